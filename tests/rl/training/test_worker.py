"""Optimizer steps of one worker: supervised loss, warm-up and its end, weights in buckets."""

import numpy as np
import pytest
import torch

from rl.models import tiny
from rl.models.architecture import read_architecture
from rl.models.weights import export_weights
from rl.training.batch import MiniBatch
from rl.training.passes import PassSettings
from rl.training.worker import OptimizerSpec, PolicyObjective, SupervisedObjective
from tests.ranks import RankError
from tests.rl.training.common import LOSS, make_layout, make_samples, make_worker, merge, worst

SCHEDULE = OptimizerSpec(lr=1e-3, min_lr=1e-4, warmup_steps=2, schedule="cosine", decay_steps=6, weight_decay=0.1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(tiny.qwen3_moe(tmp_path_factory.mktemp("worker") / "m", seed=3))


def weights(model):
    return {name: t.numpy().copy() for name, t in export_weights(model)}


def batch_of(worker, seed=0):
    samples = make_samples(worker.actor.arch, seed=seed)
    whole = MiniBatch.make(samples, make_layout(samples, worker.spec.layout))
    return whole.part(worker.groups.coordinates["dp"])


def supervised(directory, layout):
    worker = make_worker(directory, layout, dtype="float64", distributed_optimizer=False)
    batch = batch_of(worker)
    loss, sums, report = worker.gradients(batch, 0, SupervisedObjective())
    tensors = {n: t.numpy().copy() for n, t in export_weights(worker.actor, source="main_grad")}
    return {"loss": loss, "sums": sums, "tensors": tensors, "digests": report.digests}


def by_transformers(directory):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, experts_implementation="eager")
    total, tokens = 0.0, 0
    for s in make_samples(read_architecture(directory)):
        ids = torch.from_numpy(s.tokens).long()
        logprobs = torch.log_softmax(model(ids[None, :-1]).logits[0], -1).gather(1, ids[1:, None])[:, 0]
        total = total - logprobs[torch.from_numpy(s.loss_mask[1:])].sum()
        tokens += int(s.loss_mask.sum())
    loss = total / tokens
    loss.backward()
    return float(loss.detach()), {n: p.grad.numpy() for n, p in model.named_parameters()}


@pytest.mark.parametrize(("world", "layout"), [(1, {}), (2, {"ep": 2}), (4, {"tp": 2, "pp": 2, "ep": 2})])
def test_supervised_loss_and_gradients_equal_those_of_transformers(ranks, directory, world, layout):
    got = merge(ranks(world).run(supervised, directory, layout))
    loss, gradients = by_transformers(directory)
    assert abs(got["loss"] - loss) <= 1e-6  # transformers computes softmax of routers in float32
    tokens = sum(int(s.loss_mask.sum()) for s in make_samples(read_architecture(directory)))
    assert got["sums"]["nll"] == pytest.approx(got["loss"] * tokens)
    assert got["digests"] == {}
    shared = {n: g for n, g in got["tensors"].items() if n in gradients}  # transformers fuses experts
    assert len(shared) > 30
    assert worst(shared, {n: gradients[n] for n in shared}) <= 1e-5
    for name, gradient in gradients.items():
        if name.endswith("experts.down_proj"):
            ours = np.stack([got["tensors"][name.replace("down_proj", f"{e}.down_proj.weight")] for e in range(8)])
            assert np.abs(ours - gradient).max() <= 1e-5 * np.abs(gradient).max()


def warm_up_then_train(directory, layout, warmup, spec):
    """Warm up on supervised pairs, end it, then two policy steps; what is left of the warm-up is its weights."""
    worker = make_worker(directory, layout, optimizer=SCHEDULE, reference=True, **spec)
    for step in range(warmup):
        result = worker.train(batch_of(worker, seed=10 + step), step, SupervisedObjective(), lr=3e-3)
        assert result.lr == 3e-3
    warm = weights(worker.actor)
    worker.end_warmup()
    lrs, losses = [], []
    for step in range(3):
        objective = PolicyObjective(LOSS, PassSettings(with_entropy=True))
        result = worker.train(batch_of(worker, seed=step), step, objective)
        lrs.append(result.lr)
        losses.append(result.loss)
    return {
        "warm": warm,
        "reference": weights(worker.reference),
        "end": weights(worker.actor),
        "lrs": lrs,
        "updated": result.updated,
        "grad_norm": result.grad_norm,
        "seconds": sorted(result.seconds),
    }


