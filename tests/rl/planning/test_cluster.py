"""GPUs and the links between them."""

import pytest

from rl.planning.cluster import GPUS, cluster_of


def test_links_inside_and_between_nodes():
    cluster = cluster_of("h100", 8, 40.0)
    assert cluster.link_gbs(8) == GPUS["h100"].nvlink_gbs
    assert cluster.link_gbs(9) == 40.0
    assert [cluster.nodes(gpus) for gpus in (1, 8, 9, 516)] == [1, 1, 2, 65]


def test_an_unknown_gpu():
    with pytest.raises(ValueError, match="h100"):
        cluster_of("abacus", 8, 50.0)
