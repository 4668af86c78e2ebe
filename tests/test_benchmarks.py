"""The speed benchmarks run, on tiny sizes, and their rows hold what they promise."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_ultraep.replay.trace import RoutingTrace, TraceSample
from scripts import bench_common, bench_layer, bench_model
from scripts.bench_results import Row, memory_verdict, missed_bars

ROOT = Path(__file__).resolve().parent.parent
FAST = ["--cpu", "--iterations", "2", "--draws", "2"]


def rows(file, methods=("stock", "ours", "foresight", "balanced")):
    document = json.loads(file.read_text())
    assert document["measured"]
    assert {"hardware", "versions", "settings", "shapes"} <= set(document)
    assert [row["method"] for row in document["rows"]] == list(methods) * (len(document["rows"]) // len(methods))
    for row in document["rows"]:
        assert row["ms"] > 0
        assert row["p10_ms"] <= row["p90_ms"]
        assert row["device_gib"] is None
        if row["method"] == "ours":
            assert row["slot_gib"] > 0
        if row["method"] == "balanced":
            assert row["fraction_of_balanced"] == 1.0
    return document["rows"]


@pytest.mark.parametrize("more", [[], ["--transformer-layer", "--shared-experts", "--grad-dtype", "bf16"]])
def test_layer(ranks, tmp_path, capsys, more):
    file = tmp_path / "layer.json"
    given = [*FAST, "--imbalances", "1", "1.5", "2.5", "--json", str(file), *more]
    assert bench_layer.main(given, ranks) == 0
    found = rows(file)
    assert [row["imbalance"] for row in found] == [1.0] * 4 + [1.5] * 4  # two ranks cannot have 2.5
    stock, ours, foresight, balanced = found[4:]
    assert foresight["after"] == ours["after"]
    assert foresight["replicas"] == ours["replicas"]
    assert abs(stock["before"] - 1.5) < 0.1
    assert ours["before"] == pytest.approx(stock["before"])
    assert ours["after"] < 1.05
    assert ours["replicas"] > 0
    assert balanced["before"] < 1.1
    assert found[0]["ms"] == found[3]["ms"]


def test_model(ranks, tmp_path, capsys):
    file = tmp_path / "model.json"
    profile = tmp_path / "profile"
    given = [*FAST, "--imbalances", "1.5", "--methods", "ours", "balanced", "--json", str(file)]
    assert bench_model.main([*given, "--trace-profile", str(profile), "--overlap"], ranks) == 0
    ours, _ = rows(file, ("ours", "balanced"))
    assert ours["after"] < 1.05
    assert sorted(path.name for path in profile.iterdir()) == [
        f"{method}-model-tiny-rank{rank}.json.gz" for method in ("balanced", "ours") for rank in (0, 1)
    ]


def test_recorded_routes(ranks, tmp_path, capsys):
    """Routes of a trace that all go to the experts of rank 0."""
    routes = np.tile(np.array([[0, 1], [2, 3]], dtype=np.uint8), (50, 1))[:, None]
    RoutingTrace(8, 1, 2, (TraceSample("s", routes),)).save(tmp_path / "trace")
    file = tmp_path / "layer.json"
    assert bench_layer.main([*FAST, "--trace", str(tmp_path / "trace"), "--json", str(file)], ranks) == 0
    stock, ours, _, _ = rows(file)
    assert stock["before"] == stock["imbalance"] == 2.0
    assert ours["after"] < 2.0


def test_failures_are_told(ranks, tmp_path, capsys):
    RoutingTrace(16, 1, 2, (TraceSample("s", np.array([[[0, 9]]], dtype=np.uint8)),)).save(tmp_path / "trace")
    assert bench_layer.main([*FAST, "--bars", "--trace", str(tmp_path / "trace")], ranks) == 1
    output = capsys.readouterr().out
    assert "the trace has 16 experts" in output
    assert "nothing was measured" in output


def test_refusals_are_told(ranks, tmp_path, capsys):
    """What balancing refuses leaves the other methods' rows."""
    file = tmp_path / "layer.json"
    given = [*FAST, "--bars", "--imbalances", "1.5", "--grad-dtype", "bf16", "--set", "node_size=3"]
    assert bench_layer.main([*given, "--json", str(file)], ranks) == 1
    assert "ours was not measured" in capsys.readouterr().out
    assert len(rows(file, ("stock", "balanced"))) == 2


