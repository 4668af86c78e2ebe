"""What modules keep for backward, by hand for sizes that are easy to count."""

import pytest

from rl.config.trainer import ParallelSection
from rl.planning.activations import (
    Workload,
    expert_rows,
    in_flight,
    kept_by_layer,
    kept_by_routes,
    logits,
    needed_by_layer,
)
from tests.rl.planning.models import published, tiny

ONE = ParallelSection()


def test_full_recomputation_keeps_the_input_of_a_layer():
    arch = published("qwen3-30b-a3b")
    assert kept_by_layer(arch, ONE, Workload(100, recompute="full"), moe=True) == 100 * 2048 * 2
    assert kept_by_layer(arch, ParallelSection(tp=2, ep=2), Workload(100, recompute="full"), moe=True) == 50 * 2048 * 2


def test_a_dense_layer_by_hand():
    arch = tiny("llama")  # hidden 32, 4 heads and 2 key-value heads of 16, MLP of 48
    rows, b = 10, 2
    hidden = 3 * 32 * b + 2 * 4  # input, norm, sum; statistics of two norms
    attention = ((4 + 2 * 2) + (4 + 2) + 4) * 16 * b + 4 * 4  # projection, with positions, output; softmax statistics
    mlp = 32 * b + 4 + 4 * 48 * b  # norm, its statistics; fc1 (two), activation, product
    assert kept_by_layer(arch, ONE, Workload(rows), moe=False) == rows * (hidden + attention + mlp)


def test_an_moe_layer_by_hand():
    arch = tiny("mixtral")  # as above; 8 experts of 48, top-2
    rows, b = 10, 2
    hidden = 3 * 32 * b + 2 * 4
    attention = ((4 + 2 * 2) + (4 + 2) + 4) * 16 * b + 4 * 4
    router = 32 * b + 4 + 8 * (3 * 4 + 1)
    experts = 2 * (32 * b + 12 + 2 * 48 * b + 3 * 48 * b)
    assert kept_by_layer(arch, ONE, Workload(rows), moe=True) == rows * (hidden + attention + router + experts)
    uneven = kept_by_layer(arch, ONE, Workload(rows, imbalance=1.5), moe=True)
    assert uneven - kept_by_layer(arch, ONE, Workload(rows), moe=True) == rows * experts // 2


def test_rows_of_experts():
    arch = tiny("mixtral")
    assert expert_rows(arch, ONE, Workload(100)) == 200
    assert expert_rows(arch, ParallelSection(tp=2, ep=2), Workload(100, imbalance=1.5)) == 150
    assert expert_rows(arch, ParallelSection(tp=2, etp=2), Workload(100)) == 200


def test_recomputing_needs_what_it_does_not_keep():
    arch = tiny("mixtral")
    whole, full = Workload(64), Workload(64, recompute="full")
    assert needed_by_layer(arch, ONE, full, moe=True) == needed_by_layer(arch, ONE, whole, moe=True) + kept_by_layer(
        arch, ONE, whole, moe=True
    )


def test_logits_by_hand():
    arch = tiny("llama")  # 101 words
    # Two in float32 and one in bfloat16, and three chunks of 4 rows in float32.
    assert logits(arch, ONE, Workload(10, 2, logprob_chunk=4)) == 101 * (10 * 10 + 3 * 4 * 4)
    assert logits(arch, ParallelSection(tp=2), Workload(10, 4, logprob_chunk=64)) == 51 * (10 * 8 + 3 * 10 * 4)


@pytest.mark.parametrize(
    ("pp", "vpp", "micro_batches", "expected"),
    [(1, 1, 8, [1]), (4, 1, 8, [4, 3, 2, 1]), (4, 1, 2, [2, 2, 2, 1]), (2, 2, 8, [5, 3]), (4, 2, 16, [11, 9, 7, 5])],
)
def test_micro_batches_in_flight(pp, vpp, micro_batches, expected):
    parallel = ParallelSection(pp=pp, vpp=vpp)
    assert [in_flight(parallel, stage, micro_batches) for stage in range(pp)] == expected


def test_routes_of_a_mini_batch():
    # 100 rows over 2 tensor-parallel ranks, 3 layers, top-2: int16 captured, int64 taken.
    assert kept_by_routes(tiny("qwen3_moe"), ParallelSection(tp=2), 100, 3) == 50 * 3 * 2 * 10
