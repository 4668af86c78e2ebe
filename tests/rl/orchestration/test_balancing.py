"""A run that balances its experts, from end to end: its records and metrics are what was trained on."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from megatron_ultraep.layout import BatchLayout
from megatron_ultraep.replay import RoutingTrace, layer_digests
from megatron_ultraep.telemetry import read
from megatron_ultraep.telemetry.blocks import Block
from rl.cli import app
from rl.ledger import Ledger, line_digest
from rl.metrics import METRICS, read_metrics
from rl.orchestration.steps import short_digest
from rl.verification.evaluations import verify_eval
from rl.verification.run import verify_run
from tests.rl.orchestration.command import Command, ledger_lines, tiny_config

STEPS, LAYERS, EXPERTS, BUDGET = 2, 2, 8, 640


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two steps with a reference model, so that two models are balanced; a budget that takes several micro-batches."""
    directory = tmp_path_factory.mktemp("balancing")
    config = tiny_config(
        directory,
        run__steps=STEPS,
        data__train__size=12,
        data__prompts_per_step=6,
        rollout__max_model_len=BUDGET,
        trainer__tokens_per_micro_batch=BUDGET,
        trainer__recompute="full",
        algorithm__kl={"coef": 0.01},
        balance={"enabled": True, "gate": False, "min_tokens": 1, "tolerance": 0.0},
        logging={"wandb": "off", "tensorboard": False, "traces_every": 1},
    )
    command = Command(config)
    try:
        assert command.end(600) == 0, command.output()[-3000:]
        assert command.orphans() == []
    finally:
        command.kill()
    return directory / "run"


def traces(run):
    """By optimizer step, which is one less than the number of the iteration: each makes one."""
    return {step: RoutingTrace.load(run / "traces" / f"step_{step + 1:05d}.safetensors") for step in range(STEPS)}


def expert_tokens(trace, layer):
    routes = np.concatenate([s.routes[:, layer].ravel() for s in trace.samples])
    return np.bincount(routes, minlength=EXPERTS)


def test_ledger_and_evaluations(finished):
    Ledger.read(finished).verify_exactly_once(0, 12)
    assert [len(line["consumed"]) for line in ledger_lines(finished)] == [6, 6]
    assert verify_eval(finished).mismatches == ()


def test_trained_on_the_routes_of_rollout(finished):
    traced = {s.sample_id: short_digest(layer_digests(s.routes)) for t in traces(finished).values() for s in t.samples}
    noted = {}
    for line in ledger_lines(finished):
        noted |= line["route_digests"]
    assert noted == traced
    assert len(noted) == 6 * 4 * STEPS
    for values in read_metrics(finished).values():
        if "train/rollout_logprob_abs_diff" in values:
            assert values["train/rollout_logprob_abs_diff"] <= 1e-4


def test_one_record_of_every_micro_batch_and_layer(finished):
    records = list(read(finished))
    for step, trace in traces(finished).items():
        rows = [len(s.routes) for s in trace.samples]
        layout = BatchLayout.pack(
            [s.sample_id for s in trace.samples], rows, data_parallel=2, tokens_per_micro_batch=BUDGET
        )
        count = len(layout.micro_batches[0])
        assert count > 1
        for name in ("old_logprob", "train"):
            found = [r for r in records if (r.key.model, r.key.pass_, r.key.step) == ("actor", name, step)]
            places = sorted((r.key.microbatch, r.layer) for r in found)
            assert places == [(m, layer) for m in range(count) for layer in range(1, LAYERS + 1)]
            for layer in range(LAYERS):
                tokens = sum(r.tokens for r in found if r.layer == layer + 1)
                np.testing.assert_array_equal(tokens, expert_tokens(trace, layer))
    assert {r.key.model for r in records} == {"actor"}
    for r in records:
        assert r.before.sum() == r.after.sum() == r.source_tokens.sum()
        assert r.after.sum(1).max() <= r.before.sum(1).max()
    assert sum(len(r.replicas) for r in records) > 0


def test_metrics_are_those_of_the_records(finished):
    metrics = read_metrics(finished)
    known = {name.partition("<")[0] for name in METRICS}
    for step in range(STEPS):
        found = metrics[step + 1]
        assert found["moe/imbalance_after/mean"] < found["moe/imbalance_before/mean"]
        trained = [r for r in read(finished) if (r.key.pass_, r.key.step) == ("train", step)]
        for name, loads in (("before", [r.before for r in trained]), ("after", [r.after for r in trained])):
            values = [load.sum(1).max() / load.sum(1).mean() for load in loads]
            assert found[f"moe/imbalance_{name}/mean"] == pytest.approx(np.mean(values))
            assert found[f"moe/imbalance_{name}/max"] == pytest.approx(np.max(values))
        assert found["moe/replicas/mean"] == pytest.approx(np.mean([len(r.replicas) for r in trained]))
        histogram = np.stack([expert_tokens(traces(finished)[step], layer) for layer in range(LAYERS)])
        assert found["moe/max_vio"] == pytest.approx((histogram.max(1) / histogram.mean(1) - 1).mean())
        assert all(any(name.startswith(k) for k in known) for name in found if name.startswith("moe/"))
    assert "Imbalance of ranks in training" in (finished / "report.html").read_text()


