#!/usr/bin/env python3
"""Training whose experts change their homes before every step beside training that never moves one.

    scripts/check_reorder.py [--json FILE] [--only WORD]
    PYTHONPATH=.venv/megatron-core-0.19.2 scripts/check_reorder.py
    scripts/check_reorder.py --gpu      # ranks on GPUs: NCCL, TEGroupedMLP; layouts that the GPUs suffice for

Under each layout a tiny model with biased routers trains for 20 steps: stock, without the plugin; and balanced, where
before every step every layer's experts move to homes drawn at random (another permutation for every step and layer).
The moving run writes a checkpoint in the middle, with experts away from where Megatron has them. From it go on: a stock
run; and a run that moves experts too, to other homes. A second checkpoint is written by the stock run and loaded by a
moving one.

- ``moved``, ``stock from moved``, ``moved from moved``, ``moved from stock``: largest relative difference of any loss
  to the stock run that was never interrupted. ``weights``: of the exported weights after the last step, worst tensor,
  max|dw| / max|w|, over all of these runs.
- float64, plain optimizer, each router choosing by itself. Bar: losses and weights within 1e-7.
- float32, distributed optimizer (which takes no float64), on captured routes. Bar: losses within 1e-5; the ``noise``
  row says what another order of summation does to stock alone.
  On GPUs, where Transformer Engine has no float64, the plain optimizer runs in float32 too, with the same bar.
- Experts and bytes moved are those of one pipeline stage. Experts must have moved, and replicas been used, or nothing
  was shown.

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("PYTHONWARNINGS", "ignore")  # Megatron's, once per rank and model

from scripts.machine import hardware  # noqa: E402
from tests.ranks import RankPools  # noqa: E402
from tests.rl.training.balancing import BALANCE, biased_model  # noqa: E402
from tests.rl.training.common import megatron_version, worst  # noqa: E402
from tests.rl.training.reordering import LIMIT_BYTES, Run, difference, merge, train  # noqa: E402

BARS = {"float64": 1e-7, "float32": 1e-5}
SEED, OTHER_SEED = 5, 6


@dataclass(frozen=True)
class Case:
    """A layout to train under, and its ranks."""

    name: str
    ranks: int
    run: Run


PLAIN = Run({})
SHARDED = Run({}, dtype="float32", distributed=True)


def cases(base: Run) -> list[Case]:
    """Every layout with one dtype and optimizer."""
    layouts = (
        ("EP 2", 2, {"ep": 2}, False),
        ("EP 4", 4, {"ep": 4}, False),
        ("PP 2 x EP 2", 4, {"pp": 2, "ep": 2}, False),
        ("EP 2 x expert-data-parallel 2", 4, {"ep": 2}, False),
        ("EP 2 x expert-data-parallel 2, overlapped", 4, {"ep": 2}, True),
    )
    return [
        Case(name, ranks, dataclasses.replace(base, layout=layout, overlap=overlap))
        for name, ranks, layout, overlap in layouts
    ]


@dataclass(frozen=True)
class Row:
    """Differences are relative; see the module's text."""

    layout: str
    dtype: str
    optimizer: str
    steps: int
    moved: float
    stock_from_moved: float | None = None
    moved_from_moved: float | None = None
    moved_from_stock: float | None = None
    weights: float = 0.0
    experts_moved: int = 0
    mib_moved: float = 0.0
    waves: int = 0
    ms_per_move: float = 0.0
    replicas: int = 0
    seconds: float = 0.0
    noise: bool = False
    missed: tuple[str, ...] = ()


def compared(pools: Any, model: str, case: Case, steps: int, root: Path) -> Row:
    """Run everything under one layout."""
    started, middle = time.perf_counter(), steps // 2
    paths = {name: root / f"{case.name} {case.run.dtype} {name}" for name in ("moved", "stock")}
    for path in paths.values():
        path.mkdir()

    def result(**changes: Any) -> dict[str, Any]:
        run = dataclasses.replace(case.run, **{"steps": (0, steps)} | changes)
        return merge(pools(case.ranks).run(train, model, run, timeout=900))

    moving = {"seed": SEED, "balance": BALANCE}
    later = {"steps": (middle, steps)}
    stock = result(save=(middle - 1, str(paths["stock"])))
    moved = result(**moving, save=(middle - 1, str(paths["moved"])))
    resumed = {
        "stock_from_moved": result(**later, load=str(paths["moved"])),
        "moved_from_moved": result(**later, **moving | {"seed": OTHER_SEED}, load=str(paths["moved"])),
        "moved_from_stock": result(**later, **moving, load=str(paths["stock"])),
    }
    return Row(
        layout=case.name,
        dtype=case.run.dtype,
        optimizer="distributed" if case.run.distributed else "plain",
        steps=steps,
        moved=difference(moved["losses"], stock["losses"]),
        **{name: difference(each["losses"], stock["losses"][middle:]) for name, each in resumed.items()},
        weights=max(worst(each["weights"], stock["weights"]) for each in (moved, *resumed.values())),
        experts_moved=moved["moved"],
        mib_moved=moved["bytes"] / 2**20,
        waves=moved["waves"],
        ms_per_move=1e3 * moved["seconds"] / steps,
        replicas=moved["replicas"],
        seconds=time.perf_counter() - started,
    )


