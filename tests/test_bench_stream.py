"""The benchmark of dispatch and modes runs, on a small part, and its rows are what they say."""

import json

import pytest

from rl.rollout.dispatch import get_dispatch
from rl.rollout.latency import LatencyProfile
from rl.simulation.generation import Generation
from rl.simulation.lengths import LengthLaw, draw_groups
from rl.simulation.loops import LoopSettings, TrainCost, simulate
from scripts import bench_stream, measure_latency


def test_simulated(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(bench_stream, "LAWS", bench_stream.LAWS[:2])
    monkeypatch.setattr(bench_stream, "LOOP_ENGINES", 2)
    monkeypatch.setattr(bench_stream, "TRAIN_SHARES", (0.5,))
    file = tmp_path / "stream.json"
    assert bench_stream.main(["--engines", "4", "--seeds", "2", "--steps", "3", "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    assert document["simulated"]
    rows = document["rows"]
    assert len(rows) == len(bench_stream.LAWS) * len(bench_stream.WAVES) * len(bench_stream.POLICIES)
    for row in rows:
        assert row["ratio_worst"] >= row["ratio"] >= 1.0
        assert row["makespan"] >= row["lower_bound"]
        assert row["seeds"] == 2
    modes = {(row["train_share"], row["mode"]): row for row in document["modes"]}
    for share in bench_stream.TRAIN_SHARES:
        assert modes[share, "sync"]["speedup"] == pytest.approx(1)
        assert modes[share, "streaming"]["speedup"] > 1
        for name, _ in bench_stream.LOOPS:
            assert modes[share, name]["step_seconds"] >= modes[share, name]["bound"]
    printed = capsys.readouterr().out
    assert "Simulated" in printed
    assert "Where ours does not win" in printed


def test_against_measured_rows(tmp_path, capsys) -> None:
    profile = LatencyProfile.load(bench_stream.PROFILE)
    groups = draw_groups(LengthLaw(median=50, sigma=1.0, cap=300), 8, 4, 0, 10)
    generation = Generation(
        profile,
        1,
        16,
        get_dispatch("fcfs"),
        prefill_seconds_per_token=profile.prefill_seconds_per_token,
        group_seconds=profile.group_seconds,
    )
    seconds = simulate([groups], generation, TrainCost(0.1, 1e-4), LoopSettings("sync")).makespan
    row = {
        "mode": "sync",
        "engines": 1,
        "seats": 16,
        "train": {"fixed_seconds": 0.1, "seconds_per_token": 1e-4},
        "steps": [
            {"step_seconds": 1.05 * seconds, "prompt_tokens": 10, "lengths": [list(each.lengths) for each in groups]}
        ],
    }
    far = row | {"steps": [row["steps"][0] | {"step_seconds": 1.5 * seconds}]}
    given = ["--engines", "--steps", "0", "--real", str(tmp_path / "rows.json"), "--bars"]
    (tmp_path / "rows.json").write_text(json.dumps({"rows": [row]}))
    assert bench_stream.main(given) == 0
    (tmp_path / "rows.json").write_text(json.dumps({"rows": [row, far]}))
    assert bench_stream.main(given) == 1
    assert "MISSED: sync: -33.3% off" in capsys.readouterr().out


@pytest.mark.slow
def test_a_real_engine_is_measured(tmp_path) -> None:
    import subprocess
    import sys

    file = tmp_path / "latency.json"
    command = [sys.executable, measure_latency.__file__, str(file), "--seats", "8", "--repeats", "1", "--tokens", "16"]
    subprocess.run(command, check=True, timeout=300)
    profile = LatencyProfile.load(file)
    assert profile.running == (1, 2, 4, 8)
    assert profile.prefill_seconds_per_token >= 0
    assert profile.provenance["model"]["num_experts"] == 8
