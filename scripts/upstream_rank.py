"""One rank of ``scripts/upstream_tests.py``: pytest over Megatron-core's own test files, balancing attached or not.

What a rank changes before the tests are imported:

| what | where | why |
|---|---|---|
| ``megatron_ultraep.megatron.cpu`` | CPU | stock Megatron on a CPU |
| literals ``"cuda"``, ``"nccl"``, ``torch.cuda.is_available()`` in the test files | CPU | they name the device |
| ``torch.cuda.set_device``, ``device_count``, ``get_device_capability`` | CPU | called by the tests themselves |
| ``megatron.training``: ``_set_random_seed``, ``parse_args`` | both | the tests take these two, the wheel lacks them |
| ``mlp.submodules``, ``grouped_gemm_util`` | from 0.18 on | test files of 0.16 read them |

With balancing, every MoE layer that a test calls is attached before its first forward (or when it is built): tests move
layers to a device and a dtype after building them. A layer that ``attach`` refuses runs stock.

Most tests ask for one expert-parallel rank, for tensor-parallel experts or for the allgather dispatcher, which
balancing refuses. An adapted job therefore changes what they ask for, stock and balanced alike: see :func:`_adapt`.
"""

from __future__ import annotations

import functools
import gc
import importlib
import inspect
import json
import multiprocessing
import os
import random
import re
import sys
import threading
import time
import types
from dataclasses import dataclass, field
from multiprocessing.synchronize import Barrier
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

import pytest

RANKS_DISAGREE = 71  # exit status
OUTCOMES = ("passed", "skipped", "failed")

_CPU_LITERALS = (
    (re.compile(r"""(["'])cuda\1"""), r"\1cpu\1"),
    (re.compile(r"""(["'])nccl\1"""), r"\1gloo\1"),
    (re.compile(r"torch\.cuda\.is_available\(\)"), "True"),
)


@dataclass(frozen=True)
class Job:
    """What one group of ranks runs.

    Attributes:
        root: directory that holds ``tests``, prepared by :func:`copy_tests`.
        files: test files, relative to ``root``.
        results: directory for one ``<rank>.jsonl`` and one ``<rank>.log`` per rank.
        world: number of ranks.
        gpu: CUDA and NCCL, or CPU and gloo.
        balance: attach balancing, when a layer is first called ("forward") or built ("construction"); "" for stock.
        adapted: give the tests the parallelism and the dispatcher that balancing supports.
        only: ids of the tests to run; None for all.
        skip: ids of the tests not to run.
        limit_s: how long a rank waits for the others after a test (s).
        transport: how replicas travel, as in ``BalanceConfig``.
    """

    root: Path
    files: tuple[str, ...]
    results: Path
    world: int
    gpu: bool
    balance: str
    adapted: bool
    only: frozenset[str] | None
    skip: frozenset[str]
    limit_s: float
    port: int
    transport: str = "auto"


def copy_tests(checkout: Path, root: Path, files: tuple[str, ...], *, gpu: bool) -> None:
    """Copy test files of a checkout, and the utilities they import, as packages under ``root``."""
    for name in ("tests/unit_tests/test_utilities.py", *files):
        text = (checkout / name).read_text()
        if not gpu:
            for pattern, replacement in _CPU_LITERALS:
                text = pattern.sub(replacement, text)
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        for parent in target.relative_to(root).parents[:-1]:
            (root / parent / "__init__.py").touch()
    (root / "pytest.ini").write_text("[pytest]\nmarkers =\n    internal: upstream's\n    timeout: ours applies\n")


