#!/usr/bin/env python
"""Actor and critic trained by one fused schedule, beside the two one after the other; all on one executor.

    python scripts/bench_fused.py [--json FILE] [--bars]          # 4 gloo ranks on this machine's cores
    python scripts/bench_fused.py --gpu [--ranks N] [--ep 2]       # one rank a GPU, NCCL, bf16, Transformer Engine
    python scripts/bench_fused.py --sleep 4                        # stages sleep: the executor's own cost

Methods, in turn within every repetition:

- ``serial``: 1F1B of the actor, then, when all ranks are done, that of the critic.
- ``concatenated``: the same orders without waiting in between: a node goes on with the critic while others drain.
- ``fused``: the schedule that the search finds for the stage times measured here.

Columns: the longest rank's time from a common start to its last operation, the median of the repetitions; ``predicted``
by simulating the schedule with stage times that were measured before it was made, and ``of it``, measured / predicted;
``own times``, by simulating it with the stage times of its own runs; ``bound``, below which no schedule is at the
predicted times; ``finish``, reducing gradients, not part of the other times.

Cases: ``equal``, both models alike with few micro-batches; ``half``, a critic of half the layers in two replicas;
``reference``, a partner that only runs forward; ``many``, so many micro-batches that nodes are hardly ever idle: there
is little to win, on 4 nodes 9% (on GPUs, with half as many, 19%), and nothing when stages slow each other down.

On CPUs more ranks than cores share them: stage times depend on what the other ranks do at the moment, so predictions
are off and fusing wins little or nothing, because an idle rank's core is not idle. ``--sleep`` shows what the executor
does when every rank has its own device: stages sleep, which is an emulation, and is labelled so.

With ``--bars`` exits with 1 when, on GPUs or with ``--sleep``, a fused makespan is not within 10% of the predicted one.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.bench_fused_rank import Case, Options, Row, as_json, measure, table  # noqa: E402
from scripts.bench_results import versions, write  # noqa: E402
from scripts.machine import hardware  # noqa: E402

WITHIN = 0.10


def cases(nodes: int, names: str, many: int) -> list[Case]:
    """Those asked for; layers are two a node, so that a critic may have half of them.

    Args:
        nodes: of the pipeline.
        names: of cases, with commas; empty: all.
        many: micro-batches a node of the case of that name.
    """
    layers = 2 * nodes
    found = [
        Case("equal", (layers, layers), (nodes, nodes), (nodes, nodes)),
        Case("half", (layers, nodes), (nodes, max(1, nodes // 2)), (2 * nodes, nodes)),
        Case("reference", (layers, layers), (nodes, nodes), (nodes, nodes), forward_only=True),
        Case("many", (layers, layers), (nodes, nodes), (many * nodes, many * nodes)),
    ]
    wanted = names.split(",") if names else [case.name for case in found]
    unknown = set(wanted) - {case.name for case in found}
    if unknown:
        raise SystemExit(f"expected cases among {[c.name for c in found]}, got {sorted(unknown)}")
    return [case for case in found if case.name in wanted]


def sizes(given: argparse.Namespace) -> Options:
    """Of the models, by where they run.

    On GPUs a stage computes for longer than its host takes to launch it (7 ms a layer's forward on the hosts of
    H200s), as in the models that pipelines are for: few large experts, whose products take 15 ms; on 80 GB there is
    room for two thirds of the tokens.
    """
    if given.gpu:
        rows = 12288 if _memory_gib() > 100 else 8192
        repetitions = given.repetitions or 5
        o = Options(4096, 8192, 8, 2, 8192, rows, given.ep, "bfloat16", repetitions, 2, given.solve_seconds)
    else:
        repetitions = given.repetitions or 11
        o = Options(64, 64, 4, 2, 512, 96, given.ep, "float32", repetitions, 2, given.solve_seconds)
    changes = {"hidden": given.hidden, "rows": given.rows, "sleep_ms": given.sleep}
    return o.__class__(**(o.__dict__ | {k: v for k, v in changes.items() if v is not None}))


def missed(rows: list[Row]) -> list[str]:
    """Fused makespans that are not what was predicted."""
    return [
        f"{row.case}: measured {row.ms:.2f} ms, predicted {row.predicted:.2f} ms ({row.of_predicted:.3f})"
        for row in rows
        if row.method == "fused" and abs(row.of_predicted - 1) > WITHIN
    ]


def main(arguments: list[str] | None = None, pools: Any = None) -> int:
    """The exit code.

    Args:
        arguments: of the command line.
        pools: of ranks; started and stopped here when there are none.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="one rank a GPU; all of the host by default")
    parser.add_argument("--ranks", type=int, metavar="N", help="number of ranks (CPUs: 4)")
    parser.add_argument("--ep", type=int, default=1, metavar="N", help="ranks of a node, over which experts are spread")
    parser.add_argument("--cases", default="", metavar="A,B", help="which cases, all by default")
    parser.add_argument("--hidden", type=int, metavar="N")
    parser.add_argument("--rows", type=int, metavar="N", help="tokens of a micro-batch")
    parser.add_argument("--sleep", type=float, metavar="MS", help="emulation: stages sleep MS per layer and forward")
    parser.add_argument("--repetitions", type=int, metavar="N", help="11; on GPUs 5")
    parser.add_argument("--solve-seconds", type=float, default=10.0, metavar="S", help="of the search, for each case")
    parser.add_argument("--json", metavar="FILE", help="write hardware, versions, settings and rows there")
    parser.add_argument("--bars", action="store_true", help="exit with 1 when a bar is missed")
    given = parser.parse_args(arguments)
    if given.gpu and given.sleep:
        raise SystemExit("--sleep emulates on CPUs: leave --gpu out")
    ranks = given.ranks or (_gpus() if given.gpu else 4)
    if ranks % given.ep or ranks // given.ep < 2:
        raise SystemExit(f"expected at least 2 nodes of {given.ep} ranks, got {ranks} ranks: a pipeline needs 2 stages")
    # A message that waits for its receiver must not hold up kernels behind it in a hardware queue.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "8" if given.gpu else "1")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    options = sizes(given)
    where = _where(given, ranks)
    print(where, flush=True)
    own, pools = pools is None, pools or _pools(given.gpu)
    rows: list[Row] = []
    try:
        for case in cases(ranks // given.ep, given.cases, many=4 if given.gpu else 8):
            found = pools(ranks).run(measure, case, options, timeout=900)[0]
            print(table(found), flush=True)
            rows += found
            if given.json:
                write(given.json, _document(where, ranks, options, rows))
    finally:
        if own:
            pools.stop()
    over = missed(rows) if given.gpu or given.sleep else []
    print("Bars: " + ("MISSED\n" + "\n".join(over) if over else "kept" if given.gpu or given.sleep else "none on CPUs"))
    return int(bool(over) and given.bars)


def _where(given: argparse.Namespace, ranks: int) -> str:
    if given.gpu:
        import torch

        return f"{ranks} x {torch.cuda.get_device_name()}, measured"
    cores = len(os.sched_getaffinity(0))
    if given.sleep:
        return f"EMULATED: stages sleep {given.sleep:g} ms per layer and forward; {ranks} gloo ranks, {cores} cores"
    return f"{ranks} gloo ranks share {cores} cores, measured"


def _document(where: str, ranks: int, options: Options, rows: list[Row]) -> dict[str, Any]:
    return {
        "measured": not options.sleep_ms,
        "where": where,
        "hardware": hardware(),
        "versions": versions(),
        "settings": options.__dict__
        | {"ranks": ranks, "CUDA_DEVICE_MAX_CONNECTIONS": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "")},
        "rows": [as_json(row) for row in rows],
    }


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _memory_gib() -> float:
    import torch

    return torch.cuda.get_device_properties(0).total_memory / 2**30


def _pools(gpu: bool) -> Any:
    if gpu:
        from scripts.gpu_ranks import GpuPools

        return GpuPools()
    from tests.ranks import RankPools

    return RankPools()


if __name__ == "__main__":
    sys.exit(main())
