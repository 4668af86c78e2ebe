"""The imports that every rank of a multi-rank test needs, made once by the fork server.

They take 10 s and more; a forked rank has them for nothing. Nothing here may start a thread or touch a device: threads
do not survive a fork.
"""

import gc
import importlib

_HEAVY = (
    "torch",
    "torch.distributed",
    "numpy",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "megatron.core.parallel_state",
    "megatron.core.dist_checkpointing",
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel",
    "megatron.core.transformer.moe.moe_layer",
    "megatron.core.transformer.moe.router_replay",
)

for _name in _HEAVY:
    importlib.import_module(_name)

# What is imported by now lives as long as the process: keep collections in the ranks short, and their pages shared.
gc.collect()
gc.freeze()
