"""Experts change their homes before every step, and nothing else of training changes."""

import dataclasses

import numpy as np
import pytest

from megatron_ultraep.megatron.checkpoint import home_slot_of
from rl.training.batch import MiniBatch
from rl.training.passes import PassSettings
from rl.training.worker import SupervisedObjective
from tests.ranks import RankError
from tests.rl.training.balancing import BALANCE, biased_model
from tests.rl.training.common import make_layout, make_samples, make_worker, worst
from tests.rl.training.reordering import Run, difference, exported, merge, train

FLOAT64 = Run({"ep": 2}, steps=(0, 4))
# What scripts/check_reorder.py runs for 20 steps, on both versions of Megatron; ranks, run, bar of losses and weights.
CASES = {
    "ep2": (2, FLOAT64, 1e-7),
    "pp2xep2": (4, dataclasses.replace(FLOAT64, layout={"pp": 2, "ep": 2}), 1e-7),
    "ep2xdp2, distributed, overlapped": (
        4, dataclasses.replace(FLOAT64, dtype="float32", distributed=True, overlap=True), 1e-5,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return biased_model(tmp_path_factory.mktemp("reorder") / "m", strength=25.0)


@pytest.mark.parametrize("name", CASES)
def test_training_and_resuming_equal_stock(ranks, directory, tmp_path, name):
    """Losses and exported weights of a moving run; and of stock, and of another moving run, from its checkpoint."""
    world, run, bar = CASES[name]
    stock = merge(ranks(world).run(train, directory, run))
    moving = dataclasses.replace(run, seed=5, balance=BALANCE)
    moved = merge(ranks(world).run(train, directory, dataclasses.replace(moving, save=(1, str(tmp_path)))))
    assert moved["away"] > 0
    assert moved["waves"] > moved["moved"] / 8
    assert moved["replicas"] > 0
    assert difference(moved["losses"], stock["losses"]) <= bar
    assert worst(moved["weights"], stock["weights"]) <= bar
    later = {"steps": (2, 4), "load": str(tmp_path)}
    for again in (dataclasses.replace(run, **later), dataclasses.replace(moving, seed=6, **later)):
        resumed = merge(ranks(world).run(train, directory, again))
        assert difference(resumed["losses"], stock["losses"][2:]) <= bar
        assert worst(resumed["weights"], stock["weights"]) <= bar


def warmed_up(directory):
    """Exported weights before and after a move, and whether the reference follows an actor whose experts are away."""
    worker = make_worker(
        directory, {"ep": 2}, dtype="float64", distributed_optimizer=False, balance=BALANCE, reference=True
    )
    samples = make_samples(worker.actor.arch)
    batch = MiniBatch.make(samples, make_layout(samples, worker.spec.layout)).part(worker.groups.coordinates["dp"])
    worker.train(batch, 0, SupervisedObjective(PassSettings(chunk_tokens=64)))
    before = exported(worker)
    worker.reorder({2: (7, 6, 5, 4, 3, 2, 1, 0), 3: (1, 0, 2, 3, 4, 5, 6, 7)})
    after = exported(worker)
    worker.end_warmup()
    same = all(
        (p == q).all()
        for mine, theirs in zip(worker.actor.chunks, worker.reference.chunks, strict=True)
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True)
    )
    homes = {home_slot_of(layer) for layer in worker.balancer.layers}
    return before, after, same, homes


def test_exports_and_the_reference_are_by_logical_expert(ranks, directory):
    results = ranks(2).run(warmed_up, directory)
    before, after = ({n: t for result in results for n, t in result[i].items()} for i in (0, 1))
    assert set(before) == set(after)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert any(set(result[0]) != set(result[1]) for result in results), "no expert changed its rank"
    for _, _, same, homes in results:
        assert same
        assert homes == {tuple(range(8))}


def unbalanced(directory):
    make_worker(directory, {"ep": 2}, dtype="float64", distributed_optimizer=False).reorder({})


def test_without_balancing_it_is_refused(ranks, directory):
    with pytest.raises(RankError, match="enable balancing"):
        ranks(2).run(unbalanced, directory)
