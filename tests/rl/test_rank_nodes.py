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
