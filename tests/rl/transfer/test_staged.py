"""Staged transfers: sharded Megatron models reach the engine beside each trainer rank bitwise; failures are named.

Each test's members are the ranks of one pool: trainer ranks first, then the engines beside them, in the same order.
"""

import os
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

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
from rl.rollout.weights import WeightMismatch, WeightUpdateExtension, checked, fetch
from rl.transfer.links import Board, Limits, Rendezvous, TransferError, source_name
from rl.transfer.plan import TensorSpec, make_plan, plan_transfer
from rl.transfer.receiver import Incoming, Receiver, receiver_names
from rl.transfer.staged_receiver import StagedReceiver
from rl.transfer.staged_sender import StagedSender
from rl.transfer.staging import ENTRIES, Entry, Staging
from rl.transfer.trainer import ModelSender
from rl.transfer.turns import staging_bytes, turns_of

CPU = torch.device("cpu")
LIMITS = Limits(join_s=60.0, start_s=60.0, bucket_s=60.0)
SHORT = Limits(join_s=60.0, start_s=60.0, bucket_s=4.0)  # others wait longer, 1.5 and 2 times, so all name one member


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.qwen3_moe(tmp_path_factory.mktemp("staged") / "model", seed=7)


def members_of(world):
    return tuple(source_name(r) for r in range(world)), receiver_names(list(range(world)), 1)


# ---------------------------------------------------------------- a model


def hand_over(directory, layout, world, bucket_bytes):
    """One member: the first ``world`` ranks train, the others receive; sends twice, the weights doubled in between."""
    rank = dist.get_rank()
    groups = create_groups(ParallelLayout(world=world, **layout), ranks=list(range(world)), timeout_s=60)
    sender = announced = None
    if rank < world:
        model = build_model(read_architecture(directory), groups, dtype=torch.float32)
        load_weights(model, directory)
        sender = ModelSender(model, rank)
        announced = sender.announce("float32")
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, announced)
    plan = plan_transfer(told[:world], bucket_bytes)
    turns = turns_of(plan, {t.name: h.key for holdings in told[:world] for h in holdings for t in h.tensors})
    box = [None]
    if rank == 0:
        rendezvous = Rendezvous("127.0.0.1")
        box = [rendezvous.generation(*members_of(world), "gloo", LIMITS)]
    dist.broadcast_object_list(box, 0)
    handles = [None] * dist.get_world_size()
    dist.all_gather_object(handles, sender and sender.join_staged(box[0], staging_bytes(plan)))
    if sender is None:
        receiver = StagedReceiver(box[0].receivers[rank - world], CPU)
        receiver.join(box[0], handles[rank - world])
        got = [
            {n: t.numpy() for n, t in checked(fetch([Incoming(plan)], 1.0, receiver), plan.manifest)} for _ in range(2)
        ]
        dist.barrier()
        receiver.close()
        return got
    first = sender.hand_over(plan, turns)
    with torch.no_grad():
        for p in model.chunks[0].parameters():
            p.mul_(2)
    second = sender.hand_over(plan, turns)
    dist.barrier()
    sender.close()
    return plan.ranks, (first.buckets, first.nbytes), (second.buckets, second.nbytes)


@pytest.mark.parametrize(
    ("world", "layout", "bucket_bytes", "sources"),
    [
        (4, {"tp": 2, "pp": 2, "ep": 2}, 100_000, 4),
        (2, {"ep": 2}, 200_000, 2),
        (2, {"tp": 2, "etp": 2}, 30_000, 1),
        (1, {}, 50_000, 1),
    ],
    ids=["tp2 pp2 ep2", "dp2 ep2", "tp2 etp2, small buckets", "one rank"],
)
def test_a_sharded_model_arrives_bitwise_at_every_engine(ranks, directory, world, layout, bucket_bytes, sources):
    answers = ranks(2 * world).run(hand_over, str(directory), layout, world, bucket_bytes)
    stored = load_file(directory / "model.safetensors")
    for first, second in answers[world:]:
        assert first.keys() == second.keys() == stored.keys()
        assert all(np.array_equal(first[n], stored[n].numpy()) for n in stored)
        assert all(np.array_equal(second[n], 2 * stored[n].numpy()) for n in stored)
    assert len(answers[0][0]) == sources
    for _, *reports in answers[:world]:
        for buckets, nbytes in reports:
            assert buckets > 4
            assert nbytes >= sum(t.numel() * 4 for t in stored.values())


