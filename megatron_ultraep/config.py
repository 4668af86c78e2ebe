"""What a user says about balancing: one frozen dataclass, whose fields are also the command-line flags.

Every field carries its help text, unit and default; ``megatron.arguments`` makes ``--ultraep-*`` flags of them, and
``rl.config`` reads them from the recipe's ``balance`` section.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

TransportName = Literal["auto", "collective", "symmetric"]


def _option(default: Any, help_text: str, *, metavar: str | None = None, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help_text, "metavar": metavar, "choices": choices})


@dataclass(frozen=True)
class BalanceConfig:
    """How experts are balanced. Immutable; the same on every rank.

    Raises:
        ValueError: when fields are out of range or contradict each other; all of them in one message.
    """

    enabled: bool = _option(True, "Balance experts. False leaves the model as it is: no hook, no buffer, no group.")
    slots: int = _option(
        2,
        "Replica slots on each expert-parallel rank (count, >= 1). One slot takes the memory of one expert's weights "
        "and gradients, once per rank: all layers share it.",
        metavar="N",
    )
    slot_sets: int = _option(
        1,
        "Sets of slots that MoE layers use in turn (1 or 2). Where plans are made ahead, 2 place the weights of the "
        "next layer while a layer's experts compute, 1 while attention does. Each set takes the memory of the slots.",
        metavar="N",
    )
    node_size: int = _option(
        0,
        "Expert-parallel ranks in one node (count, consecutive ranks of the expert-parallel group). Replicas never "
        "leave a node. 0: the whole group is one node.",
        metavar="RANKS",
    )
    min_tokens: int = _option(
        1024, "Fewest tokens a replica is made for (tokens of one micro-batch, >= 1).", metavar="TOKENS"
    )
    tolerance: float = _option(
        0.01,
        "How far above the mean the busiest rank may stay (fraction, 0 to 1). Smaller balances further, with more "
        "replicas.",
        metavar="FRACTION",
    )
    gate: bool = _option(
        True,
        "Make replicas only where the tokens taken off the busiest rank save more time than copying weights and "
        "gradients costs. False: balance always.",
    )
    token_ns: int = _option(
        0,
        "Time that one more token costs a rank in forward and backward of one MoE layer (ns). 0: measured at attach.",
        metavar="NS",
    )
    copy_ns_per_mib: int = _option(
        0,
        "Time that computing is held up by 1 MiB on its way from rank to rank inside a node (ns): less than the way "
        "takes where it is travelled beside computing. 0: measured at attach.",
        metavar="NS",
    )
    transport: TransportName = _option(  # noqa: RUF009 - it is dataclasses.field
        "auto",
        "How weights and gradients travel: 'symmetric' through memory that the GPUs of a node share over NVLink, with "
        "planning on the GPU; 'collective' over gloo or NCCL, with planning on the host; 'auto' takes 'symmetric' on "
        "GPUs where it works.",
        choices=("auto", "collective", "symmetric"),
    )
    record: str = _option(
        "", "Directory for load records (loads and replicas of every micro-batch of every layer). Empty: none.",
        metavar="DIR",
    )  # fmt: skip
    record_mib: int = _option(
        256,
        "Most disk that load records take on each recording rank (MiB). When full, records are thinned, oldest and "
        "newest kept.",
        metavar="MIB",
    )
    profile: bool = _option(
        False,
        "Name ranges for profilers: forward and backward of every transformer layer, attention and MoE layer, and the "
        "parts of balancing. Windows are those of the job's own profiler.",
    )
    allow_untested: bool = _option(
        False, "Go on, with a warning, where the Megatron-core version was not tested with this plugin."
    )

    def __post_init__(self) -> None:
        problems = []
        if self.slots < 1:
            problems.append(f"slots must be >= 1, got {self.slots}: use enabled=False for no balancing")
        if self.slot_sets not in (1, 2):
            problems.append(f"slot_sets must be 1 or 2, got {self.slot_sets}")
        if self.node_size < 0 or self.node_size == 1:
            problems.append(
                f"node_size must be 0 (the whole group) or >= 2 ranks, got {self.node_size}: no replica leaves a node"
            )
        if self.min_tokens < 1:
            problems.append(f"min_tokens must be >= 1 token, got {self.min_tokens}")
        if not 0 <= self.tolerance <= 1:
            problems.append(f"tolerance is a fraction of the mean, 0 to 1, got {self.tolerance}")
        if self.token_ns < 0 or self.copy_ns_per_mib < 0:
            problems.append(
                f"token_ns and copy_ns_per_mib are times >= 0, got {self.token_ns} and {self.copy_ns_per_mib}"
            )
        if not self.gate and (self.token_ns or self.copy_ns_per_mib):
            problems.append("token_ns and copy_ns_per_mib belong to the gate, which is off: drop them or set gate")
        if self.transport not in ("auto", "collective", "symmetric"):
            problems.append(f"transport must be 'auto', 'collective' or 'symmetric', got {self.transport!r}")
        if self.profile and not self.enabled:
            problems.append("profile names ranges of a model that is balanced, and enabled is off: drop one of them")
        if self.record_mib < 1:
            problems.append(f"record_mib must be >= 1 MiB, got {self.record_mib}")
        if problems:
            raise ValueError("BalanceConfig: " + "; ".join(problems))

    @property
    def tolerance_ppm(self) -> int:
        """The tolerance as planners take it: parts per million, an integer."""
        return round(self.tolerance * 1_000_000)


def option_help(name: str) -> str:
    """The help text of a field."""
    return str(next(f for f in fields(BalanceConfig) if f.name == name).metadata["help"])
