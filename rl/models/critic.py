"""Models that give one number per row: a PPO critic, or a reward model.

The trunk is the language model's, under any layout; the output layer is replaced by a linear head of one output. The
head is replicated over tensor-parallel ranks. With sequence parallelism each of them applies it to its own rows, then
the numbers are gathered: one per row travels, not its hidden state. The head's gradient is then a part on each rank,
which Megatron adds up as it does those of norms (``sequence_parallel`` on the parameter).

Such a model never ties its head to its embedding, whatever the language model does.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ultraep.megatron import compat
from megatron_ultraep.megatron.groups import ModelGroups
from rl.models.architecture import Architecture
from rl.models.builder import BuiltModel, Recompute, build_model
from rl.models.names import SCALAR_HEAD
from rl.models.weights import load_weights


class ScalarHead(torch.nn.Module):
    """A linear layer of one output in the place of a ``GPTModel``'s output layer; begins at zero.

    Args:
        hidden: size of a hidden state.
        tp_group: the tensor-parallel group, None without tensor parallelism.
        dtype, device: of the weight ``[1, hidden]``.
    """

    def __init__(
        self, hidden: int, tp_group: dist.ProcessGroup | None, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.tp_group = tp_group
        self.weight = torch.nn.Parameter(torch.zeros(1, hidden, dtype=dtype, device=device))
        # What Megatron asks of parameters: is this one's gradient a part that tensor-parallel ranks add up?
        self.weight.sequence_parallel = tp_group is not None  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor, weight: None = None, **unused: Any) -> tuple[torch.Tensor, None]:
        """One number per row.

        Args:
            hidden: ``[rows, 1, hidden]``; with sequence parallelism this rank's part of the rows.
            weight, unused: what Megatron gives its own output layer.

        Returns:
            ``([rows, 1, 1], None)``, all rows on every rank.
        """
        values = torch.nn.functional.linear(hidden, self.weight)
        if self.tp_group is not None:
            values = compat.gather_rows(values, self.tp_group)
        return values, None


def build_scalar_model(
    arch: Architecture,
    groups: ModelGroups,
    *,
    name: str,
    dtype: torch.dtype = torch.float32,
    recompute: Recompute | None = None,
    seed: int = 0,
    permute_fusion: bool = False,
) -> BuiltModel:
    """A language model's architecture with a scalar head, weights uninitialised; see ``build_model``."""
    arch = replace(arch, tied=False, scalar_head=True)
    model = build_model(
        arch, groups, name=name, dtype=dtype, recompute=recompute, seed=seed, permute_fusion=permute_fusion
    )
    tp_group = groups.collection.tp if groups.layout.sequence_parallel else None
    for chunk in model.chunks:
        if chunk.post_process:
            chunk.output_layer = ScalarHead(arch.hidden, tp_group, dtype=dtype, device=model.device)
    return model


def load_scalar_weights(model: BuiltModel, directory: str | Path, *, head_required: bool = False) -> None:
    """Weights from a Hugging Face directory of a language model, or of sequence classification with one label.

    A directory without a head (``score.weight``) leaves it at zero.

    Raises:
        KeyError: tensors that are missing, the head among them with ``head_required``.
        ValueError: shapes that do not fit, as of a head with several labels.
    """
    load_weights(model, directory, optional=() if head_required else (SCALAR_HEAD,))
