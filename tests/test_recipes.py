"""Every recipe is valid; the smoke recipe does what it promises, and its control does nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from rl.config import load
from rl.evaluation import eval_files, read_eval, summarize
from rl.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "rl.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_dry_run(recipe):
    load(recipe)
    result = command("train", str(recipe), "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "rank" in result.stdout


def accuracies(directory):
    """Held-out accuracy by step, from the saved samples."""
    return {
        step: summarize(step, [s.reward for s in read_eval(path)]).accuracy
        for step, path in eval_files(directory).items()
    }


def run_smoke(directory, *overrides, recipe="smoke"):
    return command(
        "train",
        f"recipes/{recipe}.yaml",
        f"run.output_dir={directory}/run",
        f"model.path={directory}/model",
        "logging.wandb=off",
        *overrides,
    )


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", [1, 2])
def test_smoke_learns(tmp_path, seed):
    result = run_smoke(tmp_path, f"run.seed={seed}", f"model.create_args.seed={seed}")
    assert result.returncode == 0, result.stderr[-3000:]
    by_step = accuracies(tmp_path / "run")
    assert by_step[min(by_step)] <= 0.3
    assert by_step[max(by_step)] >= 0.6
    metrics = read_metrics(tmp_path / "run")
    assert max(m.get("train/rollout_logprob_abs_diff", 0.0) for m in metrics.values()) <= 1e-4
    assert command("verify-eval", str(tmp_path / "run")).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_smoke_learns_with_a_critic(tmp_path):
    result = run_smoke(tmp_path, recipe="smoke-ppo")
    assert result.returncode == 0, result.stderr[-3000:]
    by_step = accuracies(tmp_path / "run")
    assert by_step[min(by_step)] <= 0.3
    assert by_step[max(by_step)] >= 0.6
    metrics = read_metrics(tmp_path / "run")
    assert metrics[1]["critic/explained_variance"] == 0, "the critic's head begins at zero"
    assert max(metrics[step]["critic/explained_variance"] for step in range(2, 16)) > 0.02
    assert "train/loss" not in metrics[2], "the actor learnt while the critic warmed up"
    assert command("verify-eval", str(tmp_path / "run")).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_without_advantages_nothing_is_learnt(tmp_path):
    result = run_smoke(tmp_path, "algorithm.zero_advantages=true", "evaluation.success.after_min=null")
    assert result.returncode == 0, result.stderr[-3000:]
    by_step = accuracies(tmp_path / "run")
    assert abs(by_step[max(by_step)] - by_step[0]) <= 0.05
