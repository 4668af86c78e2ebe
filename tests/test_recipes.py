"""Every recipe is valid; the smoke recipe does what it promises, and its control does nothing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rl.cli import app
from rl.config import load
from rl.evaluation import eval_files, read_eval, summarize
from rl.metrics import read_metrics
from rl.placement import place
from rl.planning.plan import make_plan, read_dimensions
from rl.planning.render import summary

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PLANNED = [path for path in RECIPES if "Planned only" in path.read_text()]


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
def test_dry_run(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(app, ["train", str(recipe), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "trainer rank" in result.stdout


def test_dry_run_as_a_command():
    result = command("train", "recipes/smoke.yaml", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "trainer rank" in result.stdout


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_head_says_what_was_run(recipe):
    head = recipe.read_text().split("\nrun:")[0]
    assert re.search(r"^# (Run as it is|Planned only: not run|Not run)", head, re.MULTILINE), head


@pytest.mark.parametrize("recipe", PLANNED, ids=lambda path: path.name)
def test_plan_is_that_of_the_head(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load(recipe)
    plan = make_plan(config, read_dimensions(config))
    assert plan.fits, plan.over
    head = recipe.read_text().split("\nrun:")[0]
    assert f"# {summary(plan)}" in head.split("\n"), f"expected the plan's figures in the head: # {summary(plan)}"
    # What is refused today is said, so that nobody waits in a queue for it.
    assert all(sentence.split(":")[0].split(" = ")[0] in head for sentence in plan.refused)
    assert config.plan.dimensions is not None


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_batch_file_of_the_same_name(recipe):
    text = recipe.with_suffix(".sbatch").read_text()
    assert re.search(rf"^exec scripts/slurm/launch\.sh recipes/{re.escape(recipe.name)} .*\"\$@\"$", text, re.MULTILINE)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    config = load(recipe)
    gpus = int(options["nodes"]) * int(options.get("gpus-per-node", 0))
    assert gpus >= place(config).ray_gpus
    assert gpus < place(config).ray_gpus + config.plan.gpus_per_node, "a node is idle"
    assert {"time", "signal", "output"} <= options.keys()
    assert "#SBATCH --requeue" in text


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
