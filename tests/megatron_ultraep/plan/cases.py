"""Loads and layouts for the planner's tests."""

import importlib.util
from unittest import mock

import numpy as np
from hypothesis import strategies as st

from megatron_ultraep.layout import ExpertLayout
from megatron_ultraep.plan import PlanSettings, search


def single_node(tokens, ranks, slots):
    """Loads and layout of one node whose experts have these tokens, spread over the source ranks."""
    tokens = np.asarray(tokens, dtype=np.int64)
    share = tokens // ranks
    loads = np.tile(share, (ranks, 1))
    loads[0] += tokens - share * ranks
    return loads, ExpertLayout(len(tokens), ranks, slots=slots)


def random_loads(rng, ranks, experts):
    """int64 ``[ranks, experts]``: heavy-tailed, sometimes with one hot expert, idle ranks, ties, or next to nothing."""
    kind = rng.integers(6)
    popularity = rng.pareto(rng.choice([0.7, 1.5, 3.0]), experts) + 0.01
    loads = rng.poisson(np.minimum(popularity * rng.choice([3, 100, 2000]), 1e5), (ranks, experts)).astype(np.int64)
    if kind == 0:
        loads[:, rng.integers(experts)] += 3000
    elif kind == 1:
        loads[rng.random(ranks) < 0.5] = 0
    elif kind == 2:
        loads //= 50
        loads *= 50  # many ties
    elif kind == 3:
        loads[:, rng.random(experts) < 0.7] = 0
    return loads


@st.composite
def problems(draw, most_ranks=5):
    """Loads, layout and settings; any home permutation, several nodes, from no slot to more than are useful."""
    node_size = draw(st.integers(1, most_ranks))
    nodes = draw(st.integers(1, 3))
    per_rank = draw(st.integers(1, 4))
    ranks = node_size * nodes
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    experts = ranks * per_rank
    layout = ExpertLayout(experts, ranks, tuple(rng.permutation(experts).tolist()), node_size, draw(st.integers(0, 3)))
    settings = PlanSettings(draw(st.sampled_from([1, 10, 100, 1024])), draw(st.sampled_from([0, 10_000, 100_000])))
    return random_loads(rng, ranks, experts), layout, settings


def uncompiled_search():
    """The search module again, as plain Python."""
    spec = importlib.util.spec_from_file_location("uncompiled_search", search.__file__)
    module = importlib.util.module_from_spec(spec)
    with mock.patch("numba.njit", lambda function: function):
        spec.loader.exec_module(module)
    return module
