"""Groups are Megatron's own, and two models of different layouts train in one process."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_ultraep.megatron.groups import ParallelLayout, create_groups, new_group
from rl.models import tiny
from rl.models.weights import export_weights
from rl.training.batch import MiniBatch
from rl.training.passes import PassSettings
from rl.training.worker import PolicyObjective
from tests.ranks import RankError
from tests.rl.training.common import LOSS, make_layout, make_samples, make_worker, merge, worst

LAYOUTS = {
    1: [{}],
    2: [{"ep": 2}, {"pp": 2, "vpp": 2}, {"tp": 2, "etp": 2}],
    4: [{"tp": 2, "pp": 2, "ep": 2}, {"tp": 2, "ep": 4}, {"ep": 2}, {"tp": 2, "ep": 2}, {"tp": 4, "etp": 2, "ep": 2}],
    8: [{"tp": 2, "pp": 2, "ep": 2}, {"tp": 2, "ep": 2, "etp": 2}, {"pp": 4, "ep": 2}],
}
# Field of the collection -> what Megatron's rank generator calls the group; EXPERT ones cut by etp, ep, expert dp.
DENSE = {"tp": "tp", "pp": "pp", "dp": "dp", "mp": "tp-pp", "cp": "cp", "tp_dp_cp": "tp-dp", "dp_cp": "dp"}
EXPERT = {"ep": "ep", "expt_tp": "tp", "expt_dp": "dp", "tp_ep": "tp-ep", "tp_ep_pp": "tp-ep-pp"}


def groups_beside_megatrons(layouts):
    """Per layout: ``{field: (our members, Megatron's)}`` on this rank, and this rank's coordinates."""
    from megatron.core.parallel_state import RankGenerator

    rank, world = dist.get_rank(), dist.get_world_size()
    answers = []
    for kwargs in layouts:
        layout = ParallelLayout(world=world, **kwargs)
        groups = create_groups(layout, timeout_s=60)
        order = "tp-cp-ep-dp-pp"
        dense = RankGenerator(tp=layout.tp, ep=1, dp=layout.dp, pp=layout.pp, cp=1, order=order)
        expert = RankGenerator(tp=layout.etp, ep=layout.ep, dp=layout.expert_dp, pp=layout.pp, cp=1, order=order)
        members = {}
        for generator, names in ((dense, DENSE), (expert, EXPERT)):
            for name, token in names.items():
                (expected,) = [ranks for ranks in generator.get_ranks(token) if rank in ranks]
                members[name] = dist.get_process_group_ranks(getattr(groups.collection, name)), sorted(expected)
        embedding = dist.get_process_group_ranks(groups.collection.embd) if groups.collection.embd else None
        answers.append((members, groups.coordinates, groups.is_first_stage, groups.is_last_stage, embedding))
    return answers


@pytest.mark.parametrize("world", LAYOUTS)
def test_groups_are_those_of_megatron(ranks, world):
    for rank, answers in enumerate(ranks(world).run(groups_beside_megatrons, LAYOUTS[world])):
        for kwargs, (members, coordinates, first, last, embedding) in zip(LAYOUTS[world], answers, strict=True):
            stages = members["pp"][0]
            assert embedding == (sorted({stages[0], stages[-1]}) if first or last else None)
            for name, (ours, theirs) in members.items():
                assert ours == theirs, (kwargs, rank, name)
            index = {name: members[group][0].index(rank) for name, group in GROUP_OF.items()}
            assert coordinates == index, (kwargs, rank)
            assert (first, last) == (index["pp"] == 0, index["pp"] == len(members["pp"][0]) - 1)


GROUP_OF = {"tp": "tp", "pp": "pp", "dp": "dp", "etp": "expt_tp", "ep": "ep", "expert_dp": "expt_dp"}


def test_coordinates_by_hand():
    layout = ParallelLayout(world=8, tp=2, pp=2, ep=4)
    assert (layout.dp, layout.expert_dp, layout.sequence_parallel) == (2, 1, True)
    assert layout.coordinates(0) == {"pp": 0, "tp": 0, "dp": 0, "etp": 0, "ep": 0, "expert_dp": 0}
    assert layout.coordinates(3) == {"pp": 0, "tp": 1, "dp": 1, "etp": 0, "ep": 3, "expert_dp": 0}
    assert layout.coordinates(6) == {"pp": 1, "tp": 0, "dp": 1, "etp": 0, "ep": 2, "expert_dp": 0}


def test_a_placement_renumbers_ranks():
    reversed_ = ParallelLayout(world=4, pp=2, ep=2, placement=((1, 0),))
    assert [reversed_.coordinates(r)["pp"] for r in range(4)] == [1, 1, 0, 0]
    assert [reversed_.coordinates(r)["ep"] for r in range(4)] == [0, 1, 0, 1]
    segments = ParallelLayout(world=8, pp=2, ep=2, placement=((1, 0), (3, 2)))
    assert (segments.dp, segments.replicas, segments.node_size, segments.expert_dp) == (4, 2, 2, 2)
    assert [segments.coordinates(r)["pp"] for r in range(8)] == [1, 1, 0, 0, 1, 1, 0, 0]
    assert [segments.coordinates(r)["dp"] for r in range(8)] == [0, 1, 0, 1, 2, 3, 2, 3]
    assert [segments.coordinates(r)["expert_dp"] for r in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    same = ParallelLayout(world=8, pp=4, placement=((0, 1, 2, 3),))
    assert [same.coordinates(r) for r in range(8)] == [ParallelLayout(world=8, pp=4).coordinates(r) for r in range(8)]


PLACED = {
    2: [{"pp": 2, "placement": ((1, 0),)}, {"placement": ((1,), (0,))}],
    4: [{"pp": 4, "placement": ((2, 0, 3, 1),)}, {"pp": 2, "placement": ((1, 0), (3, 2))},
        {"pp": 2, "ep": 2, "tp": 2, "placement": ((1, 0),)}],
    8: [{"pp": 2, "ep": 2, "placement": ((1, 0), (3, 2))}, {"pp": 2, "tp": 2, "ep": 2, "placement": ((3, 2), (1, 0))}],
}  # fmt: skip


def placed_groups(layouts):
    """Per layout: coordinates, this rank's place in each group and the group's members, and a sum over its pipeline."""
    answers = []
    for kwargs in layouts:
        layout = ParallelLayout(world=dist.get_world_size(), **kwargs)
        groups = create_groups(layout, timeout_s=60)
        pipeline = groups.collection.pp
        total = torch.tensor([1.0 + groups.coordinates["pp"]])
        dist.all_reduce(total, group=pipeline)
        first = torch.tensor([float(dist.get_rank())])
        dist.broadcast(first, dist.get_global_rank(pipeline, 0), group=pipeline)
        places = {n: (dist.get_rank(g), g.rank(), dist.get_process_group_ranks(g))
                  for n, f in GROUP_OF.items() for g in [getattr(groups.collection, f)]}  # fmt: skip
        embedding = dist.get_process_group_ranks(groups.collection.embd) if groups.collection.embd else None
        answers.append((groups.coordinates, places, float(total), int(first), embedding, groups.replica))
    return answers


@pytest.mark.parametrize("world", PLACED)
def test_groups_of_placed_stages_say_the_stage(ranks, world):
    for rank, answers in enumerate(ranks(world).run(placed_groups, PLACED[world])):
        for kwargs, (coordinates, places, total, first, embedding, replica) in zip(PLACED[world], answers, strict=True):
            layout = ParallelLayout(world=world, **kwargs)
            for name, (group_rank, own_rank, members) in places.items():
                assert group_rank == own_rank == members.index(rank) == coordinates[name], (kwargs, rank, name)
            stages = places["pp"][2]
            assert total == layout.pp * (layout.pp + 1) / 2
            assert first == stages[0]
            assert [layout.coordinates(r)["pp"] for r in stages] == list(range(layout.pp))
            assert stages == [node * layout.node_size + rank % layout.node_size for node in layout.placement[replica]]
            ends = {stages[0], stages[-1]}
            assert embedding == ([r for r in stages if r in ends] if rank in ends else None)


def ordered_group(order):
    group = new_group(order, timeout_s=20)
    gathered = [torch.zeros(1) for _ in order]
    dist.all_gather(gathered, torch.tensor([float(dist.get_rank())]), group=group)
    return group.rank(), [int(t) for t in gathered]


def ordered_group_of_older_torch(order):
    """Without ``sort_ranks``, as torch 2.11 and before have it."""
    stock = dist.new_group

    def older(ranks=None, timeout=None, backend=None):
        return stock(ranks, timeout=timeout, backend=backend)

    dist.new_group = older
    try:
        return ordered_group(order)
    finally:
        dist.new_group = stock


@pytest.mark.parametrize("make", [ordered_group, ordered_group_of_older_torch])
def test_a_group_in_the_order_given(ranks, make):
    answers = ranks(4).run(make, [2, 0, 3, 1])
    assert [rank for rank, _ in answers] == [1, 3, 0, 2]
    assert all(gathered == [2, 0, 3, 1] for _, gathered in answers)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"world": 6, "tp": 4}, r"tp\*pp = 4\*1 must divide the 6 ranks"),
        ({"world": 8, "pp": 2, "ep": 8}, r"etp\*ep = 1\*8 must divide the 4 ranks of a pipeline stage"),
        ({"world": 4, "cp": 2}, "context parallelism is not supported, got cp=2"),
        ({"world": 4, "pp": 2, "vpp": 1}, "vpp=1 needs pp > 1 and at least 2 chunks per stage"),
        ({"world": 4, "vpp": 2}, "got pp=1: unset vpp"),
        ({"world": 4, "ep": 0}, "expected ep >= 1, got 0"),
        ({"world": 4, "pp": 2, "placement": ((0, 1, 2, 3),)}, r"a placement of pp=2 nodes for every replica"),
        ({"world": 4, "pp": 2, "placement": ((0, 1), (1, 2))}, "expected each of the nodes 0 to 3 once"),
        (
            {"world": 8, "pp": 2, "ep": 4, "placement": ((1, 0), (2, 3))},
            r"etp\*ep=1\*4 must divide the ranks of a node",
        ),
        ({"world": 6, "pp": 2, "placement": ((1, 0), (2, 3))}, "6 ranks / 4 nodes"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        ParallelLayout(**sizes)


def sub_groups():
    """A model of two ranks of four, then one of all."""
    some = create_groups(ParallelLayout(world=2, ep=2), ranks=[1, 3], timeout_s=20)
    everyone = create_groups(ParallelLayout(world=4, tp=2, pp=2), timeout_s=20)
    sums = []
    for group in ([some.collection.ep] if some else []) + [everyone.collection.pp]:
        total = torch.tensor([dist.get_rank()])
        dist.all_reduce(total, group=group)
        sums.append(int(total))
    return some and (some.rank, dist.get_rank(some.collection.ep)), sums


def test_opposed_stages():
    layout = ParallelLayout(world=8, pp=2, ep=2)
    assert layout.opposed(2).placement == ((1, 0),)
    assert layout.opposed(4).placement == ((1, 0), (3, 2))
    assert ParallelLayout(world=8).opposed(4).placement == ((0,), (1,), (2,), (3,))
    assert [layout.opposed(4).coordinates(rank)["pp"] for rank in range(0, 8, 2)] == [1, 0, 1, 0]
    with pytest.raises(ValueError, match="divides the 3 nodes, got pp=2"):
        layout.opposed(3)
    with pytest.raises(ValueError, match="ranks of a node"):
        ParallelLayout(world=4, pp=2, ep=2).opposed(4)


def test_a_model_may_use_some_of_the_ranks(ranks):
    assert ranks(4).run(sub_groups) == [(None, [2]), ((0, 0), [4, 4]), (None, [2]), ((1, 1), [4, 4])]


def wrong_ranks(members):
    create_groups(ParallelLayout(world=2), ranks=members, timeout_s=60)


@pytest.mark.parametrize(
    ("members", "message"),
    [([0, 1, 2], r"expected 2 ranks for .*, got 3"), ([1, 0], r"expected increasing ranks .* got \[1, 0\]")],
)
def test_ranks_that_do_not_fit_are_refused(ranks, members, message):
    with pytest.raises(RankError, match=message):
        ranks(2).run(wrong_ranks, members)


class Trained:
    """A worker, its mini-batch, and what it computes."""

    def __init__(self, directory, layout, seed, **spec):
        self.worker = make_worker(directory, layout, **spec)
        samples = make_samples(self.worker.actor.arch, seed=seed)
        whole = MiniBatch.make(samples, make_layout(samples, self.worker.spec.layout))
        self.batch = whole.part(self.worker.groups.coordinates["dp"])

    def gradients(self, step):
        objective = PolicyObjective(LOSS, PassSettings(temperature=0.7, with_entropy=True))
        loss, sums, report = self.worker.gradients(self.batch, step, objective)
        tensors = {n: t.numpy().copy() for n, t in export_weights(self.worker.actor, source="main_grad")}
        return {"loss": loss, "sums": sums, "tensors": tensors, "digests": report.digests}

    def logprobs(self, step):
        values, _ = self.worker.logprobs(self.batch, "actor", "old_logprob", step, "replay", PassSettings())
        return values


def train_alone(model):
    trained = Trained(*model[:3], **model[3])
    return trained.gradients(0), trained.logprobs(0)


def train_both(a, b):
    one, other = Trained(*a[:3], **a[3]), Trained(*b[:3], **b[3])
    # Each model's passes between the other's: a stale global would show.
    first = one.logprobs(0)
    second = other.gradients(0)
    third = one.gradients(0)
    return (third, first), (second, other.logprobs(0))


def together(results):
    logprobs = {}
    for _, values in results:
        logprobs |= values
    return merge([gradients for gradients, _ in results]), logprobs


@pytest.mark.parametrize(
    ("layout_a", "layout_b", "recompute"),
    [
        ({"tp": 2, "pp": 2, "ep": 2}, {"ep": 4}, None),
        ({"pp": 2, "vpp": 2, "ep": 2}, {"tp": 2, "ep": 2}, ("full",)),
        ({"tp": 2, "pp": 2, "ep": 2}, {}, ("full",)),
    ],
    ids=["tp2xpp2xep2 and ep4", "vpp2xep2 and tp2xep2", "tp2xpp2xep2 and dp4"],
)
def test_two_models_of_different_layouts_in_one_process(ranks, tmp_path, layout_a, layout_b, recompute):
    a = str(tiny.qwen3_moe(tmp_path / "a", seed=5)), layout_a, 1, {"recompute": recompute}
    b = str(tiny.mixtral(tmp_path / "b", seed=6, heads=4, kv_heads=2, experts=4)), layout_b, 2, {}
    alone = [together(ranks(4).run(train_alone, model)) for model in (a, b)]
    both = ranks(4).run(train_both, a, b)
    for i in (0, 1):
        gradients, logprobs = together([answers[i] for answers in both])
        expected, expected_logprobs = alone[i]
        assert gradients["loss"] == expected["loss"]
        assert worst(gradients["tensors"], expected["tensors"]) == 0
        assert set(logprobs) == set(expected_logprobs)
        assert all(np.array_equal(logprobs[n], expected_logprobs[n]) for n in logprobs)
        assert all(np.array_equal(gradients["digests"][n], d) for n, d in expected["digests"].items())