def main(job: Job, rank: int, barrier: Barrier, outcomes: Any) -> None:
    """Run the job's tests as one rank; results go to ``<rank>.jsonl``."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    log = os.open(job.results / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(job.world),
        LOCAL_WORLD_SIZE=str(job.world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(job.port),
    )
    _prepare(job)
    plugin = _Plugin(job, rank, barrier, outcomes)
    os.chdir(job.root)
    options = ["-p", "no:cacheprovider", "-p", "no:timeout", "-q", "--noconftest", "--continue-on-collection-errors"]
    status = pytest.main([*options, f"--rootdir={job.root}", *job.files], plugins=[plugin])
    plugin.write({"event": "finished", "status": int(status)})
    sys.stdout.flush()
    # Process groups of broken tests may be left; ending them in order could hang.
    os._exit(0)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(RANKS_DISAGREE)


def _prepare(job: Job) -> None:
    # Our own `tests` package may be on the path: upstream's must come first.
    sys.path.insert(0, str(job.root))
    import torch

    if not job.gpu:
        from megatron_ultraep.megatron import cpu

        torch.set_num_threads(1)
        cpu.install()
        _cuda_calls_of_tests(job.world)
    _without_transformer_engine()
    _training_helpers()
    _tests_of_older_versions()
    if job.adapted:
        _adapt()
    # Collections after every test would walk all of torch and Megatron.
    gc.collect()
    gc.freeze()


def _cuda_calls_of_tests(world: int) -> None:
    import torch

    torch.cuda.set_device = lambda device: None
    torch.cuda.device_count = lambda: world
    torch.cuda.get_device_capability = lambda device=None: (0, 0)
    torch.cuda.empty_cache = lambda: None
    torch.cuda.manual_seed_all = lambda seed: None


def _without_transformer_engine() -> None:
    """``is_te_min_version`` compares a version that is None where Transformer Engine is missing: TypeError."""
    from megatron.core import utils

    stock = utils.is_te_min_version

    @functools.wraps(stock)
    def is_te_min_version(*args: Any, **kwargs: Any) -> bool:
        try:
            return bool(stock(*args, **kwargs))
        except TypeError:
            return False

    utils.is_te_min_version = is_te_min_version


def _training_helpers() -> None:
    def set_random_seed(seed_: int, *_: Any, **__: Any) -> None:
        import numpy as np
        import torch
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        random.seed(seed_)
        np.random.seed(seed_)
        torch.manual_seed(seed_)
        model_parallel_cuda_manual_seed(seed_)

    def parse_args(*_: Any, **__: Any) -> types.SimpleNamespace:
        return types.SimpleNamespace()

    training = types.ModuleType("megatron.training")
    training.__path__ = []
    initialize = types.ModuleType("megatron.training.initialize")
    initialize._set_random_seed = set_random_seed  # type: ignore[attr-defined]
    arguments = types.ModuleType("megatron.training.arguments")
    arguments.parse_args = parse_args  # type: ignore[attr-defined]
    for module in (training, initialize, arguments):
        sys.modules[module.__name__] = module


def _tests_of_older_versions() -> None:
    from megatron.core.models.gpt import gpt_layer_specs

    build = gpt_layer_specs.get_moe_module_spec_for_backend

    @functools.wraps(build)
    def spec(*args: Any, **kwargs: Any) -> Any:
        built = build(*args, **kwargs)
        if isinstance(built, functools.partial) and not hasattr(built, "submodules"):
            built.submodules = built.keywords["submodules"]  # type: ignore[attr-defined]
        return built

    gpt_layer_specs.get_moe_module_spec_for_backend = spec
    name = "megatron.core.transformer.moe.grouped_gemm_util"
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        # Only tests that are skipped with today's Transformer Engine use it.
        package = importlib.import_module("megatron.core.transformer.moe")
        sys.modules[name] = package.grouped_gemm_util = types.ModuleType(name)


def _adapt() -> None:
    """Expert parallelism over all ranks where a test asks for none, whole experts, all-to-all dispatch."""
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    initialize, post_init = parallel_state.initialize_model_parallel, TransformerConfig.__post_init__
    sizes = inspect.signature(initialize)

    @functools.wraps(initialize)
    def initialize_adapted(*args: Any, **kwargs: Any) -> None:
        asked = sizes.bind(*args, **kwargs).arguments
        if (asked.get("expert_model_parallel_size") or 1) == 1:
            stages = asked.get("pipeline_model_parallel_size") or 1
            asked["expert_model_parallel_size"] = int(os.environ["WORLD_SIZE"]) // stages
        initialize(**{**asked, "expert_tensor_parallel_size": 1})

    @functools.wraps(post_init)
    def post_init_adapted(config: Any) -> None:
        if config.num_moe_experts and parallel_state.model_parallel_is_initialized():
            config.expert_model_parallel_size = parallel_state.get_expert_model_parallel_world_size()
            config.expert_tensor_parallel_size = 1
            if config.moe_token_dispatcher_type == "allgather":
                config.moe_token_dispatcher_type = "alltoall"
        post_init(config)

    parallel_state.initialize_model_parallel = initialize_adapted
    TransformerConfig.__post_init__ = post_init_adapted


@dataclass
class _Layers:
    """What became of the MoE layers of one test."""

    built: int = 0
    called: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    balancers: list[Any] = field(default_factory=list)

    @property
    def record(self) -> dict[str, Any]:
        return {
            "built": self.built,
            "called": self.called,
            "balanced": len(self.balancers),
            "replicas": sum(balancer.replicas for balancer in self.balancers),
            "refused": sorted(self.refused),
        }


class _Plugin:
    """Runs the selected tests, keeps the ranks in step, and writes what happened."""

    def __init__(self, job: Job, rank: int, barrier: Barrier, outcomes: Any) -> None:
        self.job = job
        self.rank = rank
        self.barrier = barrier
        self.outcomes = outcomes
        self.layers = _Layers()
        self._file = (job.results / f"{rank}.jsonl").open("a", buffering=1)
        self._watch_layers()

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")

    def _watch_layers(self) -> None:
        from megatron.core.transformer.moe.moe_layer import MoELayer

        init, forward = MoELayer.__init__, MoELayer.forward
        plugin = self

        @functools.wraps(init)
        def watched_init(layer: Any, *args: Any, **kwargs: Any) -> None:
            init(layer, *args, **kwargs)
            plugin.layers.built += 1
            if plugin.job.balance == "construction":
                plugin.attach(layer)

        @functools.wraps(forward)
        def watched_forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
            if "_upstream_called" not in layer.__dict__:
                object.__setattr__(layer, "_upstream_called", True)
                plugin.layers.called += 1
                if plugin.job.balance == "forward":
                    plugin.attach(layer)
            return forward(layer, *args, **kwargs)

        MoELayer.__init__, MoELayer.forward = watched_init, watched_forward

    def attach(self, layer: Any) -> None:
        from megatron_ultraep import BalanceConfig, Unsupported, attach
        from megatron_ultraep.megatron.support import refusals

        config = BalanceConfig(slots=2, min_tokens=1, gate=False, transport=self.job.transport)
        try:
            self.layers.balancers.append(attach(layer, config, timeout_s=self.job.limit_s))
        except Unsupported as error:
            # attach names the first reason of the first layer; the report counts each reason.
            for sentence in refusals(layer) or [str(error)]:
                self.layers.refused[sentence] = 1

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        self.write({"event": "collected", "ids": [item.nodeid for item in items]})
        only, skip = self.job.only, self.job.skip
        items[:] = [i for i in items if i.nodeid not in skip and (only is None or i.nodeid in only)]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.write({"event": "not_collected", "id": report.nodeid, "reason": _last_line(str(report.longrepr))})

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: Any, nextitem: Any) -> bool:
        from _pytest.runner import runtestprotocol

        self.layers = _Layers()
        self.write({"event": "start", "id": item.nodeid})
        started = time.monotonic()
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        reports = runtestprotocol(item, nextitem=nextitem, log=True)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        outcome = max((report.outcome for report in reports), key=OUTCOMES.index)
        record = {"event": "end", "id": item.nodeid, "outcome": outcome, "reason": _reason(reports)}
        self.write({**record, **self.layers.record, "seconds": round(time.monotonic() - started, 2)})
        self._clean_up()
        self._agree(OUTCOMES.index(outcome))
        return True

    def _clean_up(self) -> None:
        import torch.distributed as dist

        for balancer in self.layers.balancers:
            if dist.is_initialized():
                balancer.release()
        # A traceback keeps a test's objects, and some of upstream's use process groups when they are collected.
        for name in ("last_exc", "last_type", "last_value", "last_traceback"):
            if hasattr(sys, name):
                delattr(sys, name)
        gc.collect()

    def _agree(self, outcome: int) -> None:
        """Go on only where all ranks saw the same outcome: otherwise their process groups are out of step."""
        self.outcomes[self.rank] = outcome
        try:
            self.barrier.wait(self.job.limit_s)
            same = len(set(self.outcomes[: self.job.world])) == 1
            self.barrier.wait(self.job.limit_s)
        except BrokenBarrierError:
            same = False
        if not same:
            os._exit(RANKS_DISAGREE)


def _reason(reports: list[Any]) -> str:
    for report in reports:
        if report.skipped:
            return str(report.longrepr[2]).removeprefix("Skipped: ")
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            return crash.message.strip() if crash else _last_line(str(report.longrepr))
    return ""


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("E").strip() if lines else ""