# ---- ultraep-rl verify: the run as it is, and with one thing changed


def test_the_run_is_verified_from_its_files(finished):
    found = verify_run(finished)
    assert found.mismatches == ()
    counts = {check.name: check.count for check in found.checks}
    microbatches = len({(r.key, r.layer) for r in read(finished)})
    assert counts == {
        "ledger": STEPS,
        "prompts": 12,
        "metrics": STEPS,
        "data": 2,
        "routes": 6 * 4 * STEPS,
        "plans": microbatches,
        "loads": LAYERS * STEPS,
        "checkpoints": 2,
        "evaluations": 2 * 8,
    }
    assert "everything that was checked fits together" in found.render()


def changed_line(path, number, change):
    lines = path.read_text().splitlines()
    value = json.loads(lines[number])
    change(value)
    lines[number] = json.dumps(value)
    path.write_text("\n".join(lines) + "\n")


def chained(run):
    """Digests of the ledger as someone would make them who changes a line and knows how."""
    before, lines = "", []
    for line in ledger_lines(run):
        line["chain"] = before = line_digest(before, line)
        lines.append(json.dumps(line))
    (run / "steps.jsonl").write_text("\n".join(lines) + "\n")


def changed_block(run, column, index, value):
    (path,) = (run / "balance").glob("*.loads.npz")
    block = Block.read(path)
    array = getattr(block, column).copy()
    array[index] = value(array[index])
    path.write_bytes(dataclasses.replace(block, **{column: array}).to_bytes())


def balanced(run):
    """A record that has a replica: its index, and the rank and slot of it."""
    (path,) = (run / "balance").glob("*.loads.npz")
    return tuple(int(i) for i in np.argwhere(Block.read(path).replica_expert >= 0)[0])


def index_in_training(run):
    """A record of training with tokens for its last expert."""
    (path,) = (run / "balance").glob("*.loads.npz")
    block = Block.read(path)
    return next(i for i in range(len(block)) if block.key(i).pass_ == "train" and block.tokens[i, EXPERTS - 1] > 0)


def digest_of_routes(run, rechain=True):
    def change(line):
        line["route_digests"]["train/0/0/1"] = "0" * 16

    changed_line(run / "steps.jsonl", 0, change)
    if rechain:
        chained(run)


def prompt_repeated(run):
    changed_line(run / "steps.jsonl", 1, lambda line: line.update(consumed=[[0, 5], *line["consumed"][1:]]))
    chained(run)


def step_removed(run):
    path = run / "steps.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


def metrics_changed(run):
    path = run / "metrics.jsonl"
    rows = [i for i, line in enumerate(path.read_text().splitlines()) if "perf/step_time" in line]
    changed_line(path, rows[1], lambda line: line.update({"rollout/reward/mean": 0.75}))


def metrics_row_removed(run):
    path = run / "metrics.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if '"step":2' not in line))


def data_digest(run):
    value = json.loads((run / "run.json").read_text())
    value["data_digests"]["train"] = "sha256:" + "0" * 64
    (run / "run.json").write_text(json.dumps(value))


def trace_byte(run):
    path = run / "traces" / "step_00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def trace_of_other_routes(run):
    path = run / "traces" / "step_00002.safetensors"
    trace = RoutingTrace.load(path)
    first = trace.samples[0]
    routes = first.routes.copy()
    routes[0, 1] = (routes[0, 1] + 1) % EXPERTS
    dataclasses.replace(trace, samples=(dataclasses.replace(first, routes=routes), *trace.samples[1:])).save(path)


def evaluation_reward(run):
    changed_line(run / "eval" / "step_00002.jsonl", 3, lambda line: line.update(reward=0.5))


def checkpoint_cursor(run):
    path = run / "checkpoints" / "step_00000002" / "loop.json"
    value = json.loads(path.read_text())
    value["cursor"] = {"epoch": 0, "ordinal": 7}
    path.write_text(json.dumps(value))


def cut(name, at=0.5):
    def do(run):
        (path,) = run.glob(name)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * at)])

    return do


