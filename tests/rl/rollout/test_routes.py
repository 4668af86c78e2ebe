import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.rollout.routes import join, join_versions, row_versions, select_moe_layers


def test_dense_layers_are_dropped_and_the_type_narrowed() -> None:
    captured = np.arange(2 * 4 * 2).reshape(2, 4, 2)
    routes = select_moe_layers(captured, (0, 2, 3), experts=16)
    assert routes.dtype == np.uint8
    assert routes.flags.c_contiguous
    np.testing.assert_array_equal(routes, captured[:, [0, 2, 3]])
    assert select_moe_layers(captured, (0, 1, 2, 3), experts=257).dtype == np.uint16


def test_rows_computed_first_win() -> None:
    first, second = np.zeros((3, 1, 2), np.uint8), np.ones((5, 1, 2), np.uint8)
    np.testing.assert_array_equal(join(first, second)[:, 0, 0], [0, 0, 0, 1, 1])
    with pytest.raises(ValueError, match="at least the rows"):
        join(second, first)


def test_a_row_has_the_version_of_the_step_that_sampled_the_next_token() -> None:
    # Prompt of 3, response of 4, new weights before the third response token (index 2).
    # rows: p0 p1 (prompt) | p2 -> r0, r0 -> r1 (old) | r1 -> r2, r2 -> r3 (new)
    np.testing.assert_array_equal(row_versions(((0, 7), (2, 8)), 3, 4), [7, 7, 7, 7, 8, 8])


def test_joined_spans() -> None:
    assert join_versions(((0, 1),), 5, ((0, 1), (3, 2))) == ((0, 1), (8, 2))
    assert join_versions(((0, 1),), 5, ((0, 2),)) == ((0, 1), (5, 2))
    assert join_versions(((0, 1),), 0, ((0, 2),)) == ((0, 2),)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2)), min_size=1, max_size=5))
def test_joining_parts_is_the_same_as_one_response(parts: list[tuple[int, int]]) -> None:
    """A response broken off after every part, each made with one version, has the versions of its parts."""
    spans: tuple[tuple[int, int], ...] = ()
    length = 0
    for tokens, version in parts:
        spans = join_versions(spans, length, ((0, version),))
        length += tokens
    expected = [version for tokens, version in parts for _ in range(tokens)]
    np.testing.assert_array_equal(row_versions(spans, 1, length), expected)
    assert all(a[1] != b[1] for a, b in itertools.pairwise(spans)), "spans must be maximal"
