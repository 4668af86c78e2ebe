"""Neighbours in rank are neighbours on a node."""

import pytest

from rl import rank_nodes


@pytest.mark.parametrize(
    ("nodes", "order"),
    [
        ({0: "a", 1: "a", 2: "b", 3: "b"}, [0, 1, 2, 3]),
        ({0: "b", 1: "a", 2: "b", 3: "a"}, [0, 2, 1, 3]),
        ({3: "c", 2: "a", 1: "c", 0: "b"}, [0, 1, 3, 2]),
    ],
)
def test_bundles_of_one_node_are_together(monkeypatch, nodes, order):
    monkeypatch.setattr(rank_nodes, "placement_group_table", lambda group: {"bundles_to_node_id": nodes})
    assert rank_nodes.bundles_by_node(None) == order


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_real_nodes():
    """Three nodes of Ray, of four CPUs each."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for _ in range(3):
        cluster.add_node(num_cpus=4, object_store_memory=100 << 20, include_dashboard=False)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

    @ray.remote(num_cpus=1)
    class Rank:
        def node(self):
            return ray.get_runtime_context().get_node_id()

    def nodes_of(place, ranks):
        actors = [Rank.options(**place.options(rank)).remote() for rank in range(ranks)]
        found = ray.get([actor.node.remote() for actor in actors], timeout=300)
        for actor in actors:
            ray.kill(actor)
        place.release()
        return found

    try:
        found = nodes_of(rank_nodes.RankNodes(8, gpus=False, per_node=None, timeout_s=120), 8)
        assert found == sorted(found, key=found.index), "ranks of a node are not neighbours"
        found = nodes_of(rank_nodes.RankNodes(6, gpus=False, per_node=2, timeout_s=120), 6)
        assert len(set(found)) == 3
        assert [found[i] == found[i + 1] for i in (0, 2, 4)] == [True] * 3
        with pytest.raises(TimeoutError, match="4 trainer ranks, 1 on each of 4 nodes"):
            rank_nodes.RankNodes(4, gpus=False, per_node=1, timeout_s=3)
    finally:
        ray.shutdown()
        cluster.shutdown()
