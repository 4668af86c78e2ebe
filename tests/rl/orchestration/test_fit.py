"""What only the model's ``config.json`` can show to be wrong."""

from dataclasses import replace

import pytest
from transformers import Qwen3MoeConfig

from rl.config import ConfigError, from_dict
from rl.models.architecture import Architecture, architecture
from rl.orchestration.fit import check_against_model
from tests.rl.test_config import changed


def arch_of(heads: int, kv_heads: int) -> Architecture:
    config = Qwen3MoeConfig(
        vocab_size=384,
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=8192,
        architectures=["Qwen3MoeForCausalLM"],
    )
    return architecture(config.to_dict())


def test_ranks_of_an_engine_divide_its_heads():
    two = from_dict(changed(("rollout.tensor_parallel", 2)))
    for heads, kv_heads in ((6, 3), (3, 1)):
        with pytest.raises(ConfigError, match=rf"must divide {heads} attention heads, .* {kv_heads} key/value heads"):
            check_against_model(two, arch_of(heads, kv_heads))
    check_against_model(two, arch_of(4, 2))
    check_against_model(two, arch_of(4, 1))  # every rank has a copy of the head


GPUS = (
    ("trainer.ranks", 2),
    ("trainer.parallel", {"pp": 2}),
    ("trainer.backend", "nccl"),
    ("rollout.device", "cuda"),
)


def test_what_has_run_on_gpus_needs_no_leave():
    check_against_model(from_dict(changed(*GPUS)), replace(arch_of(4, 2), family="deepseek_v3"))
    odd = replace(arch_of(4, 2), layers=3, moe_layers=(0, 1, 2))
    check_against_model(from_dict(changed(*GPUS)), odd)