def joined(results, field):
    tensors = {}
    for r in results:
        tensors |= r[field]
    return tensors


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed", "plain"])
def test_the_end_of_the_warmup_leaves_its_weights_and_nothing_else(ranks, directory, tmp_path, distributed):
    spec = {"distributed_optimizer": distributed}
    warmed = ranks(2).run(warm_up_then_train, directory, {"ep": 2}, 3, spec)
    warm = joined(warmed, "warm")
    assert worst(joined(warmed, "reference"), warm) == 0
    # A worker that starts from the warm weights, and never saw the warm-up.
    fresh = ranks(2).run(start_from, directory, warm, spec)
    assert worst(joined(fresh, "warm"), warm) == 0
    assert worst(joined(warmed, "end"), joined(fresh, "end")) == 0
    assert worst(joined(warmed, "end"), warm) > 0
    assert warmed[0]["lrs"] == fresh[0]["lrs"]
    assert len(set(warmed[0]["lrs"])) == 3
    assert warmed[0]["updated"]
    assert warmed[0]["grad_norm"] == warmed[1]["grad_norm"] > 0
    assert warmed[0]["seconds"] == ["forward_backward", "optimizer"]


def start_from(directory, warm, spec):
    import shutil
    import tempfile
    from pathlib import Path

    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "m"
        shutil.copytree(directory, path)
        save_file({n: torch.from_numpy(w) for n, w in warm.items()}, path / "model.safetensors")
        return warm_up_then_train(str(path), {"ep": 2}, 0, spec)


def in_buckets(directory, layout, size, dtype):
    worker = make_worker(directory, layout)
    buckets = list(worker.export(size, getattr(torch, dtype)))
    own = {name: tensor.to(getattr(torch, dtype), copy=True) for name, tensor in export_weights(worker.actor)}
    before = {name: tensor.clone() for bucket in buckets for name, tensor in bucket.items()}
    worker.train(batch_of(worker), 0, PolicyObjective(LOSS, PassSettings(with_entropy=True)))
    kept = all(torch.equal(before[n], t) for bucket in buckets for n, t in bucket.items())
    same = set(own) == set(before) and all(torch.equal(own[n], before[n]) for n in own)
    sizes = [sum(t.nbytes for t in bucket.values()) for bucket in buckets]
    largest = max(t.nbytes for t in before.values()) if before else 0
    return same, kept, sizes, largest, sorted(own)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_leave_in_buckets_as_copies(ranks, directory, dtype):
    answers = ranks(4).run(in_buckets, directory, {"tp": 2, "pp": 2, "ep": 2}, 60_000, dtype)
    names = [name for *_, own in answers for name in own]
    assert sorted(names) == tiny.tensor_names(directory)
    for same, kept, sizes, largest, _ in answers:
        assert same
        assert kept, "training changed tensors that were handed out"
        assert all(60_000 <= size < 60_000 + 2 * largest for size in sizes[:-1])


def policy_step(directory, dtype, recompute=None):
    worker = make_worker(directory, {"ep": 2}, dtype=dtype, recompute=recompute)
    result = worker.train(batch_of(worker), 0, PolicyObjective(LOSS, PassSettings(with_entropy=True)))
    return result.loss, result.sums, result.grad_norm, weights_as_float(worker)


def weights_as_float(worker):
    return {name: t.float().numpy().copy() for name, t in export_weights(worker.actor)}


def test_bfloat16_is_near_float32(ranks, directory):
    full = ranks(2).run(policy_step, directory, "float32")
    half = ranks(2).run(policy_step, directory, "bfloat16")
    assert sum(r[0] for r in half) == pytest.approx(sum(r[0] for r in full), abs=0.02, rel=0.05)
    assert half[0][2] == pytest.approx(full[0][2], rel=0.1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"dtype": "float64"}, "distributed optimizer takes no float64: set distributed_optimizer to false"),
        (
            {"dtype": "float64", "distributed_optimizer": False, "optimizer": OptimizerSpec(clip_grad=1.0)},
            "Megatron clips no float64 gradients: set optimizer.clip_grad to 0",
        ),
    ],
)
def test_what_megatron_does_not_do_is_refused(ranks, directory, spec, message):
    with pytest.raises(RankError, match=message):
        ranks(1).run(start, directory, spec)


def start(directory, spec):
    make_worker(directory, {}, **spec)


def test_policy_samples_need_advantages(ranks, directory):
    with pytest.raises(RankError, match="expected advantages of every sample of a policy mini-batch, got none"):
        ranks(1).run(without_advantages, directory)


def without_advantages(directory):
    import dataclasses

    worker = make_worker(directory, {})
    samples = [dataclasses.replace(s, advantages=None) for s in make_samples(worker.actor.arch)]
    batch = MiniBatch.make(samples, make_layout(samples, worker.spec.layout))
    worker.gradients(batch, 0, PolicyObjective(LOSS, PassSettings(with_entropy=True)))
