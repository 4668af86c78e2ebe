"""The supervised warm-up: a step of its own before the loop, for models that cannot do anything yet."""

from __future__ import annotations

import numpy as np

from rl.orchestration.setup import Run
from rl.progress import Progress
from rl.training.batch import TrainSample
from rl.training.worker import SupervisedObjective

_WINDOW = 2  # batches whose accuracies are averaged


def warm_up(run: Run) -> None:
    """Learn solved problems for ``warmup.steps`` optimizer steps, or until they are answered well enough.

    The accuracy is that of greedy decoding on the batch, before it is learnt from: a by-product of the loss. There is
    none when whole texts are learnt.

    Leaves a fresh optimizer; the reference model starts from the warmed-up weights.
    """
    section = run.config.warmup
    examples = run.data.warmup
    order = np.random.Generator(np.random.PCG64(run.config.run.seed))
    queue: list[int] = []
    recent: list[float] = []
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
            metrics = {
                "warmup/loss": outcome.loss,
                "warmup/grad_norm": outcome.grad_norm,
            }
            if section.learn == "answers":
                metrics["warmup/accuracy"] = outcome.sums["exact"] / len(samples)
                recent = [*recent, metrics["warmup/accuracy"]][-_WINDOW:]
            run.metrics.log(step, metrics, axis="warmup_step")
            progress.update(step, metrics)
            limit = section.stop_at_accuracy
            if limit is not None and len(recent) == _WINDOW and float(np.mean(recent)) >= limit:
                progress.note(f"warm-up: accuracy {np.mean(recent):.3f} after {step} steps is enough")
                break
    run.trainer.end_warmup()
