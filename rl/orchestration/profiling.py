"""Profiled iterations: windows of the driver, trainer ranks and engines around one step, as ``profile`` says.

    with profiled(state):
        one_step(state)

Of iteration 3 come ``profile/step_00003_driver.json.gz``, ``..._rank_0.json.gz`` and ``..._engine_0.json.gz`` in the
run directory. An iteration that raises leaves none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from megatron_ultraep.runtime import ranges
from megatron_ultraep.runtime.profiler import ProfileSettings, Window
from rl.config.profile import ProfileSection
from rl.orchestration.setup import Run
from rl.rollout.engine import EngineTimeout
from rl.rollout.fleet import EngineDied
from rl.rollout.stepper import EngineFailed

T = TypeVar("T")


@contextlib.contextmanager
def profiled(state: Run) -> Iterator[None]:
    """The next iteration, profiled if it is one of ``profile.steps``."""
    section, step = state.config.profile, state.step + 1
    if step not in section.steps:
        yield
        return
    settings = settings_of(section)
    directory = (state.directory / "profile").absolute()
    ranks = range(state.config.trainer.ranks) if section.ranks is None else section.ranks
    # GPUs are the ranks' and the engines'.
    driver = Window(settings, trace_path(directory, step, "driver"), device=False, threads=True)
    state.trainer.profile(settings, {rank: trace_path(directory, step, f"rank_{rank}") for rank in ranks})
    engines = _of_engines(
        state,
        state.pool.indices() if section.engines else [],
        lambda engine: state.pool.profile(settings, {engine: trace_path(directory, step, f"engine_{engine}")}),
    )
    driver.start()
    try:
        with ranges.span(f"iteration {step}"):
            yield
    except BaseException:
        driver.drop()
        raise
    of_engines = _of_engines(state, engines, lambda engine: state.pool.end_profile([engine]))
    traces = [driver.stop(), *state.trainer.end_profile(ranks), *(t for found in of_engines.values() for t in found)]
    written = [trace for trace in traces if trace is not None]
    if written:
        state.say(f"iteration {step} was profiled: {len(written)} traces in {directory}")


def _of_engines(state: Run, engines: Iterable[int], do: Callable[[int], T]) -> dict[int, T]:
    """What each engine answers; one that has died is the generation service's business, and only has no trace."""
    answers = {}
    for engine in engines:
        try:
            answers[engine] = do(engine)
        except (EngineDied, EngineFailed, EngineTimeout) as error:
            state.say(f"no trace of engine {engine}: {error}")
    return answers


def settings_of(section: ProfileSection) -> ProfileSettings:
    """What every process is told."""
    return ProfileSettings(section.tool, section.shapes, section.stacks, section.memory)


def trace_path(directory: Path, step: int, who: str) -> Path:
    """Of the trace of one process."""
    return directory / f"step_{step:05d}_{who}.json.gz"
