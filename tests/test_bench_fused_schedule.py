"""The benchmark of fused schedules runs, on a small part, and its rows hold what they promise."""

import json

import pytest

from scripts import bench_fused_schedule


def instances(tmp_path, **published):
    large = {"stages": 4, "microbatches": 4, "forward": 5, "backward": 10, "activation": 1.95}
    small = {"stages": 2, "microbatches": 2, "replicas": 2, "forward": 4, "backward": 8, "activation": 2}
    row = {"name": "small", "nodes": 4, "large": large, "small": small | {"direction": "reversed on each segment"}}
    if published:
        row["published"] = {"annealed": 150, "annealed_peak_memory": 7.8, "memory_lower_bound": 7.8} | published
    file = tmp_path / "instances.json"
    file.write_text(json.dumps({"instances": [row, row | {"name": "other"}]}))
    return ["--instances", str(file), "--only", "small", "--seconds", "0.5", "--memory-seconds", "0.5", "--small", "2"]


@pytest.fixture(autouse=True)
def easy(monkeypatch):
    monkeypatch.setattr(bench_fused_schedule, "SMALL_ROUNDS", 1)
    monkeypatch.setattr(bench_fused_schedule, "EASY_SECONDS", 0.5)


def test_rows(tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert bench_fused_schedule.main([*instances(tmp_path), "--json", str(file), "--bars"]) == 0
    document = json.loads(file.read_text())
    assert document["simulated"]
    assert document["brute_force"]["bound_above_optimum"] == 0
    (row,) = document["rows"]
    assert row["name"] == "small"
    assert row["lower_bound"] <= row["makespan"] <= row["greedy"]["makespan"]
    assert row["makespan"] < row["concatenated"]["makespan"] <= row["serial"]["makespan"]
    gain = document["no_gain"]["serial"]["makespan"] / document["no_gain"]["makespan"]
    assert 1 <= gain < 1.02
    assert "Where fusing does not win" in capsys.readouterr().out


def test_a_missed_bar_fails(tmp_path, capsys):
    given = instances(tmp_path, annealed=10, annealed_peak_memory=1.0)
    assert bench_fused_schedule.main([*given, "--bars"]) == 1
    assert bench_fused_schedule.main(given) == 0
    out = capsys.readouterr().out
    assert "small: makespan" in out
    assert "small: peak memory" in out


def test_an_unknown_instance(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench_fused_schedule.main([*instances(tmp_path), "--only", "none"])
    assert "expected names of small, other; got none" in capsys.readouterr().err
