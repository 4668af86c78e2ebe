"""Sharded Megatron models reach receivers bitwise; members that die, stall or stay away are named within the limit.

Each test's members are the ranks of one pool: sources first, receivers after them.
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_ultraep.megatron.groups import ParallelLayout, create_groups
from rl.models import tiny
from rl.models.architecture import read_architecture
from rl.models.builder import build_model
from rl.models.weights import load_weights
from rl.rollout.weights import checked, fetch
from rl.transfer.ipc import SharedWeights
from rl.transfer.links import Limits, Rendezvous, TransferError, TransferTimeout, source_name
from rl.transfer.plan import plan_transfer
from rl.transfer.receiver import Incoming, Receiver
from rl.transfer.sender import Sender
from rl.transfer.trainer import ModelSender
from tests.rl.transfer.processes import PLAN, RECEIVERS, SOURCES, member, run_members

CPU = torch.device("cpu")
LIMITS = Limits(join_s=20.0, start_s=20.0, bucket_s=20.0)
SHORT = Limits(join_s=2.0, start_s=2.0, bucket_s=2.0)
DEADLY = Limits(join_s=60.0, start_s=60.0, bucket_s=2.0)  # fresh processes need time to come


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.qwen3_moe(tmp_path_factory.mktemp("transfer") / "model", seed=7)


@pytest.fixture
def rendezvous():
    return Rendezvous("127.0.0.1")


# ---------------------------------------------------------------- a model


def hand_over(directory, layout, world, limits, how):
    """One member: the first ``world`` ranks train, the others receive; sends twice, the weights doubled in between."""
    rank = dist.get_rank()
    groups = create_groups(ParallelLayout(world=world, **layout), ranks=list(range(world)), timeout_s=30)
    model = sender = receiver = None
    announced = None
    if rank < world:
        model = build_model(read_architecture(directory), groups, dtype=torch.float32)
        load_weights(model, directory)
        sender = ModelSender(model, rank)
        announced = sender.announce("float32")
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, announced)
    plan = plan_transfer(told[:world], 200_000, spread=how != "first")
    box = [None]
    if rank == 0:
        rendezvous = Rendezvous("127.0.0.1")
        box = [rendezvous.generation([source_name(r) for r in plan.ranks], RECEIVERS, "gloo", limits)]
    dist.broadcast_object_list(box, 0)
    if model is None:
        receiver = Receiver(RECEIVERS[rank - world], CPU)
        receiver.join(box[0])
        got = [
            {n: t.numpy().copy() for n, t in checked(fetch([Incoming(plan)], 1.0, receiver), plan.manifest)}
            for _ in range(2)
        ]
        dist.barrier()
        return got
    sender.join(box[0])
    if how == "copy":
        sender.start(plan)
    else:
        sender.send(plan)
    with torch.no_grad():
        for p in model.chunks[0].parameters():
            p.mul_(2)
    if how == "copy":
        sender.finish(20.0)
    dist.all_reduce(torch.zeros(1), group=groups.collection.tp)
    report = sender.send(plan)
    dist.barrier()
    return plan.ranks, None if report is None else (report.buckets, report.nbytes)


@pytest.mark.parametrize(
    ("world", "layout", "how", "sources"),
    [
        (4, {"tp": 2, "pp": 2, "ep": 2}, "copy", 4),
        (4, {"ep": 2}, "spread", 4),
        (4, {"ep": 2}, "first", 2),
        (2, {"tp": 2, "etp": 2}, "spread", 1),
    ],
    ids=["tp2 pp2 ep2, from a copy", "dp4 ep2, replicas share", "dp4 ep2, first replica", "tp2 etp2"],
)
def test_a_sharded_model_arrives_bitwise(ranks, directory, world, layout, how, sources):
    answers = ranks(world + 2).run(hand_over, str(directory), layout, world, LIMITS, how)
    stored = load_file(directory / "model.safetensors")
    for first, second in answers[world:]:
        assert first.keys() == second.keys() == stored.keys()
        assert all(np.array_equal(first[n], stored[n].numpy()) for n in stored)
        assert all(np.array_equal(second[n], 2 * stored[n].numpy()) for n in stored)
    assert len(answers[0][0]) == sources
    reports = [report for _, report in answers[:world] if report]
    assert len(reports) == sources
    assert sum(nbytes for _, nbytes in reports) >= sum(t.numel() * 4 for t in stored.values())
    assert all(buckets > 1 for buckets, _ in reports)


# ---------------------------------------------------------------- failures


def run_with(ranks, rendezvous, limits, faults):
    membership = rendezvous.generation(SOURCES, RECEIVERS, "gloo", limits)
    return ranks(4).run(member, membership, faults)


def test_a_member_that_stays_away_is_named_and_the_next_generation_is_without_it(ranks, rendezvous):
    answers = run_with(ranks, rendezvous, SHORT, {3: "stays away"})
    for name, error, message, _, seconds in answers[:3]:
        assert error in ("TransferTimeout", "TransferError"), name
        assert "engine 3 rank 0" in message
        assert "waited 2 s" in message
        assert seconds < 4.0
    again = run_with(ranks, rendezvous, LIMITS, {})
    assert [(error, taken) for _, error, _, taken, _ in again] == [(None, 0), (None, 0), (None, 48), (None, 48)]


def test_a_receiver_that_stalls_holds_nobody_beyond_the_limit(ranks, rendezvous):
    answers = run_with(ranks, rendezvous, SHORT, {3: "stalls"})
    for rank in (0, 1):
        name, error, message, _, seconds = answers[rank]
        assert error in ("TransferTimeout", "TransferError"), name
        assert "engine 3 rank 0" in message
        assert "bucket" in message
        assert seconds < 6.0
    assert answers[3][1] == "TransferError"  # when it wakes up: what it has is torn
    assert answers[3][3] < 48


def test_a_receiver_whose_loading_fails_is_named_to_all(ranks, rendezvous):
    answers = run_with(ranks, rendezvous, LIMITS, {3: "raises"})
    for rank in (0, 1, 2):
        assert answers[rank][1] == "TransferError"
        assert "engine 3 rank 0: its caller stopped half-way" in answers[rank][2]
        assert answers[rank][4] < 10.0
    assert answers[3][1:3] == ("RuntimeError", "a layer of another kind")
    assert answers[2][3] < 48


def test_a_source_whose_export_fails_is_named_to_all(ranks, rendezvous):
    answers = run_with(ranks, rendezvous, LIMITS, {1: "raises"})
    for rank in (2, 3):
        assert answers[rank][1] == "TransferError"
        assert "trainer rank 2: RuntimeError: a layer of another kind" in answers[rank][2]
        assert answers[rank][3] < 48


def test_members_with_other_plans_do_not_begin(ranks, rendezvous):
    answers = run_with(ranks, rendezvous, LIMITS, {3: "other plan"})
    assert all(error == "TransferError" for _, error, _, _, _ in answers)
    assert any("another plan than" in message for _, _, message, _, _ in answers)
    assert all(taken == 0 for _, _, _, taken, _ in answers)


@pytest.mark.parametrize("victim", [1, pytest.param(3, marks=pytest.mark.slow)], ids=["source", "receiver"])
def test_a_killed_member_holds_nobody_beyond_the_limit(rendezvous, victim):
    """In processes of its own: a pool ends with any of its ranks."""
    answers = run_members(rendezvous.generation(SOURCES, RECEIVERS, "gloo", DEADLY), {victim: "dies"})
    assert victim not in answers
    witnesses = [0, 1] if victim == 3 else [2, 3]
    for rank in witnesses:
        _, error, message, taken, seconds = answers[rank]
        assert error in ("TransferTimeout", "TransferError")
        assert (SOURCES + RECEIVERS)[victim] in message
        assert "bucket" in message
        assert taken < 48
        assert seconds < 40.0  # the imports included; without the limit, join_s at least


# ---------------------------------------------------------------- the rest


def test_a_worker_that_joined_nothing_says_so():
    with pytest.raises(TransferError, match="transfer_join"):
        list(fetch([Incoming(PLAN)], 1.0, None))
    with pytest.raises(TransferError, match="join one"):
        list(Receiver("engine 0 rank 0", CPU).receive(PLAN))
    with pytest.raises(TransferError, match="in no generation"):
        Sender("trainer rank 0", CPU).send(PLAN, 0, [])


def test_memberships_are_checked(rendezvous):
    for sources, receivers in (([], ["e"]), (["s"], []), (["x"], ["x"])):
        with pytest.raises(ValueError, match="all names different"):
            rendezvous.generation(sources, receivers)
    numbers = [rendezvous.generation(["s"], ["e"]).generation for _ in range(3)]
    assert numbers == sorted(set(numbers))


def test_a_store_that_is_gone_is_named():
    from rl.transfer.links import Board, Membership

    gone = Membership(1, "127.0.0.1:9", ("s",), ("e",), limits=Limits(join_s=1.0))
    with pytest.raises(TransferTimeout, match=r"127\.0\.0\.1:9 within 1 s"):
        Board(gone, "s")


def opened(handles):
    return {name: tensor.clone() for name, tensor in fetch([handles], 1.0)}


def test_shared_allocations_are_opened_as_the_same_tensors(tmp_path):
    """With CPU memory, whose handles torch makes the same way; views of one allocation travel as one."""
    whole = torch.arange(100.0)
    tensors = {"a": whole[10:30].view(4, 5), "b": whole[30:60].view(5, 6).T, "c": torch.ones(3, dtype=torch.bfloat16)}
    shared = SharedWeights(tensors.items(), rank=0)
    handles = shared.handles()
    assert len(handles.storages) == 2
    assert handles.manifest == {"a": (4, 5), "b": (6, 5), "c": (3,)}
    got = opened(handles)
    assert all(torch.equal(got[n], t) for n, t in tensors.items())
    whole.mul_(2)
    assert torch.equal(opened(handles)["a"], whole[10:30].view(4, 5))
    shared.release()