# ---------------------------------------------------------------- failures


def specs(rank, n=24):
    return [TensorSpec(f"t{rank}.{i}", (64, 512), "float32") for i in range(n)]


PLAN = make_plan({0: specs(0), 1: specs(1)}, 600_000)
KEYS = {f"t{rank}.{i}": (i, rank, 0) for rank in (0, 1) for i in range(24)}
TURNS = turns_of(PLAN, KEYS)


def hang_until_somebody_gave_up(membership):
    board, deadline = Board(membership, "the test"), time.monotonic() + 60
    while not board.store.check(["failed"]) and time.monotonic() < deadline:
        time.sleep(0.1)


def member(faults):
    """Ranks 0 and 1 train, 2 and 3 receive. ``faults``: {rank: what it does half-way}.

    Returns ``(error or None, its message, tensors taken or exported)``.
    """
    rank = dist.get_rank()
    fault, limits = faults.get(rank), SHORT if "stalls" in faults.values() else LIMITS
    box = [None]
    if rank == 0:
        rendezvous = Rendezvous("127.0.0.1")
        box = [rendezvous.generation(*members_of(2), "gloo", limits)]
    dist.broadcast_object_list(box, 0)
    membership = box[0]
    sender = StagedSender(rank, CPU) if rank < 2 else None
    handles = [None] * 4
    dist.all_gather_object(handles, sender and sender.join(membership, staging_bytes(PLAN)))
    dist.barrier()
    done = 0

    def half_way():
        if done == 10 and fault == "stalls":
            hang_until_somebody_gave_up(membership)
        if done == 10 and fault == "raises":
            raise RuntimeError("a layer of another kind")

    def exported():
        nonlocal done
        for i in range(24):
            half_way()
            done += 1
            yield (i, rank, 0), [(f"t{rank}.{i}", torch.full((64, 512), float(i)))]

    answer = (None, "")
    try:
        if sender is not None:
            sender.hand_over(PLAN, TURNS, exported())
        else:
            receiver = StagedReceiver(membership.receivers[rank - 2], CPU)
            receiver.join(membership, handles[rank - 2])
            plan = PLAN if fault != "other plan" else make_plan({0: specs(0), 1: specs(1)}, 900_000)
            for name, tensor in checked(receiver.receive(plan), plan.manifest):
                assert (tensor == float(name.split(".")[1])).all()
                half_way()
                done += 1
    except (TransferError, RuntimeError, WeightMismatch) as error:
        answer = (type(error).__name__, str(error))
    dist.barrier()  # the driver's store lives in rank 0
    return *answer, done


def test_nothing_is_wrong(ranks):
    answers = ranks(4).run(member, {})
    assert [(error, done) for error, _, done in answers] == [(None, 24), (None, 24), (None, 48), (None, 48)]


def test_an_engine_that_hangs_is_named_with_its_bucket_and_ranks_export_to_the_end(ranks):
    answers = ranks(4).run(member, {3: "stalls"})
    for rank in (0, 1, 2):
        error, message, _ = answers[rank]
        assert error in ("TransferTimeout", "TransferError"), rank
        assert "waited 4 s for engine 1 rank 0 to take bucket" in message
        assert "of 12" in message
    assert [answers[rank][2] for rank in (0, 1)] == [24, 24]  # nobody is left alone in a gather
    assert answers[3][0] == "TransferError"  # when it wakes up: what it has is torn
    assert answers[3][2] < 48


def test_an_engine_whose_loading_fails_is_named_to_all(ranks):
    answers = ranks(4).run(member, {2: "raises"})
    for rank in (0, 1, 3):
        assert answers[rank][0] == "TransferError"
        assert "engine 0 rank 0: its caller stopped half-way" in answers[rank][1]
    assert answers[2][:2] == ("RuntimeError", "a layer of another kind")


def test_a_rank_whose_export_fails_is_named_to_all(ranks):
    answers = ranks(4).run(member, {1: "raises"})
    for rank in (0, 2, 3):
        assert answers[rank][0] == "TransferError"
        assert "trainer rank 1: RuntimeError: a layer of another kind" in answers[rank][1]
    assert answers[1][:2] == ("RuntimeError", "a layer of another kind")


def test_a_rank_that_hangs_is_named_by_the_others(ranks):
    answers = ranks(4).run(member, {1: "stalls"})
    for rank in (0, 2, 3):
        assert answers[rank][0] in ("TransferTimeout", "TransferError")
        assert "for trainer rank 1" in answers[rank][1]


