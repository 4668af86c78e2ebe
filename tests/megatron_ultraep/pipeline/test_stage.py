"""Gradients of two models from one fused schedule are those of the two trained one after the other."""

import pytest

from rl.models import tiny
from tests.megatron_ultraep.pipeline.fused_models import fused_gradients
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
        replicas = [r[f"{name} balance"].get("replicas", 0) for r in results for name in ("actor", "critic")]
        assert sum(replicas) > 0, results[0]["actor balance"]


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
