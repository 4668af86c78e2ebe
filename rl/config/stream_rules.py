"""What the fields of ``stream`` demand of each other and of other sections; see ``rules``."""

from __future__ import annotations

from collections.abc import Iterator

from rl.config.sections import RunConfig
from rl.config.violations import Violation


def stream(config: RunConfig) -> Iterator[Violation]:
    section, algorithm = config.stream, config.algorithm
    if section.pipelining and algorithm.epochs_per_batch > 1:
        yield Violation(
            "algorithm.epochs_per_batch",
            f"expected 1 with stream.pipelining, whose samples are trained on as they arrive, came "
            f"{algorithm.epochs_per_batch}; set it to 1, or pipelining to false.",
            ("stream.pipelining",),
        )
    if section.pipelining and algorithm.mini_batches > 1 and algorithm.old_logprobs == "recompute":
        yield Violation(
            "algorithm.old_logprobs",
            "with stream.pipelining the weights before the iteration are gone when later mini-batches arrive; set "
            f"old_logprobs: rollout, or mini_batches (came {algorithm.mini_batches}) to 1.",
            ("stream.pipelining", "algorithm.mini_batches"),
        )
    if section.pipelining and algorithm.mini_batches > config.data.prompts_per_step:
        yield Violation(
            "algorithm.mini_batches",
            f"with stream.pipelining mini-batches are cut by prompts: expected at most data.prompts_per_step = "
            f"{config.data.prompts_per_step}, came {algorithm.mini_batches}.",
            ("stream.pipelining", "data.prompts_per_step"),
        )
    if section.overlapped and config.balance.reorder and config.balance.reorder_by == "coming":
        yield Violation(
            "balance.reorder_by",
            "homes by the coming batch need all its routes before training begins; set reorder_by: previous (the last "
            "complete step) with stream.pipelining or stream.staleness.",
            ("stream.pipelining", "stream.staleness"),
        )
    if section.colocated and section.overlapped:
        yield Violation(
            "stream.colocated",
            "engines and trainer that share GPUs take turns, so nothing overlaps; set staleness: 0 and pipelining: "
            "false, or colocated: false.",
            ("stream.pipelining", "stream.staleness"),
        )
    if section.colocated and config.rollout.device == "cuda" and config.rollout.engines != config.trainer.ranks:
        yield Violation(
            "rollout.engines",
            f"colocated engines and trainer ranks are one pair on each GPU: expected trainer.ranks = "
            f"{config.trainer.ranks} engines, came {config.rollout.engines}.",
            ("stream.colocated", "trainer.ranks"),
        )
    if section.colocated and config.balance.reorder and config.balance.reorder_by == "previous":
        yield Violation(
            "balance.reorder_by",
            "experts would move while engines generate, but a colocated trainer is off its GPUs then; set reorder_by: "
            "coming.",
            ("stream.colocated",),
        )
    if section.dispatch in ("longest_first", "skew_aware") and section.predictor == "none":
        yield Violation(
            "stream.predictor",
            f"dispatch: {section.dispatch} goes by predicted lengths; choose features, history or ranker.",
            ("stream.dispatch",),
        )
    if section.dispatch == "skew_aware" and section.latency_profile is None:
        yield Violation(
            "stream.latency_profile",
            "dispatch: skew_aware chooses how many engines take the long groups by measured latencies; make the file "
            "with scripts/measure_latency.py, or use longest_first.",
            ("stream.dispatch",),
        )
    yield from transfer(config)
    most = section.elastic.max_engines
    if most is not None and most < config.rollout.engines:
        yield Violation(
            "stream.elastic.max_engines",
            f"expected at least rollout.engines = {config.rollout.engines}, came {most}; raise it or set it to null.",
            ("rollout.engines",),
        )
    if most is not None and section.colocated:
        yield Violation(
            "stream.elastic.max_engines", "colocated engines are one for each trainer rank; set it to null.",
            ("stream.colocated",),
        )  # fmt: skip


def transfer(config: RunConfig) -> Iterator[Violation]:
    stream, engines, trainer = config.stream, config.rollout, config.trainer
    path = config.transfer_path
    if path == "store":
        return
    gpus = (engines.device == "cuda", trainer.backend == "nccl")
    fits = {
        "gloo": (not any(gpus), "gloo is between engines on CPUs and a trainer with backend: gloo"),
        "nccl": (all(gpus) and not stream.colocated, "nccl is between GPUs of engines and GPUs of the trainer"),
        "ipc": (
            len(set(gpus)) == 1
            and stream.colocated
            and trainer.ranks == engines.engines
            and engines.tensor_parallel == 1,
            "ipc is for engines of one rank, as many as trainer ranks, each beside its own (stream.colocated)",
        ),
    }
    fit, what = fits[path]
    if not fit:
        yield Violation(
            "stream.transfer",
            f"{what}, which this run is not; use store.",
            ("stream.colocated", "rollout.device", "trainer.backend", "rollout.engines", "trainer.ranks"),
        )
    if stream.staleness and stream.in_flight == "finish":
        yield Violation(
            "stream.transfer",
            "a direct transfer reaches all engines at once, but with in_flight: finish each takes weights when it has "
            "finished its samples; set in_flight: continue, or transfer: store.",
            ("stream.staleness", "stream.in_flight"),
        )
    if stream.elastic.max_engines is not None:
        yield Violation(
            "stream.transfer",
            "engines that leave take no more weights, and a direct transfer waits for all; use store, or set "
            "elastic.max_engines to null.",
            ("stream.elastic.max_engines",),
        )
