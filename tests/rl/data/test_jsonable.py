"""Python values survive the way through JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.data.jsonable import from_json, to_json

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
keys = st.text() | st.integers() | st.sampled_from(["__tuple__", "__set__", "__pairs__"]) | st.tuples(st.integers())
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
        | st.sets(st.integers() | st.text())
    ),
    max_leaves=12,
)


@given(values)
def test_round_trip(value):
    back = from_json(json.loads(json.dumps(to_json(value), allow_nan=False)))
    assert back == value
    assert repr(back) == repr(value) or isinstance(value, set | tuple | list | dict)


def test_by_hand():
    assert to_json({"a": (1, [2]), "b": {3: "c"}}) == {
        "a": {"__tuple__": [1, [2]]},
        "b": {"__pairs__": [[3, "c"]]},
    }
    assert to_json(np.str_("x")) == "x"
    assert type(to_json(np.str_("x"))) is str
    assert to_json(np.int64(3)) == 3


@pytest.mark.parametrize("value", [object(), float("nan"), [float("inf")], {"a": b"bytes"}, np.zeros(3)])
def test_refusals(value):
    with pytest.raises(TypeError, match="expected"):
        to_json(value)
