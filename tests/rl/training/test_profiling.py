"""Profiled windows of trainer ranks: every layer of every pass is in the trace, and no number changes."""

import pytest

from rl.models import tiny
from tests.rl.training.profiled import attached, intervals, range_names, steps

CASES = [
    (2, {"ep": 2}, {}),
    (2, {"pp": 2, "vpp": 2}, {"recompute": ("full", ())}),
    pytest.param(2, {"tp": 2, "ep": 2}, {"recompute": ("selective", ("moe", "core_attn"))}, marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(tiny.qwen3_moe(tmp_path_factory.mktemp("profiling") / "m", seed=3, layers=4))


@pytest.mark.parametrize(("world", "layout", "spec"), CASES)
def test_every_layer_of_every_pass(ranks, directory, tmp_path, world, layout, spec):
    spec = spec | {"dtype": "float64", "distributed_optimizer": False}
    stock = ranks(world).run(steps, directory, layout, None, **spec)
    profiled = ranks(world).run(steps, directory, layout, str(tmp_path), **spec)
    recompute = spec.get("recompute", ("none", ()))[0]
    for plain, seen in zip(stock, profiled, strict=True):
        assert seen["losses"] == plain["losses"]
        assert seen["hooked"] == 2 * 3 * len(seen["layers"])
        names = range_names(seen["trace"])
        assert names["logprobs"] == names["train"] == names["optimizer"] == 1
        assert names["pass | actor/old_logprob/step 1"] == names["pass | actor/train/step 1"] == 1
        for microbatch in range(seen["microbatches"]):
            for layer in seen["layers"]:
                for part in ("", " attention", " moe"):
                    # Selective recomputation is a part of the layer's backward, inside the module.
                    name, again = f"layer {layer}{part}", int(recompute == "full")
                    for kind, pass_, count in (
                        ("forward", "old_logprob", 1),
                        ("forward", "train", 1),
                        ("recompute", "train", again),
                        ("backward", "train", 1),
                        ("backward", "old_logprob", 0),
                    ):
                        key = f"actor/{pass_}/step 1/micro-batch {microbatch}"
                        assert names[f"{name} {kind} | {key}"] == count, (name, kind, key)
        assert not any("step 0" in name or "step 2" in name for name in names)
        if "ep" in layout:
            assert {"balance: plan", "balance: weights, forward", "balance: gradients, end"} <= set(names)
        nested(intervals(seen["trace"]))


def nested(found):
    """Ranges of a thread are inside each other or apart, to the resolution of the trace."""
    for thread in {tid for tid, *_ in found}:
        open_until = []
        for _, begin, end, name in sorted(e for e in found if e[0] == thread):
            while open_until and open_until[-1][0] <= begin + 0.002:
                open_until.pop()
            if open_until:
                assert end <= open_until[-1][0] + 0.002, (name, open_until[-1])
            open_until.append((end, name))


def test_a_model_attached_with_profile_names_ranges_until_it_is_detached(ranks, directory):
    for seen in ranks(2).run(attached, directory):
        for layer in (1, 2, 3, 4):
            assert f"layer {layer} moe backward | actor/train/step 0/micro-batch 0" in seen["names"]
        assert {"balance: plan", "balance: reroute", "balance: gradients, end"} <= seen["names"]
        assert (seen["on"], seen["on_afterwards"], seen["hooks"]) == (True, False, [])
