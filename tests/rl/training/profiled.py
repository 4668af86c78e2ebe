"""Training steps inside a profiled window, and what its trace says."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ultraep.megatron import compat
from megatron_ultraep.megatron.attach import detach
from megatron_ultraep.runtime import ranges
from megatron_ultraep.runtime.profiler import ProfileSettings
from rl.training.batch import MiniBatch
from rl.training.passes import PassSettings
from rl.training.profiling import WorkerWindow
from rl.training.worker import PolicyObjective
from tests.rl.training.balancing import BALANCE
from tests.rl.training.common import LOSS, make_layout, make_samples, make_worker


def hooks(worker: Any) -> int:
    """Hooks on all modules of the actor; balancing has some of its own."""
    modules = [module for chunk in worker.actor.chunks for module in chunk.modules()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def steps(directory: str, layout: dict[str, Any], traces: str | None, **spec: Any) -> dict[str, Any]:
    """Three steps with the balancer, the second one in a window if there is a directory for its trace."""
    worker = make_worker(directory, layout, balance=BALANCE if layout.get("ep", 1) > 1 else None, **spec)
    samples = make_samples(worker.actor.arch)
    whole = MiniBatch.make(samples, make_layout(samples, worker.spec.layout))
    batch = whole.part(worker.groups.coordinates["dp"])
    objective = PolicyObjective(LOSS, PassSettings(with_entropy=True), "replay")
    before, losses, trace, hooked = hooks(worker), [], None, 0
    for step in range(3):
        window = None
        if traces is not None and step == 1:
            path = Path(traces) / f"rank_{dist.get_rank()}.json.gz"
            window = WorkerWindow(worker, ProfileSettings(), path)
            hooked = hooks(worker) - before
        worker.logprobs(batch, "actor", "old_logprob", step, "replay", PassSettings())
        result = worker.train(batch, step, objective)
        losses.append((result.loss, result.grad_norm))
        if window is not None:
            trace = str(window.end())
    assert hooks(worker) == before
    assert not ranges.on()
    where = worker.groups.coordinates
    return {
        "losses": losses,
        "trace": trace,
        "hooked": hooked,
        "microbatches": len(whole.layout.micro_batches[where["dp"]]),
        "layers": sorted(int(layer.layer_number) for layer in _layers(worker)),
    }


def attached(directory: str) -> dict[str, Any]:
    """Ranges of a model that was attached with ``profile`` until it is detached."""
    worker = make_worker(directory, {"ep": 2}, balance=replace(BALANCE, profile=True))
    samples = make_samples(worker.actor.arch)
    batch = MiniBatch.make(samples, make_layout(samples, worker.spec.layout)).part(worker.groups.coordinates["dp"])
    objective = PolicyObjective(LOSS, PassSettings(with_entropy=True), "replay")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        worker.train(batch, 0, objective)
    on = ranges.on()
    detach(worker.actor.wrapped)
    modules = [module for chunk in worker.actor.chunks for module in chunk.modules()]
    left = [hook for m in modules for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    ours = {hook.__qualname__ for hook in left if "LayerRanges" in hook.__qualname__}
    return {
        "names": {event.key for event in profiler.key_averages()},
        "on": on,
        "on_afterwards": ranges.on(),
        "hooks": sorted(ours),
    }


def _layers(worker: Any) -> list[Any]:
    kind = compat.transformer_layer_class()
    return [module for chunk in worker.actor.chunks for module in chunk.modules() if isinstance(module, kind)]


def range_names(trace: str | Path) -> Counter[str]:
    """How often each named range is in a trace; the file is read as JSON."""
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    return Counter(event["name"] for event in events if event.get("cat") == "user_annotation")


def intervals(trace: str | Path) -> list[tuple[int, float, float, str]]:
    """Thread, beginning, end (us) and name of every range of ours."""
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    found = [e for e in events if e.get("cat") == "user_annotation" and not e["name"].startswith("gloo:")]
    return [(e["tid"], e["ts"], e["ts"] + e["dur"], e["name"]) for e in found]
