import json

import pytest

from rl.rollout.latency import LatencyProfile
from rl.simulation.real_rows import compare, read_real_rows, simulate_row

PROFILE = LatencyProfile((1, 8, 16), (0.01, 0.02, 0.03), 1e-5, 0.002)
ROW = {
    "mode": "streaming",
    "engines": 1,
    "seats": 8,
    "chunk_groups": 2,
    "train": {"fixed_seconds": 0.1, "seconds_per_token": 1e-3, "apply_seconds": 0.05},
    "transfer_seconds": 0.2,
    "steps": [
        {"step_seconds": 2.0, "prompt_tokens": 9.6, "lengths": [[20, 30], [40, 10], [50, 60]]},
        {"step_seconds": 2.0, "prompt_tokens": 9.6, "lengths": [[20, 30], [40, 10], [50, 60]]},
    ],
}


def write(path, *rows):
    path.write_text(json.dumps({"rows": list(rows)}))
    return path


def test_a_run_that_is_as_simulated_has_no_error(tmp_path) -> None:
    (row,) = read_real_rows(write(tmp_path / "rows.json", ROW))
    assert row.batches[1][2].lengths == (50, 60)
    assert row.batches[1][2].prompt_tokens == 10
    seconds = simulate_row(row, PROFILE).step_seconds
    measured = ROW | {"steps": [s | {"step_seconds": t} for s, t in zip(ROW["steps"], seconds, strict=True)]}
    (again,) = read_real_rows(write(tmp_path / "rows.json", measured))
    assert compare(again, PROFILE)["error"] == pytest.approx(0)
    (slow,) = read_real_rows(write(tmp_path / "rows.json", measured | {"slowdown": 1.5}))
    assert compare(slow, PROFILE)["error"] > 0.1


def test_steps_that_are_simulated_and_not_compared(tmp_path) -> None:
    (row,) = read_real_rows(write(tmp_path / "rows.json", ROW | {"skip": 1}))
    found = compare(row, PROFILE)
    assert found["steps"] == 1
    assert found["simulated_step_seconds"] == simulate_row(row, PROFILE).step_seconds[1]
    with pytest.raises(ValueError, match="expected to skip fewer than 2 steps, got 2"):
        read_real_rows(write(tmp_path / "rows.json", ROW | {"skip": 2}))


@pytest.mark.parametrize("dispatch", ["fcfs", "random", "longest_first", "skew_aware"])
def test_policies(tmp_path, dispatch) -> None:
    (row,) = read_real_rows(write(tmp_path / "rows.json", ROW | {"dispatch": dispatch, "engines": 2}))
    assert compare(row, PROFILE)["simulated_step_seconds"] > 0


def test_faults_name_the_row(tmp_path) -> None:
    with pytest.raises(ValueError, match="row 1: KeyError"):
        read_real_rows(write(tmp_path / "rows.json", ROW, {"mode": "sync"}))
    with pytest.raises(ValueError, match="at least one row"):
        read_real_rows(write(tmp_path / "rows.json"))
    with pytest.raises(ValueError, match="groups in each"):
        read_real_rows(write(tmp_path / "rows.json", ROW | {"steps": []}))
