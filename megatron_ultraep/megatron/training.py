"""Hooks into ``megatron.training``, the training loop that comes with Megatron: the one place that patches it.

1. :func:`install` waits for ``megatron.training.training`` to be imported (or takes it when it already is), checks that
   it looks as expected, and replaces three names in it. Its functions look them up there at every call.
2. ``setup_model_and_optimizer``: when it returns, the model chunks are wrapped, the optimizer made, and the checkpoint
   loaded; then :func:`megatron_ultraep.attach` balances their MoE layers. Both ways to build a model end in it.
3. ``get_forward_backward_func``: every forward step runs under its micro-batch key.
4. ``training_log``: once per log interval, the metrics go to Megatron's TensorBoard and W&B writers and to one line.
5. :func:`close` ends load records.

Run on 0.19.2; on 0.17.1 and 0.18.1 what is patched has been compared with what is expected. A Megatron that looks
different is refused when it is imported.

Invariants: without :func:`install`, or with ``enabled=False``, nothing is imported or replaced; a key names one
micro-batch of one pass of one iteration, in whatever order a pipeline runs them, and is the same on every
expert-parallel rank.
"""

from __future__ import annotations

import collections
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from megatron_ultraep.config import BalanceConfig

TARGET = "megatron.training.training"
TRIED_VERSIONS = ("0.17.1", "0.18.1", "0.19.2")

# What is replaced: the parameters we rely on, and the functions that must look the name up when they run.
_EXPECTED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "setup_model_and_optimizer": (("model_type", "checkpointing_context"), ("pretrain",)),
    "get_forward_backward_func": (("pp_size", "vp_size"), ("train", "evaluate")),
    "training_log": (("loss_dict", "iteration"), ("train",)),
}

_IN_LINE = {
    "moe/imbalance_before/mean": "imbalance before",
    "moe/imbalance_after/mean": "after",
    "moe/replicas/mean": "replicas",
}

_decision: BalanceConfig | None = None
_hooks: _Hooks | None = None


class HookError(RuntimeError):
    """``megatron.training`` does not look as it did in the versions that were tried."""


def install(config: BalanceConfig) -> None:
    """Balance the model that this process trains with ``megatron.training``.

    Once per process; again with the same config it has no effect.

    Raises:
        ValueError: another config was installed before.
        HookError: ``megatron.training`` is imported already and does not look as expected; when it is imported later,
            its import raises this.
    """
    global _decision, _hooks
    if _decision is not None:
        if config != _decision:
            raise ValueError(f"balancing was set up with {_decision}, and now again with {config}: do it once")
        return
    if config.enabled:
        hooks = _Hooks(config)
        if TARGET in sys.modules:
            hooks.patch(sys.modules[TARGET])
        else:
            sys.meta_path.insert(0, _AfterImport(TARGET, hooks.patch))
        _hooks = hooks
    _decision = config


def decision() -> BalanceConfig | None:
    """The installed config, be it to balance or not to; None before :func:`install`."""
    return _decision


def is_waiting() -> bool:
    """Whether hooks are installed and have not met a model."""
    return _hooks is not None and not _hooks.met_model


def use(balancer: Any) -> None:
    """Let the hooks work for this balancer, whose layers adopt themselves: they will not attach another."""
    if _hooks is None:
        raise RuntimeError("megatron_ultraep.megatron.training.use() needs install() first, with an enabled config")
    _hooks.replace_balancer(balancer)
    _hooks.attaches, _hooks.met_model = False, True


def close() -> None:
    """Close what :func:`megatron_ultraep.attach` opened. Idempotent."""
    if _hooks is not None:
        _hooks.replace_balancer(None)


