import itertools

import pytest

from rl import placement
from rl.config import ParallelSection, from_dict
from tests.rl.test_config import TWO_TP, changed

LAYOUTS = [
    # ranks, tp, pp, etp, ep
    (1, 1, 1, 1, 1),
    (2, 1, 1, 1, 2),
    (4, 1, 2, 1, 2),
    (8, 2, 2, 1, 2),
    (8, 2, 1, 2, 2),
    (16, 2, 2, 1, 4),
    (16, 4, 2, 2, 2),
]


@pytest.mark.parametrize(("ranks", "tp", "pp", "etp", "ep"), LAYOUTS)
def test_coordinates_are_those_of_megatron(ranks, tp, pp, etp, ep):
    from megatron.core.parallel_state import RankGenerator

    dense = RankGenerator(tp=tp, ep=1, dp=ranks // (tp * pp), pp=pp, cp=1, order="tp-cp-ep-dp-pp")
    expert = RankGenerator(tp=etp, ep=ep, dp=ranks // (etp * ep * pp), pp=pp, cp=1, order="tp-cp-ep-dp-pp")
    sizes = ParallelSection(tp=tp, pp=pp, etp=etp, ep=ep)
    placed = [placement.rank_placement(rank, ranks, sizes) for rank in range(ranks)]
    for generator, names in (
        (dense, {"tp": "tp", "dp": "dp", "pp": "pp"}),
        (expert, {"tp": "etp", "ep": "ep", "dp": "edp"}),
    ):
        for axis, field in names.items():
            for group in generator.get_ranks(axis):
                assert [getattr(placed[rank], field) for rank in group] == list(range(len(group)))


@pytest.mark.parametrize(("ranks", "tp", "pp", "etp", "ep"), LAYOUTS)
def test_coordinates_name_each_rank_once(ranks, tp, pp, etp, ep):
    sizes = ParallelSection(tp=tp, pp=pp, etp=etp, ep=ep)
    placed = [placement.rank_placement(rank, ranks, sizes) for rank in range(ranks)]
    assert {(r.tp, r.dp, r.pp) for r in placed} == set(
        itertools.product(range(tp), range(ranks // (tp * pp)), range(pp))
    )
    assert len({(r.etp, r.ep, r.edp, r.pp) for r in placed}) == ranks


def test_place_counts_what_actors_ask_for():
    config = from_dict(changed(*TWO_TP, ("rollout.engines", 2), ("rollout.tensor_parallel", 2)))
    placed = placement.place(config)
    assert (placed.data_parallel, placed.expert_data_parallel, placed.ray_cpus, placed.ray_gpus) == (1, 2, 6, 0)
    assert placed.to_dict()["ranks"][1]["tp"] == 1
    on_gpu = from_dict(changed(("rollout.device", "cuda"), ("trainer.backend", "nccl"), ("allow_untested", True)))
    assert placement.place(on_gpu).ray_gpus == 2


def test_render():
    text = placement.render(from_dict(changed(*TWO_TP)))
    assert "2 trainer ranks: data parallel 1" in text
    assert "1 rollout engine\n" in text
    assert "private local instance, 3 CPU tokens" in text
    assert "runs/smoke" in text
    joined = placement.render(from_dict(changed(("ray.address", "host:6379"))))
    assert "joins the cluster at host:6379" in joined


def test_render_names_the_node_of_a_rank():
    config = from_dict(changed(("trainer.ranks", 4), ("trainer.ranks_per_node", 2)))
    rows = [line for line in placement.render(config).split("\n") if "(gloo)" in line]
    assert [row.rpartition(", node ")[2] for row in rows] == ["0", "0", "1", "1"]
    assert ", node " not in placement.render(from_dict(changed()))
