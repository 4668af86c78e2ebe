import json

import numpy as np
import pytest

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.plan.types import Costs, PlanSettings
from megatron_ultraep.replay import RoutingTrace, TraceSample
from megatron_ultraep.telemetry import Recorder, plan_cli
from megatron_ultraep.telemetry.plan_cli import evaluate, main
from megatron_ultraep.telemetry.whatif import Case
from tests.megatron_ultraep.telemetry.plans import key, make_plan


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """Routes that favour experts 0 and 1: 24 samples of 200 rows, 2 layers, 16 experts, top-2."""
    rng = np.random.default_rng(0)
    weights = np.array([6, 4, *[1] * 14]) / 24
    samples = []
    for i in range(24):
        race = rng.exponential(size=(200, 2, 16)) / weights
        samples.append(TraceSample(f"s{i}", np.argsort(race, axis=-1)[..., :2]))
    path = tmp_path_factory.mktemp("traces") / "step_00001.safetensors"
    RoutingTrace(16, 2, 2, tuple(samples)).save(path)
    return path


def run(*arguments):
    return main([str(a) for a in arguments])


def test_every_combination_has_a_line(trace, tmp_path, capsys):
    out = tmp_path / "r.json"
    options = ["--tokens-per-microbatch", 800, "--min-tokens", 8, "--expert-bytes", 1 << 20]
    assert run(trace, "--ep", 4, 8, "--slots", 0, 2, "--node-size", 4, 8, *options, "--json", out) == 0
    results = json.loads(out.read_text())["results"]
    found = [(r["ep"], r["node_size"], r["slots"]) for r in results]
    # A node of 8 ranks is the whole group where that is 4.
    assert found == [(4, 4, 0), (4, 4, 2), (8, 4, 0), (8, 4, 2), (8, 8, 0), (8, 8, 2)]
    text = capsys.readouterr().out
    assert "predicted" in text
    assert "24 samples" in text
    for r in results:
        assert 1 <= r["bound_mean"] <= r["after_mean"] + 1e-9
        assert r["after_mean"] <= r["before_mean"] <= r["before_max"]
        if r["slots"] == 0:
            assert (r["predicted_speedup"], r["replicas_max"], r["traffic_bytes_mean"]) == (1.0, 0, 0)
            assert r["skipped"]["no_replica_possible"] == 1
        else:
            assert r["after_mean"] < r["before_mean"]
            assert r["predicted_speedup"] > 1.1
            assert r["traffic_bytes_mean"] == pytest.approx(r["replicas_mean"] * 4 * 2**20)


def test_the_prediction_is_the_documented_formula():
    layout = ExpertLayout(4, 2, slots=0)
    cases = [Case(key(0, mb), 0, np.array([[a, 0, 0, 0], [0, 0, b, 0]])) for mb, (a, b) in enumerate([(8, 2), (6, 6)])]
    result = evaluate(cases, layout, PlanSettings(), 0)
    assert (result.before_mean, result.before_max, result.predicted_speedup) == (pytest.approx(1.3), 1.6, 1.0)

    layout = ExpertLayout(4, 2, slots=1)
    costs = Costs(token_ps=1000, copy_ps_per_kib=1024, replica_bytes=1000)
    cases = [Case(key(), 0, np.array([[1000, 1000, 0, 0], [1000, 1000, 0, 0]]))]
    result = evaluate(cases, layout, PlanSettings(min_tokens=1, tolerance_ppm=0, costs=costs), costs.replica_bytes)
    assert result.replicas_max == 1
    busiest_after = result.after_max * 2000
    assert 2000 <= busiest_after < 2100
    assert result.predicted_speedup == pytest.approx(4000 * 1000 / (busiest_after * 1000 + costs.replica_ps))


def test_a_run_is_planned_again_on_its_own_and_on_other_layouts(tmp_path, capsys):
    layout = ExpertLayout(16, 4, tuple(np.random.default_rng(0).permutation(16).tolist()), node_size=2, slots=1)
    before = []
    with Recorder(tmp_path, max_mib=1, name="a") as r:
        for step in range(30):
            plan = make_plan(layout, step)
            before.append(plan.before.max() / plan.before.mean())
            r.record(key(step), 0, plan)
    out = tmp_path / "r.json"
    assert run(tmp_path, "--json", out) == 0
    (own,) = json.loads(out.read_text())["results"]
    assert (own["ep"], own["node_size"], own["slots"], own["plans"]) == (4, 2, 1, 30)
    assert own["before_mean"] == pytest.approx(np.mean(before))
    assert run(tmp_path, "--ep", 8, "--node-size", 8, "--slots", 2, "--most-plans", 10, "--json", out) == 0
    (other,) = json.loads(out.read_text())["results"]
    assert (other["ep"], other["plans"]) == (8, 10)
    assert "10 of 30 load records" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ep", 3], r"--ep 3: expected a size that divides the 16 experts: one of 1, 2, 4, 8, 16"),
        (["--ep", 0], r"--ep 0: expected a size"),
        ([], r"--ep: expected numbers of expert-parallel ranks"),
        (["--ep", 8, "--node-size", 3], r"--node-size 3: expected a size that divides the 8"),
        (["--ep", 8, "--slots", -1], r"--slots: expected 0 or more"),
        (["--ep", 8, "--tokens-per-microbatch", 100], r"200 rows .* raise tokens_per_micro_batch"),
        (["--ep", 8, "--tokens-per-microbatch", 0], r"--tokens-per-microbatch: expected at least 1"),
        (["--ep", 8, "--token-ns", 5], r"the gate needs all three"),
        (["--ep", 8, "--tolerance", 2], r"--tolerance: expected a fraction"),
        (["--ep", 8, "--min-tokens", 0], r"--min-tokens: expected at least 1"),
        (["--ep", 8, "--most-plans", 0], r"--most-plans"),
        (["--ep", 8, "--expert-bytes", -1], r"--expert-bytes: expected 0 or more"),
        (["--ep", 8, "--json", "/nowhere/x.json"], r"/nowhere/x\.json"),
    ],
)
def test_errors_say_what_was_expected(trace, arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        run(trace, *arguments)
    assert end.value.code == 2
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(" ".join(capsys.readouterr().err.split()))


def test_files_that_are_no_traces(tmp_path, capsys):
    (tmp_path / "x.safetensors").write_bytes(b"junk")
    RoutingTrace(16, 2, 2, ()).save(tmp_path / "empty.safetensors")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("x.safetensors", "could not read it"),
        ("empty.safetensors", "expected a trace with routes"),
        ("missing", "found no such file"),
        ("folder", "expected load records"),
    ):
        with pytest.raises(SystemExit):
            run(tmp_path / name, "--ep", 2)
        assert message in " ".join(capsys.readouterr().err.split())


def test_help_has_the_formula(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    assert " ".join(plan_cli.FORMULA.split()) in " ".join(capsys.readouterr().out.split())