TAMPERED = {
    "tokens of an expert": (lambda run: changed_block(run, "tokens", (3, 5), lambda v: v + 7), "plans", "source ranks"),
    "tokens moved between experts": (
        lambda run: [changed_block(run, "tokens", (3, e), lambda v, d=d: int(v) + d) for e, d in ((0, 1), (7, -1))],
        "plans",
        r"ranks-0-1.000000.loads.npz: actor/\w+/step \d/micro-batch \d, layer \d",
    ),
    "tokens moved between experts of a rank": (
        lambda run: [
            changed_block(run, "tokens", (index_in_training(run), e), lambda v, d=d: int(v) + d)
            for e, d in ((6, 1), (7, -1))
        ],
        "loads",
        r"step \d, layer \d: experts took",
    ),
    "expert in a slot": (
        lambda run: changed_block(run, "replica_expert", balanced(run), lambda v: v ^ 1),
        "plans",
        r"the planner puts",
    ),
    "tokens of a replica": (
        lambda run: changed_block(run, "replica_tokens", balanced(run), lambda v: v - 1),
        "plans",
        r"the planner puts",
    ),
    "decision": (lambda run: changed_block(run, "outcome", (2, 0), lambda v: (v + 1) % 5), "plans", "outcome"),
    "figure of a decision": (lambda run: changed_block(run, "figures", (2, 0, 1), lambda v: v + 1), "plans", "after"),
    "home": (lambda run: changed_block(run, "home_slot", 0, lambda v: v[::-1]), "plans", "planner"),
    "chunk cut off": (cut("balance/*.loads.npz"), "plans", "could not read it"),
    "digest of routes": (digest_of_routes, "routes", "step 1: the routes of train/0/0/1 have digest 0000"),
    "digest of routes, line as it was": (
        lambda run: digest_of_routes(run, rechain=False),
        "ledger",
        "line 1, step 1: its digest",
    ),
    "prompt repeated": (prompt_repeated, "prompts", "prompt 5 of epoch 0 was consumed 2 times"),
    "step removed": (step_removed, "ledger", "line 1, step 2: expected step 1"),
    "ledger cut off": (cut("steps.jsonl", 0.9), "ledger", "steps.jsonl: the last line is cut off"),
    "ledger cut off at a line": (
        lambda run: (run / "steps.jsonl").write_text((run / "steps.jsonl").read_text().splitlines()[0] + "\n"),
        "ledger",
        "ended after step 2, and steps.jsonl has 1",
    ),
    "metric": (metrics_changed, "metrics", "step 2: rollout/reward/mean is 0.75"),
    "row of metrics removed": (metrics_row_removed, "metrics", "expected one row of step 2, found 0"),
    "metrics cut off": (cut("metrics.jsonl", 0.98), "metrics", "metrics.jsonl: the last line is cut off"),
    "digest of data": (data_digest, "data", "data_digests.train is sha256:0000"),
    "byte of a trace": (trace_byte, "routes", "step_00001.safetensors: .*checksum"),
    "trace cut off": (cut("traces/step_00002*"), "routes", "step_00002.safetensors: .*could not read"),
    "trace of other routes": (trace_of_other_routes, "loads", "step 2, layer 2: experts took"),
    "reward of an evaluation": (evaluation_reward, "evaluations", "recorded 0.5, computed"),
    "evaluation cut off": (cut("eval/step_00000.jsonl", 0.9), "evaluations", "step_00000.jsonl: the last line"),
    "cursor of a checkpoint": (checkpoint_cursor, "checkpoints", "goes on with prompt 7 of epoch 0"),
    "checkpoint cut off": (cut("checkpoints/step_00000002/loop.json"), "checkpoints", "expected JSON"),
    "run.json cut off": (cut("run.json"), "ledger", "cannot be read"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_what_was_changed_is_found(finished, tmp_path, name):
    tamper, check, said = TAMPERED[name]
    run = tmp_path / "run"
    ignore = shutil.ignore_patterns("*.distcp", "reference")
    shutil.copytree(finished, run, ignore=ignore)
    tamper(run)
    found = {each.name: each.mismatches for each in verify_run(run).checks}
    assert any(re.search(said, text) for text in found[check]), found


def test_the_command_ends_with_the_documented_codes(finished, tmp_path):
    runner = CliRunner()
    result = runner.invoke(app, ["verify", str(finished), "--no-rewards"])
    assert result.exit_code == 0, result.output
    assert "not checked, evaluations: rewards were not computed again" in result.output
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    trace_byte(run)
    result = runner.invoke(app, ["verify", str(run), "--no-rewards"])
    assert result.exit_code == 1
    assert "MISMATCH routes: traces/step_00001.safetensors" in result.output
    assert runner.invoke(app, ["verify", str(tmp_path / "none")]).exit_code == 2
