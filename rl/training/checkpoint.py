"""Megatron distributed checkpoints of the trainer: weights, optimizer, schedule and random state.

A checkpoint loads under another layout (other TP, PP, EP, DP) as long as the optimizer kind is the same and EP does
not go from 1 to more or back, where Megatron chains one optimizer or two. Random states are then not restored, which
only matters to dropout, and this project has none.

Experts are written in logical order wherever they live (see :mod:`megatron_ultraep.megatron.checkpoint`), so a
checkpoint says nothing of homes: a run resumes with experts where they are when it loads, at first where Megatron has
them.

Directories appear whole: ranks write into ``<name>.partial``, and :func:`publish` renames it when all have.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_ultraep.megatron import compat
from megatron_ultraep.megatron.groups import ParallelLayout
from rl.models.builder import BuiltModel
from rl.training.spec import TrainerSpec
from rl.training.trained import TrainedModel, reset_optimizer_state
from rl.training.worker import TrainWorker

_NAME = re.compile(r"step_(\d{8})")
_EXTRA_STATE = re.compile(r"(.*\.)?_extra_state\d*")
LOOP_STATE = "loop.json"


# ------------------------------------------------------------------ on the ranks


def save(worker: TrainWorker, directory: str | Path, *, optimizer: bool = True) -> None:
    """Write this rank's part; a collective. ``directory`` must exist and be empty of checkpoints.

    The critic, if there is one, is a checkpoint of its own in the directory ``critic``.
    """
    directory = Path(directory)
    for name, trained in worker.trained.items():
        path = directory if name == "actor" else directory / name
        path.mkdir(exist_ok=True)
        extra = {"random": _random_state(worker)} if name == "actor" else {}
        _save(trained, path, worker.spec.distributed_optimizer, extra, optimizer=optimizer)


def _save(trained: TrainedModel, directory: Path, distributed: bool, extra: dict[str, Any], *, optimizer: bool) -> None:
    compat.synchronize_parameters(trained.model.wrapped)
    state = _model_state(trained.model, distributed) | extra
    state["layout"] = dataclasses.asdict(trained.model.groups.layout)
    state["distributed_optimizer"] = distributed
    if optimizer:
        _complete_optimizer_state(trained.optimizer)
        state["optimizer"] = trained.optimizer.sharded_state_dict(
            state, is_loading=False, metadata=_metadata(trained.model, distributed)
        )
        state["scheduler"] = trained.scheduler.state_dict()
    compat.save_checkpoint(state, str(directory))


def load(worker: TrainWorker, directory: str | Path) -> None:
    """Read this rank's part back; a collective.

    Raises:
        ValueError: a checkpoint without optimizer state, of the other kind of optimizer, or a layout it does not fit;
            one without a critic for a run that has one, or the other way round.
    """
    directory = Path(directory)
    saved = {name for name in ("critic",) if (directory / name).is_dir()}
    wanted = set(worker.trained) - {"actor"}
    if wanted - saved:
        raise ValueError(
            f"{directory} holds no critic, and this run trains one: its run had algorithm.advantage other than gae; "
            "resume it as it was, or start a new run from its weights"
        )
    if saved - wanted:
        raise ValueError(
            f"{directory} holds a critic, and this run has none: resume it with the algorithm.advantage and the "
            "section critic that it had"
        )
    for name, trained in worker.trained.items():
        random_state = _random_state(worker) if name == "actor" else None
        _load(trained, directory if name == "actor" else directory / name, worker.spec, random_state)


def _load(trained: TrainedModel, directory: Path, spec: TrainerSpec, random_state: Any | None) -> None:
    model, optimizer, distributed = trained.model, trained.optimizer, spec.distributed_optimizer
    common = compat.load_checkpoint_common(str(directory))
    if "scheduler" not in common:
        raise ValueError(
            f"{directory} holds no optimizer state: a run can only be resumed with checkpoint.save_optimizer"
        )
    if common.get("distributed_optimizer") != distributed:
        raise ValueError(
            f"{directory} was written with distributed_optimizer={common.get('distributed_optimizer')}, this run has "
            f"{distributed}: set trainer.distributed_optimizer as it was"
        )
    saved = ParallelLayout(**common["layout"])
    mine = model.groups.layout
    if (saved.ep > 1) != (mine.ep > 1) or (not distributed and saved != mine):
        raise ValueError(
            f"{directory} was written under {saved}, this run has {mine}: "
            + (
                "keep ep at 1 or above 1 as it was"
                if distributed
                else "the plain optimizer resumes under the same layout only"
            )
        )
    reset_optimizer_state(optimizer)  # torch's Adam makes its state lazily; loading wants it there
    state = _wanted_state(model, distributed)
    with_random = random_state is not None and saved == mine
    if with_random:
        state["random"] = random_state
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=True, metadata=_metadata(model, distributed))
    loaded = compat.load_checkpoint(state, str(directory))
    _load_model(model, loaded)
    optimizer.load_state_dict(loaded["optimizer"])
    _separate_step_counts(optimizer)
    trained.scheduler.load_state_dict(loaded["scheduler"])
    if with_random:
        _set_random_state(loaded["random"])


def save_model(model: BuiltModel, directory: str | Path) -> None:
    """Weights alone, of a model that is not trained (the reference); a collective."""
    compat.save_checkpoint(_model_state(model, False), str(directory))


def load_model(model: BuiltModel, directory: str | Path) -> None:
    """Read :func:`save_model` back; a collective."""
    _load_model(model, compat.load_checkpoint(_wanted_state(model, False), str(directory)))


def _metadata(model: BuiltModel, distributed: bool) -> dict[str, Any]:
    return compat.checkpoint_metadata(model.groups.collection, distributed_optimizer=distributed)


def _model_state(model: BuiltModel, distributed: bool) -> dict[str, Any]:
    names = _chunk_names(model)
    return {
        name: chunk.sharded_state_dict(metadata=_metadata(model, distributed))
        for name, chunk in zip(names, model.chunks, strict=True)
    }


def _wanted_state(model: BuiltModel, distributed: bool) -> dict[str, Any]:
    """What to read: all but Transformer Engine's state for fp8, which is not used.

    Which modules have one depends on settings (norms of a float32 residual stream do not), and Megatron fails at the
    first thing that a checkpoint lacks.
    """
    return {
        name: {key: value for key, value in chunk.items() if not _EXTRA_STATE.fullmatch(key)}
        for name, chunk in _model_state(model, distributed).items()
    }


def _chunk_names(model: BuiltModel) -> list[str]:
    return ["model"] if len(model.chunks) == 1 else [f"model{i}" for i in range(len(model.chunks))]


def _load_model(model: BuiltModel, loaded: dict[str, Any]) -> None:
    for name, chunk in zip(_chunk_names(model), model.chunks, strict=True):
        missing, unexpected = chunk.load_state_dict(loaded[name], strict=False)
        wrong = [n for n in [*missing, *unexpected] if not n.endswith("_extra_state")]
        if wrong:
            raise ValueError(f"checkpoint and model {model.name} differ in {len(wrong)} tensors, e.g. {wrong[:3]}")


def _complete_optimizer_state(optimizer: Any) -> None:
    """Before the first step Adam has no state to save."""
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        adam = inner.optimizer
        if adam is not None and any(not adam.state.get(p) for g in adam.param_groups for p in g["params"]):
            reset_optimizer_state(optimizer)
            return


def _separate_step_counts(optimizer: Any) -> None:
    """Loading puts one ``step`` tensor into every parameter's state; torch's Adam would count it up for each."""
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        for state in inner.optimizer.state.values() if inner.optimizer is not None else ():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()


def _random_state(worker: TrainWorker) -> Any:
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": compat.random_tracker_states(),
    }
    where, layout = worker.groups.coordinates, worker.spec.layout
    return compat.sharded_object(
        "random", state, (layout.pp, layout.dp, layout.tp), (where["pp"], where["dp"], where["tp"])
    )


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    compat.set_random_tracker_states(state["tracker"])


# ------------------------------------------------------------------ on the driver


def begin(root: str | Path, step: int) -> Path:
    """A fresh directory for the ranks to write into; leftovers of a crash are removed."""
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob("*.partial"):
        shutil.rmtree(leftover)
    partial = root / f"step_{step:08d}.partial"
    partial.mkdir()
    return partial


def publish(partial: Path, loop_state: dict[str, Any], keep: int) -> Path:
    """Let a checkpoint appear, with the loop's state in it; remove all but the newest ``keep``."""
    with (partial / LOOP_STATE).open("w") as f:
        json.dump(loop_state, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    final = partial.with_suffix("")
    if final.exists():  # a resumed run reaches a step again
        shutil.rmtree(final)
    partial.rename(final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    for old in complete(final.parent)[:-keep]:
        shutil.rmtree(old)
    return final


def complete(root: str | Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    root = Path(root)
    found = [p for p in root.glob("step_*") if _NAME.fullmatch(p.name) and (p / LOOP_STATE).is_file()]
    return sorted(found)


def loop_state(directory: str | Path) -> dict[str, Any]:
    """The loop's state in a checkpoint."""
    return dict(json.loads((Path(directory) / LOOP_STATE).read_text()))
