"""The streamed gradient equals the batch gradient, for any order of arrival and however chunks are cut."""

import numpy as np
import pytest

from megatron_ultraep.replay import layer_digests
from rl.models import tiny
from rl.models.architecture import read_architecture
from rl.training.accumulate import AccumulationError
from rl.training.batch import Counts, MiniBatch
from rl.training.worker import OptimizerSpec
from tests.rl.training.common import make_layout, make_samples, make_worker, merge, worst
from tests.rl.training.planning import BALANCE, skewed_samples
from tests.rl.training.streaming import chunks_of, objective_of, orders, steps

BAR = 1e-8


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(tiny.qwen3_moe(tmp_path_factory.mktemp("accumulate") / "m", seed=3))


def test_chunks_are_whole_groups_in_many_orders(directory):
    samples = make_samples(read_architecture(directory))
    seen = set()
    for seed in range(20):
        chunks = list(chunks_of(samples, seed))
        ids = [s.sample_id for chunk in chunks for s in chunk]
        assert sorted(ids) == sorted(s.sample_id for s in samples)
        assert all(len(chunk) % 2 == 0 for chunk in chunks)
        seen.add(tuple(tuple(s.sample_id for s in chunk) for chunk in chunks))
    assert len(seen) == 20


def assert_orders_agree(ranks, world, directory, layout, count, **spec):
    """Gradients tensor by tensor, losses, metrics and digests of every order against the mini-batch's."""
    results = ranks(world).run(orders, directory, layout, count, timeout=600.0, **spec)
    found = [merge([result[i] for result in results]) for i in range(2 + count)]
    rows = [sum(result[i]["rows"] for result in results) for i in range(2 + count)]
    whole, streamed = found[:2], found[2:]
    assert worst(whole[0]["tensors"], whole[1]["tensors"]) > 1e-3, "the two aggregations should differ"
    captured = {
        s.sample_id: layer_digests(s.routes.handle) for s in skewed_samples(read_architecture(directory), seed=0)
    }
    for i, got in enumerate(streamed):
        expected = whole[i % 2]
        assert worst(got["tensors"], expected["tensors"]) <= BAR
        assert all(np.abs(g).max() > 0 for g in got["tensors"].values())
        assert got["loss"] == pytest.approx(expected["loss"], rel=BAR)
        assert got["sums"] == pytest.approx(expected["sums"], rel=BAR)
        assert rows[2 + i] == rows[i % 2]
        assert set(got["digests"]) == set(captured)
        assert all(np.array_equal(captured[name], got["digests"][name]) for name in captured)
    return results


def test_streamed_gradient_equals_batch_gradient(ranks, directory):
    assert_orders_agree(ranks, 2, directory, {"ep": 2}, 20)


def test_streamed_gradient_with_plans_made_ahead(ranks, directory):
    results = assert_orders_agree(ranks, 2, directory, {"ep": 2}, 2, balance=BALANCE, foresight=True)
    for told in results[0]:
        assert told["balance"]["moe/imbalance_before/mean"] > told["balance"]["moe/imbalance_after/mean"]
        assert told["balance"]["moe/replicas/max"] > 0
    assert all(told["balance"] == {} for told in results[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "layout", "spec"),
    [
        (4, {"ep": 4}, {}),
        (4, {"pp": 2, "ep": 2}, {}),
        (2, {"pp": 2, "vpp": 2}, {}),
        (2, {"tp": 2, "ep": 2}, {}),
        (2, {}, {}),
        (4, {"ep": 2}, {"balance": BALANCE}),
        (4, {"pp": 2, "ep": 2}, {"balance": BALANCE, "foresight": True}),
        (2, {"ep": 2}, {"recompute": ("full",), "balance": BALANCE, "foresight": True}),
    ],
    ids=["ep4", "pp2xep2", "vpp2", "tp2xep2", "dp2", "dp2xep2 balanced", "pp2xep2 foreseen", "ep2 recomputed"],
)
def test_streamed_gradient_under_other_layouts(ranks, directory, world, layout, spec):
    assert_orders_agree(ranks, world, directory, layout, 20, **spec)


def merged_steps(results):
    weights = {}
    for result in results:
        weights |= result["weights"]
    assert all(result["norms"] == results[0]["norms"] for result in results)
    return np.sum([r["losses"] for r in results], axis=0), np.array(results[0]["norms"]), weights


