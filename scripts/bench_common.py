"""What the speed benchmarks share: options, the order of measuring, rows, table, bars, and starting ranks.

For each imbalance, in one process and several rounds: ``balanced``, ``stock``, ``ours``, each for a part of the
iterations. How far the medians of ``balanced`` lie apart from round to round is the noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ultraep.config import BalanceConfig
from scripts.bench_results import (
    HEADER,
    PLANNING_AND_PLACEMENT,
    Report,
    Row,
    asdict,
    memory_verdict,
    missed_bars,
    versions,
)
from scripts.machine import hardware

NOTES = (
    "Measured. balanced is the ideal: nothing that keeps the number of tokens does better.\n"
    "Where balancing does not help: at an imbalance of 1 ours can only lose what planning takes."
)
METHODS = ("stock", "ours", "foresight", "balanced")
OURS = ("ours", "foresight")
PRESETS: dict[str, dict[str, Any]] = {"32x4": {"experts": 32, "topk": 4}, "128x8": {"experts": 128, "topk": 8}}
TINY: dict[str, Any] = {
    "hidden": 64,
    "ffn": 48,
    "tokens": 128,
    "sequence": 64,
    "heads": 4,
    "vocabulary": 128,
    "experts": 8,
    "topk": 2,
}


@dataclass(frozen=True)
class Options:
    """What ranks are told, besides the shape."""

    imbalances: tuple[float, ...]
    methods: tuple[str, ...]
    balance: BalanceConfig
    iterations: int
    rounds: int
    warmup: int
    trace: str
    profile: str
    seed: int
    reduction: bool
    reduce_blocks: tuple[int, ...]


def measure(make: Callable[[Any], Any], shape: Any, options: Options, file: str, document: dict[str, Any]) -> list[Row]:
    """All imbalances and methods of one shape; runs on every rank, and gives the same rows on each.

    Args:
        make: builds what is timed from its shape.
        file, document: the JSON file, empty for none, and what it holds besides these rows.
    """
    import torch.distributed as dist

    try:
        document = document | {"versions": versions()}
        report = Report(dist.get_rank(), file, document)
        report.say("\n" + ", ".join(f"{name} {version}" for name, version in document["versions"].items()))
        _measure(make, shape, options, report)
        return report.rows
    except Exception:
        # The others may wait for this rank: say at once why it does not come.
        print(f"rank {dist.get_rank()}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        raise


def _measure(make: Callable[[Any], Any], shape: Any, options: Options, report: Report) -> None:
    import torch.distributed as dist

    from scripts.bench_rank import Bench, Routes, generated, recorded

    ranks = dist.get_world_size()
    bench = Bench(make, shape)
    layout = f"{shape}, EP {ranks}"
    report.say(
        f"{layout}: hidden {shape.hidden}, ffn {shape.ffn} ({shape.expert_mib:.1f} MiB an expert), {shape.tokens} "
        f"tokens a rank, {shape.dtype}, gradients {shape.grad_dtype}; measured, {options.iterations} iterations\n"
        f"{HEADER}"
    )
    routes: dict[float, Routes] = {}
    for imbalance in dict.fromkeys((1.0, *(() if options.trace else options.imbalances))):
        try:
            routes[imbalance] = generated(bench.subject, imbalance, options.seed)
        except ValueError as error:
            report.say(f"{imbalance:9.3g} skipped: {error}")
    if options.trace:
        trace = recorded(bench.subject, options.trace)
        asked = {round(trace.imbalance, 3): trace}
    else:
        asked = {imbalance: routes[imbalance] for imbalance in options.imbalances if imbalance in routes}

    for imbalance, these in asked.items():
        rounds = _Rounds(bench, options, report)
        for _ in range(options.rounds):
            if "balanced" in options.methods:
                rounds.time("balanced", routes[1.0])
            # At an imbalance of 1 stock is balanced: it is not run for itself.
            if "stock" in options.methods and these is not routes[1.0]:
                rounds.time("stock", these)
            for method in OURS:
                if method in options.methods:
                    rounds.time_ours(method, these)
        report.add(rounds.rows(layout, ranks, imbalance, these, routes[1.0]))
    if options.profile and asked:
        _profile(bench, routes[1.0], list(asked.values())[-1], options, report)


class _Rounds:
    """One imbalance: methods in turn, a few iterations each, several times over, so that all see the same weather."""

    def __init__(self, bench: Any, options: Options, report: Report) -> None:
        self.bench, self.options, self.report = bench, options, report
        self.blocks: dict[str, list[Any]] = {}
        self.details: dict[str, dict[str, Any]] = {}
        self.balance = options.balance
        self.refused = False

    def time(self, method: str, routes: Any, balancer: Any = None) -> Any:
        iterations = -(-self.options.iterations // self.options.rounds)
        timed = self.bench.block(routes, iterations=iterations, warmup=self.options.warmup, balancer=balancer)
        self.blocks.setdefault(method, []).append(timed)
        return timed

    def time_ours(self, method: str, routes: Any) -> None:
        """Attach, time, detach. The gate measures its constants once; ``foresight`` plans before the iterations."""
        from megatron_ultraep import Unsupported, attach, detach
        from scripts.bench_rank import foresee

        if self.refused:
            return
        try:
            balancer = attach(self.bench.subject.chunks, self.balance)
        except Unsupported as error:  # on all ranks alike
            self.refused = True
            self.report.say(f"{method} skipped: {error}")
            return
        if balancer is None:
            raise ValueError("balancing is off: drop enabled=false")
        try:
            if method == "foresight":
                foresee(balancer, routes)
            self.time(method, routes, balancer)
            if method not in self.details:
                self.details[method] = self._details(method, routes, balancer)
            if balancer.costs is not None:
                self.balance = dataclasses.replace(
                    self.balance,
                    token_ns=max(1, round(balancer.costs.token_ps / 1e3)),
                    copy_ns_per_mib=max(1, round(balancer.costs.copy_ps_per_kib * 1024 / 1e3)),
                )
            balancer.end_foresight()  # raises where routers did what was not foreseen
        finally:
            detach(self.bench.subject.chunks)

    def _details(self, method: str, routes: Any, balancer: Any) -> dict[str, Any]:
        """Slots, the gate and exposed times; the latter from iterations of their own, as recording takes time."""
        from scripts.bench_rank import GIB, largest_of_ranks

        costs = balancer.costs
        gate = {} if costs is None else {"token_ns": costs.token_ps / 1e3, "replica_us": costs.replica_ps / 1e6}
        balancer.timings(True)
        self.bench.block(routes, iterations=min(5, self.options.iterations), warmup=1, balancer=balancer)
        return {
            "reduction": self._reduction(routes, balancer) if self.options.reduction and method == "ours" else {},
            "gate": gate,
            "exposed_us": {n: round(us, 2) for n, us in largest_of_ranks(balancer.timings(False)).items()},
            "slot_gib": largest_of_ranks({"slots": balancer.slot_bytes / GIB})["slots"],
        }

    def _reduction(self, routes: Any, balancer: Any) -> dict[str, float]:
        """What the way home of replicas' gradients adds to a backward, in turns with backwards that do without."""
        from megatron_ultraep.runtime import symmetric
        from scripts.bench_rank import gradients_stay

        rounds, iterations = self.options.rounds, -(-self.options.iterations // self.options.rounds)
        default = symmetric._REDUCE_BLOCKS
        sent: dict[int, list[float]] = {blocks: [] for blocks in (default, *self.options.reduce_blocks)}
        stayed = []
        for _ in range(rounds):
            for blocks, times in sent.items():
                symmetric._REDUCE_BLOCKS = blocks
                times += self.bench.backward(routes, iterations=iterations)
            symmetric._REDUCE_BLOCKS = default
            with gradients_stay(balancer.transport):
                stayed += self.bench.backward(routes, iterations=iterations)
        without_ms = statistics.median(stayed)
        shares = {blocks: statistics.median(times) / without_ms - 1 for blocks, times in sent.items()}
        for blocks in self.options.reduce_blocks:
            self.report.say(f"{'':20}gradients' way home with {blocks} blocks adds {shares[blocks]:.2%}")
        return {
            "backward_ms": statistics.median(sent[default]), "without_ms": without_ms, "share": shares[default]
        }  # fmt: skip

    def rows(self, layout: str, ranks: int, imbalance: float, routes: Any, balanced: Any) -> list[Row]:
        """The rows of this imbalance, in the order of ``METHODS``."""
        from scripts.bench_rank import percentiles

        made = []
        for method in METHODS:
            blocks = self.blocks.get(method)
            if blocks is None and method == "stock" and method in self.options.methods and routes is balanced:
                blocks = self.blocks.get("balanced")
            if not blocks:
                continue
            which = balanced if method == "balanced" else routes
            times = [ms for one in blocks for ms in one.ms]
            low, high = percentiles(times)
            median = statistics.median(times)
            row = Row(layout, ranks, imbalance, method, which.imbalance, which.imbalance, median, low, high, None)
            row.device_gib = None if blocks[0].device_gib is None else max(one.device_gib for one in blocks)
            if method in OURS:
                _fill(row, blocks, self.details[method], self.bench.subject.shape)
            made.append(row)
        ideal = next((row for row in made if row.method == "balanced"), None)
        if ideal is not None:
            medians = [one.median for one in self.blocks["balanced"]]
            ideal.noise = max(medians) / min(medians) - 1
            for row in made:
                row.fraction_of_balanced = ideal.ms / row.ms
        return made


def _fill(row: Row, blocks: list[Any], details: dict[str, Any], shape: Any) -> None:
    """What balancing says of itself, into its row."""
    metrics = [one for block in blocks for one in block.metrics]
    mean = {n: statistics.mean(one[n] for one in metrics) for n in metrics[0] if "/layer_" not in n}
    row.before, row.after = mean["moe/imbalance_before/mean"], mean["moe/imbalance_after/mean"]
    row.replicas = round(mean["moe/replicas/mean"], 2)
    skipped = {name.rpartition("/")[2]: share for name, share in mean.items() if name.startswith("moe/skipped/")}
    row.skipped = {name: round(share, 3) for name, share in skipped.items() if share}
    row.reduction = details["reduction"]
    exposed = sum(details["exposed_us"].get(part, 0.0) for part in PLANNING_AND_PLACEMENT)
    row.exposed_share = exposed / 1e3 * shape.layers * shape.micro_batches / row.ms
    row.gate, row.exposed_us, row.slot_gib = details["gate"], details["exposed_us"], details["slot_gib"]


def _profile(bench: Any, ideal: Any, routes: Any, options: Options, report: Report) -> None:
    """One iteration of ours and of balanced as Chrome traces, and their kernels side by side."""
    from megatron_ultraep import attach, detach
    from scripts.bench_rank import foresee, profiled, top_kernels

    directory = Path(options.profile)
    directory.mkdir(parents=True, exist_ok=True)
    shape = bench.subject.shape
    found = {}
    for method, which in (*((name, routes) for name in OURS if name in options.methods), ("balanced", ideal)):
        balancer = attach(bench.subject.chunks, options.balance) if method in OURS else None
        if method == "foresight":
            foresee(balancer, routes)
        bench.block(which, iterations=1, warmup=options.warmup, balancer=balancer)
        file = directory / f"{method}-{shape.kind}-{shape.name}-rank{report.rank}.json.gz"
        keys = which.keys[0]
        found[method] = profiled(lambda keys=keys: bench.subject(keys), str(file))  # type: ignore[misc]
        if balancer is not None:
            detach(bench.subject.chunks)
    report.say(f"\nRank 0, one iteration, ours at an imbalance of {routes.imbalance:.2f}; traces in {directory}")
    for method in OURS:
        if method in found:
            report.say(f"{method}:\n{top_kernels(found[method], found['balanced'])}")


# ---------------------------------------------------------------- from the command line to the ranks


def parser(doc: str) -> argparse.ArgumentParser:
    """Options of both benchmarks."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", default="", metavar="FILE", help="write hardware, versions, settings and rows there")
    made.add_argument("--bars", action="store_true", help="exit with 1 when a bar is missed")
    made.add_argument("--cpu", action="store_true", help="gloo ranks on this machine's CPU, tiny sizes")
    made.add_argument("--gpus", type=int, default=0, metavar="N", help="ranks (default: all GPUs; 2 with --cpu)")
    made.add_argument("--preset", nargs="+", choices=tuple(PRESETS), help="experts x top-k")
    for name in ("tokens", "sequence", "hidden", "ffn", "heads", "experts", "topk", "draws"):
        made.add_argument(f"--{name}", type=int, metavar="N", help="instead of the preset's")
    made.add_argument("--shared-experts", action="store_true", help="one shared expert of the size of a routed one")
    made.add_argument("--grad-dtype", choices=("fp32", "bf16"), default="fp32", help="of DDP's gradient buffers")
    made.add_argument("--imbalances", nargs="+", type=float, metavar="X", help="max / mean over ranks")
    made.add_argument("--trace", default="", metavar="FILE", help="recorded routes instead of generated ones")
    made.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    made.add_argument("--iterations", type=int, metavar="N", help="timed, of each method (default: 30; 3 with --cpu)")
    made.add_argument(
        "--rounds", type=int, metavar="N", help="in which they are timed in turn (default: 3; 1 with --cpu)"
    )
    made.add_argument("--warmup", type=int, metavar="N", help="before each block")
    made.add_argument("--slots", type=int, default=4, metavar="N", help="replica slots of a rank")
    made.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="fields of BalanceConfig")
    made.add_argument("--permute-fusion", action=argparse.BooleanOptionalAction, default=None, help="default: on GPUs")
    made.add_argument("--fusions", action=argparse.BooleanOptionalAction, default=True, help="Megatron's other fusions")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--trace-profile", default="", metavar="DIR", help="Chrome traces of one iteration; its kernels")
    return made


def balance_config(arguments: argparse.Namespace) -> BalanceConfig:
    """The settings of balancing; on CPUs, where nothing pays, every replica is made.

    Raises:
        ValueError: a field that does not exist, or a value it does not take.
    """
    values: dict[str, Any] = {"slots": arguments.slots}
    if arguments.cpu:
        values |= {"gate": False, "min_tokens": 1}
    kinds: dict[str, type] = {f.name: type(f.default) for f in dataclasses.fields(BalanceConfig)}
    for setting in arguments.set:
        name, separator, text = setting.partition("=")
        if name not in kinds or not separator:
            raise ValueError(f"--set takes KEY=VALUE with a KEY of {', '.join(kinds)}; got {setting!r}")
        if kinds[name] is bool and text.lower() not in ("true", "false"):
            raise ValueError(f"{name} is true or false, got {text!r}")
        values[name] = text.lower() == "true" if kinds[name] is bool else kinds[name](text)
    return BalanceConfig(**values)


def shapes(arguments: argparse.Namespace, presets: tuple[str, ...], **defaults: Any) -> list[Any]:
    """What to build: one shape for each preset, one tiny shape on CPUs."""
    from scripts.bench_subject import Shape

    names = ["tiny"] if arguments.cpu else arguments.preset or presets
    made = []
    for name in names:
        values = defaults | (TINY if arguments.cpu else PRESETS[name])
        for key in ("tokens", "sequence", "hidden", "ffn", "heads", "experts", "topk", "draws", "layers", "vocabulary"):
            if getattr(arguments, key, None) is not None:
                values[key] = getattr(arguments, key)
        values["sequence"] = min(values.get("sequence", 4096), values.get("tokens", 8192))
        if values.get("tokens", 8192) % values["sequence"]:
            raise ValueError(f"--sequence {values['sequence']} must divide --tokens {values['tokens']}")
        made.append(
            Shape(
                name=name,
                grad_dtype={"fp32": "float32", "bf16": "bfloat16"}[arguments.grad_dtype],
                shared_experts=arguments.shared_experts,
                permute_fusion=not arguments.cpu if arguments.permute_fusion is None else arguments.permute_fusion,
                fusions=arguments.fusions,
                overlap=getattr(arguments, "overlap", False),
                **values,
            )
        )
    return made


def run(
    make: Callable[[Any], Any],
    arguments: argparse.Namespace,
    wanted: list[Any],
    *,
    warmup: int,
    bar: Callable[[float], float],
    memory: bool,
    notes: str,
    foresight: float | None = None,
    pools: Any = None,
) -> int:
    """Measure every shape, print, write; the exit code.

    Args:
        make: see :func:`measure`.
        wanted: shapes.
        warmup: default iterations before each block.
        bar, memory, foresight: see :func:`missed_bars`.
        notes: printed under the tables.
        pools: of ranks; started and stopped here when there are none.
    """
    import torch

    ranks = arguments.gpus or (2 if arguments.cpu else torch.cuda.device_count())
    if ranks < 2:
        raise SystemExit(f"balancing needs at least 2 ranks, this machine has {ranks} GPUs: --cpu runs on gloo")
    default = (1.0, 1.1, 1.25, 1.5, 1.75) if ranks < 4 else (1.0, 1.1, 1.5, 2.0, 3.0)
    options = Options(
        imbalances=tuple(arguments.imbalances or default),
        methods=tuple(arguments.methods),
        balance=balance_config(arguments),
        iterations=arguments.iterations or (3 if arguments.cpu else 30),
        rounds=arguments.rounds or (1 if arguments.cpu else 3),
        warmup=(1 if arguments.cpu else warmup) if arguments.warmup is None else arguments.warmup,
        trace=arguments.trace,
        profile=arguments.trace_profile,
        seed=arguments.seed,
        reduction=getattr(arguments, "reduction", False),
        reduce_blocks=tuple(getattr(arguments, "reduce_blocks", ())),
    )
    settings = dataclasses.asdict(options) | {"trace": Path(arguments.trace).name}
    del settings["profile"]
    document: dict[str, Any] = {
        "measured": True,
        "hardware": hardware(),
        "versions": {},
        "settings": settings,
        "shapes": [dataclasses.asdict(shape) for shape in wanted],
        "rows": [],
    }
    own = pools is None
    if own:
        pools = _pools(arguments.cpu)
    rows: list[Row] = []
    failed = []
    try:
        for shape in wanted:
            try:
                rows += pools(ranks).run(measure, make, shape, options, arguments.json, document, timeout=900)[0]
            except Exception as error:
                failed.append(f"{shape} failed: {error}")
                print(failed[-1], flush=True)
                pools.stop()
            document["rows"] = [asdict(row) for row in rows]
    finally:
        if own:
            pools.stop()
    print(f"\n{notes}")
    for layout in dict.fromkeys(row.layout for row in rows):
        memory_kept = memory_verdict([row for row in rows if row.layout == layout])
        if memory_kept is not None:
            print(f"{layout}: {memory_kept[1]}: {'kept' if memory_kept[0] else 'MISSED'}")
    missed = missed_bars(rows, bar, memory=memory, foresight=foresight)
    if arguments.bars:
        print(
            "Bars: "
            + ("nothing was measured" if not rows else "kept" if not missed else "MISSED\n" + "\n".join(missed))
        )
    return int(bool(failed) or (arguments.bars and bool(missed)))


def _pools(cpu: bool) -> Any:
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # Megatron's, once per rank
    # Megatron's fusions are a handful of kernels: no pool of compilers for each rank.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if cpu:
        from tests.ranks import RankPools

        return RankPools()
    from scripts.gpu_ranks import GpuPools

    return GpuPools()
