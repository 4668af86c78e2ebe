#!/usr/bin/env python
"""What choosing which samples share a micro-batch adds, by itself: packed by length, and composed by load.

    python scripts/bench_compose.py [--seeds 3] [--trace FILE] [--json benchmarks/results/compose-cpu.json]

Simulated samples: lengths are log-normal; the batch's expert shares come from ``megatron_ultraep.plan.generator`` and
each sample's are drawn around them, layer by layer (Dirichlet, concentration ``kappa`` x the batch's shares: small is
wild). Experts are reordered for the batch first (LPT), as they would be, so what is left is what micro-batches differ
by. ``busiest`` is the objective, tokens of the busiest node over the mean of all nodes (1.0 is ideal, the lower bound
of any packing); ``planned`` is the imbalance over ranks after replicas, from the exact loads. Both weigh every
(micro-batch, layer) by its tokens. A trace is real routes of a small model. Exits with 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_ultraep.layout import BatchLayout, ExpertLayout  # noqa: E402
from megatron_ultraep.plan import PlanSettings, comparators, solve  # noqa: E402
from megatron_ultraep.plan.compose import compose, objective  # noqa: E402
from megatron_ultraep.plan.generator import expert_weights, inclusion_probabilities  # noqa: E402
from megatron_ultraep.plan.loads import step_loads  # noqa: E402
from megatron_ultraep.replay import RoutingTrace, histogram  # noqa: E402
from scripts.bench_plan import versions  # noqa: E402
from scripts.machine import hardware  # noqa: E402

IMBALANCE = 2.0  # of the batch before experts are reordered
MEAN_ROWS, LENGTH_SPREAD = 1000, 0.6  # median rows of a sample; standard deviation of their logarithm
SLOTS = 2
MICRO_BATCHES = 16


@dataclass(frozen=True)
class Case:
    """A cluster and a batch; ``samples`` is per rank and micro-batch."""

    name: str
    ranks: int = 64
    node_size: int = 8
    experts: int = 256
    topk: int = 8
    layers: int = 8
    samples: int = 4
    kappa: float = 100

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.ranks} ranks in nodes of {self.node_size}, {self.experts} experts, {self.layers} MoE "
            f"layers, {self.samples} samples a rank and micro-batch, kappa {self.kappa:g}"
        )


CASES = (
    Case("wild", kappa=20),
    Case("medium", kappa=100),
    Case("batch-like", kappa=2000),
    Case("many layers", kappa=100, layers=48),
    Case("short samples", kappa=100, samples=16),
    Case("two nodes", kappa=100, ranks=16),
    Case("few samples", kappa=100, samples=1),
    Case("one node (nothing to gain)", kappa=100, ranks=8),
)


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples of a case: rows, histograms int ``[N, E]``, experts of a token, layouts of layers, token budget."""

    rows: list[int]
    histograms: list[np.ndarray]
    topk: int
    layouts: list[ExpertLayout]
    budget: int

    @property
    def ids(self) -> list[str]:
        return [str(i) for i in range(len(self.rows))]


def simulated(case: Case, seed: int) -> Batch:
    """A batch of a case."""
    rng = np.random.default_rng([seed, case.layers, case.samples])
    count = case.ranks * MICRO_BATCHES * case.samples
    rows = np.clip(np.exp(rng.normal(np.log(MEAN_ROWS), LENGTH_SPREAD, count)), 50, 6 * MEAN_ROWS).astype(np.int64)
    weights = expert_weights(case.ranks, case.experts, case.topk, IMBALANCE)
    shares = inclusion_probabilities(weights / weights.sum(), case.topk) / case.topk
    by_layer = np.stack([rng.permutation(shares) for _ in range(case.layers)])
    # Gamma draws, normalised, are Dirichlet; the floor keeps the smallest shares from vanishing in float64.
    drawn = rng.standard_gamma(np.maximum(case.kappa * by_layer, 1e-3), (count, *by_layer.shape)) + 1e-12
    drawn /= drawn.sum(axis=2, keepdims=True)
    histograms = rng.multinomial((rows * case.topk)[:, None], drawn).astype(np.int32)
    return _batch(
        rows.tolist(), list(histograms), case.topk, ExpertLayout(case.experts, case.ranks, (), case.node_size, SLOTS)
    )


def traced(path: Path, ranks: int, node_size: int) -> Batch:
    """The samples of a routing trace on some cluster."""
    trace = RoutingTrace.load(path)
    histograms = [histogram(s.routes, trace.experts) for s in trace.samples]
    layout = ExpertLayout(trace.experts, ranks, (), node_size, SLOTS)
    return _batch([len(s.routes) for s in trace.samples], histograms, trace.topk, layout)


