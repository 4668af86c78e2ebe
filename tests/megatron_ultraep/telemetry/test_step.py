import json
import re

import numpy as np
import pytest

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.plan import solve
from megatron_ultraep.plan.compose import objective
from megatron_ultraep.plan.reorder import ReorderSettings
from megatron_ultraep.plan.types import Costs, PlanSettings, imbalance
from megatron_ultraep.replay import RoutingTrace, TraceSample, histogram
from megatron_ultraep.telemetry.page import imbalances
from megatron_ultraep.telemetry.plan_cli import main
from megatron_ultraep.telemetry.step import HOMES_KEPT, REORDERED, blocks, plan_trace, summary, table
from megatron_ultraep.telemetry.whatif import pack_trace, trace_cases
from tests.megatron_ultraep.telemetry.test_view import dump, needs_chromium

FREE = ReorderSettings(token_ps=1, expert_bytes=64, node_ps_per_kib=0, cross_ps_per_kib=0)
LAYOUT = ExpertLayout(16, 4, node_size=2, slots=1)
SETTINGS = PlanSettings(min_tokens=8)


def make_trace(samples=24):
    """Routes that favour experts 0 to 3, each sample one more: 100 to 104 rows, 2 layers, 16 experts, top-2."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(samples):
        weights = np.ones(16)
        weights[:4] = 6
        weights[rng.integers(16)] += 10
        race = rng.exponential(size=(rng.integers(100, 105), 2, 16)) / weights
        made.append(TraceSample(f"s{i}", np.argsort(race, axis=-1)[..., :2]))
    return RoutingTrace(16, 2, 2, tuple(made))


@pytest.fixture(scope="module")
def trace():
    return make_trace()


@pytest.fixture(scope="module")
def preview(trace):
    return plan_trace(trace, LAYOUT, SETTINGS, FREE, replica_bytes=100, tokens_per_micro_batch=400)


def test_figures_are_those_of_the_plans(trace, preview):
    batch = pack_trace(trace, 4, 400)
    assert preview.batch == batch
    for layer in range(2):
        loads = [case.loads for case in trace_cases(trace, batch) if case.layer == layer]
        mean = sum(x.sum() for x in loads) / 4
        kept = [solve(x, LAYOUT, SETTINGS) for x in loads]
        plans = [solve(x, preview.moves[layer].layout, SETTINGS) for x in loads]
        figures = preview.layers[layer]
        assert figures.before == pytest.approx(sum(p.before.max() for p in kept) / mean)
        assert figures.kept == pytest.approx(sum(p.after.max() for p in kept) / mean)
        assert figures.reordered == pytest.approx(sum(p.before.max() for p in plans) / mean)
        assert figures.after == pytest.approx(sum(p.after.max() for p in plans) / mean)
        assert figures.bound == pytest.approx(sum(max(d.bound for d in p.decisions) for p in plans) / mean)
        assert figures.replicas == sum(len(p.replicas) for p in plans)
        assert figures.replica_bytes == 100 * figures.replicas
        assert figures.moved == len(preview.moves[layer].moves) > 0
        assert figures.bytes_in_node + figures.bytes_across == 64 * figures.moved
        # Hot experts share a node at first, which replicas cannot mend.
        assert figures.after < figures.kept < figures.before
        assert 1 <= figures.bound <= figures.after < 1.05


def test_times_are_paid_in_token_time_and_copies(trace):
    costs = Costs(token_ps=1000, copy_ps_per_kib=1024, replica_bytes=500, fixed_ps=7)
    settings = PlanSettings(min_tokens=8, costs=costs)
    moving = ReorderSettings(token_ps=1000, expert_bytes=2048, node_ps_per_kib=10, cross_ps_per_kib=100)
    found = plan_trace(trace, LAYOUT, settings, moving, tokens_per_micro_batch=400)
    for layer, figures in enumerate(found.layers):
        plans = [found.plan.plan(m, layer) for m in range(found.plan.microbatches)]
        assert figures.after_ps == 1000 * sum(int(p.after.max()) for p in plans)
        paid = [max(d.cost_ps if d.outcome == "balanced" else 0 for d in p.decisions) for p in plans]
        assert figures.copy_ps == sum(paid) > 0
        assert figures.move_ps == found.moves[layer].move_ps > 0
    assert found.total("after_ps") < found.total("before_ps")
    text = table(found, timed=True, sized=True)
    assert "moving ms" in text
    assert (
        f"{found.total('before_ps') / 1e9:.2f} to {found.total('after_ps') / 1e9:.2f} ms"
        in summary(found, timed=True)[-1]
    )


def test_nothing_moves_where_it_does_not_pay(trace):
    dear = ReorderSettings(token_ps=1, expert_bytes=2**40, node_ps_per_kib=10**6, cross_ps_per_kib=10**6)
    found = plan_trace(trace, LAYOUT, SETTINGS, dear, tokens_per_micro_batch=400)
    assert found.plan is found.kept
    assert found.total("moved") == found.total("bytes_across") == 0
    for figures in found.layers:
        assert (figures.reordered, figures.after) == (figures.before, figures.kept)
    assert {block.models for block in blocks(found)} == {(HOMES_KEPT,)}


def test_composing_is_reported_by_itself(trace):
    found = plan_trace(trace, LAYOUT, SETTINGS, FREE, tokens_per_micro_batch=400, composing=True)
    assert found.composed is not None
    assert found.composed.after.tokens < found.composed.before.tokens
    histograms = [histogram(sample.routes, 16) for sample in trace.samples]
    layouts = [move.layout for move in found.moves]
    assert found.composed.after == objective(found.batch, histograms, layouts)
    assert found.composed.before == objective(pack_trace(trace, 4, 400), histograms, layouts)
    assert any("composed by load" in line for line in summary(found, timed=False))
    assert found.as_json()["composition"]["after"]["tokens"] == found.composed.after.tokens


def test_without_slots_only_homes_change(trace):
    layout = ExpertLayout(16, 4, node_size=2)
    found = plan_trace(trace, layout, SETTINGS, FREE, tokens_per_micro_batch=400)
    assert found.total("replicas") == 0
    for figures in found.layers:
        assert figures.after == figures.reordered < figures.before == figures.kept


def test_blocks_hold_both_orders(preview):
    found = {block.models[0]: block for block in blocks(preview)}
    assert list(found) == [REORDERED, HOMES_KEPT]
    for name, step in ((REORDERED, preview.plan), (HOMES_KEPT, preview.kept)):
        block = found[name]
        assert len(block) == 2 * step.microbatches
        after = imbalances(block.rank_after())
        for i in range(len(block)):
            plan = step.plan(int(block.microbatch[i]), int(block.layer[i]))
            assert after[i] == pytest.approx(imbalance(plan.after))


@pytest.fixture
def file(trace, tmp_path):
    path = tmp_path / "t.safetensors"
    trace.save(path)
    return path


OPTIONS = ["--ep", "4", "--node-size", "2", "--slots", "1", "--tokens-per-microbatch", "400", "--min-tokens", "8"]


def test_command_prints_layers_and_writes_json(file, tmp_path, capsys):
    out = tmp_path / "x.json"
    assert main([str(file), "--step", *OPTIONS, "--expert-bytes", "1048576", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    content = json.loads(out.read_text())
    for layer in content["layers"]:
        (line,) = [cells for cells in lines if cells and cells[0] == str(layer["layer"]) and len(cells) == 11]
        assert line[1:6] == [f"{layer[name]:.3f}" for name in ("before", "kept", "reordered", "after", "bound")]
        assert line[6:9] == [str(layer["moved"]), "0.0", f"{7 * layer['moved']:.1f}"]
        assert line[10] == f"{4 * layer['replicas']:.1f}"
    assert content["layout"] == {"experts": 16, "ranks": 4, "node_size": 2, "slots": 1}
    assert "24 samples in" in text
    assert "predicted, not measured" in text
    assert "ms" not in text.split("predicted")[0].replace("samples", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step"], "--ep: expected|expected one layout, got 0"),
        (["--step", "--ep", "2", "4"], "--step: expected one layout, got 2"),
        (["--ep", "4", "--compose"], "--compose: is for a step planned ahead, give --step too"),
        (["--ep", "4", "--html", "x.html"], "--html: is for a step planned ahead"),
        (["--step", "--ep", "4", "--horizon", "0"], "horizon must be an integer from 1"),
        (["--step", "--ep", "4", "--state-bytes", "-1"], "--state-bytes: expected 0 or more"),
    ],
)
def test_command_says_what_does_not_fit(file, arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main([str(file), *arguments])
    assert end.value.code == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


@needs_chromium
def test_page_of_a_step_renders(file, tmp_path):
    page, out = tmp_path / "x.html", tmp_path / "x.json"
    costs = ["--expert-bytes", "4096", "--token-ns", "1000", "--copy-ns-per-mib", "1000"]
    assert main([str(file), "--step", "--compose", *OPTIONS, *costs, "--html", str(page), "--json", str(out)]) == 0
    body, document, console = dump(page, tmp_path)
    assert console == []
    assert 'data-ready="true"' in document
    assert '<section id="step">' in body
    assert body.count('class="stage"') == 2 * 4
    assert "NaN" not in body
    assert "undefined" not in body
    for layer in json.loads(out.read_text())["layers"]:
        for name in ("before", "kept", "reordered", "after"):
            assert f"{layer[name]:.3f}</title>" in body
        assert f'<td class="n">{layer["after_ps"] / 1e9:.2f}</td>' in body
    assert f"{REORDERED} / train" in body
    assert f"{HOMES_KEPT} / train" in body
