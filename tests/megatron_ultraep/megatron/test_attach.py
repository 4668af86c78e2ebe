"""A balanced layer is the stock layer, computed elsewhere."""

import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_ultraep.config import BalanceConfig
from megatron_ultraep.megatron import compat
from megatron_ultraep.megatron.attach import make_balancer
from megatron_ultraep.megatron.stages import check_target
from megatron_ultraep.megatron.support import REFUSED, TESTED, Unsupported, check_version, table
from tests.megatron_ultraep.megatron import moe
from tests.megatron_ultraep.megatron.moe import Case, stock_and_balanced, worst

ROOT = Path(__file__).resolve().parents[3]
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
            assert (mine[0] == first[0]).all(), "ranks planned differently"
            assert (mine[1] == first[1]).all(), "ranks planned differently"
    if replicas:
        assert all((plan[0] >= 0).any() for plan in results[0]["plans"]), "no replica was used: nothing was tested"
        for _, _, before, after, _ in results[0]["plans"]:
            assert after.max() <= before.max()


@pytest.mark.parametrize("transport", ["collective", "symmetric"])
@pytest.mark.parametrize("name", CASES)
def test_layer_equals_stock(ranks, name, transport):
    case = CASES[name]
    balance = dataclasses.replace(moe.BALANCE, transport=transport)
    compare(case, ranks(len(case.tokens)).run(stock_and_balanced, case, balance))


@pytest.mark.parametrize("home_slot", [(7, 6, 5, 4, 3, 2, 1, 0), (0, 4, 1, 5, 2, 6, 3, 7)])
def test_permuted_homes(ranks, home_slot):
    """Experts may live anywhere: results are by logical expert."""
    results = ranks(2).run(moe.permuted, Case(), home_slot)
    home = {name: t for r in results for name, t in r["home"].items()}
    expected = {name: t for r in results for name, t in r["expected"].items()}
    assert worst(home, expected)[0] <= 1e-12
    for result in results:
        assert worst(result["balanced"], result["stock"])[0] <= 1e-12
        assert "are away from where Megatron has them: move them back" in result["refused"]
    assert results[0]["replicas"] > 0


def test_frozen_experts(ranks):
    for result in ranks(2).run(moe.frozen_experts, Case()):
        assert result["replicas"] > 0
        assert worst(result["balanced"], result["stock"])[0] <= 1e-12


def test_experts_frozen_in_part_are_refused(ranks):
    assert all("train all or none" in said for said in ranks(2).run(moe.frozen_in_part))


def test_not_enabled_leaves_no_hook_and_twice_is_refused(ranks):
    assert ranks(2).run(moe.left_alone) == [(True, True)] * 2


REFUSALS = {
    "dispatcher": ({"moe_token_dispatcher_type": "allgather"}, "set moe_token_dispatcher_type to 'alltoall'"),
    "capacity": ({"moe_expert_capacity_factor": 1.0}, "unset the capacity factor"),
    "padding": ({"moe_pad_expert_input_to_capacity": True}, "unset the capacity factor"),
    "fp8": ({"fp8": "hybrid"}, "train experts in bf16"),
    "graphs": ({"cuda_graph_impl": "local"}, "set cuda_graph_impl to 'none'"),
    "delayed": ({"delay_wgrad_compute": True}, "turn off delay_wgrad_compute"),
    "overlapped": ({"overlap_moe_expert_parallel_comm": True}, "overlap_moe_expert_parallel_comm"),
    "shared overlap": ({"moe_shared_expert_overlap": True}, "moe_shared_expert_overlap was not tested"),
    "latent": ({"moe_latent_size": 8}, "unset it"),
    "probs on input": ({"moe_apply_probs_on_input": True}, "moe_apply_probs_on_input was not tested"),
    "grouped": ({"moe_single_grouped_weight": True}, "each expert must have weights of its own"),
    "offloading": ({"fine_grained_activation_offloading": True}, "activation offloading was not tested"),
    "inference": ({"transformer_impl": "inference_optimized"}, "has no backward"),
    "fusion": ({"gradient_accumulation_fusion": True}, "turn it off"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(ranks, name):
    config, sentence = REFUSALS[name]
    for said in ranks(2).run(moe.refusal, config):
        assert "MoE layer 1" in said
        assert sentence in said


def test_layouts_that_are_refused(ranks):
    alone = ranks(2).run(moe.refusal, {}, layout={"ep": 1})
    assert all("there is nothing to balance" in said for said in alone)
    cut = ranks(2).run(moe.refusal, {}, layout={"ep": 1, "tp": 2, "etp": 2})
    assert all("set expert_tensor_parallel_size to 1" in said for said in cut)
    nodes = ranks(4).run(moe.refusal, {}, BalanceConfig(node_size=3))
    assert all("node_size 3 must divide the 4" in said for said in nodes)


def test_ranks_must_agree(ranks):
    assert all("different settings" in said for said in ranks(2).run(moe.different_settings))


def test_gate_is_measured_and_the_same_everywhere(ranks):
    first, second = ranks(2).run(moe.measured_gate)
    assert first == second
    costs, replicas = first
    assert costs.token_ps > 0
    assert costs.copy_ps_per_kib > 0
    assert costs.replica_bytes == (96 * 32 + 32 * 48) * 3 * 8  # float64: weights twice, gradients once
    assert replicas == 0


def no_moe_layer():
    try:
        make_balancer(BalanceConfig(), ())
    except Unsupported as error:
        return str(error)


def test_a_dense_model_is_refused(ranks):
    assert all("no MoE layer" in said for said in ranks(2).run(no_moe_layer))


def test_untested_versions_are_refused(monkeypatch):
    monkeypatch.setattr(compat, "version", lambda: "9.9.9")
    with pytest.raises(Unsupported, match=r"9.9.9 was not tested.*allow_untested"):
        check_version(allow_untested=False)
    assert "9.9.9" in check_version(allow_untested=True)


def test_a_changed_target_is_noticed(monkeypatch):
    monkeypatch.setattr(compat.moe_layer_class(), "preprocess", lambda self, hidden_states: None)
    with pytest.raises(Unsupported, match=r"MoELayer.preprocess .* takes \['self', 'hidden_states'\]"):
        check_target()


def test_support_page_is_the_table():
    """`python -m megatron_ultraep.megatron.support` prints what docs/support.md holds."""
    page = (ROOT / "docs" / "support.md").read_text()
    assert table() in page, "run: python -m megatron_ultraep.megatron.support docs/support.md"


@pytest.mark.parametrize("tested", TESTED, ids=lambda t: t.feature)
def test_every_supported_row_names_a_test_that_exists(tested):
    path, _, rest = tested.test.partition("::")
    assert (ROOT / path).is_file(), path
    if rest:
        function = rest.split("[")[0]
        assert f"def {function}(" in (ROOT / path).read_text(), rest
        if "[" in rest:
            case = rest.split("[")[1].rstrip("]").removesuffix("-collective").removesuffix("-symmetric")
            assert f'"{case}"' in (ROOT / path).read_text(), case


def test_refused_features_have_one_row_each():
    assert len({refusal.feature for refusal in REFUSED}) == len(REFUSED)
