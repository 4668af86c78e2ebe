#!/usr/bin/env python3
"""Training with balancing beside training without: losses, gradients, weights, and how far balancing went.

    scripts/check_balance.py [--json FILE] [--only WORD]
    PYTHONPATH=.venv/megatron-core-0.19.2 scripts/check_balance.py
    scripts/check_balance.py --gpu      # ranks on GPUs: NCCL, TEGroupedMLP; layouts that the GPUs suffice for

A model whose routers are biased trains under each layout twice, once with balancing (no gate, no floor, so that every
micro-batch uses replicas). All other things are equal, so every difference is balancing's.

- ``float64, own routes``: 50 steps, each router choosing by itself. Bar: every loss within 1e-7, relative.
- ``float32, replayed``: 20 steps on captured routes. Bars: every loss within 1e-5, relative; the gradients of step 1
  within 1e-5 in the worst tensor, max|dg| / max|g|.
- ``noise`` rows: stock on another layout against stock, no bar: what another order of summation does alone.
- Imbalance (max/mean over ranks of tokens computed): the mean before balancing and the largest after it, over all
  micro-batches and layers; ``over`` counts those above max(1.05, bound + 1 token). Bar: 0, and replicas > 0. Before
  balancing it must be at least 1.6 on 2 expert-parallel ranks and 2 on 4, or nothing was shown.

On GPUs, Transformer Engine has no float64. There float32 runs 50 steps too, with each router choosing by itself, whose
losses have no bar (a token whose top-k flips changes them more than rounding does); and bfloat16 rows have no bar but
their noise row.

Measured, not simulated. Exits with 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("PYTHONWARNINGS", "ignore")  # Megatron's, once per rank and model

from scripts.machine import hardware  # noqa: E402
from tests.ranks import RankPools  # noqa: E402
from tests.rl.training.balancing import BALANCE, biased_model, merge_steps, several_steps  # noqa: E402
from tests.rl.training.common import megatron_version, worst  # noqa: E402

IMBALANCE = {2: 1.6, 4: 2.0}


@dataclass(frozen=True)
class Mode:
    """How a case runs: dtype, whose routes, how long, and its bars (None: shown, not judged)."""

    dtype: str
    routes: str
    steps: int
    loss_bar: float | None = None
    gradient_bar: float | None = None

    def __str__(self) -> str:
        return f"{self.dtype}, {'replayed' if self.routes == 'replay' else 'own'} routes"


FLOAT64 = Mode("float64", "own", 50, loss_bar=1e-7, gradient_bar=1e-8)
FLOAT32 = Mode("float32", "replay", 20, loss_bar=1e-5, gradient_bar=1e-5)
FLOAT32_OWN = Mode("float32", "own", 50, gradient_bar=1e-5)
BFLOAT16 = Mode("bfloat16", "replay", 20)
ON_CPU, ON_GPU = (FLOAT64, FLOAT32), (FLOAT32, FLOAT32_OWN, BFLOAT16)


@dataclass(frozen=True)
class Case:
    """A layout to train under; ``modes`` by default those of the device."""

    name: str
    ranks: int
    layout: dict[str, Any]
    spec: dict[str, Any] = field(default_factory=dict)
    modes: tuple[Mode, ...] = ()


DISTRIBUTED = {"distributed_optimizer": True, "overlap": True}
CASES = (
    Case("EP 2", 2, {"ep": 2}),
    Case("EP 4", 4, {"ep": 4}),
    Case("EP 2 x expert-data-parallel 2", 4, {"ep": 2}),
    Case("PP 2 x EP 2", 4, {"pp": 2, "ep": 2}),
    Case("PP 2, VPP 2 x EP 2", 4, {"pp": 2, "vpp": 2, "ep": 2}),
    Case("TP 2 x EP 2", 2, {"tp": 2, "ep": 2}),
    Case("EP 2, recompute full", 2, {"ep": 2}, {"recompute": ("full",)}),
    Case("EP 2, recompute moe", 2, {"ep": 2}, {"recompute": ("selective", ("moe",))}),
    Case("EP 2, recompute norms", 2, {"ep": 2}, {"recompute": ("selective", ("layernorm",))}),
    Case("EP 2 x DP 2, overlapped reduction", 4, {"ep": 2}, {"overlap": True}),
    Case("PP 2, VPP 2 x EP 2, overlapped", 4, {"pp": 2, "vpp": 2, "ep": 2}, {"overlap": True}),
    # Megatron's distributed optimizer takes no float64.
    Case("EP 2, distributed optimizer", 2, {"ep": 2}, {"distributed_optimizer": True}, (FLOAT32,)),
    Case("EP 2 x DP 2, distributed optimizer, overlapped", 4, {"ep": 2}, DISTRIBUTED, (FLOAT32,)),
)
FUSED = {"fuse_gradients": True}
GPU_CASES = (
    Case("EP 2", 2, {"ep": 2}),
    Case("EP 4", 4, {"ep": 4}),
    Case("PP 2 x EP 2", 4, {"pp": 2, "ep": 2}, modes=(FLOAT32,)),
    Case("PP 2, VPP 2 x EP 2", 4, {"pp": 2, "vpp": 2, "ep": 2}, modes=(FLOAT32,)),
    Case("TP 2 x EP 2", 2, {"tp": 2, "ep": 2}, modes=(FLOAT32,)),
    Case("EP 2, recompute full", 2, {"ep": 2}, {"recompute": ("full",)}, (FLOAT32,)),
    Case("EP 2, recompute moe", 2, {"ep": 2}, {"recompute": ("selective", ("moe",))}, (FLOAT32,)),
    Case("EP 2, recompute expert activation", 2, {"ep": 2}, {"recompute": ("selective", ("moe_act",))}, (FLOAT32,)),
    Case("EP 2, distributed optimizer, overlapped", 2, {"ep": 2}, DISTRIBUTED, (FLOAT32, BFLOAT16)),
    Case("EP 2, fused gradients", 2, {"ep": 2}, FUSED, (FLOAT32, BFLOAT16)),
    Case("EP 2, fused permutation", 2, {"ep": 2}, {"permute_fusion": True}, (FLOAT32, BFLOAT16)),
    Case("EP 2, distributed, overlapped, fused", 2, {"ep": 2}, DISTRIBUTED | FUSED, (FLOAT32, BFLOAT16)),
    Case("EP 2 x DP 2, distributed, overlapped, fused", 4, {"ep": 2}, DISTRIBUTED | FUSED, (FLOAT32, BFLOAT16)),
    Case("PP 2 x EP 2, overlapped, fused", 4, {"pp": 2, "ep": 2}, DISTRIBUTED | FUSED, (FLOAT32,)),
)
# Stock against stock: what the second layout's order of summation does.
NOISE = (
    ("noise: stock EP 2 against stock EP 1", 2, {"ep": 2}, {}),
    ("noise: stock EP 4 against stock EP 2", 4, {"ep": 4}, {"ep": 2}),
)


@dataclass(frozen=True)
class Row:
    layout: str
    dtype: str
    routes: str
    steps: int
    loss_difference: float
    gradient_difference: float
    weight_difference: float
    replicas: int
    before_mean: float
    after_max: float
    over: int
    seconds: float
    noise: bool = False
    missed: tuple[str, ...] = ()


def run(pools: Any, model: str, ranks: int, layout: dict[str, Any], mode: Mode, **more: Any) -> dict[str, Any]:
    """One training run, merged over ranks."""
    arguments = {
        "balance": None,
        "distributed_optimizer": False,
        "budget": 64,
        "replay": mode.routes == "replay",
    } | more
    results = pools(ranks).run(
        several_steps, model, layout, dtype=mode.dtype, routes=mode.routes, steps=mode.steps, timeout=900, **arguments
    )
    return merge_steps(results)


def compare(case: str, mode: Mode, got: dict[str, Any], base: dict[str, Any], seconds: float, **more: Any) -> Row:
    """A row from two runs."""
    import numpy as np

    return Row(
        layout=case,
        dtype=mode.dtype,
        routes=mode.routes,
        steps=mode.steps,
        loss_difference=float(np.abs(got["losses"] / base["losses"] - 1).max()),
        gradient_difference=worst(got["tensors"], base["tensors"]),
        weight_difference=worst(got["weights"], base["weights"]),
        replicas=got["replicas"],
        before_mean=got["before_mean"],
        after_max=got["after_max"],
        over=got["over"],
        seconds=seconds,
        **more,
    )


def judged(row: Row, mode: Mode, ep: int) -> Row:
    """The row with the bars it misses."""
    missed = []
    # "not <=": a difference that is no number misses too.
    if mode.loss_bar is not None and not row.loss_difference <= mode.loss_bar:
        missed.append(f"loss > {mode.loss_bar:.0e}")
    if mode.gradient_bar is not None and not row.gradient_difference <= mode.gradient_bar:
        missed.append(f"gradients > {mode.gradient_bar:.0e}")
    if row.replicas == 0:
        missed.append("no replica")
    if row.over:
        missed.append(f"{row.over} left unbalanced")
    # Captured routes are made up and uniform: only routers that choose by themselves are biased.
    if mode.routes == "own" and row.before_mean < IMBALANCE[ep]:
        missed.append(f"imbalance before < {IMBALANCE[ep]}")
    return dataclasses.replace(row, missed=tuple(missed))


HEADER = ("layout", "dtype", "routes", "steps", "|d loss|/loss", "max|dg|/max|g|", "weights", "replicas", "before",
          "after max", "over", "")  # fmt: skip


def table(rows: list[Row]) -> str:
    lines = [
        (
            row.layout,
            row.dtype,
            row.routes,
            str(row.steps),
            f"{row.loss_difference:.1e}",
            f"{row.gradient_difference:.1e}",
            f"{row.weight_difference:.1e}",
            "" if row.noise else str(row.replicas),
            "" if row.noise else f"{row.before_mean:.2f}",
            "" if row.noise else f"{row.after_max:.3f}",
            "" if row.noise else str(row.over),
            "MISSED " + ", ".join(row.missed) if row.missed else "",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [HEADER, *lines]) for i in range(len(HEADER))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in [HEADER, tuple("-" * w for w in widths), *lines]
    )


def all_rows(pools: Any, model: str, arguments: argparse.Namespace) -> list[Row]:
    """Run everything that is asked for, printing rows as they come."""
    rows: list[Row] = []
    balance = dataclasses.replace(BALANCE, transport=arguments.transport)

    def show(row: Row) -> None:
        rows.append(row)
        print(table([row]).splitlines()[-1], flush=True)

    for case in GPU_CASES if arguments.gpu else CASES:
        for mode in case.modes or (ON_GPU if arguments.gpu else ON_CPU):
            if arguments.only not in case.name or case.ranks > arguments.ranks:
                continue
            started = time.perf_counter()
            base = run(pools, model, case.ranks, case.layout, mode, **case.spec)
            got = run(pools, model, case.ranks, case.layout, mode, **case.spec | {"balance": balance})
            row = compare(case.name, mode, got, base, time.perf_counter() - started)
            show(judged(row, mode, case.layout["ep"]))
    for name, ranks, layout, other in NOISE:
        if arguments.only not in name or ranks > arguments.ranks:
            continue
        for mode in ON_GPU if arguments.gpu else ON_CPU:
            started = time.perf_counter()
            base = run(pools, model, max(1, other.get("ep", 1)), other, mode)
            got = run(pools, model, ranks, layout, mode)
            show(compare(name, mode, got, base, time.perf_counter() - started, noise=True))
    return rows


def device_text() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {}
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"gpus": names, "cuda": torch.version.cuda}


def main() -> int:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write rows, versions and hardware there")
    parser.add_argument("--gpu", action="store_true", help="ranks on GPUs")
    parser.add_argument("--ranks", type=int, default=4, help="skip layouts of more ranks; on GPUs at most their number")
    parser.add_argument("--only", default="", metavar="WORD", help="only layouts whose name contains this")
    parser.add_argument("--transport", default="auto", choices=("auto", "collective", "symmetric"))
    parser.add_argument("--strength", type=float, default=25.0, help="of the routers' bias, in logits")
    parser.add_argument("--seed", type=int, default=3, help="of the model's weights")
    arguments = parser.parse_args()

    if arguments.gpu:
        from scripts.gpu_ranks import GpuPools

        arguments.ranks = min(arguments.ranks, torch.cuda.device_count())
        pools: Any = GpuPools()
        size = {"hidden": 128, "head_dim": 64, "moe_intermediate": 128}
    else:
        pools, size = RankPools(), {}
    try:
        with tempfile.TemporaryDirectory(prefix="ultraep-balance-") as root:
            model = biased_model(Path(root) / "model", strength=arguments.strength, seed=arguments.seed, **size)
            versions = {
                "megatron-core": pools(1).run(megatron_version)[0],
                "torch": torch.__version__,
                "python": platform.python_version(),
            }
            print(", ".join(f"{name} {version}" for name, version in versions.items()), flush=True)
            rows = all_rows(pools, model, arguments)
    finally:
        pools.stop()
    print("\n" + table(rows))
    missed = [row for row in rows if row.missed]
    print(f"{sum(not row.noise for row in rows)} compared, {len(missed)} missed a bar")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"versions": versions, "hardware": hardware() | device_text(), "seed": arguments.seed} | {
            "model": "tiny Qwen3-MoE with biased routers: 4 layers, 8 experts, top-2; policy loss",
            "balance": asdict(BALANCE) | {"transport": arguments.transport},
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
