"""A run that is saved and loaded goes on as if nothing had happened, under the same and under another layout."""

from unittest import mock

import psutil
import pytest

from rl.models import tiny
from rl.models.weights import export_weights
from rl.training import checkpoint
from rl.training.batch import MiniBatch
from rl.training.passes import PassSettings
from rl.training.worker import OptimizerSpec, PolicyObjective
from tests.ranks import RankError
from tests.rl.training.common import LOSS, make_layout, make_samples, make_worker, worst

OPTIMIZER = OptimizerSpec(lr=1e-3, warmup_steps=1, schedule="cosine", decay_steps=10, weight_decay=0.1)


def train(directory, layout, steps, *, save=None, load=None, distributed=True):
    """Weights in logical order after the given steps."""
    worker = make_worker(directory, layout, optimizer=OPTIMIZER, distributed_optimizer=distributed)
    if load:
        checkpoint.load(worker, load)
    lrs = []
    for step in steps:
        samples = make_samples(worker.actor.arch, seed=step)
        batch = MiniBatch.make(samples, make_layout(samples, worker.spec.layout)).part(worker.groups.coordinates["dp"])
        result = worker.train(batch, step, PolicyObjective(LOSS, PassSettings(with_entropy=True)))
        lrs.append(result.lr)
        if save and step == save[0]:
            # A rank that is killed must not leave a process behind: a fork of it would hold its connections open.
            with mock.patch("os.fork", side_effect=AssertionError("a rank forked to write its files")):
                checkpoint.save(worker, save[1])
            assert not psutil.Process().children(), psutil.Process().children()
    return {n: t.numpy().copy() for n, t in export_weights(worker.actor)}, lrs


def merged(results):
    tensors = {}
    for weights, _ in results:
        tensors |= weights
    return tensors, results[0][1]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(tiny.qwen3_moe(tmp_path_factory.mktemp("checkpoint") / "m", seed=3))


@pytest.mark.parametrize(
    ("first", "then", "distributed"),
    [
        ((2, {"ep": 2}), (2, {"ep": 2}), True),
        ((2, {"ep": 2}), (2, {"ep": 2}), False),
        ((2, {"pp": 2, "vpp": 2}), (2, {"pp": 2, "vpp": 2}), True),
        ((2, {"pp": 2, "vpp": 2}), (2, {"pp": 2, "vpp": 2}), False),
        # Under another layout the plain optimizer is refused: see test_refusals.
        ((2, {"ep": 2}), (4, {"pp": 2, "ep": 2}), True),
        ((2, {"pp": 2}), (1, {}), True),
    ],
    ids=["ep2", "ep2 plain", "vpp", "vpp plain", "ep2->pp2ep2", "pp2->one"],
)
def test_resume_is_exact(ranks, directory, tmp_path, first, then, distributed):
    whole, lrs = merged(ranks(first[0]).run(train, directory, first[1], range(4), distributed=distributed))
    path = tmp_path / "c"
    path.mkdir()
    ranks(first[0]).run(train, directory, first[1], range(2), save=(1, str(path)), distributed=distributed)
    resumed, later = merged(
        ranks(then[0]).run(train, directory, then[1], range(2, 4), load=str(path), distributed=distributed)
    )
    assert later == lrs[2:]
    assert worst(resumed, whole) <= (0 if first == then else 1e-4)


@pytest.mark.parametrize(
    ("then", "distributed", "message"),
    [((1, {}), True, "keep ep"), ((2, {"ep": 2}), False, "set trainer.distributed_optimizer as it was")],
)
def test_refusals(ranks, directory, tmp_path, then, distributed, message):
    ranks(2).run(train, directory, {"ep": 2}, range(1), save=(0, str(tmp_path)))
    with pytest.raises(RankError, match=message):
        ranks(then[0]).run(train, directory, then[1], range(1, 2), load=str(tmp_path), distributed=distributed)


def test_publish_keeps_the_newest_and_removes_leftovers(tmp_path):
    for step in (1, 2, 3):
        partial = checkpoint.begin(tmp_path, step)
        (partial / "data").write_text(str(step))
        checkpoint.publish(partial, {"step": step}, keep=2)
    checkpoint.begin(tmp_path, 4)  # and dies
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step_00000002", "step_00000003"]
    assert checkpoint.loop_state(checkpoint.complete(tmp_path)[-1]) == {"step": 3}
    checkpoint.begin(tmp_path, 5)
    assert not (tmp_path / "step_00000004.partial").exists()


def test_distributed_and_plain_optimizer_agree(ranks, directory):
    one, _ = merged(ranks(2).run(train, directory, {"ep": 2}, range(3), distributed=True))
    other, _ = merged(ranks(2).run(train, directory, {"ep": 2}, range(3), distributed=False))
    assert worst(one, other) <= 1e-4
