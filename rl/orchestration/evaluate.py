"""Held-out evaluation: its samples are saved, so that anybody can score them again."""

from __future__ import annotations

import numpy as np

from rl.evaluation import EvalResult, summarize, write_eval
from rl.orchestration.experience import generate
from rl.orchestration.setup import Run
from rl.rollout.config import Sampling


def evaluate(run: Run) -> EvalResult | None:
    """Answer all held-out prompts with the engines' weights; None when the run has none."""
    held_out = run.data.held_out
    if held_out is None:
        return None
    with run.phase("evaluate"):
        prompts = [held_out.prompt(0, i) for i in range(len(held_out))]
        sampling = run.sampling
        if run.config.evaluation.greedy:
            sampling = Sampling(sampling.max_tokens, temperature=0.0, stop_token_ids=sampling.stop_token_ids)
        run.updated()
        run.engines_turn()
        samples = run.reward.score(generate(run.service, prompts, 1, sampling, run.config.run.seed))
    write_eval(run.directory, run.step, samples)
    result = summarize(run.step, [s.reward for s in samples], run.config.evaluation.correct_from)
    lengths = [len(s.response_tokens) for s in samples]
    run.metrics.log(
        run.step,
        {
            "eval/accuracy": result.accuracy,
            "eval/reward/mean": result.reward_mean,
            "eval/response_length/mean": float(np.mean(lengths)),
            "perf/time/evaluate": run.seconds.get("evaluate", 0.0),
        },
    )
    run.say(f"evaluation after step {run.step}: accuracy {result.accuracy:.3f} on {result.count} held-out prompts")
    return result
