"""The loop from end to end on real engines and ranks: what it writes down is what happened."""

import json

import numpy as np
import pytest

from megatron_ultraep.replay import RoutingTrace, layer_digests
from rl.evaluation import eval_files, read_eval
from rl.ledger import Ledger
from rl.metrics import read_metrics
from rl.orchestration.steps import RouteMismatch, check_digests, short_digest
from rl.types import Prompt, Sample
from tests.rl.orchestration.command import Command, ledger_lines, tiny_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole epoch with everything on: warm-up, reference, several mini-batches and epochs, comparison of routes."""
    directory = tmp_path_factory.mktemp("sync")
    config = tiny_config(
        directory,
        data__prompts_per_step=6,  # 32 prompts: the last step takes two
        algorithm__kl={"coef": 0.01},
        algorithm__mini_batches=2,
        algorithm__epochs_per_batch=2,
        algorithm__entropy_coef=0.01,
        algorithm__importance={"truncation": 2.0},
        algorithm__routes={"compare_own_every": 1},
        warmup={"steps": 3, "batch_size": 8, "examples_seed": 50000},
        logging={"wandb": "offline", "tensorboard": True, "traces_every": 5},
        trainer__recompute="full",
    )
    command = Command(config)
    try:
        assert command.end(300) == 0, command.output()[-3000:]
        assert command.orphans() == []
    finally:
        command.kill()
    return directory / "run"


def test_every_prompt_of_the_epoch_once(finished):
    Ledger.read(finished).verify_exactly_once(0, 32)
    assert [len(line["consumed"]) for line in ledger_lines(finished)] == [6, 6, 6, 6, 6, 2]


def test_rollout_and_training_agree(finished):
    metrics = read_metrics(finished)
    for step in range(1, 7):
        assert metrics[step]["train/rollout_logprob_abs_diff"] <= 1e-4
        assert metrics[step]["train/rollout_logprob_abs_diff_own_routes"] <= 1e-2
        assert metrics[step]["moe/own_routes_differ_fraction"] <= 0.01
        assert metrics[step]["train/optimizer_steps"] == 3 + 4 * step
        for name in ("train/grad_norm", "train/ppo_kl", "train/kl", "train/entropy", "moe/max_vio", "perf/step_time"):
            assert np.isfinite(metrics[step][name]), name


def test_routes_of_every_sample_were_checked_and_noted(finished):
    for line in ledger_lines(finished):
        assert set(line["route_digests"]) == set(line["sample_ids"])
        assert all(len(digest) == 16 for digest in line["route_digests"].values())


def test_files(finished):
    run = json.loads((finished / "run.json").read_text())
    assert run["sessions"][-1]["outcome"] == "finished"
    assert run["data_digests"]["train"].startswith("sha256:")
    assert list(eval_files(finished)) == [0, 6]
    assert len(read_eval(eval_files(finished)[6])) == 8
    report = (finished / "report.html").read_text()
    assert "<svg" in report
    assert "http://" not in report.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert list((finished / "tensorboard").rglob("events*"))
    assert list(finished.rglob("*.wandb"))
    assert len(read_metrics(finished, "warmup_step")) == 3


def test_traces_hold_the_routes_that_were_trained_on(finished):
    paths = sorted((finished / "traces").iterdir())
    assert [p.name for p in paths] == ["step_00001.safetensors", "step_00006.safetensors"]
    digests = {}
    for line in ledger_lines(finished):
        digests |= line["route_digests"]
    for path in paths:
        trace = RoutingTrace.load(path)
        assert (trace.experts, trace.moe_layers, trace.topk) == (8, 2, 2)
        for entry in trace.samples:
            assert short_digest(layer_digests(entry.routes)) == digests[entry.sample_id]


def sample(digests):
    prompt = Prompt("train/0/0", 0, 0, "", np.zeros(2, np.int32))
    return Sample(
        sample_id="train/0/0/0",
        prompt=prompt,
        response_tokens=np.zeros(1, np.int32),
        rollout_logprobs=np.zeros(1, np.float32),
        weight_versions=((0, 0),),
        finish_reason="stop",
        routes=None,
        histogram=None,
        route_digests=digests,
    )


def test_other_routes_than_captured_are_an_error_that_names_sample_and_layer():
    captured = np.array([1, 2, 3], dtype=np.uint64)
    check_digests([sample(captured)], {"train/0/0/0": captured.copy()})
    with pytest.raises(RouteMismatch, match=r"train/0/0/0.*layers \[1\]"):
        check_digests([sample(captured)], {"train/0/0/0": np.array([1, 9, 3], dtype=np.uint64)})
    assert short_digest(captured) != short_digest(captured[::-1])
