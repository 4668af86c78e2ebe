"""A balanced layer is the stock layer, computed elsewhere."""

import pytest
import torch

from tests.megatron_ultraep.megatron.moe import Case, stock_and_balanced, worst

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}

SHARED = {"moe_shared_expert_intermediate_size": 40}
CASES = {
    "top-2": Case(),
    "4 ranks": Case(tokens=(40, 24, 56, 32), micro_batches=2),
    "float32": Case(dtype=torch.float32),
    "bfloat16": Case(dtype=torch.bfloat16),
    "top-1": Case(config={"moe_router_topk": 1, "moe_router_pre_softmax": True}),
    "top-3": Case(config={"moe_router_topk": 3}),
    "top-8 of 16": Case(config={"moe_router_topk": 8, "num_moe_experts": 16}),
    "uneven tokens": Case(tokens=(90, 7)),
    "no tokens on a rank": Case(tokens=(0, 64), plain_router=True),
    "no tokens on three ranks": Case(tokens=(0, 0, 64, 0), plain_router=True),
    "experts without tokens": Case(skew=40.0),
    "shared experts": Case(config=SHARED),
    "gated shared experts": Case(config=SHARED | {"moe_shared_expert_gate": True}),
    "experts with bias": Case(config={"add_bias_linear": True}),
    "no gated linear unit": Case(config={"gated_linear_unit": False, "activation_func": torch.nn.functional.gelu}),
    "tensor and sequence parallel": Case(layout={"tp": 2, "ep": 2}, config=SHARED),
    "group-limited, sigmoid, expert bias": Case(
        tokens=(32, 32, 32, 32),
        config={
            "moe_router_num_groups": 4,
            "moe_router_group_topk": 2,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_topk": 3,
            "moe_router_topk_scaling_factor": 2.5,
        },
    ),
    "auxiliary loss": Case(config={"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1}),
    "sequence auxiliary loss": Case(
        config={"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1}
    ),
    "global auxiliary loss": Case(
        config={"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.1}
    ),
    "z-loss": Case(config={"moe_z_loss_coeff": 0.1}),
    "layer recomputed": Case(config={"recompute_granularity": "selective", "recompute_modules": ["moe"]}),
    "nothing to balance": Case(config={"moe_router_load_balancing_type": "sinkhorn", "moe_router_topk": 1}, skew=0.0),
}


def compare(case, results, *, replicas=True):
    for result in results:
        difference, name = worst(result["balanced"], result["stock"])
        assert difference <= TOLERANCE[case.dtype], (name, difference)
        difference, name = worst(result["again"], result["stock"])
        assert difference == 0, f"not given back as it was: {name}"
        for mine, first in zip(result["plans"], results[0]["plans"], strict=True):
            assert (mine[0] == first[0]).all() and (mine[1] == first[1]).all(), "ranks planned differently"
    if replicas:
        assert all((plan[0] >= 0).any() for plan in results[0]["plans"]), "no replica was used: nothing was tested"


@pytest.mark.parametrize("name", CASES)
def test_layer_equals_stock(ranks, name):
    case = CASES[name]
    compare(case, ranks(len(case.tokens)).run(stock_and_balanced, case))
