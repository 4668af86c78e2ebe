#!/usr/bin/env python
"""How fast weights go from trainer ranks to engines, without vLLM, beside what the link itself can do.

    python scripts/bench_transfer.py --gpu --gib 4 --json FILE     # NCCL between the GPUs of one host, 1x1, 1x3, 2x2
    python scripts/bench_transfer.py --gib 0.25 --json FILE        # gloo between processes on this host
    python scripts/bench_transfer.py --staged [--gpu] --json FILE  # trainer ranks and engines that share GPUs, in pairs

S source processes hold a Qwen3-MoE-like model in Hugging Face names (bf16, random bits), its experts spread over them;
R receiver processes hold the same tensors as zeros. Everything is measured, in one run:

1. *link*: one large buffer from a source to a receiver: NCCL send/receive, NCCL or gloo broadcast, and, where one
   process sees two GPUs, ``Tensor.copy_`` between them. The link rate is the best of those between two processes or
   GPUs; on CPUs, the broadcast to all receivers.
2. *transfer*: pack, wire, and copies into place at the receivers, from the moment all members are ready until the last
   receiver's device is done; medians. ``ready`` is the handshake before. The bound is bytes / link rate: every receiver
   takes in all bytes, whoever sends them.
3. *store*: the same model through Ray's object store, executed by actors; of at most ``--store-gib``.
4. a tiny model, whose transfer is all latency: the direct path does not come near the link there.

With ``--staged``, instead of all that: buckets through memory that the two processes of a GPU share, see
``scripts/bench_transfer_staged.py``.

All bytes are compared by weighted checksums of every tensor. Bar: transfers of 2 GiB and more at >= 70% of the link
rate (``--bars`` exits with 1 when the best bucket size of a layout misses it). NVLink multicast is off, here and in
runs: ``NCCL_NVLS_ENABLE=0``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Before torch is imported here or in any process that is started.
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

import torch  # noqa: E402

from rl.transfer.links import Limits, Rendezvous  # noqa: E402
from rl.transfer.plan import TensorSpec, TransferPlan, make_plan  # noqa: E402
from scripts.bench_transfer_rank import StoreActor, Timed, serve, sizes_of  # noqa: E402
from scripts.bench_transfer_staged import measure, serve_pair  # noqa: E402
from scripts.machine import hardware  # noqa: E402

BAR = 0.70
BAR_GIB = 2.0
MIB = 2**20
_HEADING = (
    f"{'layout':6} {'what':9} {'variant':26} {'GiB':>8} {'ms':>10} {'ready':>8} {'GB/s':>8} {'bound ms':>9} of link"
)
_ANSWER_S = 120.0


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        layout: sources x receivers, or pairs of processes on one device each, trainer ranks + engines.
        what: ``link``, ``transfer``, ``store``, ``signal`` or ``staged``.
        variant: bucket size, channels, or how the link was measured.
        gib: that every receiver took in.
        ms: median; ``ready_ms`` is the handshake before it.
        gbps: GB/s into every receiver.
        bound_ms: bytes / link rate; 0 for the link itself.
        fraction: of the link rate; 0 for the link itself.
        equal: whether all bits arrived; None where nothing was compared.
    """

    layout: str
    what: str
    variant: str
    gib: float
    ms: float
    ready_ms: float
    gbps: float
    bound_ms: float
    fraction: float
    equal: bool | None


