"""A small training script on `megatron.training`, as a user has one: no line of it knows of balancing.

    torchrun --nproc-per-node 2 pretrain_mock.py <Megatron's arguments> --mock-data

Tokens are drawn from a skewed distribution, seeded by the sample's index, so that some experts get far more tokens than
others. Written for the `megatron.training` that comes with Megatron-core 0.19.
"""

import json
import os
from functools import partial

import torch
from megatron.core.enums import ModelType
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_timers, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args


class SkewedTokens(torch.utils.data.Dataset):
    """Sequences in which token `t` comes with probability proportional to `(t + 1) ** -1.5`."""

    def __init__(self, samples: int, sequence_length: int, vocabulary: int, seed: int) -> None:
        self.samples, self.sequence_length, self.seed = samples, sequence_length, seed
        self.weights = torch.arange(1, vocabulary + 1) ** -1.5

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        text = torch.multinomial(self.weights, self.sequence_length + 1, replacement=True, generator=generator)
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": torch.ones(self.sequence_length),
            "position_ids": torch.arange(self.sequence_length),
        }


def datasets(samples: list[int | None], vp_stage: int | None = None) -> list[SkewedTokens | None]:
    args = get_args()
    sizes = args.seq_length, args.vocab_size
    return [SkewedTokens(n, *sizes, args.seed + i) if n else None for i, n in enumerate(samples)]


def mean_loss(loss_mask: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
    loss = torch.sum(output.view(-1).float() * loss_mask.view(-1))
    tokens = loss_mask.sum().to(torch.int)
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}


def forward_step(data_iterator, model):
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = {name: tensor.cuda(non_blocking=True) for name, tensor in next(data_iterator).items()}
    timers("batch-generator").stop()
    assert get_attr_wrapped_model(model, "vp_stage") is None, "this script has no virtual pipeline"
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=batch["loss_mask"])
    return output, partial(mean_loss, batch["loss_mask"])


def note_losses(path: str) -> None:
    """Have every logged loss appended to a file, unrounded: what Megatron prints has seven digits."""
    from megatron.training import training

    original = training.training_log

    def training_log(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs):
        if loss_dict:
            with open(path, "a") as file:
                record = {"iteration": iteration} | {name: float(value) for name, value in loss_dict.items()}
                file.write(json.dumps(record) + "\n")
        return original(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs)

    training.training_log = training_log


if __name__ == "__main__":
    datasets.is_distributed = True
    args = parse_and_validate_args()
    if "MOCK_LOSSES" in os.environ and args.rank == 0:
        note_losses(os.environ["MOCK_LOSSES"])
    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        datasets,
        ModelType.encoder_or_decoder,
        forward_step,
    )
    torch.distributed.destroy_process_group()