def noise(pools: Any, model: str, base: Run, steps: int) -> Row:
    """Stock on another layout against stock."""
    started = time.perf_counter()
    one, other = (
        merge(pools(ep).run(train, model, dataclasses.replace(base, layout={"ep": ep}, steps=(0, steps)), timeout=900))
        for ep in (4, 2)
    )
    return Row(
        layout="noise: stock EP 4 against stock EP 2",
        dtype=base.dtype,
        optimizer="distributed" if base.distributed else "plain",
        steps=steps,
        moved=difference(one["losses"], other["losses"]),
        weights=worst(one["weights"], other["weights"]),
        seconds=time.perf_counter() - started,
        noise=True,
    )


def judged(row: Row) -> Row:
    """The row with the bars it misses."""
    bar, missed = BARS[row.dtype], []
    for name in ("moved", "stock_from_moved", "moved_from_moved", "moved_from_stock"):
        if not getattr(row, name) <= bar:  # "not <=": a difference that is no number misses too
            missed.append(f"{name.replace('_', ' ')} > {bar:.0e}")
    if row.dtype == "float64" and not row.weights <= bar:
        missed.append(f"weights > {bar:.0e}")
    if row.experts_moved == 0 or row.replicas == 0:
        missed.append("nothing moved, or no replica")
    return dataclasses.replace(row, missed=tuple(missed))


HEADER = ("layout", "dtype", "optimizer", "steps", "moved", "stock from moved", "moved from moved", "moved from stock",
          "weights", "experts moved", "MiB", "ms a move", "")  # fmt: skip


def table(rows: list[Row]) -> str:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.1e}"

    lines = [
        (
            row.layout,
            row.dtype,
            row.optimizer,
            str(row.steps),
            number(row.moved),
            number(row.stock_from_moved),
            number(row.moved_from_moved),
            number(row.moved_from_stock),
            number(row.weights),
            "" if row.noise else str(row.experts_moved),
            "" if row.noise else f"{row.mib_moved:.1f}",
            "" if row.noise else f"{row.ms_per_move:.1f}",
            "MISSED " + ", ".join(row.missed) if row.missed else "",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [HEADER, *lines]) for i in range(len(HEADER))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in [HEADER, tuple("-" * w for w in widths), *lines]
    )


def main(given: list[str] | None = None, pools: Any = None) -> int:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write rows, versions and hardware there")
    parser.add_argument("--gpu", action="store_true", help="ranks on GPUs")
    parser.add_argument("--ranks", type=int, default=4, help="skip layouts of more ranks; on GPUs at most their number")
    parser.add_argument("--only", default="", metavar="WORD", help="only layouts whose name contains this")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of a run, even")
    parser.add_argument("--strength", type=float, default=25.0, help="of the routers' bias, in logits")
    parser.add_argument("--seed", type=int, default=3, help="of the model's weights")
    arguments = parser.parse_args(given)

    rows: list[Row] = []

    def show(row: Row) -> None:
        rows.append(row)
        print(table([row]).splitlines()[-1], flush=True)

    size: dict[str, int] = {}
    bases = (PLAIN, SHARDED)
    if arguments.gpu:
        from scripts.gpu_ranks import GpuPools

        arguments.ranks = min(arguments.ranks, torch.cuda.device_count())
        size = {"hidden": 128, "head_dim": 64, "moe_intermediate": 128}
        bases = (dataclasses.replace(PLAIN, dtype="float32"), SHARDED)
    own = None if pools is not None else GpuPools() if arguments.gpu else RankPools()
    pools = pools or own
    try:
        with tempfile.TemporaryDirectory(prefix="ultraep-reorder-") as root:
            model = biased_model(Path(root) / "model", strength=arguments.strength, seed=arguments.seed, **size)
            versions = {
                "megatron-core": pools(1).run(megatron_version)[0],
                "torch": torch.__version__,
                "python": platform.python_version(),
            }
            print(", ".join(f"{name} {version}" for name, version in versions.items()), flush=True)
            for base in bases:
                for case in cases(base):
                    if arguments.only in case.name and case.ranks <= arguments.ranks:
                        show(judged(compared(pools, model, case, arguments.steps, Path(root))))
                if arguments.only in "noise" and arguments.ranks >= 4:
                    show(noise(pools, model, base, arguments.steps))
    finally:
        if own is not None:
            own.stop()
    print("\n" + table(rows))
    missed = [row for row in rows if row.missed]
    print(f"{sum(not row.noise for row in rows)} compared, {len(missed)} missed a bar")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"versions": versions, "hardware": hardware(), "seed": arguments.seed, "measured": True} | {
            "model": "tiny Qwen3-MoE with biased routers: 4 layers, 8 experts, top-2; policy loss",
            "balance": asdict(BALANCE),
            "limit_bytes": LIMIT_BYTES,
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
