"""The supervised warm-up: a step of its own before the loop, for models that cannot do anything yet."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rl.evaluation import summarize
from rl.orchestration.experience import generate
from rl.orchestration.setup import Run
from rl.progress import Progress
from rl.rollout.config import Sampling
from rl.training.batch import TrainSample
from rl.training.worker import SupervisedObjective

_CHECK_EVERY = 20  # steps between looks at the accuracy, when a limit for it is set
_CHECK_PROBLEMS = 128


@dataclass(frozen=True)
class _Stop:
    accuracy: float


def warm_up(run: Run) -> None:
    """Learn solved problems for ``warmup.steps`` optimizer steps, or until ``stop_at_accuracy`` on some of them.

    Leaves a fresh optimizer and the warmed-up weights in the engines; the reference model starts from them too.
    """
    section = run.config.warmup
    examples = run.data.warmup
    order = np.random.Generator(np.random.PCG64(run.config.run.seed))
    queue: list[int] = []
    with Progress(section.steps, "warm-up", enabled=run.config.logging.progress) as progress:
        for step in range(1, section.steps + 1):
            while len(queue) < section.batch_size:
                queue += order.permutation(len(examples)).tolist()
            chosen, queue = queue[: section.batch_size], queue[section.batch_size :]
            samples = [
                TrainSample(f"warmup/{step}/{n}", examples[i].tokens, examples[i].loss_mask)
                for n, i in enumerate(chosen)
            ]
            outcome = run.trainer.train(run.packing.mini_batch(samples), SupervisedObjective(), lr=section.lr)
            metrics = {"warmup/loss": outcome.loss, "warmup/grad_norm": outcome.grad_norm}
            if section.stop_at_accuracy and (step % _CHECK_EVERY == 0 or step == section.steps):
                metrics["warmup/accuracy"] = _accuracy(run)
            run.metrics.log(step, metrics, axis="warmup_step")
            progress.update(step, metrics)
            if section.stop_at_accuracy and metrics.get("warmup/accuracy", 0.0) >= section.stop_at_accuracy:
                progress.note(f"warm-up: accuracy {metrics['warmup/accuracy']:.3f} reached after {step} steps")
                break
    run.trainer.end_warmup()


def _accuracy(run: Run) -> float:
    """Greedy accuracy on some problems of the warm-up itself."""
    problems = run.data.warmup_problems
    assert problems is not None
    run.update_engines()
    prompts = [problems.prompt(0, i) for i in range(min(_CHECK_PROBLEMS, len(problems)))]
    sampling = Sampling(run.config.sampling.max_tokens, temperature=0.0, stop_token_ids=run.stop_token_ids)
    samples = run.reward.score(generate(run.pool, prompts, 1, sampling, run.config.run.seed))
    return summarize(0, [s.reward for s in samples], run.config.evaluation.correct_from).accuracy
