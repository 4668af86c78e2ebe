#!/usr/bin/env python3
"""Loss and gradients of one step under every layout, beside one rank's, with the noise of stock against stock.

    scripts/check_parity.py [--json FILE]
    PYTHONPATH=.venv/megatron-core-0.19.2 scripts/check_parity.py

Same seed, data and captured routes. ``|d loss|`` is the absolute difference to the baseline; ``max|dg|/max|g|`` is that
of the worst gradient tensor, all tensors of the model in logical order. Rows marked ``stock`` replay nothing: routers
choose by themselves, on unmodified Megatron, and are compared with stock on one rank; they show what another order of
summation alone does. Exits with 1 when a row of ours is above its bar: 1e-8 in float64, 1e-5 in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("PYTHONWARNINGS", "ignore")  # Megatron's, once per rank and model

from scripts.machine import hardware  # noqa: E402
from tests.ranks import RankPools  # noqa: E402
from tests.rl.training.common import megatron_version, merge, one_step, worst  # noqa: E402

BARS = {"float64": 1e-8, "float32": 1e-5}


@dataclass(frozen=True)
class Case:
    """A layout to compare; ``stock`` cases let routers choose and are compared with stock on one rank."""

    name: str
    ranks: int = 1
    layout: dict[str, Any] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)
    stock: bool = False


CASES = (
    Case("EP 1, data parallel 2", 2),
    Case("EP 2", 2, {"ep": 2}),
    Case("PP 2", 2, {"pp": 2}),
    Case("PP 4", 4, {"pp": 4}),
    Case("PP 2 x EP 2", 4, {"pp": 2, "ep": 2}),
    Case("PP 2, VPP 2", 2, {"pp": 2, "vpp": 2}),
    Case("TP 2 x EP 2", 2, {"tp": 2, "ep": 2}),
    Case("TP 2 x ETP 2", 2, {"tp": 2, "etp": 2}),
    Case("TP 2 x PP 2 x EP 2", 4, {"tp": 2, "pp": 2, "ep": 2}),
    Case("EP 2, recompute full", 2, {"ep": 2}, {"recompute": ("full",)}),
    Case("PP 2, VPP 2, recompute full", 2, {"pp": 2, "vpp": 2}, {"recompute": ("full",)}),
    Case("EP 2, recompute moe", 2, {"ep": 2}, {"recompute": ("selective", ("moe",))}),
    Case("EP 2, recompute core_attn", 2, {"ep": 2}, {"recompute": ("selective", ("core_attn",))}),
    Case("EP 2, recompute layernorm", 2, {"ep": 2}, {"recompute": ("selective", ("layernorm",))}),
    Case("noise: stock EP 2", 2, {"ep": 2}, stock=True),
    Case("noise: stock PP 2 x EP 2", 4, {"pp": 2, "ep": 2}, stock=True),
    Case("noise: stock TP 2 x EP 2", 2, {"tp": 2, "ep": 2}, stock=True),
    Case("noise: stock EP 1, packed differently", 1, {}, {"budget": 96}, stock=True),
)


@dataclass(frozen=True)
class Row:
    layout: str
    stock: bool
    dtype: str
    loss: float
    loss_difference: float
    gradient_difference: float
    bar: float | None

    @property
    def passed(self) -> bool:
        return self.bar is None or max(self.gradient_difference, self.loss_difference) <= self.bar


def compare(pools: RankPools, directory: str) -> list[Row]:
    """One row per dtype and case, in the order of ``BARS`` and ``CASES``."""

    def run(ranks: int, layout: dict[str, Any], dtype: str, stock: bool, **spec: Any) -> dict[str, Any]:
        mode = {"routes": "own", "replay": False} if stock else {"routes": "replay"}
        answers = pools(ranks).run(
            one_step, directory, layout, dtype=dtype, distributed_optimizer=False, **mode, **spec
        )
        return merge(answers)

    rows = []
    for dtype, bar in BARS.items():
        base = {stock: run(1, {}, dtype, stock) for stock in (False, True)}
        for stock, label in ((False, "one rank (baseline)"), (True, "noise: stock, one rank (baseline)")):
            rows.append(Row(label, stock, dtype, base[stock]["loss"], 0.0, 0.0, None))
        for case in CASES:
            got = run(case.ranks, case.layout, dtype, case.stock, **case.spec)
            rows.append(
                Row(
                    layout=case.name,
                    stock=case.stock,
                    dtype=dtype,
                    loss=got["loss"],
                    loss_difference=abs(got["loss"] - base[case.stock]["loss"]),
                    gradient_difference=worst(got["tensors"], base[case.stock]["tensors"]),
                    bar=None if case.stock else bar,
                )
            )
    return sorted(rows, key=lambda row: (list(BARS).index(row.dtype), row.stock))


def table(rows: list[Row]) -> str:
    header = ("layout", "dtype", "loss", "|d loss|", "max|dg|/max|g|", "bar")
    lines = [
        (
            row.layout,
            row.dtype,
            f"{row.loss:.12f}",
            f"{row.loss_difference:.1e}",
            f"{row.gradient_difference:.1e}",
            "" if row.bar is None else f"{row.bar:.0e}" + ("" if row.passed else "  MISSED"),
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in [header, tuple("-" * w for w in widths), *lines]
    )


def main() -> int:
    import torch

    from rl.models import tiny

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write rows, versions and hardware there")
    parser.add_argument("--seed", type=int, default=3, help="of the model's weights")
    arguments = parser.parse_args()

    pools = RankPools()
    try:
        with tempfile.TemporaryDirectory(prefix="ultraep-parity-") as root:
            directory = str(tiny.qwen3_moe(Path(root) / "model", seed=arguments.seed))
            versions = {
                "megatron-core": pools(1).run(megatron_version)[0],
                "torch": torch.__version__,
                "python": platform.python_version(),
            }
            print(", ".join(f"{name} {version}" for name, version in versions.items()), flush=True)
            rows = compare(pools, directory)
    finally:
        pools.stop()
    print(table(rows))
    missed = [row for row in rows if not row.passed]
    print(f"{sum(row.bar is not None for row in rows)} compared, {len(missed)} above their bar")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"versions": versions, "hardware": hardware(), "seed": arguments.seed} | {
            "model": "tiny Qwen3-MoE: 4 layers, 8 experts, top-2; 10 samples of 7 to 40 tokens, policy loss",
            "rows": [asdict(row) | {"passed": row.passed} for row in rows],
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
