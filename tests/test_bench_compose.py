"""The benchmark of composing micro-batches: its rows, on a small case, and its bars."""

import dataclasses

import numpy as np

from scripts import bench_compose
from scripts.bench_compose import CASES, Case, measure, missed_bars, simulated

SMALL = Case("small", ranks=4, node_size=2, experts=16, topk=2, layers=2, samples=2, kappa=20)


def test_rows_of_a_small_case():
    batch = simulated(SMALL, 0)
    assert len(batch.rows) == len(batch.histograms) == 4 * bench_compose.MICRO_BATCHES * 2
    for rows, histogram in zip(batch.rows, batch.histograms, strict=True):
        np.testing.assert_array_equal(histogram.sum(axis=1), rows * SMALL.topk)
    packed, composed = measure(SMALL.name, SMALL.kappa, 0, batch)
    assert (packed["method"], composed["method"]) == ("pack", "compose")
    assert 1 <= composed["busiest"] < packed["busiest"]
    assert composed["busiest"] <= composed["planned"] * 1.001  # padding is in one and not in the other
    assert missed_bars([packed, composed]) == []
    (missed,) = missed_bars([packed, composed | {"rows": packed["rows"] + 1}])
    assert "rows" in missed


def test_one_case_cannot_be_helped():
    (one_node,) = [case for case in CASES if case.ranks == case.node_size]
    packed, composed = measure("x", None, 0, simulated(dataclasses.replace(one_node, layers=2, samples=1), 0))
    assert packed["busiest"] == composed["busiest"] == 1
