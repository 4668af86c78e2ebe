"""Gradients of two models from one fused schedule are those of the two trained one after the other."""

import numpy as np
import pytest
import torch

from megatron_ultraep.megatron import compat, cpu
from megatron_ultraep.megatron.groups import ParallelLayout, create_groups
from megatron_ultraep.pipeline.agreement import ScheduleMismatch
from megatron_ultraep.pipeline.stage import StageWork
from rl.models import tiny
from rl.training.checkpoint import load, save
from tests.megatron_ultraep.pipeline.fused_models import Fused, fused_gradients, trained_weights
from tests.ranks import RankError
from tests.rl.training.common import merge, worst
from tests.rl.training.critics import both_gradients, with_head
from tests.rl.training.planning import BALANCE

FP64 = {"dtype": "float64"}
TOLERANCE = 1e-8
PP2, PP4 = {"pp": 2}, {"pp": 4}
REVERSED2, REVERSED4 = {"pp": 2, "placement": ((1, 0),)}, {"pp": 4, "placement": ((3, 2, 1, 0),)}
HALF2, HALF4 = {"pp": 1, "placement": ((0,), (1,))}, {"pp": 2, "placement": ((1, 0), (3, 2))}
EP2 = {"ep": 2}
CASES = {
    # ranks, actor, critic, schedule (seed of a random one), spec
    "pp2": (2, PP2, REVERSED2, 1, {}),
    "pp2, critic on one stage": (2, PP2, HALF2, 2, {"recompute": ("full",)}),
    "pp4, critic of half the stages": (4, PP4, HALF4, 3, {}),
    "pp2xep2, balanced": (4, PP2 | EP2, REVERSED2 | EP2, 4, {"balance": BALANCE}),
}
SLOW = {
    "pp2, selective recomputation": (2, PP2, REVERSED2, 5, {"recompute": ("selective", ("moe", "layernorm"))}),
    "pp4": (4, PP4, REVERSED4, 6, {}),
    "pp4, concatenated": (4, PP4, HALF4, "concatenated", {"recompute": ("full",)}),
    "pp4, critics of one stage": (4, PP4, {"pp": 1, "placement": ((2,), (0,), (3,), (1,))}, 7, {}),
    "pp4, same direction": (4, PP4, PP4, 8, {}),
    "pp2xep2, balanced, recompute": (4, PP2 | EP2, HALF2 | EP2, 9, {"balance": BALANCE, "recompute": ("full",)}),
    "pp2xtp2": (4, {"tp": 2, "pp": 2, "etp": 2}, {"tp": 2, "etp": 2} | REVERSED2, 10, {}),
    "pp2xdp2": (4, PP2, REVERSED2, 11, {}),
    "pp4xep2, half the stages": (8, PP4 | EP2, HALF4 | EP2, 12, {"balance": BALANCE}),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tiny.qwen3_moe(tmp_path_factory.mktemp("fused") / "m", seed=3, layers=4, tie_word_embeddings=True)
    return with_head(path)


@pytest.fixture(scope="module")
def stock(ranks, directory):
    """Both models trained one after the other by Megatron's own schedules, on ranks in their usual order."""
    return together(ranks(2).run(both_gradients, directory, PP2, PP2, **FP64))


def together(results, models=("actor", "critic")):
    return {name: merge([r[name] for r in results]) for name in models}


def check(ranks, directory, stock, case):
    world, actor, critic, kind, spec = case
    results = ranks(world).run(fused_gradients, directory, actor, critic, kind, **FP64, **spec)
    fused = together(results)
    for name, expected in stock.items():
        assert fused[name]["loss"] == pytest.approx(expected["loss"], abs=1e-9)
        assert worst(fused[name]["tensors"], expected["tensors"]) <= TOLERANCE
        for metric, value in expected["sums"].items():
            assert fused[name]["sums"][metric] == pytest.approx(value, rel=1e-9, abs=1e-9)
    for sample, digest in stock["actor"]["digests"].items():
        assert (fused["actor"]["digests"][sample] == digest).all()
    assert fused["critic"]["digests"] == {}  # its routers chose
    if "balance" in spec:
        for name in ("actor", "critic"):
            assert results[0][f"{name} balance"]["moe/replicas/mean"] > 0, f"the {name} was not balanced"


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_of_the_stock_schedule(ranks, directory, stock, case):
    check(ranks, directory, stock, CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_gradients_equal_those_of_the_stock_schedule_in_more_layouts(ranks, directory, stock, case):
    check(ranks, directory, stock, SLOW[case])


def test_plain_1f1b_of_one_model_equals_the_stock_schedule(ranks, directory, stock):
    results = ranks(2).run(fused_gradients, directory, PP2, PP2, "1f1b", models=("actor",), **FP64)
    fused = together(results, ("actor",))["actor"]
    assert fused["loss"] == pytest.approx(stock["actor"]["loss"], abs=1e-12)
    assert worst(fused["tensors"], stock["actor"]["tensors"]) <= TOLERANCE


@pytest.mark.parametrize(
    ("world", "actor", "critic"),
    [(2, PP2, HALF2), pytest.param(4, PP4, HALF4, marks=pytest.mark.slow)],
    ids=["pp2", "pp4"],
)
def test_steps_with_distributed_optimizer_and_overlap_equal_stock_steps(ranks, directory, world, actor, critic):
    """Each model's micro-batches come in the same order, so that not even rounding differs."""
    spec = {"distributed_optimizer": True, "overlap": True}
    stock = ranks(world).run(trained_weights, directory, actor, critic, None, **spec)
    fused = ranks(world).run(trained_weights, directory, actor, critic, 13, **spec)
    for name in ("actor", "critic"):
        expected = {n: t for r in stock for n, t in r[name].items()}
        got = {n: t for r in fused for n, t in r[name].items()}
        assert set(got) == set(expected)
        assert all(np.array_equal(got[n], expected[n]) for n in expected)


def values_beside_training(directory, layout, critic, **spec):
    """The critic forward only, fused into the actor's training; and its values from the stock schedule."""
    fused = Fused(directory, layout, critic, ("actor", "critic"), **spec)
    expected = fused.worker.values(fused.part_of("critic"), 0)
    found, values = fused.gradients_and_values(14)
    found["actor"]["tensors"] = fused.tensors("actor")
    return found, values, expected


def test_a_model_that_only_runs_forward(ranks, directory, stock):
    results = ranks(2).run(values_beside_training, directory, PP2, REVERSED2, **FP64)
    actor = together([r[0] for r in results], ("actor",))["actor"]
    assert worst(actor["tensors"], stock["actor"]["tensors"]) <= TOLERANCE
    assert sum(len(values) for _, values, _ in results) == 10
    for _, values, expected in results:
        assert set(values) == set(expected)
        assert all(np.array_equal(values[sample], expected[sample]) for sample in expected)


class Auxiliary(torch.nn.Module):
    """One weight per model; an auxiliary loss beside the main one."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = torch.nn.Parameter(torch.ones(4))

    def set_input_tensor(self, received):
        pass

    def forward(self, x):
        from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

        return MoEAuxLossAutoScaler.apply(x * self.weight, (self.weight**2).sum())


def auxiliary_gradients(order):
    """Gradients of two models of 2 and 4 micro-batches whose operations run in this order."""
    cpu.install()
    groups = create_groups(ParallelLayout(world=1), timeout_s=60)
    stages, chunks = [], []
    for count in (2, 4):
        config = compat.transformer_config(
            num_layers=1, hidden_size=4, num_attention_heads=1, num_moe_experts=2, pipeline_dtype=torch.float32
        )
        chunks.append(Auxiliary(config))

        def step(data, chunk):
            return chunk(next(data)), lambda output: (output.sum(), output.detach().sum())

        data = iter([torch.full((4,), float(i)) for i in range(count)])
        work = StageWork(chunks[-1], config, groups, step, data, (4,) * count)
        assert work.microbatches == count
        stages.append(work.begin())
    for model, microbatch, backward in order:
        (stages[model].backward if backward else stages[model].forward)(microbatch, None)
    return [chunk.weight.grad.tolist() for chunk in chunks]


def test_auxiliary_losses_keep_the_scale_of_their_model(ranks):
    """Megatron has one scale per process, which the last forward sets, of whatever model."""
    in_turn = [(m, i, b) for m, count in enumerate((2, 4)) for i in range(count) for b in (False, True)]
    mixed = [(0, 0, False), (1, 0, False), (0, 1, False), (1, 1, False), (0, 0, True), (1, 0, True), (1, 2, False),
             (0, 1, True), (1, 3, False), (1, 1, True), (1, 2, True), (1, 3, True)]  # fmt: skip
    assert ranks(1).run(auxiliary_gradients, mixed) == ranks(1).run(auxiliary_gradients, in_turn)


def unfit(directory, what):
    fused = Fused(directory, PP2, REVERSED2, ("actor", "critic"))
    if what == "vpp":
        fused.worker.actor.config.virtual_pipeline_model_parallel_size = 2
    counts = {"actor": 1} if what == "count" else {}
    try:
        fused.gradients(1, counts=counts)
    except ScheduleMismatch as error:
        return str(error)
    return "ran"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("count", "model 'actor': expected 1 micro-batches on every rank, got 4"),
        ("vpp", "model 'actor': virtual pipeline stages"),
        ("nothing", "ran"),
    ],
)
def test_what_does_not_fit_is_refused_on_all_ranks(ranks, directory, what, message):
    for answer in ranks(2).run(unfit, directory, what):
        assert message in answer


def wrong_rows(directory):
    fused = Fused(directory, PP2, REVERSED2, ("actor", "critic"))
    fused.gradients(1, more_rows=1)


def test_rows_that_are_not_the_models_are_an_error_not_a_hang(ranks, directory):
    with pytest.raises(RankError, match=r"expected \(\d+, 1, 64\) torch.float32, got \(\d+, 1, 64\)"):
        ranks(2).run(wrong_rows, directory)


def saved_after_steps(directory, where, actor, critic):
    """Train by fused schedules, save, train on; weights at the end of the second half."""
    fused = Fused(directory, actor, critic, ("actor", "critic"), distributed_optimizer=True)
    steps(fused, 0)
    save(fused.worker, where)
    steps(fused, 1)
    return {name: fused.tensors(name, "parameter") for name in fused.models}


def resumed(directory, where, actor, critic):
    """Read that checkpoint under another layout; weights after the same second half."""
    fused = Fused(directory, actor, critic, ("actor", "critic"), distributed_optimizer=True)
    load(fused.worker, where)
    steps(fused, 1)
    return {name: fused.tensors(name, "parameter") for name in fused.models}


def steps(fused, step):
    fused.gradients(15, step)
    for name in fused.models:
        fused.worker.trained[name].optimizer_step(1e-2)


@pytest.mark.slow
def test_a_checkpoint_of_placed_stages_loads_under_other_placements(ranks, tmp_path):
    # Not tied: Megatron saves the copy of a tied embedding on the last stage by asking its global state.
    directory = with_head(tiny.qwen3_moe(tmp_path / "model", seed=4, layers=4))
    (tmp_path / "saved").mkdir()
    saved = ranks(4).run(saved_after_steps, directory, tmp_path / "saved", PP4, HALF4)
    again = ranks(2).run(resumed, directory, tmp_path / "saved", PP2, REVERSED2)
    for name in ("actor", "critic"):
        expected = {n: t for r in saved for n, t in r[name].items()}
        got = {n: t for r in again for n, t in r[name].items()}
        assert worst(got, expected) <= 1e-4  # other sums of gradients, in fp32
