"""A run that is saved and loaded goes on as if nothing had happened, under the same and under another layout."""

from unittest import mock

import numpy as np
import psutil
import pytest
import torch

from rl.models import tiny
from rl.models.attention import RMSNorm
from rl.models.weights import export_weights
from rl.training import checkpoint
from rl.training.batch import MiniBatch
from rl.training.passes import PassSettings
from rl.training.worker import OptimizerSpec, PolicyObjective
from tests.ranks import RankError
from tests.rl.training.common import LOSS, make_layout, make_samples, make_worker, worst
from tests.rl.training.critics import POLICY, VALUES, critic_samples, critic_worker, part_of

OPTIMIZER = OptimizerSpec(lr=1e-3, warmup_steps=1, schedule="cosine", decay_steps=10, weight_decay=0.1)


def train(directory, layout, steps, *, save=None, load=None, distributed=True, **spec):
    """Weights in logical order after the given steps."""
    worker = make_worker(directory, layout, optimizer=OPTIMIZER, distributed_optimizer=distributed, **spec)
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
    return {n: t.float().numpy().copy() for n, t in export_weights(worker.actor)}, lrs


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


def test_tied_embeddings_of_a_pipeline(ranks, tmp_path):
    tied = str(tiny.qwen3_moe(tmp_path / "m", seed=3, layers=2, tie_word_embeddings=True))
    path = tmp_path / "c"
    path.mkdir()
    whole, _ = merged(ranks(2).run(train, tied, {"pp": 2}, range(3)))
    ranks(2).run(train, tied, {"pp": 2}, range(2), save=(1, str(path)))
    for layout, world in (({"pp": 2}, 2), ({}, 1)):
        resumed, _ = merged(ranks(world).run(train, tied, layout, range(2, 3), load=str(path)))
        assert worst(resumed, whole) <= (0 if world == 2 else 1e-4)


def test_stages_of_unequal_length(ranks, tmp_path):
    """Five layers: three and two of them on two stages; two, two and one on three."""
    odd = str(tiny.qwen3_moe(tmp_path / "m", seed=3, layers=5, mlp_only_layers=[1]))
    path = tmp_path / "c"
    path.mkdir()
    whole, _ = merged(ranks(1).run(train, odd, {}, range(3)))
    ranks(2).run(train, odd, {"pp": 2}, range(2), save=(1, str(path)))
    for layout, world in (({"pp": 2}, 2), ({"pp": 3}, 3), ({}, 1)):
        resumed, _ = merged(ranks(world).run(train, odd, layout, range(2, 3), load=str(path)))
        assert worst(resumed, whole) <= 1e-4


NARROW, WIDE = ({"dtype": "bfloat16", "float32_residual": wide} for wide in (False, True))


def train_with_more_state(*arguments, **options):
    """As with Transformer Engine, whose norms have a state for fp8."""
    state = {"get_extra_state": lambda norm: torch.empty(0), "set_extra_state": lambda norm, given: None}
    with mock.patch.multiple(RMSNorm, create=True, **state):
        return train(*arguments, **options)


def test_a_float32_stream_may_begin_and_end(ranks, directory, tmp_path):
    """Its norms are other modules than those of a narrow one, in checkpoints they are the same."""
    kinds = {"wide": (train, WIDE), "narrow": (train_with_more_state, NARROW)}
    saved = {}
    for name, (function, spec) in kinds.items():
        (tmp_path / name).mkdir()
        save = (1, str(tmp_path / name))
        saved[name], _ = merged(ranks(2).run(function, directory, {"ep": 2}, range(2), save=save, **spec))
    for before, after in (("wide", "wide"), ("wide", "narrow"), ("narrow", "wide")):
        function, spec = kinds[after]
        loaded, _ = merged(ranks(2).run(function, directory, {"ep": 2}, [], load=str(tmp_path / before), **spec))
        assert worst(loaded, saved[before]) == 0
    whole, lrs = merged(ranks(2).run(train, directory, {"ep": 2}, range(3), **WIDE))
    for before, most in (("wide", 0), ("narrow", 0.005)):
        load = str(tmp_path / before)
        resumed, later = merged(ranks(2).run(train, directory, {"ep": 2}, range(2, 3), load=load, **WIDE))
        assert later == lrs[2:]
        assert max(np.abs(resumed[name] - whole[name]).max() for name in whole) <= most


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


def train_both(directory, layout, critic, steps, *, save=None, load=None):
    """Weights of actor and critic in logical order after the given steps; ``critic`` None: there is none."""
    worker = critic_worker(directory, layout, critic) if critic is not None else make_worker(directory, layout)
    if load:
        checkpoint.load(worker, load)
    lrs = []
    for step in steps:
        samples = critic_samples(worker.actor.arch, seed=step)
        for model, objective in (("critic", VALUES), ("actor", POLICY)):
            if model in worker.trained:
                result = worker.train(part_of(worker, model, samples), step, objective, model=model)
                lrs.append(result.lr)
        if save and step == save[0]:
            checkpoint.save(worker, save[1])
    weights = {}
    for name, trained in worker.trained.items():
        weights |= {f"{name} {n}": t.numpy().copy() for n, t in export_weights(trained.model)}
    return weights, lrs


@pytest.mark.parametrize("then", [(2, {"ep": 2}, {"pp": 2}), (4, {"ep": 2}, {"tp": 2, "pp": 2, "etp": 2})], ids=str)
def test_a_critic_resumes_with_its_actor(ranks, directory, tmp_path, then):
    first = (2, {"ep": 2}, {"pp": 2})
    whole, lrs = merged(ranks(2).run(train_both, directory, *first[1:], range(3)))
    ranks(2).run(train_both, directory, *first[1:], range(2), save=(1, str(tmp_path)))
    resumed, later = merged(ranks(then[0]).run(train_both, directory, *then[1:], range(2, 3), load=str(tmp_path)))
    assert "critic score.weight" in resumed
    assert later == lrs[4:]
    assert worst(resumed, whole) <= (0 if first == then else 1e-3)


def test_checkpoints_with_and_without_a_critic_are_told_apart(ranks, directory, tmp_path):
    with_critic, without = tmp_path / "with", tmp_path / "without"
    with_critic.mkdir()
    without.mkdir()
    ranks(1).run(train_both, directory, {}, {}, range(1), save=(0, str(with_critic)))
    ranks(1).run(train_both, directory, {}, None, range(1), save=(0, str(without)))
    with pytest.raises(RankError, match="holds no critic, and this run trains one"):
        ranks(1).run(train_both, directory, {}, {}, range(1), load=str(without))
    with pytest.raises(RankError, match="holds a critic, and this run has none"):
        ranks(1).run(train_both, directory, {}, None, range(1), load=str(with_critic))
