"""Samples and arguments as slime's reward functions expect them: ``async def custom_rm(args, sample, **kwargs)``.

The names are those of slime's ``slime.utils.types.Sample``; a reward only reads them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

from rl.types import Sample


class Status(Enum):
    """How a sample ended."""

    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"


_STATUS = {"stop": Status.COMPLETED, "length": Status.TRUNCATED, "abort": Status.ABORTED}


@dataclass
class SlimeSample:
    """A sample under slime's names.

    Attributes:
        group_index: the prompt's place in its epoch.
        index: which of the prompt's samples it is.
        prompt: text after the chat template.
        tokens: of prompt and response.
        response: text without special tokens.
        response_length: tokens of the response.
        label: as in the data.
        metadata: the column ``metadata``, or all columns of data without one.
        status: how it ended.
        reward: None.
        loss_mask: None: all response tokens are learnt.
        rollout_log_probs: of response tokens.
        weight_versions: under which it was generated, as text.
    """

    Status = Status

    group_index: int
    index: int
    prompt: str
    tokens: list[int]
    response: str
    response_length: int
    label: Any
    metadata: dict[str, Any]
    status: Status
    reward: Any = None
    loss_mask: list[int] | None = None
    rollout_log_probs: list[float] | None = None
    weight_versions: tuple[str, ...] = ()


class SlimeArgs(SimpleNamespace):
    """``reward.args`` as attributes. slime's own flags are not among them: what is not given is an error that says so
    (``getattr(args, name, default)`` works)."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"the reward reads args.{name}: set {name} in reward.args (slime's own flags are not here)"
        )


def slime_args(args: Mapping[str, Any]) -> SlimeArgs:
    """``reward.args`` as slime passes its arguments."""
    return SlimeArgs(**args)


def slime_sample(sample: Sample) -> SlimeSample:
    """A copy of the sample under slime's names."""
    metadata = sample.prompt.metadata.get("metadata")
    return SlimeSample(
        group_index=sample.prompt.ordinal,
        index=int(number) if (number := sample.sample_id.rpartition("/")[2]).isdecimal() else 0,
        prompt=sample.prompt.text,
        tokens=sample.tokens.tolist(),
        response=sample.response_text,
        response_length=len(sample.response_tokens),
        label=sample.prompt.label,
        metadata=dict(metadata if isinstance(metadata, Mapping) else sample.prompt.metadata),
        status=_STATUS[sample.finish_reason],
        rollout_log_probs=sample.rollout_logprobs.tolist(),
        weight_versions=tuple(str(version) for _, version in sample.weight_versions),
    )


@contextlib.contextmanager
def slime_types() -> Iterator[None]:
    """Within it, ``from slime.utils.types import Sample`` gives ``SlimeSample``, without slime being installed."""
    modules = {name: ModuleType(name) for name in ("slime", "slime.utils", "slime.utils.types")}
    for name in ("slime", "slime.utils"):
        modules[name].__path__ = []
    modules["slime.utils.types"].Sample = SlimeSample  # type: ignore[attr-defined]
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