@pytest.mark.parametrize(
    ("world", "layout", "spec"),
    [
        (2, {}, {}),
        pytest.param(4, {"ep": 2}, {"balance": BALANCE}, marks=pytest.mark.slow),
        pytest.param(2, {"ep": 2}, {"dtype": "bfloat16"}, marks=pytest.mark.slow),
    ],
    ids=["dp2", "dp2xep2 balanced", "ep2 bfloat16"],
)
def test_steps_of_the_distributed_optimizer_are_within_noise(ranks, directory, world, layout, spec):
    """Beside the noise of other micro-batches, which stock training has, too."""
    stock, other, streamed = (
        merged_steps(ranks(world).run(steps, directory, layout, 3, how, **spec))
        for how in ("stock", "shuffled", "streamed")
    )

    def apart(a, b):
        # Adam turns rounding of gradients near zero into whole steps of single elements: all elements together count.
        change = sum(float(np.square(a[2][n] - b[2][n]).sum()) for n in b[2]) ** 0.5
        return np.abs(a[0] - b[0]).max(), (np.abs(a[1] - b[1]) / b[1]).max(), change

    noise, found = apart(other, stock), apart(streamed, stock)
    assert min(noise) > 0
    assert all(f <= 5 * n for f, n in zip(found, noise, strict=True)), (found, noise)


def wrong_calls(directory):
    """What each misuse says, and that training is as if it had not been."""
    clip = OptimizerSpec(lr=1e-3, clip_grad=0.0)
    worker = make_worker(directory, {}, dtype="float64", distributed_optimizer=False, optimizer=clip)
    samples = make_samples(worker.actor.arch)
    batch = MiniBatch.make(samples, make_layout(samples, worker.spec.layout))
    objective = objective_of("token_mean")
    said = []

    def says(call, *args, **kwargs):
        try:
            call(*args, **kwargs)
        except (AccumulationError, ValueError) as error:
            said.append(str(error))

    says(worker.apply, 1.0)
    says(worker.accumulate, batch, 0, objective, first=False)
    worker.accumulate(batch, 0, objective, first=True)
    says(worker.accumulate, batch, 0, objective, first=True)
    says(worker.accumulate, batch, 1, objective, first=False)
    says(worker.apply, 0.0)
    says(worker.train, batch, 0, objective)
    says(worker.offload)
    worker.discard()
    empty = all(not buffer.grad_data.any() for chunk in worker.actor.wrapped for buffer in chunk.buffers)
    says(worker.apply, 1.0)
    worker.accumulate(batch, 0, objective, first=True)
    broken = MiniBatch.make(samples, make_layout(samples[:3], worker.spec.layout))
    object.__setattr__(broken, "samples", {})
    failed = False
    try:
        worker.accumulate(broken, 0, objective, first=False)
    except KeyError:
        failed = True
    says(worker.accumulate, batch, 0, objective, first=False)
    worker.accumulate(batch, 0, objective, first=True)
    result = worker.apply(1.0)
    again = make_worker(directory, {}, dtype="float64", distributed_optimizer=False, optimizer=clip)
    return said, empty, failed, result.loss, again.train(batch, 0, objective).loss


def test_wrong_calls_are_named_and_leave_nothing(ranks, directory):
    [(said, empty, failed, loss, stock)] = ranks(1).run(wrong_calls, directory)
    expected = [
        "no gradients to apply: accumulate",
        "begin with first=True",
        "apply() the open set, or discard() it",
        "expected a chunk of step 0, whose set is open, got one of step 1",
        "expected a scale that is a positive number, got 0.0",
        "a mini-batch would empty the gradients of the set that is open",
        "offloading would empty the gradients of the set that is open",
        "no gradients to apply: accumulate",
        "begin with first=True",
    ]
    assert len(said) == len(expected)
    assert all(part in message for part, message in zip(expected, said, strict=True)), said
    assert empty
    assert failed
    assert loss == stock


def test_overlapped_reduction_is_refused(ranks, directory):
    assert "set overlap of its TrainerSpec to false" in ranks(1).run(overlapped, directory)[0]


def overlapped(directory):
    worker = make_worker(directory, {}, overlap=True)
    samples = make_samples(worker.actor.arch)
    batch = MiniBatch.make(samples, make_layout(samples, worker.spec.layout))
    with pytest.raises(AccumulationError) as error:
        worker.accumulate(batch, 0, objective_of("token_mean"), first=True)
    return str(error.value)


def test_scale_is_estimate_over_truth():
    estimate, true = Counts(100, 10), Counts(80, 20)
    assert estimate.scale("token_mean", true) == 1.25
    assert estimate.scale("sequence_mean", true) == 0.5
    assert Counts(100, 10).scale("token_mean", Counts()) == 100
    with pytest.raises(ValueError, match="expected the aggregation token_mean or sequence_mean, got 'mean'"):
        estimate.scale("mean", true)
