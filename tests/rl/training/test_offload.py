"""Offloaded and brought back, a trainer goes on bit for bit as if it had not been."""

import numpy as np
import pytest
import torch

from rl.models import tiny
from rl.models.weights import export_weights
from rl.training.batch import MiniBatch
from rl.training.objectives import PolicyObjective
from rl.training.offload import PARTS, MemoryReport, Offloaded, OffloadReport, merge_reports
from rl.training.passes import PassSettings
from rl.training.worker import OptimizerSpec
from tests.rl.training.common import LOSS, make_layout, make_samples, make_worker, worst
from tests.rl.training.critics import POLICY, VALUES, critic_samples, critic_worker, part_of
from tests.rl.training.planning import BALANCE
from tests.rl.training.streaming import chunks_of, objective_of

SETTINGS = PassSettings(with_entropy=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(tiny.qwen3_moe(tmp_path_factory.mktemp("offload") / "m", seed=3))


def batch_of(worker, seed, samples=None):
    samples = samples or make_samples(worker.actor.arch, seed=seed)
    whole = MiniBatch.make(samples, make_layout(samples, worker.spec.layout), total_tokens=100)
    return whole.part(worker.groups.coordinates["dp"])


def addresses(worker):
    """Of every storage that may be offloaded."""
    return {part: [s.data_ptr() for s in found] for part, found in worker.offloader._storages().items()}


def train(directory, layout, away, spec):
    """Steps of both kinds and log-probs, with everything offloaded in between or not; all that there is afterwards."""
    worker = make_worker(directory, layout, optimizer=OptimizerSpec(lr=1e-3), reference=True, **spec)
    objective = PolicyObjective(LOSS, SETTINGS, "replay")
    reports, held, said = [], [], []

    def in_turn():
        if not away:
            return
        held.append(worker.offloader.memory().torch_allocated)
        reports.append(worker.offload())
        held.append(worker.offloader.memory().torch_allocated)
        assert all(not addresses(worker)[part] for part in PARTS)
        for call in (
            lambda: worker.train(batch_of(worker, 0), 0, objective),
            lambda: worker.accumulate(batch_of(worker, 0), 0, objective, first=True),
            lambda: worker.logprobs(batch_of(worker, 0), "actor", "eval", 0, "replay", SETTINGS),
            lambda: list(worker.export(1 << 20, torch.float32)),
            worker.end_warmup,
        ):
            try:
                call()
            except Offloaded as error:
                said.append(str(error))
        assert worker.offload().bytes == dict.fromkeys(PARTS, 0)
        weights = worker.onload(["weights"])  # engines wake while the rest is away
        assert weights.bytes == {"weights": reports[-1].bytes["weights"]}
        exported = {n: t for bucket in worker.export(1 << 20, worker.actor.dtype) for n, t in bucket.items()}
        assert all(torch.equal(exported[n], t) for n, t in export_weights(worker.actor))
        with worker.offloader.borrowed("weights"):
            pass  # they are there already, and stay
        worker.offload(["weights"])
        with worker.offloader.borrowed("weights"):
            again = {n: t for bucket in worker.export(1 << 20, worker.actor.dtype) for n, t in bucket.items()}
        assert all(not addresses(worker)[part] for part in PARTS)
        assert again.keys() == exported.keys()
        assert all(torch.equal(exported[n], t) for n, t in again.items())
        worker.onload(["weights"])
        back = worker.onload()
        assert back.bytes == reports[-1].bytes | {"weights": 0}
        assert worker.offloader.memory().torch_allocated == held[-2]

    results, logprobs = [], {}
    in_turn()  # before Adam has any state
    for step in range(3):
        if step == 1:
            for number, chunk in enumerate(chunks_of(make_samples(worker.actor.arch, seed=step), seed=4)):
                worker.accumulate(batch_of(worker, step, chunk), step, objective_of("token_mean"), first=number == 0)
            result = worker.apply(0.8)
        else:
            result = worker.train(batch_of(worker, step), step, objective)
        results.append((result.loss, result.grad_norm, result.sums))
        in_turn()
        for model in ("actor", "reference"):
            logprobs |= {
                (model, step, name): values
                for name, values in worker.logprobs(batch_of(worker, step), model, "eval", step, "replay", SETTINGS)[
                    0
                ].items()
            }
    state = {
        "weights": {n: t.double().numpy().copy() for n, t in export_weights(worker.actor)},
        "optimizer": {
            f"{i}/{kind}": tensor.double().numpy().copy()
            for i, held_of in enumerate(_held(worker))
            for kind, tensor in held_of.tensors().items()
        },
    }
    return {"results": results, "logprobs": logprobs, "reports": reports, "held": held, "said": said, **state}


def _held(worker):
    from megatron_ultraep.megatron.optimizer import held_by

    return held_by(worker.optimizer).values()


@pytest.mark.parametrize(
    ("layout", "spec"),
    [
        ({"ep": 2}, {"balance": BALANCE}),
        ({}, {"dtype": "bfloat16"}),
        pytest.param({"ep": 2}, {"dtype": "bfloat16", "distributed_optimizer": False}, marks=pytest.mark.slow),
        pytest.param({"ep": 2}, {"distributed_optimizer": False, "balance": BALANCE}, marks=pytest.mark.slow),
        pytest.param({"pp": 2, "vpp": 2}, {}, marks=pytest.mark.slow),
        pytest.param({"tp": 2, "ep": 2}, {"recompute": ("full",)}, marks=pytest.mark.slow),
    ],
    ids=["ep2 balanced", "dp2 bfloat16", "ep2 bfloat16 plain", "ep2 plain balanced", "vpp2", "tp2xep2 recomputed"],
)
def test_training_is_bitwise_the_same(ranks, directory, layout, spec):
    plain = ranks(2).run(train, directory, layout, False, spec)
    away = ranks(2).run(train, directory, layout, True, spec)
    for stock, got in zip(plain, away, strict=True):
        assert got["results"] == stock["results"]
        assert set(got["logprobs"]) == set(stock["logprobs"])
        assert all(np.array_equal(got["logprobs"][key], values) for key, values in stock["logprobs"].items())
        assert stock["optimizer"]
        for part in ("weights", "optimizer"):
            assert not stock[part] or worst(got[part], stock[part]) == 0
        assert got["held"][1::2] == [0] * 4
        first, *later = got["reports"]
        main = 2 if spec.get("dtype") == "bfloat16" else 0  # Adam's moments come with the first step
        assert (first.bytes["optimizer"] > 0) == (main > 0)
        for report in later:
            assert report.bytes["weights"] > 0
            assert report.bytes["gradients"] > 0
            assert report.bytes["optimizer"] > first.bytes["optimizer"]
            assert report.seconds > 0
        assert len(got["said"]) == 4 * 5
        assert (
            "log-probs: needs the trainer's weights on the device, but weights are offloaded: onload()"
            in got["said"][2]
        )


def test_storages_are_left_to_the_allocator_and_views_stay(ranks, directory):
    assert all(ranks(2).run(views, directory))


def views(directory):
    worker = make_worker(directory, {})
    worker.train(batch_of(worker, 0), 0, PolicyObjective(LOSS, SETTINGS, "replay"))
    parameter = next(worker.actor.chunks[0].parameters())
    buffer = worker.actor.wrapped[0].buffers[0]
    alias, before = parameter.detach().view(-1)[3:9], parameter.detach().clone()
    worker.offload(["weights"])
    assert buffer.param_data.untyped_storage().nbytes() == 0
    assert buffer.grad_data.untyped_storage().nbytes() > 0
    worker.offload(["gradients"])
    assert buffer.grad_data.untyped_storage().nbytes() == 0
    worker.onload()
    assert torch.equal(parameter, before)
    assert torch.equal(alias, before.view(-1)[3:9])
    assert parameter.data_ptr() == buffer.param_data.data_ptr() + 4 * buffer.param_index_map[parameter][0]
    assert not buffer.grad_data.any()
    parameter.main_grad.fill_(1)
    return float(buffer.grad_data.sum()) == parameter.numel()


def test_unknown_parts_are_named(ranks, directory):
    said = ranks(1).run(unknown, directory)[0]
    assert said == "expected parts among weights, gradients, optimizer, got moments"


def unknown(directory):
    worker = make_worker(directory, {})
    with pytest.raises(ValueError, match="expected parts") as error:
        worker.offload(["moments"])
    return str(error.value)


def test_reports_of_ranks_add_up():
    merged = merge_reports([OffloadReport({"weights": 3}, 0.5), OffloadReport({"weights": 4}, 0.25)])
    assert merged == OffloadReport({"weights": 7}, 0.5)


def train_both(directory, away):
    """Steps of actor and critic, with everything offloaded in between or not: losses, values, and what is held."""
    worker = critic_worker(directory, {"ep": 2}, {"pp": 2})
    samples = critic_samples(worker.actor.arch)
    found, held = [], worker.offloader.memory().torch_allocated
    for step in range(2):
        for model, objective in (("critic", VALUES), ("actor", POLICY)):
            result = worker.train(part_of(worker, model, samples), step, objective, model=model)
            found.append((result.loss, result.grad_norm, result.sums))
        if away:
            worker.offload()
            assert worker.offloader.memory().torch_allocated == 0
            with pytest.raises(Offloaded, match="values: needs the trainer's weights"):
                worker.values(part_of(worker, "critic", samples), step)
            worker.onload()
    values = worker.values(part_of(worker, "critic", samples), 2)
    return found, {name: v.tolist() for name, v in values.items()}, held


def test_a_critic_is_offloaded_with_its_actor(ranks, directory):
    plain = ranks(2).run(train_both, directory, False)
    assert ranks(2).run(train_both, directory, True) == plain
    without = ranks(2).run(held_by_an_actor, directory)
    assert all(held > 1.5 * alone for (_, _, held), alone in zip(plain, without, strict=True))


def held_by_an_actor(directory):
    return make_worker(directory, {"ep": 2}).offloader.memory().torch_allocated


def test_memory_at_the_fullest():
    """40 of 80 in use, 12 of them reserved by this rank for tensors of 10, which reserved 30 before."""
    report = MemoryReport(device_used=40, device_peak=30, torch_allocated=10, device_total=80, torch_free=40 + 12 - 10)
    assert report.most_used == (40 - 12) + 30
    assert MemoryReport(device_used=7, device_peak=9, torch_allocated=5).most_used == 7