def test_members_with_other_plans_do_not_begin(ranks):
    answers = ranks(4).run(member, {3: "other plan"})
    assert all(error == "TransferError" for error, *_ in answers)
    assert any("another plan than" in message for _, message, *_ in answers)


# ---------------------------------------------------------------- the memory


def test_what_is_published_is_seen_and_what_is_taken_too():
    staging = Staging(4096, CPU, generation=5, rank=3)
    opened = staging.handles().open(CPU)
    assert (opened.written, staging.taken) == (0, 0)
    for number in range(2 * ENTRIES + 1):
        staging.ring[number] = 7
        staging.publish(number, Entry(1, number, number))
        assert opened.written == number + 1
        assert opened.entry(number) == Entry(1, number, number)
        assert opened.ring[number] == 7
        opened.take(number + 1)
        assert staging.taken == number + 1
    opened.close()
    staging.close()


def test_memory_of_another_process_or_generation_is_refused(tmp_path):
    staging = Staging(4096, CPU, generation=5, rank=3)
    handles = staging.handles()
    with pytest.raises(TransferError, match=r"trainer rank 3: .* is not what it made"):
        replace(handles, generation=6).open(CPU)
    with pytest.raises(TransferError, match="processes of one host"):
        replace(handles, descriptor=9999).open(CPU)
    with (tmp_path / "short").open("w+b") as other:
        other.write(b"x" * 10)
        other.flush()
        with pytest.raises(TransferError, match="of another process"):
            replace(handles, descriptor=other.fileno()).open(CPU)
    staging.close()


def test_another_process_opens_it_and_no_file_is_left(tmp_path):
    staging = Staging(1 << 20, CPU, generation=1, rank=0)
    staging.ring.fill_(9)
    staging.publish(0, Entry(0, 0, 0))
    before = set(os.listdir("/dev/shm"))
    h = staging.handles()
    code = (
        "import torch; from rl.transfer.staging import StagingHandles\n"
        f"o = StagingHandles({h.pid}, {h.descriptor}, {h.nbytes}, 1, 0, None).open(torch.device('cpu'))\n"
        "assert o.written == 1 and bool((o.ring == 9).all()); o.take(1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert staging.taken == 1
    assert set(os.listdir("/dev/shm")) <= before
    staging.close()


def test_who_joined_nothing_says_so():
    with pytest.raises(TransferError, match="in no generation"):
        list(StagedReceiver("engine 0 rank 0", CPU).receive(PLAN))
    taken = []
    with pytest.raises(TransferError, match="in no generation"):
        StagedSender(0, CPU).hand_over(PLAN, TURNS, (taken.append(i) for i in range(3)))
    assert taken == [0, 1, 2]


def test_an_engines_worker_opens_the_memory_and_leaves_it_for_another():
    worker = WeightUpdateExtension()
    worker.model_runner, worker.rank = SimpleNamespace(model=torch.nn.Linear(1, 1)), 0
    rendezvous = Rendezvous("127.0.0.1")
    for _ in range(2):
        membership = rendezvous.generation(*members_of(1), "gloo", LIMITS)
        staging = Staging(4096, CPU, membership.generation, 0)
        assert worker.ultraep_transfer_join(membership, 0, staging.handles()).error is None
        assert isinstance(worker._ultraep_receiver, StagedReceiver)
        assert worker._ultraep_receiver.name == "engine 0 rank 0"
        staging.close()
    wrong = worker.ultraep_transfer_join(membership, 0, replace(staging.handles(), generation=9)).error
    assert isinstance(wrong, TransferError)
    refused = worker.ultraep_transfer_join(replace(membership, limits=Limits(join_s=0.2)), 0, None).error
    assert isinstance(refused, TransferError)  # a broadcast's member, whom nobody joins
    assert isinstance(worker._ultraep_receiver, Receiver)


def test_members_must_be_all_ranks_in_order():
    membership = Rendezvous("127.0.0.1").generation(["trainer rank 1", "trainer rank 0"], ["engine 0 rank 0"])
    with pytest.raises(ValueError, match="in their order"):
        StagedSender(0, CPU).join(membership, 4096)
    with pytest.raises(ValueError, match="expected one of engine 0 rank 0"):
        StagedReceiver("engine 1 rank 0", CPU).join(membership, Staging(4096, CPU, 1, 0).handles())
