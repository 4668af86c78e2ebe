"""Actor and critic in one worker: gradients of each are those of one rank, whatever their layouts."""

import numpy as np
import pytest

from rl.models import tiny
from rl.models.architecture import read_architecture
from rl.training.accumulate import AccumulationError
from rl.training.objectives import ValueObjective
from tests.ranks import RankError
from tests.rl.training.common import merge, worst
from tests.rl.training.critics import (
    VALUES,
    both_gradients,
    critic_samples,
    critic_worker,
    part_of,
    with_head,
)
from tests.rl.training.planning import BALANCE

FP64 = {"dtype": "float64"}
LAYOUTS = {
    # world, actor, critic, spec
    "actor ep2, critic pp2": (2, {"ep": 2}, {"pp": 2}, {}),
    "actor pp2, critic tp2xep2": (2, {"pp": 2}, {"tp": 2, "ep": 2}, {}),
    "both ep2, balanced": (2, {"ep": 2}, {"ep": 2}, {"balance": BALANCE}),
    "actor dp2, critic ep2, recompute": (2, {}, {"ep": 2}, {"recompute": ("full",)}),
    "actor pp2xep2, critic tp2xpp2xep2": (4, {"pp": 2, "ep": 2}, {"tp": 2, "pp": 2, "ep": 2}, {}),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    # Tied, so that a critic that tied its head to the embedding would show.
    path = tiny.qwen3_moe(tmp_path_factory.mktemp("critic") / "m", seed=3, layers=2, tie_word_embeddings=True)
    return with_head(path)


@pytest.fixture(scope="module")
def alone(ranks, directory):
    return gathered(ranks(1).run(both_gradients, directory, {}, {}, **FP64))


def gathered(results):
    values = {}
    for result in results:
        assert not set(values) & set(result["values"]), "a sample came from two ranks"
        values |= result["values"]
    return {name: merge([r[name] for r in results]) for name in ("actor", "critic")} | {"values": values}


@pytest.mark.parametrize("case", LAYOUTS)
def test_gradients_and_values_equal_one_rank(ranks, directory, alone, case):
    world, actor, critic, spec = LAYOUTS[case]
    results = ranks(world).run(both_gradients, directory, actor, critic, **FP64, **spec)
    got = gathered(results)
    for name in ("actor", "critic"):
        assert got[name]["loss"] == pytest.approx(alone[name]["loss"], abs=1e-9)
        assert worst(got[name]["tensors"], alone[name]["tensors"]) <= 1e-8
        assert got[name]["sums"] == pytest.approx(alone[name]["sums"], abs=1e-6)
    assert set(got["values"]) == {s.sample_id for s in critic_samples(read_architecture(directory))}
    assert worst(got["values"], alone["values"]) <= 1e-9
    if "balance" in spec:
        for name in ("actor", "critic"):
            assert results[0][f"{name} balance"]["moe/replicas/mean"] > 0, f"the {name} was not balanced"


def test_every_parameter_of_the_critic_learns(alone):
    tensors = alone["critic"]["tensors"]
    assert tensors["score.weight"].shape == (1, 64)
    assert "lm_head.weight" not in tensors
    assert all(np.abs(t).max() > 0 for t in tensors.values())
    assert alone["critic"]["digests"] == {}, "the critic replayed the actor's routes"
    assert set(alone["critic"]["sums"]) == {"loss_sum", "clipfrac", "abs_error"}


def steps(directory, layout, critic, chunks):
    """Loss of the critic, step by step; its steps in one mini-batch or in chunks."""
    worker = critic_worker(directory, layout, critic)
    samples = critic_samples(worker.actor.arch)
    losses = []
    for step in range(4):
        if chunks:
            halves = samples[::2], samples[1::2]
            for i, half in enumerate(halves):
                batch = part_of(worker, "critic", half)
                batch = type(batch)(batch.layout, batch.samples, total_tokens=100, total_sequences=100)
                worker.accumulate(batch, step, VALUES, first=i == 0, model="critic")
            with pytest.raises(AccumulationError):
                worker.gradients(part_of(worker, "critic", samples), step, VALUES, model="critic")
            tokens = sum(int(s.loss_mask.sum()) for s in samples)
            result = worker.apply(100 / tokens, model="critic")
        else:
            result = worker.train(part_of(worker, "critic", samples), step, VALUES, model="critic")
        losses.append(result.loss)
    return losses


def test_the_critic_learns_in_mini_batches_and_in_chunks(ranks, directory):
    whole = np.sum(ranks(2).run(steps, directory, {"ep": 2}, {"pp": 2}, False), axis=0)
    chunked = np.sum(ranks(2).run(steps, directory, {"ep": 2}, {"pp": 2}, True), axis=0)
    assert whole[-1] < whole[0]
    assert np.abs(whole - chunked).max() <= 1e-3 * whole[0]


def train_what_is_not_there(directory, how):
    from tests.rl.training.common import make_worker

    worker = make_worker(directory, {})
    samples = critic_samples(worker.actor.arch)
    if how == "values":
        worker.values(part_of(worker, "actor", samples), 0)
    else:
        worker.train(part_of(worker, "actor", samples), 0, ValueObjective(), model="critic")


@pytest.mark.parametrize(
    ("how", "message"),
    [("values", "expected a trainer with a critic, got actor"), ("train", "that trains a critic, got actor")],
)
def test_without_a_critic(ranks, directory, how, message):
    with pytest.raises(RankError, match=message):
        ranks(1).run(train_what_is_not_there, directory, how)


def end_warmup(directory, layout, critic, reference, dtype):
    """What reference and critic are after the actor has learnt: weights in logical order."""
    import torch.distributed as dist

    from megatron_ultraep.megatron.groups import ParallelLayout
    from rl.models.weights import export_weights
    from rl.training.worker import SupervisedObjective

    own = ParallelLayout(world=dist.get_world_size(), **reference)
    worker = critic_worker(directory, layout, critic, reference=True, reference_layout=own, dtype=dtype)
    samples = critic_samples(worker.actor.arch)
    worker.train(part_of(worker, "actor", samples), 0, SupervisedObjective(), lr=3e-3)
    before = {n: t.float().numpy().copy() for n, t in export_weights(worker.critic)}
    worker.end_warmup()
    # A step of rate 0 shows what the optimizer holds of the weights.
    worker.train(part_of(worker, "critic", samples), 0, VALUES, model="critic", lr=0.0)
    found = {"before": before}
    for name, model in (("actor", worker.actor), ("reference", worker.reference), ("critic", worker.critic)):
        found[name] = {n: t.float().numpy().copy() for n, t in export_weights(model)}
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reference_and_critic_take_the_warm_weights_under_layouts_of_their_own(ranks, directory, dtype):
    results = ranks(2).run(end_warmup, directory, {"ep": 2}, {"pp": 2}, {"tp": 2, "ep": 2}, dtype)
    found = {name: {n: t for r in results for n, t in r[name].items()} for name in results[0]}
    assert worst(found["reference"], found["actor"]) == 0
    head = found["critic"].pop("score.weight")
    assert np.array_equal(head, found["before"].pop("score.weight"))
    assert worst(found["critic"], found["actor"]) == 0
    assert worst(found["critic"], found["before"]) > 0


def scores(directory, samples, layout):
    """What a reward model under a layout of its own says of whole samples, beside an actor."""
    import torch.distributed as dist

    from megatron_ultraep.megatron.groups import ParallelLayout
    from rl.orchestration.critic import scored_sample
    from rl.training.spec import ScorerSpec
    from tests.rl.training.common import make_worker

    own = ParallelLayout(world=dist.get_world_size(), **layout)
    worker = make_worker(directory, {"ep": 2}, scorer=ScorerSpec(directory, own))
    batch = part_of(worker, "scorer", [scored_sample(sample) for sample in samples])
    return {name: float(values[-1]) for name, values in worker.values(batch, 0, model="scorer").items()}


def test_scores_are_those_of_sequence_classification(ranks, directory):
    import torch
    from transformers import AutoModelForSequenceClassification

    from rl.types import Prompt, Sample

    rng, samples = np.random.default_rng(5), []
    for i, length in enumerate((9, 14, 30)):
        tokens = rng.integers(3, 250, length).astype(np.int32)
        prompt = Prompt(f"p{i}", i, 0, "", tokens[:4])
        zeros = np.zeros(length - 4, np.float32)
        samples.append(Sample(f"s{i}", prompt, tokens[4:], zeros, ((0, 1),), "stop", None, None))
    got = {}
    for found in ranks(2).run(scores, directory, samples, {"pp": 2}):
        got |= found
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = {s.sample_id: float(model(torch.from_numpy(s.tokens).long()[None]).logits) for s in samples}
    assert got == pytest.approx(expected, abs=1e-4)
