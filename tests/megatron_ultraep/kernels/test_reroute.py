"""The kernels give the same bits as ``runtime.reroute``, forward and backward; where that one cannot go, as a loop."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from megatron_ultraep import plan as planners
from megatron_ultraep.kernels import build
from megatron_ultraep.kernels.reroute import CHUNK_ROWS, count, reroute
from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.plan.types import PlanSettings
from megatron_ultraep.runtime import reroute as reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def draw_map(rng, rows, preference, topk):
    """bool ``[rows, E]``: distinct experts of each row, the preferred ones more often."""
    scores = torch.tensor(np.log(preference) + rng.gumbel(size=(rows, len(preference))))
    return torch.zeros(scores.shape, dtype=torch.bool).scatter(1, scores.topk(topk, dim=1).indices, True)


def make_plan(rng, ranks, experts, topk, rows, slots=2, concentration=0.4):
    """A plan whose every possible replica exists, and the maps that it was made from, one for each rank."""
    home = tuple(int(e) for e in rng.permutation(experts))
    layout = ExpertLayout(experts, ranks, home, slots=slots)
    preference = rng.dirichlet(np.full(experts, concentration)) + 1e-9
    maps = [draw_map(rng, n, preference, topk) for n in rows]
    loads = np.stack([m.sum(0).numpy() for m in maps])
    return planners.solve(loads, layout, PlanSettings(min_tokens=1, tolerance_ppm=0)), maps


def table_of(plan, source, rng):
    """The kernels' table of a source rank; beyond an expert's copies there is anything."""
    long = reference.tables(plan, source)
    copies = (plan.copies >= 0).sum(1)
    most = plan.copies.shape[1]
    missing = np.arange(most) >= copies[:, None]
    until, physical = long[:, 2 : 2 + most].copy(), long[:, 2 + most :].copy()
    for columns in (until, physical):
        columns[missing] = rng.integers(-(2**31), 2**31, size=columns.shape)[missing]
    return torch.from_numpy(np.concatenate([copies[:, None], long[:, :2], until, physical], axis=1)).to(torch.int32)


def physical_of(plan):
    return plan.quota.shape[1]


def bits(tensor):
    """The words of a tensor: 0 and -0 differ."""
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(words[tensor.element_size()])


def same_bits(left, right):
    return left.dtype == right.dtype and torch.equal(bits(left), bits(right))


def check_against_torch(plan, routing_map, source, topk, dtype, device, rng):
    """Counts, values, map and gradient of one rank."""
    physical = physical_of(plan)
    routing_map = routing_map.to(device)
    values = torch.from_numpy(rng.normal(size=routing_map.shape)).to(device=device, dtype=dtype)
    values[values.abs() < 0.1] = -0.0
    upstream = torch.from_numpy(rng.normal(size=(len(values), physical))).to(device=device, dtype=dtype)
    upstream[upstream.abs() < 0.1] = -0.0

    counts = count(routing_map)
    assert counts.loads.dtype == torch.int64
    assert torch.equal(counts.loads, routing_map.sum(0))
    assert torch.equal(counts.before, before_of(routing_map))

    expected_probs = values.clone().requires_grad_()
    long = torch.from_numpy(reference.tables(plan, source)).to(device)
    expected, expected_map = reference.reroute(expected_probs, routing_map, long, topk=topk, physical=physical)
    expected.backward(upstream)

    probs = values.clone().requires_grad_()
    table = table_of(plan, source, rng).to(device)
    found, found_map = reroute(probs, routing_map, counts.before, table, physical)
    assert found_map.dtype == torch.bool
    assert not found_map.requires_grad
    assert same_bits(found, expected)
    assert same_bits(found_map, expected_map)
    found.backward(upstream)
    assert same_bits(probs.grad, expected_probs.grad)


def before_of(routing_map):
    """int32 ``[chunks, E]``, from sums over all rows."""
    until = routing_map.cumsum(0)
    starts = torch.arange(0, len(routing_map), CHUNK_ROWS, device=routing_map.device)
    return (until[starts] - routing_map[starts].long()).int()


def loop(routing_map, table, physical):
    """int ``[T, P]``: 1 + the logical expert of each pair where it goes; the definition, pair by pair."""
    out = np.zeros((routing_map.shape[0], physical), dtype=np.int64)
    most = (table.shape[1] - 3) // 2
    for expert in range(routing_map.shape[1]):
        copies, tokens, stride = (int(x) for x in table[expert, :3])
        until = [int(x) for x in table[expert, 3 : 3 + copies]]
        for ordinal, row in enumerate(np.flatnonzero(routing_map[:, expert])):
            number = ordinal * stride % tokens
            copy = next(c for c in range(copies) if number < until[c])
            out[row, table[expert, 3 + most + copy]] = 1 + expert
    return out


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(1, 1, 1), (2, 2, 2), (2, 6, 1), (3, 9, 3), (4, 8, 2), (4, 32, 4), (5, 35, 6), (8, 64, 8)]),
    rows=st.integers(0, 150),
    slots=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
)
def test_same_bits_as_torch(device, seed, shape, rows, slots, dtype):
    ranks, experts, topk = shape
    rng = np.random.default_rng(seed)
    every = [rows, *rng.integers(0, 60, ranks - 1)]
    plan, maps = make_plan(rng, ranks, experts, topk, every, slots)
    for source in {0, ranks - 1}:
        check_against_torch(plan, maps[source], source, topk, dtype, device, rng)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(64, 256, 8, 97), (8, 128, 8, 256), (2, 1024, 2, 45), (1024, 1024, 3, 33), (7, 133, 5, 31)]
)
def test_same_bits_as_torch_in_large_shapes(device, dtype, shape):
    ranks, experts, topk, rows = shape
    rng = np.random.default_rng(experts)
    plan, maps = make_plan(rng, ranks, experts, topk, [rows] * ranks)
    assert plan.copies.shape[1] > 1
    check_against_torch(plan, maps[1], 1, topk, dtype, device, rng)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 70),
        (2, 6, 2, 33),
        (8, 64, 8, 100),
        (5, 35, 6, 64),
        (64, 256, 8, 40),
        (1024, 1024, 3, 33),
        (2, 4, 2, 2100),
    ],
)
def test_same_bits_with_warps_of_32(shape):
    """Blocks of many warps, their members in random order; the last shape has more chunks than the scan segments."""
    ranks, experts, topk, rows = shape
    with mock.patch("megatron_ultraep.kernels.reroute.library_of", return_value=build.library("lanes")):
        for seed, dtype in enumerate(DTYPES[1:3]):
            rng = np.random.default_rng(seed)
            plan, maps = make_plan(rng, ranks, experts, topk, [rows] * ranks)
            check_against_torch(plan, maps[-1], ranks - 1, topk, dtype, "cpu", rng)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [0, 1, 32, 33, 100])
def test_rows_may_have_any_number_of_experts(device, rows):
    rng = np.random.default_rng(rows)
    ranks, experts = 4, 12
    layout = ExpertLayout(experts, ranks, slots=2)
    share = rng.random(experts)
    share[:3] = (1.0, 0.0, 0.95)  # an expert of all tokens, one of none
    maps = [rng.random((rows + 20 * rank, experts)) < share for rank in range(ranks)]
    maps[0][: rows // 3] = False
    maps[0][rows - 1 :] = True
    plan = planners.solve(np.stack([m.sum(0) for m in maps]), layout, PlanSettings(min_tokens=1, tolerance_ppm=0))
    table = table_of(plan, 0, rng)
    expected = loop(maps[0], table.numpy(), physical_of(plan))

    routing_map = torch.from_numpy(maps[0]).to(device)
    number = torch.arange(1, experts + 1, dtype=torch.float32, device=device).expand(rows, experts)
    probs = number.clone().requires_grad_()
    found, found_map = reroute(probs, routing_map, count(routing_map).before, table.to(device), physical_of(plan))
    assert (found.detach().cpu().numpy() == expected).all()
    assert (found_map.cpu().numpy() == (expected > 0)).all()
    assert (found_map.sum(0).cpu().numpy() == plan.quota[0]).all()
    found.square().sum().backward()
    assert torch.equal(probs.grad, 2 * number * routing_map)


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_past_32_bits(device):
    """Token number times stride is a 64-bit product."""
    rows = 100_000
    stride = int(reference.stride(np.array([rows]))[0])
    assert (rows - 1) * stride > 2**32
    table = torch.tensor([[3, rows, stride, 100, 70_000, rows, 2, 0, 3]], dtype=torch.int32)
    routing_map = torch.ones(rows, 1, dtype=torch.bool, device=device)
    counts = count(routing_map)
    found, _ = reroute(torch.ones(rows, 1, device=device), routing_map, counts.before, table.to(device), 4)
    number = np.arange(rows, dtype=np.int64) * stride % rows
    target = np.array([2, 0, 3])[np.searchsorted([100, 70_000, rows], number, side="right")]
    assert (found.argmax(1).cpu().numpy() == target).all()
    assert counts.loads.tolist() == [rows]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("experts", [8, 7])
def test_layouts_in_memory(device, experts):
    """Maps and probs that are slices or transposed, maps that start at an odd address, gradients that are expanded."""
    rng = np.random.default_rng(experts)
    plan, maps = make_plan(rng, 1, experts, 2, [70], slots=0)
    table, physical = table_of(plan, 0, rng).to(device), physical_of(plan)
    routing_map = maps[0].to(device)
    probs = torch.from_numpy(rng.normal(size=routing_map.shape)).to(device)
    expected = reroute(probs, routing_map, count(routing_map).before, table, physical)

    transposed = routing_map.t().contiguous().t()
    wide = torch.cat([~routing_map, routing_map], dim=1)[:, experts:]
    padded = torch.zeros(1 + routing_map.numel(), dtype=torch.bool, device=device)
    padded[1:] = routing_map.reshape(-1)
    shifted = padded[1:].view(routing_map.shape)
    assert shifted.is_contiguous()
    assert shifted.data_ptr() % 4 == 1
    for other in (transposed, wide, shifted):
        counts = count(other)
        assert torch.equal(counts.before, before_of(routing_map))
        leaf = probs.t().contiguous().t().requires_grad_()
        found = reroute(leaf, other, counts.before, table, physical)
        assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))
        found[0].sum().backward()
        assert torch.equal(leaf.grad, routing_map.double())


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck(device):
    rng = np.random.default_rng(0)
    plan, maps = make_plan(rng, 2, 6, 2, [37, 20])
    routing_map, table = maps[0].to(device), table_of(plan, 0, rng).to(device)
    before = count(routing_map).before
    probs = torch.rand(routing_map.shape, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: reroute(p, routing_map, before, table, physical_of(plan))[0], probs)


@pytest.mark.parametrize("device", DEVICES)
def test_recomputation_and_no_grad(device):
    rng = np.random.default_rng(1)
    plan, maps = make_plan(rng, 2, 6, 2, [70, 20])
    routing_map, table = maps[0].to(device), table_of(plan, 0, rng).to(device)

    def layer(probs):
        out, chosen = reroute(probs * 2, routing_map, count(routing_map).before, table, physical_of(plan))
        return (out.square() * chosen).sum(1)

    gradients = []
    values = torch.rand(routing_map.shape, device=device)
    for run in (
        layer,
        lambda p: checkpoint(layer, p, use_reentrant=True),
        lambda p: checkpoint(layer, p, use_reentrant=False),
    ):
        probs = values.clone().requires_grad_()
        run(probs).sum().backward()
        gradients.append(probs.grad)
    assert gradients[0].any()
    assert all(same_bits(g, gradients[0]) for g in gradients)
    with torch.no_grad():
        assert same_bits(layer(values.clone().requires_grad_()), layer(values))


def test_wrong_arguments_are_refused():
    routing_map = torch.ones(40, 4, dtype=torch.bool)
    probs, table = torch.rand(40, 4), torch.zeros(4, 5, dtype=torch.int32)
    before = count(routing_map).before
    with pytest.raises(ValueError, match="expected a routing map bool"):
        count(routing_map.int())
    for name, wrong in (
        ("probs of float16", (probs.int(), routing_map, before, table, 4)),
        ("probs of float16", (probs[:8], routing_map, before, table, 4)),
        ("expected before of count", (probs, routing_map, before[:1], table, 4)),
        ("expected a table int32", (probs, routing_map, before, table.long(), 4)),
        ("expected a table int32", (probs, routing_map, before, table[:, :4], 4)),
        ("at least one physical", (probs, routing_map, before, table, 0)),
        ("of one device", (probs, routing_map, before, table.to("meta"), 4)),
    ):
        with pytest.raises(ValueError, match=name):
            reroute(*wrong)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(64, 256, 8, 8192), (64, 256, 8, 8209), (4, 32, 4, 20_001), (8, 128, 8, 16_384), (512, 1024, 8, 4099)]
)
def test_stress_on_gpu(shape):
    """Larger shapes, loads of several kinds, many launches in flight, and blocks in any order."""
    ranks, experts, topk, rows = shape
    for seed in range(5):
        rng = np.random.default_rng(seed)
        others = [64] * (ranks - 1)
        plan, maps = make_plan(
            rng, ranks, experts, topk, [rows, *others], slots=2, concentration=(0.05, 0.3, 5)[seed % 3]
        )
        check_against_torch(plan, maps[0], 0, topk, DTYPES[seed % 4], "cuda", rng)
        routing_map, table = maps[0].cuda(), table_of(plan, 0, rng).cuda()
        probs = torch.rand(routing_map.shape, device="cuda")
        runs = [reroute(probs, routing_map, count(routing_map).before, table, physical_of(plan)) for _ in range(20)]
        assert all(same_bits(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))