class Processes:
    """Members, one per device; roles are given by the membership that they join.

    Args:
        count: how many.
        gpu: on GPUs.
        pairs: of two on the same device, see ``bench_transfer_staged``; None: each has its own.
    """

    def __init__(self, count: int, gpu: bool, pairs: int | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._connections = []
        self._processes = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            target, more = (serve, ()) if pairs is None else (serve_pair, (pairs,))
            process = context.Process(target=target, args=(theirs, rank, gpu, *more), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def all(self, name: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        """Call a method on the first ``len(arguments)`` members at the same time; results in order."""
        results = self.some(name, dict(enumerate(arguments)))
        return [results[rank] for rank in range(len(arguments))]

    def some(self, name: str, arguments: dict[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Call a method on some members at the same time; results by member."""
        for rank, given in arguments.items():
            self._connections[rank].send((name, given))
        results: dict[int, Any] = {}
        ranks = {self._connections[rank]: rank for rank in arguments}
        deadline = time.monotonic() + _ANSWER_S
        while ranks:
            # The first to fail is the cause; the others wait for it.
            answered = wait(list(ranks), max(0.0, deadline - time.monotonic()))
            if not answered:
                late = ", ".join(map(str, ranks.values()))
                raise RuntimeError(f"members {late} did not answer {name} within {_ANSWER_S:g} s")
            for connection in answered:
                rank = ranks.pop(connection)
                good, results[rank] = connection.recv()
                if not good:
                    raise RuntimeError(f"member {rank} failed at {name}:\n{results[rank]}")
        return results

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(10)


class Bench:
    """Runs layouts and collects rows."""

    def __init__(self, processes: Processes, gpu: bool, repeats: int) -> None:
        self.processes = processes
        self.gpu = gpu
        self.repeats = repeats
        self.rows: list[Row] = []
        self.rendezvous = Rendezvous("127.0.0.1")
        self.links: dict[str, float] = {}  # bytes a second, by layout

    def join(self, sources: int, receivers: int, channels: int = 0) -> None:
        membership = self.rendezvous.generation(
            [f"trainer rank {i}" for i in range(sources)],
            [f"engine {i} rank 0" for i in range(receivers)],
            "nccl" if self.gpu else "gloo",
            Limits(60.0, 60.0, 60.0),
            channels,
        )
        self.processes.all("join", [(membership,)] * (sources + receivers))

    def measure_link(self, sources: int, receivers: int, nbytes: int) -> None:
        """The bare link, every way; sets the rate that transfers of this layout are held against."""
        layout, count = f"{sources}x{receivers}", sources + receivers
        rates = {}
        for how in ("broadcast", "send") if self.gpu else ("broadcast",):
            spans = []
            for _ in range(self.repeats + 1):
                told = [t for t in self.processes.all("bare", [(how, nbytes)] * count) if t.ended]
                involved = told if how == "broadcast" else told[:2]
                spans.append(max(t.ended for t in involved) - min(t.begun for t in involved))
            rates[how] = nbytes / statistics.median(spans[1:])  # the first one connects
        if self.gpu:
            rates["copy_"] = self.processes.all("peer_copy", [(nbytes, self.repeats)])[0]
        for how, rate in rates.items():
            if rate:
                self._add(Row(layout, "link", how, nbytes / 2**30, 1e3 * nbytes / rate, 0, rate / 1e9, 0, 0, None))
        # A broadcast to several is no link; between two members it is one more way to use it.
        self.links[layout] = max(
            rate for how, rate in rates.items() if how != "broadcast" or receivers == 1 or not self.gpu
        )

    def hold(self, specs: list[TensorSpec], sources: int, receivers: int) -> None:
        shares = share(specs, sources)
        self.processes.all("hold", [(shares[i], True) for i in range(sources)] + [(specs, False)] * receivers)

    def transfer(self, specs: list[TensorSpec], sources: int, receivers: int, bucket: int, note: str = "") -> Row:
        """Median of the repeats, and whether all bits arrived."""
        plan: TransferPlan = make_plan(share(specs, sources), bucket)
        spans, waits = [], []
        for _ in range(self.repeats + 1):
            told: list[Timed] = self.processes.all("transfer", [(plan,)] * (sources + receivers))
            begun = min(t.begun for t in told[:sources])
            spans.append(max(t.ended for t in told) - begun)
            waits.append(begun - max(t.called for t in told))
        ms, ready = 1e3 * statistics.median(spans[1:]), 1e3 * statistics.median(waits[1:])
        sums = self.processes.all("checksums", [()] * (sources + receivers))
        sent = {name: value for told in sums[:sources] for name, value in told.items()}
        equal = len(sent) == len(specs) and all(got == sent for got in sums[sources:])
        bound = 1e3 * plan.nbytes / self.links[f"{sources}x{receivers}"]
        variant = f"{bucket / MIB:g} MiB{note}"
        gbps = plan.nbytes / ms / 1e6
        row = Row(
            f"{sources}x{receivers}",
            "transfer",
            variant,
            plan.nbytes / 2**30,
            ms,
            ready,
            gbps,
            bound,
            bound / ms,
            equal,
        )
        return self._add(row)

    def store(self, specs: list[TensorSpec], receivers: int, note: str = "") -> None:
        """The object store with actors of its own, from one source."""
        import ray

        nbytes = sum(spec.nbytes for spec in specs)
        room = int(2.5 * nbytes) + (256 << 20)
        count = 1 + receivers
        ray.init(num_cpus=count, num_gpus=count if self.gpu else 0, object_store_memory=room, include_dashboard=False,
                 log_to_driver=False, logging_level="ERROR")  # fmt: skip
        try:
            actor = ray.remote(StoreActor).options(num_cpus=1, num_gpus=1 if self.gpu else 0)
            actors = [actor.remote(rank, self.gpu) for rank in range(count)]
            ray.get([a.hold.remote(specs, rank == 0) for rank, a in enumerate(actors)], timeout=_ANSWER_S)
            spans = []
            for _ in range(3):
                started = time.perf_counter()
                references = ray.get(actors[0].export.remote(64 * MIB), timeout=_ANSWER_S)
                ray.get([a.load.remote(references) for a in actors[1:]], timeout=_ANSWER_S)
                spans.append(time.perf_counter() - started)
                del references
            sums = ray.get([a.checksums.remote() for a in actors], timeout=_ANSWER_S)
        finally:
            ray.shutdown()
        ms = 1e3 * statistics.median(spans[1:])
        layout = f"1x{receivers}"
        bound = 1e3 * nbytes / self.links[layout] if layout in self.links else 0.0
        equal = all(got == sums[0] for got in sums[1:])
        self._add(
            Row(layout, "store", f"64 MiB{note}", nbytes / 2**30, ms, 0, nbytes / ms / 1e6, bound, bound / ms, equal)
        )

    def _add(self, row: Row) -> Row:
        self.rows.append(row)
        show(row)
        return row


def show(row: Row) -> None:
    """A line of the table."""
    bound = f"{row.bound_ms:9.2f} {row.fraction:8.1%}" if row.fraction else f"{'':9} {'':8}"
    bits = {True: "equal", False: "WRONG", None: ""}[row.equal]
    print(
        f"{row.layout:6} {row.what:9} {row.variant:26} {row.gib:8.4f} {row.ms:10.3f} {row.ready_ms:8.2f} "
        f"{row.gbps:8.2f} {bound}  {bits}",
        flush=True,
    )


def share(specs: list[TensorSpec], sources: int) -> dict[int, list[TensorSpec]]:
    """Tensors by source: experts in contiguous runs, everything else to whoever has the fewest bytes."""
    experts = sorted({_expert(spec) for spec in specs} - {-1})
    shares: dict[int, list[TensorSpec]] = {source: [] for source in range(sources)}
    dense = [0] * sources
    for spec in specs:
        expert = _expert(spec)
        if expert >= 0:
            source = expert * sources // len(experts)
        else:
            source = dense.index(min(dense))
            dense[source] += spec.nbytes
        shares[source].append(spec)
    return shares


def _expert(spec: TensorSpec) -> int:
    parts = spec.name.split(".experts.")
    return int(parts[1].split(".")[0]) if len(parts) == 2 else -1


def run(bench: Bench, given: argparse.Namespace, layouts: list[tuple[int, int]]) -> None:
    specs, tiny = sizes_of(given.gib), sizes_of(0.0005, tiny=True)
    buckets = given.buckets or ([64, 256, 512, 1024] if given.gpu else [4, 16, 64])
    print(_HEADING)
    for number, (sources, receivers) in enumerate(layouts):
        bench.join(sources, receivers)
        bench.measure_link(sources, receivers, 1024 * MIB if given.gpu else int(given.gib * 2**30))
        bench.hold(specs, sources, receivers)
        rows = {mib: bench.transfer(specs, sources, receivers, mib * MIB) for mib in buckets}
        best = min(rows, key=lambda mib: rows[mib].ms)
        if given.gpu:
            for channels in (8, 16, 32):
                bench.join(sources, receivers, channels)
                bench.transfer(specs, sources, receivers, best * MIB, f", {channels} channels")
        if number == 0:
            bench.join(sources, receivers)
            bench.hold(tiny, sources, receivers)
            bench.transfer(tiny, sources, receivers, best * MIB, ", tiny model")
            bench.hold([], sources, receivers)  # its memory is the store's now


def run_staged(given: argparse.Namespace, devices: int) -> int:
    """``--staged``; the exit code."""
    counts = [n for n in given.pairs or sorted({2, devices} if given.gpu else {2}) if n <= devices]
    if not counts:
        raise SystemExit(f"no number of pairs fits {devices} devices: came {given.pairs}")
    print(_HEADING)
    started, rows = time.perf_counter(), []

    def add(*fields: Any) -> None:
        rows.append(Row(*fields))
        show(rows[-1])

    repeats = given.repeats or (5 if given.gpu else 3)
    for pairs in counts:
        processes = Processes(2 * pairs, given.gpu, pairs)
        try:
            buckets = given.buckets or ([64, 256, 512] if given.gpu else [4, 16])
            measure(
                processes, pairs, sizes_of(given.gib), buckets, gpu=given.gpu, repeats=repeats, share=share, add=add
            )
        finally:
            processes.stop()
    return report(rows, repeats, given, [f"{n}+{n}" for n in counts], time.perf_counter() - started, [])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="NCCL, a GPU each; without it gloo on CPUs")
    parser.add_argument("--gib", type=float, help="size of the model (4 on GPUs, 0.25 on CPUs)")
    parser.add_argument(
        "--layouts", nargs="*", metavar="SxR", help="sources x receivers; what the machine has room for"
    )
    parser.add_argument("--buckets", type=int, nargs="*", metavar="MIB", help="bucket sizes of the sweep")
    parser.add_argument("--repeats", type=int, help="timed repeats (5; on CPUs 3)")
    parser.add_argument(
        "--store-gib", type=float, default=1.0, help="most of the model that goes through the store; 0: none"
    )
    parser.add_argument("--json", metavar="FILE", help="write hardware, versions, settings and rows there")
    parser.add_argument("--staged", action="store_true", help="pairs of trainer rank and engine that share a device")
    parser.add_argument("--pairs", type=int, nargs="*", help="with --staged, how many (2 and all GPUs; on CPUs 2)")
    parser.add_argument("--bars", action="store_true", help="exit with 1 when the bar is missed")
    given = parser.parse_args(arguments)
    given.gib = given.gib or (4.0 if given.gpu else 0.25)
    devices = torch.cuda.device_count() if given.gpu else 4
    if devices < 2:
        raise SystemExit(f"a transfer needs two GPUs, this machine has {devices}: leave out --gpu for gloo on CPUs")
    if not given.gpu:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if given.staged:
        where = f"{devices} x {torch.cuda.get_device_name()}" if given.gpu else "processes of one host over gloo"
        print(f"{where}; a model of {given.gib:g} GiB, bf16; pairs of processes share a device; all measured")
        return run_staged(given, devices)
    names = given.layouts or ["1x1", "1x3", "2x2"]
    layouts = [(int(s), int(r)) for s, r in (name.split("x") for name in names)]
    left_out = [f"{s}x{r}" for s, r in layouts if s + r > devices]
    layouts = [layout for layout in layouts if sum(layout) <= devices]
    if not layouts:
        raise SystemExit(f"no layout fits {devices} devices: {', '.join(left_out)}")
    where = f"{devices} x {torch.cuda.get_device_name()}" if given.gpu else "processes of one host over gloo"
    print(
        f"{where}; a model of {given.gib:g} GiB, bf16; all measured" + (f"; no room for {left_out}" if left_out else "")
    )
    started = time.perf_counter()
    processes = Processes(max(map(sum, layouts)), given.gpu)
    bench = Bench(processes, given.gpu, given.repeats or (5 if given.gpu else 3))
    try:
        run(bench, given, layouts)
    finally:
        processes.stop()
    problems = []
    if given.store_gib:
        try:
            bench.store(sizes_of(min(given.gib, given.store_gib)), 1)
            bench.store(sizes_of(0.0005, tiny=True), 1, ", tiny model")
        except Exception as error:  # the comparator must not take the other results with it
            problems.append(f"store: not measured: {type(error).__name__}: {error}")
            print(problems[-1])
    done = [f"{s}x{r}" for s, r in layouts]
    return report(bench.rows, bench.repeats, given, done, time.perf_counter() - started, problems)


def report(
    rows: list[Row], repeats: int, given: argparse.Namespace, layouts: list[str], seconds: float, problems: list[str]
) -> int:
    """Verdict and JSON; the exit code."""
    wrong = [f"{r.layout} {r.what} {r.variant}" for r in rows if r.equal is False]
    missed = []
    for layout in layouts:
        held = [r for r in rows if r.layout == layout and r.what in ("transfer", "staged") and r.gib >= BAR_GIB]
        best = max(held, key=lambda r: r.fraction, default=None)
        if best is not None:
            print(f"{best.layout}: best {best.variant}: {best.gbps:.1f} GB/s, {best.fraction:.1%} of the link")
            if best.fraction < BAR:
                missed.append(f"{best.layout}: {best.fraction:.1%} of the link, the bar is {BAR:.0%}")
        else:
            print(f"{layout}: no bar below {BAR_GIB:g} GiB")
    print("Bits: " + ("WRONG: " + ", ".join(wrong) if wrong else "equal") + f"; {seconds:.0f} s")
    print("Bars: " + ("MISSED: " + "; ".join(missed) if missed else "kept" if given.gib >= BAR_GIB else "none"))
    if given.json:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        if given.gpu:
            versions |= {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
        document = {
            "measured": True,
            "hardware": hardware(),
            "versions": versions,
            "settings": {
                "gib": given.gib,
                "repeats": repeats,
                "NCCL_NVLS_ENABLE": os.environ["NCCL_NVLS_ENABLE"],
            },
            "problems": problems,
            "rows": [asdict(row) for row in rows],
        }
        Path(given.json).write_text(json.dumps(document, indent=1) + "\n")
    return int(bool(wrong) or (given.bars and bool(missed)))


if __name__ == "__main__":
    sys.exit(main())