class _Hooks:
    """What the replaced functions share."""

    def __init__(self, config: BalanceConfig) -> None:
        self.config = config
        self.attaches = True
        self.met_model = False
        self.balancer: Any = None
        self._module: ModuleType | None = None
        self._evaluated: tuple[int, int] = (-1, 0)  # iteration, and how many micro-batches were evaluated in it

    def patch(self, module: ModuleType) -> None:
        check(module)
        self._module = module
        module.setup_model_and_optimizer = self._setup(module.setup_model_and_optimizer)  # type: ignore[attr-defined]
        module.get_forward_backward_func = self._schedule(module.get_forward_backward_func)  # type: ignore[attr-defined]
        module.training_log = self._log(module.training_log)  # type: ignore[attr-defined]

    def replace_balancer(self, balancer: Any) -> None:
        """Close the one before: a job that restarts inside its process builds its model anew."""
        before, self.balancer = self.balancer, balancer
        if before is not None:
            before.close()

    def _setup(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
            from megatron_ultraep.megatron import microbatch

            microbatch.install()
            result = original(*args, **kwargs)
            self.met_model = True
            if self.attaches:
                import megatron_ultraep

                self.replace_balancer(megatron_ultraep.attach(result[0], self.config))
                assert self._module is not None
                self._module.print_rank_0(f" ultraep: experts are balanced with {self.config}")
            return result

        return setup_model_and_optimizer

    def _schedule(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def get_forward_backward_func(*args: Any, **kwargs: Any) -> Callable[..., Any]:
            schedule = original(*args, **kwargs)

            @functools.wraps(schedule)
            def forward_backward(*, forward_step_func: Callable[..., Any], **kwargs: Any) -> Any:
                if self.config.profile and self.balancer is not None and not self.attaches:
                    self.balancer.name_ranges(kwargs["model"])  # once; layers that adopt themselves show no model
                return schedule(forward_step_func=self._with_keys(forward_step_func, **kwargs), **kwargs)

            return forward_backward

        return get_forward_backward_func

    def _with_keys(
        self, forward_step_func: Callable[..., Any], *, num_microbatches: int, forward_only: bool, **_: Any
    ) -> Callable[..., Any]:
        """The forward step, entering the key of its micro-batch: the n-th call for a model chunk is micro-batch n."""
        from megatron_ultraep.layout import MicroBatchKey
        from megatron_ultraep.megatron.microbatch import micro_batch

        iteration, first = self._iteration(), 0
        if forward_only:  # an iteration's evaluation takes many calls of the schedule
            evaluated_in, count = self._evaluated
            first = count if evaluated_in == iteration else 0
            self._evaluated = (iteration, first + num_microbatches)
        calls: collections.Counter[int] = collections.Counter()

        @functools.wraps(forward_step_func)
        def forward_step(data_iterator: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            index = first + calls[id(model)]
            calls[id(model)] += 1
            with micro_batch(MicroBatchKey("model", "eval" if forward_only else "train", iteration, index)):
                return forward_step_func(data_iterator, model, *args, **kwargs)

        return forward_step

    def _log(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def training_log(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            iteration = signature.bind(*args, **kwargs).arguments["iteration"]
            if self.balancer is not None and iteration % self._args().log_interval == 0:
                self._write(over_ranks(self.balancer.metrics()), iteration)
            return result

        return training_log

    def _write(self, metrics: dict[str, float], iteration: int) -> None:
        assert self._module is not None
        if not metrics:
            return
        writer, wandb_writer = self._module.get_tensorboard_writer(), self._module.get_wandb_writer()
        if writer:
            for name, value in metrics.items():
                writer.add_scalar(name, value, iteration)
        if wandb_writer:
            wandb_writer.log(metrics, iteration)
        self._module.print_rank_last(log_line(metrics, iteration, self._args().train_iters))

    def _args(self) -> Any:
        assert self._module is not None
        return self._module.get_args()

    def _iteration(self) -> int:
        """Iterations done before this one, as the loop counts them; where none runs, those of the checkpoint."""
        args = self._args()
        return int(getattr(args, "curr_iteration", None) or getattr(args, "iteration", None) or 0)


def over_ranks(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics of the whole job, from those of this rank's layers and expert-parallel group. Collective over the world.

    What is called ``.../max`` is the largest over ranks, the others are means over the ranks that have them.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return metrics
    everyone: list[dict[str, float]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, metrics)
    values: dict[str, list[float]] = {}
    for rank in everyone:
        for name, value in rank.items():
            values.setdefault(name, []).append(value)
    return {name: max(v) if name.endswith("/max") else sum(v) / len(v) for name, v in values.items()}


def log_line(metrics: dict[str, float], iteration: int, iterations: int) -> str:
    """The line printed after Megatron's own and in its manner: what balancing did on average, and what it left."""
    parts = [f" ultraep iteration {iteration:8d}/{iterations:8d}"]
    parts += [f"{words}: {metrics[name]:.4f}" for name, words in _IN_LINE.items() if name in metrics]
    skipped = {name.removeprefix("moe/skipped/"): value for name, value in metrics.items() if "/skipped/" in name}
    parts += [f"left alone ({why.replace('_', ' ')}): {100 * value:.1f}%" for why, value in skipped.items() if value]
    return " | ".join(parts) + " |"


def check(module: ModuleType) -> None:
    """See that what is going to be replaced is what it was in the versions that were tried.

    Raises:
        HookError: with every difference, and what to do.
    """
    problems = []
    for name, (parameters, callers) in _EXPECTED.items():
        function = getattr(module, name, None)
        if not callable(function):
            problems.append(f"it has no function {name}")
            continue
        missing = sorted(set(parameters) - set(inspect.signature(function).parameters))
        if missing:
            problems.append(f"{name}{inspect.signature(function)} has no parameters {missing}")
        problems += [f"{caller} does not call {name}" for caller in callers if not _looks_up(module, caller, name)]
    if problems:
        raise HookError(
            f"{module.__name__} ({module.__file__}) is not as in the versions of Megatron that were tried "
            f"({', '.join(TRIED_VERSIONS)}): {'; '.join(problems)}. Use one of them, or run with --no-ultraep-enabled "
            "and call megatron_ultraep.attach(model, config) after the model is built."
        )


def _looks_up(module: ModuleType, caller: str, name: str) -> bool:
    function = inspect.unwrap(getattr(module, caller, lambda: None))
    return name in getattr(getattr(function, "__code__", None), "co_names", ())


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls ``then`` with a module as soon as it has been imported, once."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self._name, self._then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)  # so that the search below does not come back here
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            sys.meta_path.insert(0, self)
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self._then(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
