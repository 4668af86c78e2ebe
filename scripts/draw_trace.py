#!/usr/bin/env python3
"""Draw the kernels of Chrome traces, one row for each stream, and say how long the GPU had nothing to do.

    scripts/bench_layer.py --preset 32x4 --imbalances 3 --trace-profile DIR  # on GPUs, writes the traces
    scripts/draw_trace.py DIR/*-rank0.json.gz --out docs/images/layer-timeline.png

Prints for each trace, measured in one iteration under the profiler (which slows the host, not the kernels): the time
from its first kernel to its last one, how long any kernel ran, how long any ran that computes (neither NCCL's nor
ours), and the three longest times without any.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from pathlib import Path
from typing import Any

KINDS = {"ncclDevKernel": ("all-to-all", "#d08c2c"), "ultraep": ("ours", "#3b6fb6")}
COMPUTE = ("compute", "#8a8f98")


def kind_of(name: str) -> tuple[str, str]:
    return next((kind for word, kind in KINDS.items() if word in name), COMPUTE)


def kernels(path: Path) -> list[dict[str, Any]]:
    """Kernel events of a trace, in order.

    Raises:
        ValueError: a file that is no such trace.
    """
    try:
        content = path.read_bytes()
        events = json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)["traceEvents"]
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: expected a Chrome trace of torch's profiler, could not read it: {error}") from error
    found = [event for event in events if event.get("cat") == "kernel"]
    if not found:
        raise ValueError(f"{path}: expected a trace with kernels, found none: trace on GPUs")
    return sorted(found, key=lambda event: event["ts"])


def idle(events: list[dict[str, Any]]) -> list[tuple[float, float, str]]:
    """Times when no kernel ran: ``(ms, at ms, the kernel that ended it)``."""
    gaps, start = [], events[0]["ts"]
    end = start
    for event in events:
        if event["ts"] > end:
            gaps.append(((event["ts"] - end) / 1e3, (end - start) / 1e3, event["name"]))
        end = max(end, event["ts"] + event["dur"])
    return gaps


def describe(name: str, events: list[dict[str, Any]]) -> str:
    span = (max(e["ts"] + e["dur"] for e in events) - events[0]["ts"]) / 1e3
    gaps = idle(events)
    computing = [e for e in events if kind_of(e["name"]) == COMPUTE]
    without = sum(gap for gap, _, _ in idle(computing))
    busy_computing = (max(e["ts"] + e["dur"] for e in computing) - computing[0]["ts"]) / 1e3 - without
    longest = "; ".join(f"{gap:.2f} before {n[:40]}" for gap, _, n in sorted(gaps, reverse=True)[:3])
    return (
        f"{name:36} {span:7.2f} ms, a kernel ran {span - sum(g for g, _, _ in gaps):6.2f}, one that computes "
        f"{busy_computing:6.2f}; longest idle (ms): {longest}"
    )


def draw(traces: dict[str, list[dict[str, Any]]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, axes = pyplot.subplots(
        len(traces), 1, figsize=(11, 1.7 * len(traces) + 0.6), sharex=True, squeeze=False, layout="constrained"
    )
    for axis, (name, events) in zip(axes[:, 0], traces.items(), strict=True):
        start = events[0]["ts"]
        streams = sorted({e["args"].get("stream", 0) for e in events})
        for row, stream in enumerate(streams):
            mine = [e for e in events if e["args"].get("stream", 0) == stream]
            axis.broken_barh(
                [((e["ts"] - start) / 1e3, e["dur"] / 1e3) for e in mine],
                (row - 0.4, 0.8),
                facecolors=[kind_of(e["name"])[1] for e in mine],
            )
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_yticks([])
        axis.set_ylabel("streams", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("ms since the first kernel")
    figure.legend(
        handles=[Patch(color=color, label=label) for label, color in (COMPUTE, *KINDS.values())],
        loc="outside upper right",
        ncols=3,
        frameon=False,
        fontsize=8,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a picture there (its ending is the format)")
    given = parser.parse_args(arguments)
    try:
        found = {path.name.split(".")[0]: kernels(path) for path in given.traces}
    except ValueError as error:
        parser.error(str(error))
    for name, events in found.items():
        print(describe(name, events))
    if given.out:
        draw(found, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
