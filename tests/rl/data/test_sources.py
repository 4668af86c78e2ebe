"""Rows from reasoning-gym, and what is the same about rows of all sources."""

from __future__ import annotations

import json
import re

import pytest

from rl.data.jsonable import from_json
from rl.data.sources import (
    DataError,
    Row,
    create_task,
    digest,
    drop_overlap,
    overlap,
    reasoning_gym_rows,
)


def test_reasoning_gym_rows():
    rows = reasoning_gym_rows("chain_sum", size=4, seed=11, args={"min_terms": 2, "max_terms": 2})
    assert len(rows) == 4
    assert rows == reasoning_gym_rows("chain_sum", 4, 11, {"min_terms": 2, "max_terms": 2})
    left, sign, right = re.search(r"(\d+) ([+-]) (\d+)", rows[0].prompt).groups()
    assert int(rows[0].answer) == int(left) + int(sign + right)
    assert json.loads(json.dumps(rows[0].label)) == rows[0].label
    assert rows[0].label["task"] == "chain_sum"


@pytest.mark.parametrize("task", ["chain_sum", "arc_1d", "arc_agi", "graph_color", "knights_knaves", "base_conversion"])
def test_what_the_task_needs_for_scoring_survives_json(task):
    original = create_task(task, {"size": 2, "seed": 3})
    for index, row in enumerate(reasoning_gym_rows(task, 2, 3)):
        entry = from_json(json.loads(json.dumps(row.label))["entry"])
        assert entry == original[index]
        if row.answer is not None:
            assert original.score_answer(row.answer, entry) == 1.0


def test_reasoning_gym_refusals():
    with pytest.raises(DataError, match="did you mean chain_sum"):
        reasoning_gym_rows("chain_sums", 1, 0)
    with pytest.raises(DataError, match=r"its settings are .*min_terms"):
        reasoning_gym_rows("chain_sum", 1, 0, {"terms": 2})
    with pytest.raises(DataError, match="refuses the settings"):
        reasoning_gym_rows("chain_sum", 1, 0, {"min_terms": 5, "max_terms": 2})


def test_digest_depends_on_content_and_order_only():
    rows = [Row("a", 1, {"x": 1, "y": 2}), Row("b", None)]
    same = [Row("a", 1, {"y": 2, "x": 1}, origin="elsewhere:9"), Row("b")]
    assert digest(rows) == digest(same)
    assert digest(rows).startswith("sha256:")
    different = [rows[::-1], [Row("a", 2, {"x": 1, "y": 2}), rows[1]], rows[:1], [Row("a", 1), rows[1]]]
    assert len({digest(rows), *map(digest, different)}) == 5


def test_overlap():
    chat = ({"role": "user", "content": "c"},)
    train = [Row("a"), Row(" b\n"), Row(chat)]
    held_out = [Row("b", 1), Row("d"), Row(({"role": "user", "content": "c "},)), Row("b", 2)]
    assert overlap(train, held_out) == 3
    assert drop_overlap(train, held_out) == [Row("d")]
    assert drop_overlap([], held_out) == held_out
    with pytest.raises(DataError, match="all 2 held-out problems are also trained on"):
        drop_overlap(train, [Row("a"), Row("b")])


def test_neighbouring_seeds_of_a_task_share_problems():
    """Why seeds alone do not hold problems out."""
    assert overlap(reasoning_gym_rows("chain_sum", 20, 1), reasoning_gym_rows("chain_sum", 20, 2)) >= 19
