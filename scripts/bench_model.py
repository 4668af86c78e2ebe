#!/usr/bin/env python3
"""A training step of a small MoE model under imbalance: stock, ours, and the ideal, in one run.

    scripts/bench_model.py [--json FILE] [--bars]      # on all GPUs of this machine
    scripts/bench_model.py --layers 8 --preset 128x8
    scripts/bench_model.py --cpu                       # tiny, on gloo: a check of this script

A step: embedding, transformer layers (attention at sequence 4096, MoE), head and loss, forward and backward, of 2
micro-batches of 8192 tokens a rank; then Megatron's distributed optimizer (Adam, gradients clipped). Methods, routes
and columns are those of ``bench_layer.py``: ``stock``, ``ours`` on the same routes, ``foresight``, ours with plans made
before the step, and ``balanced``, stock on routes of imbalance 1. Measured, not simulated.

Bars (--bars): 0.97 of balanced, 0.985 with foresight, whose planning and placement hold up at most 0.5% of the step; up
to an imbalance of 1.1, 0.99 of stock; device memory of ours at the highest imbalance is at most that of balanced, plus
the slots, plus 2%.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts import bench_common  # noqa: E402


def make(shape: Any) -> Any:
    """Build model and optimizer on a rank."""
    from scripts.bench_subject import Model

    return Model(shape)


def bar(imbalance: float) -> float:
    return 0.97


def main(arguments: list[str] | None = None, pools: Any = None) -> int:
    from scripts import bench_model  # under this name ranks find make(), not under __main__

    parser = bench_common.parser(__doc__ or "")
    parser.add_argument("--layers", type=int, default=None, metavar="N", help="transformer layers (default: 4)")
    parser.add_argument("--vocabulary", type=int, metavar="N", help="rows of the embedding (default: 32768)")
    parser.add_argument("--micro-batches", type=int, default=2, metavar="N", help="of a step")
    parser.add_argument("--overlap", action="store_true", help="overlap gradient reduction and parameter gathering")
    given = parser.parse_args(arguments)
    layers = 2 if given.cpu else 4
    shapes = bench_common.shapes(
        given, ("32x4",), kind="model", layers=layers, micro_batches=given.micro_batches, draws=2
    )
    return bench_common.run(
        bench_model.make,
        given,
        shapes,
        warmup=2,
        bar=bar,
        memory=True,
        notes=bench_common.NOTES,
        foresight=0.985,
        pools=pools,
    )


if __name__ == "__main__":
    sys.exit(main())
