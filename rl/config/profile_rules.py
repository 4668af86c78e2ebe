"""What the section of profiled iterations demands."""

from __future__ import annotations

from collections.abc import Iterator

from rl.config.profile import ProfileSection
from rl.config.sections import RunConfig
from rl.config.violations import Violation


def profile(config: RunConfig) -> Iterator[Violation]:
    """Settings of windows that never come, ranks that are not there, what only one tool knows."""
    section = config.profile
    if not section.steps:
        changed = [name for name in sorted(section.model_fields_set) if name != "steps" and _differs(section, name)]
        if changed:
            yield Violation(
                f"profile.{changed[0]}",
                "it says how iterations are profiled, and profile.steps names none; set steps or remove it.",
                ("profile.steps",),
            )
        return
    if min(section.steps) < 1 or len(set(section.steps)) < len(section.steps):
        yield Violation(
            "profile.steps",
            f"expected different iterations, counted from 1, came {list(section.steps)}; correct them.",
        )
    elif config.run.steps is not None and max(section.steps) > config.run.steps:
        yield Violation(
            "profile.steps",
            f"expected iterations of the run, which has run.steps = {config.run.steps}, came {list(section.steps)}; "
            "lower them.",
            ("run.steps",),
        )
    if section.tool == "nsys" and config.trainer.backend == "nccl" and not config.allow_untested:
        yield Violation(
            "profile.tool",
            "nsys is not tested; set it to torch, or allow_untested: true.",
            ("trainer.backend",),
        )
    ranks = section.ranks
    if ranks is not None and (not ranks or min(ranks) < 0 or max(ranks) >= config.trainer.ranks):
        yield Violation(
            "profile.ranks",
            f"expected some of the trainer's ranks, 0 to {config.trainer.ranks - 1}, came {list(ranks)}; correct them, "
            "or set null for all.",
            ("trainer.ranks",),
        )
    for name in ("shapes", "stacks", "memory"):
        if section.tool == "nsys" and getattr(section, name):
            yield Violation(
                f"profile.{name}",
                "only the torch profiler records it: expected false because profile.tool is nsys, came true; remove "
                "it.",
                ("profile.tool",),
            )
    if section.tool == "nsys" and config.trainer.backend != "nccl":
        yield Violation(
            "profile.tool",
            f"Nsight Systems captures GPUs, and trainer.backend is {config.trainer.backend}; set tool to torch.",
            ("trainer.backend",),
        )


def _differs(section: ProfileSection, name: str) -> bool:
    return bool(getattr(section, name) != type(section).model_fields[name].default)
