"""Score the saved evaluation samples of a run again, from the files alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rl.config import RunConfig, from_dict
from rl.evaluation import EvalResult, Judgement, eval_files, judge, read_eval, summarize_samples
from rl.ledger import Ledger, LedgerError
from rl.rewards.loading import load_reward
from rl.rewards.runner import RewardRunner
from rl.types import Sample


@dataclass(frozen=True)
class Verification:
    """What scoring again gave.

    Attributes:
        results: one per evaluation, from rewards computed now.
        mismatches: one sentence per sample whose recorded reward differs.
        judgements: the thresholds of `evaluation.success`, on these results.
    """

    results: tuple[EvalResult, ...]
    mismatches: tuple[str, ...]
    judgements: tuple[Judgement, ...]

    @property
    def missed(self) -> bool:
        """Whether a threshold was missed."""
        return not all(judgement.met for judgement in self.judgements)

    def render(self) -> str:
        """A table for people."""
        lines = [f"{'step':>6}  {'prompts':>7}  {'accuracy':>8}  {'mean reward':>11}  threshold"]
        for result in self.results:
            wanted = ", ".join(
                f"{judgement.wanted}: {'met' if judgement.met else 'MISSED'}"
                for judgement in self.judgements
                if judgement.step == result.step
            )
            numbers = f"{result.step:>6}  {result.count:>7}  {result.accuracy:>8.1%}  {result.reward_mean:>11.3f}"
            lines.append(f"{numbers}  {wanted}".rstrip())
        lines += self.mismatches
        lines.append(
            f"{len(self.mismatches)} recorded rewards differ from those computed now"
            if self.mismatches
            else "every recorded reward is what the reward function gives now"
        )
        return "\n".join(lines)


def verify_eval(run_directory: Path | str) -> Verification:
    """Score every saved evaluation with the run's reward function.

    Raises:
        LedgerError: no run, or no saved evaluation, in that directory.
        RewardLoadError: the reward function cannot be found.
    """
    run_directory = Path(run_directory)
    config = run_config(Ledger.read(run_directory))
    files = eval_files(run_directory)
    if not files:
        raise LedgerError(
            f"expected saved evaluations in {run_directory / 'eval'}, found none; the run has not evaluated yet."
        )
    runner = RewardRunner(
        load_reward(config.reward.path, config.reward.args),
        config.reward.args,
        concurrency=config.reward.concurrency,
        timeout_s=config.reward.timeout_s,
        on_error=config.reward.on_error,
    )
    results: list[EvalResult] = []
    mismatches: list[str] = []
    try:
        for step, path in files.items():
            recorded = read_eval(path)
            scored = runner.score(recorded)
            mismatches += _mismatches(step, recorded, scored)
            results.append(summarize_samples(step, scored, config.evaluation.correct_from))
    finally:
        runner.close()
    success = config.evaluation.success
    judgements = judge(results, success.before_max, success.after_min)
    return Verification(tuple(results), tuple(mismatches), tuple(judgements))


def run_config(ledger: Ledger) -> RunConfig:
    """The configuration of a run's last session."""
    sessions = ledger.run["sessions"]
    return from_dict(sessions[-1].get("config") or ledger.run["config"], source=f"{ledger.directory}/run.json")


def _mismatches(step: int, recorded: Sequence[Sample], scored: Sequence[Sample]) -> list[str]:
    return [
        f"step {step}, {before.sample_id}: recorded {before.reward}, computed {after.reward}"
        + (f" ({after.reward_error})" if after.reward_error else "")
        for before, after in zip(recorded, scored, strict=True)
        if not _same(before.reward, after.reward)
    ]


def _same(first: float | None, second: float | None) -> bool:
    if first is None or second is None:
        return first is second
    return math.isclose(first, second, rel_tol=1e-6, abs_tol=1e-6)
