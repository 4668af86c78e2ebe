"""Held-out evaluation: its samples are saved, so that anybody can score them again."""

from __future__ import annotations

import numpy as np

from rl.evaluation import EvalResult, eval_metrics, summarize_samples, write_eval
from rl.orchestration.experience import generate
from rl.orchestration.setup import Run
from rl.rollout.config import Sampling


def evaluate(run: Run) -> EvalResult | None:
    """Answer all held-out prompts, `evaluation.samples` times each, with the engines' weights; None without any."""
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
        count = run.config.evaluation.samples
        samples = run.reward.score(generate(run.service, prompts, count, sampling, run.config.run.seed))
    write_eval(run.directory, run.step, samples)
    result = summarize_samples(run.step, samples, run.config.evaluation.correct_from)
    lengths = [len(s.response_tokens) for s in samples]
    run.metrics.log(
        run.step,
        {
            **eval_metrics(result),
            "eval/response_length/mean": float(np.mean(lengths)),
            "perf/time/evaluate": run.seconds.get("evaluate", 0.0),
        },
    )
    several = "".join(f", pass@{k} {value:.3f}" for k, value in result.pass_at)
    run.say(
        f"evaluation after step {run.step}: accuracy {result.accuracy:.3f}{several} on {result.count} held-out prompts"
    )
    return result
