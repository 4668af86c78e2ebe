#!/usr/bin/env python3
"""Forward and backward of one MoE layer under imbalance: stock, ours, and the ideal, in one run.

    scripts/bench_layer.py [--json FILE] [--bars]              # on all GPUs of this machine, both presets
    scripts/bench_layer.py --transformer-layer                 # with attention at sequence 4096 around it
    scripts/bench_layer.py --trace FILE --experts 128 --topk 8 # routes that rollout captured
    scripts/bench_layer.py --cpu                               # tiny, on gloo: a check of this script

``stock`` gets routes of the imbalance asked for; ``ours`` gets the same routes and has balancing attached, planning on
exact loads; ``foresight`` the same with plans made before; ``balanced`` is stock on routes of imbalance 1, the ideal.
All run in one process, one after the other, on the same weights. Routes come from the generator of simulated loads (or
a trace) and are forced by routing replay; probabilities and their gradients are the router's own. bf16, gradients added
to DDP's buffers in the kernels, all-to-all dispatcher.

Columns: imbalance (max / mean over ranks of tokens computed) before and after balancing; median, p10 and p90 of the
time of an iteration, each the slowest rank's; ``of balanced``: ms of balanced / ms; device memory in use at the end of
the iterations (GiB, fullest rank, as the driver says it, reserved and cached memory and communicators included, the
CUDA context not); replicas of a micro-batch. Measured, not simulated.

Bars (--bars): 0.95 of balanced up to an imbalance of 2, 0.90 above; a transformer layer 0.96; up to 1.1, 0.99 of stock.
With --reduction, in a transformer layer at an imbalance of 2: the way home of replicas' gradients adds at most 1% to a
backward (the host queues each backward before it starts, and ranks meet before it, so that only the device is timed).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts import bench_common  # noqa: E402


def make(shape: Any) -> Any:
    """Build the layer on a rank."""
    from scripts.bench_subject import Layer

    return Layer(shape)


def layer_bar(imbalance: float) -> float:
    return 0.95 if imbalance <= 2 else 0.90


def transformer_layer_bar(imbalance: float) -> float:
    return 0.96


def main(arguments: list[str] | None = None, pools: Any = None) -> int:
    from scripts import bench_layer  # under this name ranks find make(), not under __main__

    parser = bench_common.parser(__doc__ or "")
    parser.add_argument("--transformer-layer", action="store_true", help="attention, norms and the MoE layer")
    parser.add_argument("--reduction", action="store_true", help="also time backwards without gradients' way home")
    parser.add_argument(
        "--reduce-blocks",
        nargs="+",
        type=int,
        default=[],
        metavar="N",
        help="with --reduction: other shares of the GPU too",
    )
    given = parser.parse_args(arguments)
    kind = "transformer-layer" if given.transformer_layer else "layer"
    return bench_common.run(
        bench_layer.make,
        given,
        bench_common.shapes(given, ("32x4", "128x8"), kind=kind),
        warmup=5,
        bar=transformer_layer_bar if given.transformer_layer else layer_bar,
        memory=False,
        notes=bench_common.NOTES,
        pools=pools,
    )


if __name__ == "__main__":
    sys.exit(main())
