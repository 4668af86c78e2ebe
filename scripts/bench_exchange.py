#!/usr/bin/env python
"""What it costs to place replica weights and to send replica gradients home, on the GPUs of one host.

    python scripts/bench_exchange.py [--gpus N] [--json FILE] [--bars] [--sweep]
    python scripts/bench_exchange.py --cpu      # gloo, tiny sizes, host build of the kernels: a smoke test, no bars

All times are measured: between two CUDA events, queued behind a spinning kernel so that the host's work is not in it,
from a moment that all ranks have reached on their devices; each is the slowest rank's, the median of the repeats. An
expert is two matrices of bf16, 4096 x 3072 and 1536 x 4096; three experts are at home on each rank.

1. place: from before ``place`` until ``await_placed`` and ``weights_sent`` are done. Comparator: the same bytes by
   ``Tensor.copy_`` into the peers' slots, one stream for each peer. Bound: the best large copy between peers.
2. reduce: from before ``send_home`` until ``await_home`` is done. Comparator: ``copy_`` out of the peers' slots, then
   an addition. Bound: the large copy out of a peer. Bits are those of torch's sums in the same order, five times.
3. control: loads beside ``dist.all_gather_into_tensor``; empty plans. Bound: one launch.
4. GEMMs, 8192 cubed in bf16 on the current stream, alone and beside an exchange. ``efficiency`` is the share of the
   shorter of the two that the longer one hides.

Bar: placement takes at most 1.05 of the bare copy's time. With ``--bars`` exits with 1 when it is missed; always when
bits are wrong. ``CUDA_DEVICE_MAX_CONNECTIONS`` is 1, as Megatron wants it, unless the environment says otherwise.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_ultraep.runtime import symmetric  # noqa: E402
from scripts.bench_exchange_rank import measure  # noqa: E402
from scripts.bench_exchange_rows import Options, Results, Row  # noqa: E402
from scripts.bench_results import write  # noqa: E402
from scripts.machine import hardware  # noqa: E402

EXPERT, TINY = ((4096, 3072), (1536, 4096)), ((64, 48), (24, 64))


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}


def document(results: Results, options: Options, ranks: int) -> dict[str, Any]:
    """What the JSON file has."""
    settings = asdict(options) | {
        "ranks": ranks,
        "place_blocks": symmetric._PLACE_BLOCKS,
        "reduce_blocks": symmetric._REDUCE_BLOCKS,
        "CUDA_DEVICE_MAX_CONNECTIONS": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", ""),
    }
    return {
        "measured": True,
        "hardware": hardware(),
        "versions": versions(),
        "settings": settings,
        "limits": rounded(asdict(results.limits)),
        "rows": [rounded(asdict(row) | {"kept": row.kept}) for row in results.rows],
        "overlaps": [
            rounded(asdict(each) | {"slowdown": each.slowdown, "efficiency": each.efficiency})
            for each in results.overlaps
        ],
    }


def verdict(rows: list[Row], *, bars: bool) -> int:
    """Print what is missed or wrong; the exit code."""
    wrong = [f"{r.part}, {r.case}, {r.dtype}, {r.method}: bits are wrong" for r in rows if r.equal is False]
    missed = [
        f"{r.part}, {r.case}: {r.us:.1f} us, the bar is {r.bar_us:.1f}, {r.us / r.bar_us:.3f} of it"
        for r in rows
        if r.bar_us is not None and r.kept is False
    ]
    print("Bits: " + ("WRONG\n" + "\n".join(wrong) if wrong else "equal"))
    held = any(r.bar_us is not None for r in rows)
    print("Bars: " + ("MISSED\n" + "\n".join(missed) if missed else "kept" if held else "none without GPUs"))
    return int(bool(wrong) or (bars and bool(missed)))


def main(arguments: list[str] | None = None, pools: Any = None) -> int:
    """The exit code.

    Args:
        arguments: of the command line.
        pools: of ranks; started and stopped here when there are none.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpus", type=int, metavar="N", help="ranks, one a GPU; all of the host by default")
    parser.add_argument("--cpu", action="store_true", help="tiny sizes on gloo ranks: a smoke test")
    parser.add_argument("--json", metavar="FILE", help="write hardware, versions, settings, limits and rows there")
    parser.add_argument("--bars", action="store_true", help="exit with 1 when a bar is missed")
    parser.add_argument("--sweep", action="store_true", help="other numbers of blocks of both kernels too")
    parser.add_argument("--repeats", type=int, help="timed repeats (30; on CPUs 3)")
    given = parser.parse_args(arguments)

    ranks = given.gpus or (2 if given.cpu else torch.cuda.device_count())
    if ranks < 2:
        raise SystemExit(f"an exchange needs at least 2 ranks, this machine has {ranks} GPUs: --cpu runs on gloo")
    if given.cpu:
        options = Options(TINY, 64, 1, given.repeats or 3, given.sweep)
    else:
        options = Options(EXPERT, 8192, 2, given.repeats or 30, given.sweep)
    own = pools is None
    if own:
        pools = _pools(given.cpu)
    where = f"{ranks} gloo ranks" if given.cpu else f"{ranks} x {torch.cuda.get_device_name()}"
    size = sum(2 * rows * columns for rows, columns in options.shapes) / 1e6
    print(f"{where}: an expert has {size:.3g} MB of bf16; measured, medians of {options.repeats}", flush=True)
    try:
        results = pools(ranks).run(measure, options, timeout=400)[0]
    finally:
        if own:
            pools.stop()
    print()
    if given.json:
        write(given.json, document(results, options, ranks))
    return verdict(results.rows, bars=given.bars)


def _pools(cpu: bool) -> Any:
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    if cpu:
        from tests.ranks import RankPools

        return RankPools()
    from scripts.gpu_ranks import GpuPools

    return GpuPools()


if __name__ == "__main__":
    sys.exit(main())
