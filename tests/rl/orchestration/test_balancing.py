"""A run that balances its experts, from end to end: its records and metrics are what was trained on."""

import numpy as np
import pytest

from megatron_ultraep.layout import BatchLayout
from megatron_ultraep.replay import RoutingTrace, layer_digests
from megatron_ultraep.telemetry import read
from rl.ledger import Ledger
from rl.metrics import METRICS, read_metrics
from rl.orchestration.steps import short_digest
from rl.verification import verify_eval
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