def _batch(rows: list[int], histograms: list[np.ndarray], topk: int, layout: ExpertLayout) -> Batch:
    budget = max(max(rows), int(1.1 * sum(rows) / layout.ranks / MICRO_BATCHES))
    totals = np.sum(histograms, axis=0, dtype=np.int64)
    layouts = []
    for of_layer in totals:
        loads = np.zeros((layout.ranks, layout.experts), dtype=np.int64)
        loads[0] = of_layer
        layouts.append(comparators.reordered(loads, layout))
    return Batch(rows, histograms, topk, layouts, budget)


def planned_imbalance(batch: Batch, layout: BatchLayout) -> float:
    """Tokens of the busiest rank after replicas over the mean, both summed over (micro-batch, layer)."""
    sources = [(rank, 0) for rank in range(layout.data_parallel)]
    loads = step_loads(layout, dict(zip(batch.ids, batch.histograms, strict=True)), sources, topk=batch.topk)
    settings = PlanSettings(min_tokens=1)
    busiest = sum(
        int(solve(loads[m, n], of_layer, settings).after.max())
        for m in range(len(loads))
        for n, of_layer in enumerate(batch.layouts)
    )
    return busiest / (loads.sum() / layout.data_parallel)


def measure(case: str, kappa: float | None, seed: int | None, batch: Batch) -> Iterator[dict[str, Any]]:
    """One row per method, of the keys that the JSON file documents."""
    ranks = batch.layouts[0].ranks
    options = {"data_parallel": ranks, "tokens_per_micro_batch": batch.budget}
    for method in ("pack", "compose"):
        start = time.perf_counter()
        if method == "pack":
            layout = BatchLayout.pack(batch.ids, batch.rows, **options)
        else:
            layout = compose(batch.ids, batch.rows, batch.histograms, batch.layouts, **options)
        seconds = time.perf_counter() - start
        found = objective(layout, batch.histograms, batch.layouts)
        yield {
            "case": case,
            "kappa": kappa,
            "seed": seed,
            "method": method,
            "ranks": ranks,
            "node_size": batch.layouts[0].node_size,
            "layers": len(batch.layouts),
            "samples": len(batch.rows),
            "micro_batches": layout.num_microbatches,
            "busiest": found.imbalance,
            "bound": 1.0,
            "planned": planned_imbalance(batch, layout),
            "rows": sum(m.rows for rank in layout.micro_batches for m in rank),
            "seconds": seconds,
        }


def missed_bars(rows: list[dict[str, Any]]) -> list[str]:
    """What composition promises and does not keep."""
    missed = []
    packed = {(r["case"], r["seed"]): r for r in rows if r["method"] == "pack"}
    for row in rows:
        before = packed[row["case"], row["seed"]]
        for name in ("busiest", "rows", "micro_batches"):
            if row[name] > before[name]:
                missed.append(f"{row['case']}, seed {row['seed']}: {name} {row[name]:g} after, {before[name]:g} before")
    return missed


def print_case(title: str, rows: list[dict[str, Any]]) -> None:
    """Means over seeds."""
    print(f"\n{title}")
    for method in ("pack", "compose"):
        mine = [r for r in rows if r["method"] == method]
        mean = {name: statistics.fmean(r[name] for r in mine) for name in ("busiest", "planned", "rows", "seconds")}
        print(
            f"  {method:8} busiest {mean['busiest']:.4f} (bound 1)   planned {mean['planned']:.4f}   "
            f"{mine[0]['samples']} samples in {mine[0]['micro_batches']} micro-batches, {mean['rows']:.0f} rows   "
            f"{mean['seconds']:.2f} s",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="batches of each case (count; default 3)")
    parser.add_argument("--trace", type=Path, nargs="*", default=[], help="routing traces to compose, too")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()

    rows: list[dict[str, Any]] = []
    compose(["warm", "up"], [1, 1], [np.eye(2, dtype=np.int32)[:1]] * 2, [ExpertLayout(2, 2)], data_parallel=1,
            tokens_per_micro_batch=1)  # fmt: skip
    for case in CASES:
        of_case = [r for s in range(arguments.seeds) for r in measure(case.name, case.kappa, s, simulated(case, s))]
        print_case(str(case), of_case)
        rows += of_case
    for path in arguments.trace:
        for ranks, node_size in ((16, 8), (64, 8)):
            of_case = list(measure(f"{path.stem}, ep{ranks}", None, None, traced(path, ranks, node_size)))
            print_case(f"{path.name}: {ranks} ranks in nodes of {node_size}", of_case)
            rows += of_case
    missed = missed_bars(rows)
    print(
        "\nSimulated loads but for the trace's; measured time on one core. On one node with slots replicas even out "
        "whatever meets,\nso nothing is composed there. Bars, in every row: busiest, rows and micro-batches not above "
        f"pack's: {'kept' if not missed else 'MISSED'}"
    )
    print("\n".join(missed))
    if arguments.json:
        document = {"rows": rows, "hardware": hardware() | {"threads_used": 1}, "versions": versions()}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
