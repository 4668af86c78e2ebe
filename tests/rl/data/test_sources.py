"""Rows from files and from reasoning-gym: what is read, what is refused, and how."""

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
    read_jsonl,
    reasoning_gym_rows,
)


def write(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def test_text_and_chat_rows(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        b"\xef\xbb\xbf" + json.dumps({"prompt": "1+1?", "label": "2", "level": [3]}).encode(),
        "",
        '{"label": null, "prompt": [{"role": "system", "content": ""}, {"role": "user", "content": "Gr\u00fc\u00df"}]}'
        "\r",
    )
    first, second = read_jsonl(path)
    assert first == Row("1+1?", "2", {"level": [3]}, answer="2", origin="a.jsonl:1")
    assert second.prompt[1]["content"] == "Gr\u00fc\u00df"
    assert (second.label, second.metadata, second.answer, second.origin) == (None, {}, None, "a.jsonl:3")
    assert read_jsonl(path, limit=1) == [first]


GOOD = '{"prompt": "p", "label": 1}'
BAD = [
    ("{", "expected a JSON object"),
    ("[1]", "expected a JSON object with prompt and label, got a list"),
    ("3", "got a number"),
    ('{"prompt": "p"}', "label missing (found prompt); write null if the reward needs no label"),
    ('{"question": "p", "label": 1}', "prompt missing (found label, question)"),
    ("{}", "prompt and label missing (found no keys)"),
    ('{"prompt": "", "label": 1}', "prompt: expected text, got none"),
    ('{"prompt": " \\n", "label": 1}', "prompt: expected text, got none"),
    ('{"prompt": null, "label": 1}', "prompt: expected text or a list of chat messages, got null"),
    ('{"prompt": true, "label": 1}', "got a boolean"),
    ('{"prompt": [], "label": 1}', "prompt: expected chat messages, got an empty list"),
    ('{"prompt": ["hi"], "label": 1}', "prompt[0]: expected an object with role and content, got text"),
    ('{"prompt": [{"role": "user"}], "label": 1}', "prompt[0].content: expected text, got null or nothing"),
    ('{"prompt": [{"role": 1, "content": "a"}], "label": 1}', "prompt[0].role: expected text, got a number"),
    ('{"prompt": [{"role": "assistant", "content": "a"}], "label": 1}', "got the assistant's own"),
    ('{"prompt": "p", "prompt": "q", "label": 1}', "expected each key once, got prompt twice"),
    ('{"prompt": "p", "label": NaN}', "expected JSON numbers, got NaN"),
    ('{"prompt": "p", "label": 1e999}', "Out of range float"),
    ('{"prompt": "\\ud800", "label": 1}', "half of a surrogate pair"),
    (b'{"prompt": "\xff", "label": 1}', "expected UTF-8 text, byte 12 is not"),
    ('{"prompt": "p", "label": ' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deeply"),
]


@pytest.mark.parametrize(("line", "expected"), BAD, ids=range(len(BAD)))
def test_a_bad_row_is_named_with_file_and_line(tmp_path, line, expected):
    path = write(tmp_path / "b.jsonl", GOOD, line, GOOD)
    with pytest.raises(DataError) as error:
        read_jsonl(path)
    assert f"{path}:2: " in str(error.value)
    assert expected in str(error.value)
    assert "1 of 3 rows" in str(error.value)
    assert len(str(error.value)) < 500 + len(str(path)) * 2


def test_all_bad_rows_are_collected_and_twenty_shown(tmp_path):
    path = write(tmp_path / "c.jsonl", *[GOOD, "[]"] * 30)
    with pytest.raises(DataError) as error:
        read_jsonl(path)
    assert "30 of 60 rows cannot be used" in str(error.value)
    assert re.findall(r"c\.jsonl:(\d+): ", str(error.value)) == [str(2 * n) for n in range(1, 21)]
    assert "and 10 more" in str(error.value)
    # Rows beyond the limit are not looked at.
    assert len(read_jsonl(path, limit=1)) == 1


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_jsonl(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="Is a directory"):
        read_jsonl(tmp_path)
    with pytest.raises(DataError, match="has no rows"):
        read_jsonl(write(tmp_path / "empty.jsonl", " ", ""))


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
