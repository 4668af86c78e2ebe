#!/usr/bin/env python
"""Run Megatron-core's own MoE unit tests, stock and balanced, and compare.

    scripts/upstream_tests.py --checkout ../Megatron-LM                  # CPU, gloo, 1, 2 and 4 ranks
    scripts/upstream_tests.py --checkout ../Megatron-LM --gpu            # NCCL, 1 rank and all GPUs
    PYTHONPATH=.venv/megatron-core-0.19.2 scripts/upstream_tests.py ...  # another Megatron-core

The checkout is a clone of Megatron-LM at the tag of the installed version; only its test files are used, Megatron-core
is the installed one. Every file runs once per number of ranks, and once more with balancing: the tests that passed.
With --adapt both happen again with the tests' parallelism changed to what balancing supports (see upstream_rank.py).
Exit status 1 when a test that passes stock fails balanced.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import socket
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

MOE = "tests/unit_tests/transformer/moe"
FILES = tuple(
    f"{MOE}/test_{name}.py"
    for name in (
        "moe_layer",
        "moe_layer_discrepancy",
        "latent_moe_layer",
        "sequential_mlp",
        "grouped_mlp",
        "shared_experts",
        "token_dispatcher",
        "a2a_token_dispatcher",
        "routers",
        "router_replay",
        "aux_loss",
    )
)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}
PRELOAD = ["upstream_rank", "pytest", "torch", "megatron.core.models.gpt.gpt_layer_specs", "megatron_ultraep"]
START_LIMIT_S = 240.0  # imports
MAX_RESTARTS = 60

# Messages that say the same in many words; the first that matches names the reason.
REASONS = (
    (r"world.?size \(?\d+\)? is not divisible|decrease expert parallel|is not divisible by", "needs more ranks"),
    (r"Transformer Engine|transformer_engine|TENorm|TE[A-Z]\w+|\bte_|'NoneType' object is not callable",
     "needs Transformer Engine"),
    (r"TE \d|TE fused|TE Linear|TE Grouped", "needs Transformer Engine"),
    (r"Deep ?EP|Hybrid ?EP", "needs DeepEP or HybridEP"),
    (r"NCCL|CUDA", "needs CUDA"),
)  # fmt: skip


@dataclass
class Result:
    """One test on one number of ranks.

    Attributes:
        balance: when layers were attached; "" for stock.
        outcome: passed, skipped or failed: the worst of all ranks.
        reason: of a skip or a failure.
        built: MoE layers that the test built on a rank.
        called: those whose forward ran.
        balanced: those that ran balanced.
        replicas: replicas that balancing made.
        refused: why layers were not balanced.
    """

    id: str
    world: int
    adapted: bool
    balance: str
    outcome: str
    reason: str = ""
    built: int = 0
    called: int = 0
    balanced: int = 0
    replicas: int = 0
    refused: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def file(self) -> str:
        return self.id.split("::")[0]


def main() -> int:
    options = parse()
    os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
    # Ranks must find this project and the scripts, whatever directory they run in.
    project = Path(__file__).resolve().parent.parent
    sys.path.insert(0, str(project))
    import upstream_rank

    files = tuple(f for f in FILES if (options.checkout / f).is_file() and re.search(options.files, f))
    missing = [f for f in FILES if not (options.checkout / f).is_file()]
    for name in missing:
        print(f"not in the checkout: {name}")
    worlds = options.worlds or ([1, gpus()] if options.gpu else [1, 2, 4])
    with tempfile.TemporaryDirectory(prefix="upstream-tests-") as directory:
        root = Path(directory)
        upstream_rank.copy_tests(options.checkout, root / "copy", files, gpu=options.gpu)
        job = upstream_rank.Job(
            root / "copy",
            files,
            root,
            0,
            options.gpu,
            "",
            False,
            None,
            frozenset(),
            options.limit,
            0,
            options.transport,
        )
        runs = Runs(job, options.logs)
        for world in sorted(set(worlds)):
            compare(runs, world, options, adapted=False)
            save(runs, options.json)
        for world in sorted(set(worlds)) if options.adapt else ():
            compare(runs, world, options, adapted=True)
            save(runs, options.json)
    for file, reason in runs.uncollected.items():
        print(f"\nnot collected: {file}: {reason}")
    for adapted in (False, True) if options.adapt else (False,):
        print(
            "\n== adapted: expert parallelism over all ranks, whole experts, all-to-all"
            if adapted
            else "\n== as written"
        )
        report(list(runs.collected), [r for r in runs.results if r.adapted == adapted])
    return 1 if regressions(runs.results) else 0


def save(runs: Runs, path: Path | None) -> None:
    """Write what there is so far: a run that is cut off loses only what had not ended."""
    if path:
        path.write_text(json.dumps({"uncollected": runs.uncollected, "results": runs.dump()}, indent=1))


def compare(runs: Runs, world: int, options: argparse.Namespace, *, adapted: bool) -> None:
    """Run the tests stock, then those balanced that pass and build a MoE layer."""
    skip, only = runs.settled(), None
    if adapted:
        written = [r for r in runs.results if r.world == world and not r.balance and not r.adapted]
        only = frozenset(r.id for r in written if r.built or r.outcome == "failed")
    stock = runs.run(world, "", adapted, only, skip)
    if not options.stock:
        runs.run(world, options.when, adapted, frozenset(r.id for r in stock if r.outcome == "passed" and r.built))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True, help="clone of Megatron-LM")
    parser.add_argument("--gpu", action="store_true", help="CUDA and NCCL instead of CPU and gloo")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--balance", action="store_true", help="stock, then balanced (the default)")
    mode.add_argument("--stock", action="store_true", help="stock alone")
    parser.add_argument(
        "--when",
        choices=("forward", "construction"),
        default="forward",
        help="attach a layer before its first forward, or when it is built",
    )
    parser.add_argument("--adapt", action="store_true", help="run again with the parallelism that balancing supports")
    parser.add_argument("--worlds", type=lambda s: [int(n) for n in s.split(",")], help="numbers of ranks, e.g. 1,2,8")
    parser.add_argument("--transport", default="auto", choices=("auto", "collective", "symmetric"))
    parser.add_argument("--files", default="", help="only files that this pattern is found in")
    parser.add_argument("--limit", type=float, default=120.0, help="longest time of one test (s)")
    parser.add_argument("--json", type=Path, help="write every result here")
    parser.add_argument("--logs", type=Path, help="keep the ranks' output here")
    return parser.parse_args()


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


class Runs:
    """Starts ranks, and again after a test that took them down, and collects the results."""

    def __init__(self, job: Any, logs: Path | None) -> None:
        self._job = job
        self._logs = logs
        self.results: list[Result] = []
        self.collected: dict[str, None] = {}
        self.uncollected: dict[str, str] = {}
        # A fork after the imports saves seconds per rank; CUDA does not survive a fork.
        self._context = multiprocessing.get_context("spawn" if job.gpu else "forkserver")
        if not job.gpu:
            self._context.set_forkserver_preload(PRELOAD)

    def settled(self) -> frozenset[str]:
        """Tests that passed and built no MoE layer: more ranks, or balancing, would tell nothing new."""
        return frozenset(r.id for r in self.results if r.outcome == "passed" and not r.built)

    def run(
        self,
        world: int,
        balance: str,
        adapted: bool,
        only: frozenset[str] | None,
        skip: frozenset[str] = frozenset(),
    ) -> list[Result]:
        mode = ("adapted-" if adapted else "") + (balance or "stock")
        started = time.monotonic()
        done: dict[str, Result] = {}
        for attempt in range(MAX_RESTARTS):
            directory = self._job.results / f"{mode}-{world}-{attempt}"
            directory.mkdir()
            job = replace(
                self._job,
                results=directory,
                world=world,
                balance=balance,
                adapted=adapted,
                only=only,
                skip=skip.union(done),
                port=_port(),
            )
            finished = self._start(job)
            new = self._read(job)
            done.update({result.id: result for result in new})
            if self._logs:
                self._keep(directory)
            if finished or not new:
                break
        self.results += done.values()
        counts = Counter(result.outcome for result in done.values())
        said = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items()))
        print(f"{world} ranks, {mode}: {said} ({time.monotonic() - started:.0f} s)", flush=True)
        return list(done.values())

    def _start(self, job: Any) -> bool:
        """Run the ranks until they end or one test takes too long; whether they ran all tests."""
        import upstream_rank

        barrier, outcomes = self._context.Barrier(job.world), self._context.Array("i", job.world)
        processes = [
            self._context.Process(target=upstream_rank.main, args=(job, rank, barrier, outcomes), daemon=True)
            for rank in range(job.world)
        ]
        for process in processes:
            process.start()
        heard, size = time.monotonic(), 0
        limit = START_LIMIT_S
        while any(process.is_alive() for process in processes):
            time.sleep(0.1)
            now = sum(path.stat().st_size for path in job.results.glob("*.jsonl"))
            if now != size:
                # The first lines say that the imports are over.
                heard, size, limit = time.monotonic(), now, job.limit_s
            ended = [process.exitcode for process in processes if not process.is_alive()]
            if time.monotonic() - heard > limit or any(ended):
                time.sleep(2.0 if any(ended) else 0.0)  # the others usually end too, and say why
                break
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
        return all(any(e["event"] == "finished" for e in _events(job, rank)) for rank in range(job.world))

    def _read(self, job: Any) -> list[Result]:
        ranks = [_events(job, rank) for rank in range(job.world)]
        for event in ranks[0]:
            if event["event"] == "collected":
                self.collected.update(dict.fromkeys(event["ids"]))
            elif event["event"] == "not_collected":
                self.uncollected[event["id"]] = event["reason"]
        started = dict.fromkeys(e["id"] for events in ranks for e in events if e["event"] == "start")
        ends: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for events in ranks:
            for event in events:
                if event["event"] == "end":
                    ends[event["id"]].append(event)
        return [_result(id_, ends[id_], job) for id_ in started]

    def _keep(self, directory: Path) -> None:
        assert self._logs is not None
        self._logs.mkdir(parents=True, exist_ok=True)
        for path in directory.glob("*.log"):
            (self._logs / f"{directory.name}-{path.name}").write_bytes(path.read_bytes())

    def dump(self) -> list[dict[str, Any]]:
        return [asdict(result) for result in self.results]


def _port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _events(job: Any, rank: int) -> list[dict[str, Any]]:
    path = job.results / f"{rank}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _result(id_: str, ends: list[dict[str, Any]], job: Any) -> Result:
    from upstream_rank import OUTCOMES

    worst = max(ends, key=lambda e: OUTCOMES.index(e["outcome"]), default={"outcome": "failed", "reason": ""})
    outcome, reason = worst["outcome"], worst["reason"]
    if len(ends) < job.world:
        outcome = "failed"
        reason = reason or f"{job.world - len(ends)} of {job.world} ranks hung or died (limit {job.limit_s:.0f} s)"
    said = {key: max((e[key] for e in ends), default=0) for key in ("built", "called", "balanced", "replicas")}
    refused = tuple(sorted({sentence for e in ends for sentence in e["refused"]}))
    seconds = max((e["seconds"] for e in ends), default=job.limit_s)
    return Result(id_, job.world, job.adapted, job.balance, outcome, reason, refused=refused, seconds=seconds, **said)


def regressions(results: list[Result]) -> list[Result]:
    """Balanced results of tests that pass stock on as many ranks, and fail. (Only those that pass run balanced.)"""
    return [r for r in results if r.balance and r.outcome != "passed"]


def group(reason: str) -> str:
    """What a message comes down to."""
    for pattern, name in REASONS:
        if re.search(pattern, reason):
            return name
    return reason.splitlines()[0][:150] if reason else "no reason given"


def best(results: list[Result]) -> dict[str, Result]:
    """For every test the result that says most: where it passed, else on the most ranks."""
    order = {"passed": 2, "skipped": 1, "failed": 0}
    chosen: dict[str, Result] = {}
    for result in sorted(results, key=lambda r: (order[r.outcome], r.world)):
        chosen[result.id] = result
    return chosen


def report(collected: list[str], results: list[Result]) -> None:
    stock = best([r for r in results if not r.balance])
    balanced_runs = [r for r in results if r.balance]
    broken = {r.id for r in regressions(results)}
    exercised = {r.id for r in balanced_runs if r.balanced and r.outcome == "passed"} - broken
    refused = {r.id for r in balanced_runs if r.refused} - exercised - broken
    unused = {r.id for r in stock.values() if r.outcome == "passed"} - exercised - refused - broken

    head = (
        "file",
        "collected",
        "stock passed",
        "skipped",
        "failed",
        "balanced passed",
        "refused",
        "no layer",
        "FAILED",
    )
    rows = [head]
    by_file: dict[str, list[str]] = defaultdict(list)
    for id_ in collected:
        by_file[id_.split("::")[0]].append(id_)
    for file, ids in [*by_file.items(), ("all", collected)]:
        outcomes = Counter(stock[i].outcome for i in ids if i in stock)
        counts = [len(ids), outcomes["passed"], outcomes["skipped"], outcomes["failed"]]
        counts += [len(part.intersection(ids)) for part in (exercised, refused, unused, broken)]
        rows.append((Path(file).name, *map(str, counts)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    print()
    for row in rows:
        print(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )

    _print_groups("skipped or failed stock", [r for r in stock.values() if r.outcome != "passed"])
    if not balanced_runs:
        return
    print(f"\nbalanced: {len(exercised)} tests, {sum(r.replicas for r in balanced_runs)} replicas")
    for result in sorted(balanced_runs, key=lambda r: (r.id, r.world)):
        if result.balanced:
            print(f"  {result.world} ranks, {result.replicas:4d} replicas, {result.outcome}: {Path(result.id).name}")
    print("\nrefused (a layer may have several reasons; tests):")
    sentences = Counter(s for r in best([r for r in balanced_runs if r.id in refused]).values() for s in r.refused)
    for sentence, count in sentences.most_common():
        print(f"  {count:4d}  {sentence}")
    print("\npass stock, fail balanced:" + ("" if broken else " none"))
    for result in regressions(results):
        print(f"  {result.world} ranks: {result.id}: {result.reason[:400]}")


def _print_groups(title: str, results: list[Result]) -> None:
    groups = Counter((result.outcome, group(result.reason)) for result in results)
    print(f"\n{title} (tests):")
    for (outcome, reason), count in groups.most_common():
        print(f"  {count:4d}  {outcome}: {reason}")


if __name__ == "__main__":
    sys.exit(main())