def test_settings_of_balancing():
    def parsed(*given):
        return bench_common.balance_config(bench_common.parser("").parse_args(given))

    config = parsed("--slots", "3", "--set", "gate=false", "tolerance=0.1", "min_tokens=7")
    assert (config.slots, config.gate, config.tolerance, config.min_tokens) == (3, False, 0.1, 7)
    for wrong in ("gate=maybe", "speed=1", "gate"):
        with pytest.raises(ValueError):
            parsed("--set", wrong)


def test_shapes_of_presets():
    arguments = bench_common.parser("").parse_args(["--tokens", "4096"])
    first, second = bench_common.shapes(arguments, ("32x4", "128x8"), kind="layer")
    assert (first.experts, first.topk, second.experts, second.topk) == (32, 4, 128, 8)
    assert (first.tokens, first.sequence, first.dtype) == (4096, 4096, "bfloat16")
    assert round(first.expert_mib * 2**20 / 1e6, 1) == 37.7
    with pytest.raises(ValueError, match="must divide"):
        bench_common.shapes(argparse.Namespace(**vars(arguments) | {"tokens": 5000}), ("32x4",), kind="layer")


def row(method, imbalance, ms, gib=10.0, **more):
    made = Row("a layer", 2, imbalance, method, imbalance, 1.0, ms, ms, ms, gib, **more)
    made.fraction_of_balanced = 10.0 / ms
    return made


def test_bars():
    good = [row("stock", 1.0, 10.0), row("ours", 1.0, 10.05), row("stock", 2.0, 20.0), row("ours", 2.0, 10.5)]
    good += [row("ours", 3.0, 11.0, gib=10.6, slot_gib=0.5), row("balanced", 3.0, 10.0)]
    assert missed_bars(good, bench_layer.layer_bar, memory=True) == []
    assert memory_verdict(good)[0]
    bad = [row("stock", 1.0, 10.0), row("ours", 1.0, 10.2), row("ours", 2.0, 10.6)]
    bad += [row("ours", 3.0, 11.2, gib=10.8, slot_gib=0.5), row("balanced", 3.0, 10.0)]
    missed = missed_bars(bad, bench_layer.layer_bar, memory=True)
    assert [text.split(":")[0] for text in missed] == ["a layer, imbalance 1", "a layer, imbalance 2",
                                                       "a layer, imbalance 3", "a layer"]  # fmt: skip
    assert len(missed_bars(bad, bench_layer.layer_bar, memory=False)) == 3


def test_bars_of_foresight():
    good = [row("ours", 2.0, 10.5), row("foresight", 2.0, 10.1, exposed_share=0.004)]
    assert missed_bars(good, bench_layer.layer_bar, memory=False, foresight=0.985) == []
    bad = [row("ours", 2.0, 10.5), row("foresight", 2.0, 10.4, exposed_share=0.006)]
    slow, exposed = missed_bars(bad, bench_layer.layer_bar, memory=False, foresight=0.985)
    assert "foresight: 0.962 of balanced, the bar is 0.985" in slow
    assert "hold up 0.60% of the time, the bar is 0.5%" in exposed


def test_bar_of_gradients_on_their_way_home():
    made = row("ours", 2.0, 10.1, reduction={"share": 0.0123})
    made.layout = "transformer layer, EP 4"
    (missed,) = missed_bars([made], bench_layer.transformer_layer_bar, memory=False)
    assert "way home adds 1.23% to the backward, the bar is 1%" in missed


@pytest.mark.slow
@pytest.mark.parametrize("script", ["bench_layer.py", "bench_model.py"])
def test_script(tmp_path, script):
    """As a user runs it, in fresh processes."""
    file = tmp_path / "rows.json"
    command = [sys.executable, str(ROOT / "scripts" / script), *FAST, "--imbalances", "1.5", "--json", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "of balanced" in result.stdout
    assert len(rows(file)) == 4
