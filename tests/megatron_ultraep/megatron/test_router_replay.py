"""Routers take the experts they are given, learn through them, and never choose silently."""

import numpy as np
import pytest
import torch

from megatron_ultraep.layout import MicroBatchKey
from megatron_ultraep.megatron.groups import ParallelLayout, create_groups
from megatron_ultraep.megatron.microbatch import NoMicroBatch, micro_batch
from megatron_ultraep.megatron.router_replay import ReplayError, RoutingReplay
from rl.models.architecture import architecture
from rl.models.builder import build_model
from tests.megatron_ultraep.replay.routes import valid_routes
from tests.ranks import RankError

EXPERTS, TOPK, ROWS, LAYERS = 8, 2, 6, 3
KEYS = [MicroBatchKey("actor", "train", 0, i) for i in range(3)]
CONFIG = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": LAYERS,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOPK,
    "norm_topk_prob": True,
    "vocab_size": 64,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
}


class Case:
    """A small model's routers with random weights, and their replay."""

    def __init__(self, attach=True, keep_output=True, **config):
        arch = architecture(CONFIG | config)
        self.model = build_model(arch, create_groups(ParallelLayout(world=1), timeout_s=60))
        self.routers = [layer.mlp.router for layer in self.model.chunks[0].decoder.layers]
        for i, router in enumerate(self.routers):
            torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(i))
        if attach:
            self.replay = RoutingReplay(self.model.chunks, arch.moe_layer_of(), keep_output=keep_output)

    def run(self, key, layer, x=None):
        """What the router says of ``x [rows, hidden]``: (probabilities, map), both ``[rows, experts]``."""
        with micro_batch(key):
            return self.routers[layer]((inputs() if x is None else x)[:, None])


def inputs(seed=0):
    return torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(seed))


def routes(seed=0):
    """int16 ``[layers, rows, topk]``."""
    return valid_routes(ROWS, LAYERS, EXPERTS, TOPK, seed, dtype=np.int16).swapaxes(0, 1)


def chosen(routing_map):
    return routing_map.nonzero()[:, 1].reshape(ROWS, TOPK).numpy()


def any_order():
    case = Case()
    given = {key: routes(i) for i, key in enumerate(KEYS)}
    for key in KEYS:
        case.replay.set(key, given[key])
    took = {}
    for i, layer in [(2, 1), (0, 2), (2, 0), (1, 0), (0, 0), (1, 1), (0, 1), (1, 2), (2, 2)]:
        took[KEYS[i], layer] = chosen(case.run(KEYS[i], layer)[1])
    pending = case.replay.pending()
    consumed = {(key, layer): case.replay.consumed(key, layer) for key, layer in took}
    for key in KEYS:
        case.replay.finish(key)
    return given, took, consumed, pending, case.replay.pending()


def test_each_router_takes_the_routes_of_its_key_in_any_order(ranks):
    ((given, took, consumed, pending, left),) = ranks(1).run(any_order)
    for (key, layer), experts in took.items():
        assert np.array_equal(experts, np.sort(given[key][layer]))
        assert np.array_equal(consumed[key, layer], experts)
    assert (pending, left) == (KEYS, [])


