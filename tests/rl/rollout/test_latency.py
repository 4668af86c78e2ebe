import json
from pathlib import Path

import pytest

from rl.rollout.latency import LatencyProfile

MEASURED = Path(__file__).resolve().parents[3] / "benchmarks" / "data" / "latency-tiny-cpu.json"


def test_between_and_beyond_the_points() -> None:
    profile = LatencyProfile((2, 4, 8), (0.010, 0.012, 0.020))
    assert [profile(n) for n in (2, 4, 8)] == pytest.approx([0.010, 0.012, 0.020])
    assert profile(1) == 0.010
    assert 0.010 < profile(3) < 0.012
    assert profile(12) == pytest.approx(0.028)  # 2 ms for each sample more
    assert profile.scaled(2)(12) == pytest.approx(0.014)
    assert profile.table(3).tolist() == pytest.approx([0.0, 0.010, 0.010, profile(3)])
    assert profile.best_tokens_per_second(8) == pytest.approx(400, rel=1e-2)


def test_noise_never_makes_a_larger_batch_faster() -> None:
    profile = LatencyProfile((1, 2, 4, 8, 16), (0.003, 0.006, 0.004, 0.005, 0.004))
    seconds = [profile(n) for n in range(1, 40)]
    assert seconds == sorted(seconds)


def test_files(tmp_path: Path) -> None:
    profile = LatencyProfile((1, 4), (0.1, 0.2), 1e-5, 0.01, {"date": "today"})
    profile.save(tmp_path / "p.json")
    assert LatencyProfile.load(tmp_path / "p.json") == profile
    (tmp_path / "other.json").write_text(json.dumps({"points": []}))
    with pytest.raises(ValueError, match=r"other\.json is no latency profile"):
        LatencyProfile.load(tmp_path / "other.json")


def test_the_measured_profile_says_where_it_comes_from() -> None:
    profile = LatencyProfile.load(MEASURED)
    assert {"model", "hardware", "versions", "date"} <= set(profile.provenance)
    assert profile(256) > profile(1)


@pytest.mark.parametrize(
    ("running", "seconds", "fault"),
    [
        ((1,), (0.1,), "at least two points"),
        ((2, 2), (0.1, 0.2), "increasing"),
        ((0, 2), (0.1, 0.2), "from 1"),
        ((1, 2), (0.1, 0.0), "positive"),
        ((1, 2), (0.1, float("nan")), "positive"),
    ],
)
def test_faults(running, seconds, fault) -> None:
    with pytest.raises(ValueError, match=fault):
        LatencyProfile(running, seconds)


def test_no_step_without_samples() -> None:
    with pytest.raises(ValueError, match="at least one running"):
        LatencyProfile((1, 2), (0.1, 0.2))(0)


def test_slowdown_is_measured_over_expected() -> None:
    profile = LatencyProfile((1, 10), (0.1, 0.2))
    assert profile.slowdown([{1: (2, 0.4)}, {10: (3, 0.6)}]) == pytest.approx(1.0 / 0.8)
    assert profile.slowdown([{}, {}]) is None
