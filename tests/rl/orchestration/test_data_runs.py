"""Runs on files as verl's users have them: parquet, chat messages, a reward file, several samples in evaluation."""

from __future__ import annotations

import json
import random

import pyarrow as pa
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from rl.cli import app
from rl.evaluation import eval_files, read_eval
from rl.metrics import read_metrics
from tests.rl.orchestration.command import Command, ledger_lines, tiny_config

pytestmark = pytest.mark.slow

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, scale=1.0):
    assert data_source == "sums"
    if extra_info["index"] == 5:
        raise ValueError("index 5 is not liked")
    return {"score": scale * (len(solution_str) % 2), "acc": 0}
"""


def verl_rows(count: int, low: int, high: int, split: str):
    rng = random.Random(low)
    for index in range(count):
        a, b = rng.randint(low, high), rng.randint(low, high)
        yield {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": f"What is {a} + {b}?"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(a + b)},
            "extra_info": {"split": split, "index": index},
        }


def test_verls_files_train_resume_and_evaluate(tmp_path):
    rows = list(verl_rows(12, 0, 99, "train"))
    rows[3]["prompt"] = []
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    held_out = verl_rows(6, 100, 999, "test")
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, held_out)))
    (tmp_path / "my_reward.py").write_text(REWARD)
    settings = {
        "data__train": {"files": str(tmp_path / "train.parquet")},
        "data__eval": {"files": str(tmp_path / "test.jsonl")},
        "data__chat": True,
        "data__on_bad_row": "skip",
        "reward": {"path": f"{tmp_path}/my_reward.py:compute_score", "args": {"scale": 2.0}},
        "evaluation": {"prompts": 6, "samples": 4, "greedy": False, "correct_from": 2.0},
        "checkpoint__every": 1,
    }
    first = Command(tiny_config(tmp_path, run__steps=2, **settings))
    assert first.end(600) == 0, first.output()
    assert "1 row of train cannot be used and skipped" in first.output()
    again = Command(tiny_config(tmp_path, run__steps=6, **settings), "--resume", "--allow-changes")
    assert again.end(600) == 0, again.output()

    directory = tmp_path / "run"
    (skipped,) = [json.loads(line) for line in (directory / "skipped_rows.jsonl").read_text().splitlines()]
    assert skipped["place"].endswith("train.parquet:4")
    # Eleven rows are left, two a step: every one is taken once before any is taken twice.
    taken = [tuple(prompt) for line in ledger_lines(directory) for prompt in line["consumed"]]
    assert sorted(taken[:11]) == [(0, ordinal) for ordinal in range(11)]
    assert taken[11:] == [(1, 0)]

    samples = read_eval(eval_files(directory)[6])
    assert len(samples) == 24
    assert len({sample.prompt.uid for sample in samples}) == 6
    for sample in samples:
        if sample.prompt.metadata["extra_info"]["index"] == 5:
            assert sample.reward == 0.0
            assert sample.reward_error == f"ValueError: index 5 is not liked (prompt from {tmp_path}/test.jsonl:6)"
        else:
            assert sample.reward == 2.0 * (len(sample.response_text) % 2)
    metrics = read_metrics(directory)[6]
    assert metrics["eval/pass@1"] == pytest.approx(metrics["eval/accuracy"])
    assert metrics["eval/avg@4"] == metrics["eval/accuracy"]
    assert metrics["eval/pass@4"] >= metrics["eval/pass@2"] >= metrics["eval/pass@1"]
    assert "pass@k" in (directory / "report.html").read_text()
    result = CliRunner().invoke(app, ["verify-eval", str(directory)])
    assert result.exit_code == 0, result.stdout


def test_bad_rows_and_rewards_end_the_command_before_anything_starts(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "a", "label": "1"}\n{"prompt": "", "label": "1"}\n{"prompt": "b", "label": null}\n')
    settings = {"data__train": {"files": str(path)}, "data__eval": None, "evaluation": {}}
    command = Command(tiny_config(tmp_path, reward={"path": "rl.rewards.builtin:exact_match"}, **settings))
    assert command.end(300) == 2
    assert f"{path}:2: prompt: expected text, got none" in command.output()
    assert f"{path}:3: label: expected a label of text or a number" in command.output()
    assert "Traceback" not in command.output()
    path.write_text('{"prompt": "a", "label": "1"}\n' * 4)
    reward = {"path": "rl.rewards.remote:http_reward", "args": {"url": "nowhere"}}
    command = Command(tiny_config(tmp_path, reward=reward, **settings))
    assert command.end(300) == 2
    assert "expected url to begin with http" in command.output()
    assert not command.orphans()