@pytest.mark.parametrize("normalize", [True, False], ids=["softmax after top-k", "softmax before top-k"])
def test_router_weights_learn_through_replayed_probabilities(ranks, normalize):
    ((got, by_hand),) = ranks(1).run(gradient_beside_autograd, normalize)
    for a, b in zip(got, by_hand, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
        assert b.abs().max() > 0.01


def gradient_beside_autograd(normalize):
    case = Case(norm_topk_prob=normalize)
    given, x, layer = routes(), inputs(), 1
    factor = torch.randn(ROWS, EXPERTS, generator=torch.Generator().manual_seed(9))
    case.replay.set(KEYS[0], given)
    probabilities, _ = case.run(KEYS[0], layer, x)
    (probabilities * factor).sum().backward()

    weight = case.routers[layer].weight.detach().clone().requires_grad_()
    experts = torch.from_numpy(given[layer]).long()
    logits = x @ weight.t()
    p = logits.gather(1, experts).softmax(-1) if normalize else logits.softmax(-1).gather(1, experts)
    (p * factor.gather(1, experts)).sum().backward()
    expected = torch.zeros(ROWS, EXPERTS).scatter(1, experts, p.detach())
    return (probabilities.detach(), case.routers[layer].weight.grad), (expected, weight.grad)


def ask_the_router():
    case = Case()
    own = [chosen(Case(attach=False).run(KEYS[0], layer)[1]) for layer in range(LAYERS)]
    given = routes()
    given[:, 1::2] = -1
    case.replay.set(KEYS[0], given, used=ROWS - 1)
    took = [chosen(case.run(KEYS[0], layer)[1]) for layer in range(LAYERS)]
    return given, own, took, case.replay.finish(KEYS[0])


def test_rows_of_minus_one_ask_the_router(ranks):
    ((given, own, took, differing),) = ranks(1).run(ask_the_router)
    for layer in range(LAYERS):
        assert np.array_equal(took[layer][::2], np.sort(given[layer, ::2]))
        assert np.array_equal(took[layer][1::2], own[layer][1::2])
        others = [r for r in range(ROWS - 1) if not np.array_equal(took[layer][r], own[layer][r])]
        assert differing[layer] == len(others) < ROWS - 1
    assert any(differing.values())


def own_choice():
    alone = Case(attach=False)
    case = Case()
    case.replay.let_routers_choose("actor", "train")
    same = all(
        torch.equal(a, b)
        for layer in range(LAYERS)
        for a, b in zip(case.run(KEYS[0], layer), alone.run(KEYS[0], layer), strict=True)
    )
    case.replay.clear()
    try:
        case.run(KEYS[0], 0)
    except ReplayError as error:
        return same, str(error)
    return same, None


def test_a_pass_declared_own_is_the_stock_router_until_it_ends(ranks):
    ((same, message),) = ranks(1).run(own_choice)
    assert same
    assert "actor/train/step 0/micro-batch 0, MoE layer 0: no routes were set" in message


def recompute_twice():
    case = Case()
    given = routes()
    given[:, 0] = -1
    case.replay.set(KEYS[0], given)
    for _ in range(2):
        for layer in range(LAYERS):
            case.run(KEYS[0], layer)
    return case.replay.finish(KEYS[0])


def test_consuming_twice_is_recomputation(ranks):
    (differing,) = ranks(1).run(recompute_twice)
    assert sorted(differing) == list(range(LAYERS))
    assert all(0 < n < ROWS for n in differing.values())


def changed(row):
    given = routes()
    given[1, 3] = row
    return given


def fail(how):
    case = Case()
    key = KEYS[0]
    if how == "none set":
        case.run(key, 1)
    elif how == "another key":
        case.replay.set(key, routes())
        case.run(KEYS[1], 1)
    elif how == "another pass is own":
        case.replay.let_routers_choose("actor", "old_logprob")
        case.run(key, 1)
    elif how == "no micro-batch":
        case.replay.set(key, routes())
        case.run(None, 0)
    elif how == "unconsumed":
        case.replay.set(key, routes())
        for layer in (0, 2):
            case.run(key, layer)
        case.replay.finish(key)
    elif how == "rows":
        case.replay.set(key, routes()[:, 1:])
        case.run(key, 2)
    elif how == "topk":
        case.replay.set(key, routes()[..., :1])
        case.run(key, 0)
    elif how == "layers":
        case.replay.set(key, routes()[1:])
    elif how == "twice":
        case.replay.set(key, routes())
        case.replay.set(key, routes())
    elif how == "duplicate":
        case.replay.set(key, changed([5, 5]))
    elif how == "range":
        case.replay.set(key, changed([0, EXPERTS]))
    elif how == "partly":
        case.replay.set(key, changed([-1, 3]))
    elif how == "routed otherwise":
        case.replay.set(key, np.full_like(routes(), -1))
        for layer in range(LAYERS):
            case.run(key, layer)
        case.run(key, 2, inputs(seed=1))
        case.replay.finish(key)
    elif how == "not kept":
        case = Case(keep_output=False)
        case.replay.set(key, routes())
        case.run(key, 0)
        case.replay.consumed(key, 0)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("none set", "actor/train/step 0/micro-batch 0, MoE layer 1: no routes were set. Set them before the forward"),
        ("another key", "micro-batch 1, MoE layer 1: no routes were set"),
        ("another pass is own", r"let_routers_choose\('actor', 'train'\)"),
        ("no micro-batch", f"{NoMicroBatch.__name__}: a layer runs outside any micro-batch"),
        ("unconsumed", "micro-batch 0, MoE layer 1: routes were set but no router consumed them"),
        ("rows", r"MoE layer 2: the router has 6 rows and top-2, the routes are \(5, 2\)"),
        ("topk", r"MoE layer 0: the router has 6 rows and top-2, the routes are \(6, 1\)"),
        ("layers", r"expected routes \[3 MoE layers of this rank, rows, topk\], got \(2, 6, 2\)"),
        ("twice", "MoE layer 0: routes are set already"),
        (
            "duplicate",
            r"MoE layer 1: expected distinct experts in 0..7 in each row, .* got \[5, 5\] in row 3 \(1 ",
        ),
        ("range", r"micro-batch 0, MoE layer 1: .* got \[0, 8\] in row 3"),
        ("partly", r"micro-batch 0, MoE layer 1: .* got \[-1, 3\] in row 3"),
        ("routed otherwise", r"MoE layer 2: \d rows .* or recomputation routed them otherwise than the forward"),
        ("not kept", "MoE layer 0: no router output was kept"),
    ],
)
def test_failures_name_the_key_and_the_layer(ranks, how, message):
    with pytest.raises(RankError, match=message):
        ranks(1).run(fail, how)


def attach_to(config, handle=None):
    """The refusal of a model whose config is changed, and whether its routers were left alone."""
    case = Case(attach=False)
    for name, value in config.items():
        setattr(case.routers[0].config, name, value)
    case.routers[-1].router_replay = handle
    try:
        RoutingReplay(case.model.chunks, case.model.arch.moe_layer_of())
    except ReplayError as error:
        untouched = all(not r._forward_hooks and r.router_replay is None for r in case.routers[:-1])
        return str(error), untouched
    return None, True


@pytest.mark.parametrize(
    ("config", "handle", "message"),
    [
        ({"moe_router_fusion": True}, None, "layer 1: .*moe_router_fusion bypasses replay: turn it off"),
        ({"moe_expert_capacity_factor": 1.5}, None, "moe_expert_capacity_factor drops tokens of the routes: unset it"),
        (
            {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01},
            None,
            "moe_router_load_balancing_type=aux_loss computes its loss from the router's own top-k",
        ),
        (
            {"moe_router_load_balancing_type": ["none", "seq_aux_loss"], "moe_aux_loss_coeff": [0.0, 0.1]},
            None,
            "use 'none' or moe_aux_loss_coeff=0",
        ),
        ({"moe_router_load_balancing_type": "sinkhorn"}, None, "sinkhorn bypasses replay: use 'none'"),
        ({}, "Megatron's own", "layer 3: .*moe_enable_routing_replay is on and would be overridden"),
        ({"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.0}, None, None),
    ],
)
def test_routers_that_would_not_obey_are_refused(ranks, config, handle, message):
    ((refusal, untouched),) = ranks(1).run(attach_to, config, handle)
    assert untouched
    if message is None:
        assert refusal is None
    else:
        with pytest.raises(ReplayError, match=message):
            raise ReplayError(refusal)


def detached():
    case, stock = Case(), Case(attach=False)
    case.replay.set(KEYS[0], routes())
    case.run(KEYS[0], 0)
    case.replay.detach()
    same = torch.equal(case.run(None, 0)[0], stock.run(None, 0)[0])
    clean = all(r.router_replay is None and not r._forward_hooks for r in case.routers)
    again = RoutingReplay(case.model.chunks, case.model.arch.moe_layer_of())
    return same, clean, case.replay.pending(), again.moe_layers


def test_detach_gives_the_routers_back(ranks):
    assert ranks(1).run(detached) == [(True, True, [], (0, 1, 2))]


def layers_are_counted_among_moe_layers():
    arch = architecture(CONFIG | {"num_hidden_layers": 4, "mlp_only_layers": [0, 2]})
    model = build_model(arch, create_groups(ParallelLayout(world=1), timeout_s=60))
    return RoutingReplay(model.chunks, arch.moe_layer_of()).moe_layers


def test_dense_layers_have_no_routes(ranks):
    assert ranks(1).run(layers_are_counted_among_moe_layers) == [(0, 1)]
