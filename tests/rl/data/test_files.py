"""Rows from JSONL and parquet: what is read, what is refused, and how."""

from __future__ import annotations

import datetime
import decimal
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from rl.data.files import Columns, read_files, read_values
from rl.data.sources import DataError, Row


def write(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def write_parquet(path, rows, **columns):
    """Rows as objects, or whole Arrow columns."""
    table = pa.Table.from_pylist(rows)
    for name, values in columns.items():
        table = table.append_column(name, values)
    parquet.write_table(table, path)
    return path


def good(path, *others, **columns):
    rows, bad = read_files([path, *others], Columns(**columns))
    assert bad == []
    return rows


def test_text_and_chat_rows(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        b"\xef\xbb\xbf" + json.dumps({"prompt": "1+1?", "label": "2", "level": [3]}).encode(),
        "",
        '{"label": null, "prompt": [{"role": "system", "content": ""}, {"role": "user", "content": "Gr\u00fc\u00df"}]}'
        "\r",
    )
    first, second = good(path)
    assert first == Row("1+1?", "2", {"level": [3]}, answer="2", origin=f"{path}:1")
    assert second.prompt[1]["content"] == "Gr\u00fc\u00df"
    assert (second.label, second.metadata, second.answer, second.origin) == (None, {}, None, f"{path}:3")
    assert read_files([path], limit=1) == ([first], [])


VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "1+1?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"index": 0, "split": "train"},
}
SLIME = {"prompt": [{"role": "user", "content": "1+1?"}], "label": "2", "metadata": {"rm_type": "math"}}


@pytest.mark.parametrize("values", [VERL, SLIME], ids=["verl", "slime"])
def test_columns_of_others_are_taken_as_they_are_from_both_formats(tmp_path, values):
    from_jsonl = good(write(tmp_path / "a.jsonl", json.dumps(values)))
    from_parquet = good(write_parquet(tmp_path / "a.parquet", [values]))
    for (row,) in (from_jsonl, from_parquet):
        assert row.prompt == ({"role": "user", "content": "1+1?"},)
        assert (row.label, row.answer) == ("2", "2")
        assert row.metadata == {key: value for key, value in values.items() if key not in ("prompt", "label")}
    assert from_parquet[0].origin == f"{tmp_path}/a.parquet:1"


def test_columns_can_be_named(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"input": "p", "answer.text": 1, "info": {"right": [2]}}))
    assert good(path, prompt="input", label="answer.text")[0].label == 1
    row = good(path, prompt="input", label="info.right")[0]
    assert (row.prompt, row.label, row.metadata) == ("p", [2], {"answer.text": 1, "info": {"right": [2]}})
    assert good(path, prompt="input", label="nothing", label_optional=True)[0].label is None


def test_several_files_are_read_in_order_and_told_apart(tmp_path):
    (tmp_path / "b").mkdir()
    first = write(tmp_path / "a.jsonl", *['{"prompt": "a", "label": 1}'] * 2)
    second = write(tmp_path / "b" / "a.jsonl", '{"prompt": "b", "label": 1}')
    third = write_parquet(tmp_path / "c.parquet", [{"prompt": "c", "label": 1}])
    rows = good(first, second, third)
    assert [row.prompt for row in rows] == ["a", "a", "b", "c"]
    assert [row.origin for row in rows] == [f"{first}:1", f"{first}:2", f"{second}:1", f"{third}:1"]
    assert len(read_files([first, second, third], limit=3)[0]) == 3
    # A file beyond the limit is not opened.
    assert len(read_files([first, tmp_path / "missing.jsonl"], limit=2)[0]) == 2


GOOD = '{"prompt": "p", "label": 1}'
BAD = [
    ("{", "expected a JSON object"),
    ("[1]", "expected a JSON object with a row's columns, got a list"),
    ("3", "got a number"),
    ('{"prompt": "p"}', "label missing (found prompt); set label_key to the label's column, or write null"),
    ('{"question": "p", "label": 1}', "prompt missing (found label, question); set prompt_key"),
    ("{}", "prompt and label missing (found nothing)"),
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
    ('{"prompt": "p", "label": 1, "images": ["a.png"]}', "images: expected text only, got 1"),
    (b'{"prompt": "\xff", "label": 1}', "expected UTF-8 text, byte 12 is not"),
    ('{"prompt": "p", "label": ' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deeply"),
]


@pytest.mark.parametrize(("line", "expected"), BAD, ids=range(len(BAD)))
def test_a_bad_row_is_named_with_file_and_line(tmp_path, line, expected):
    path = write(tmp_path / "b.jsonl", GOOD, line, GOOD)
    rows, (bad,) = read_files([path])
    assert [row.origin for row in rows] == [f"{path}:1", f"{path}:3"]
    assert bad.place == f"{path}:2"
    assert expected in bad.reason
    assert len(str(bad)) < 500 + len(str(path))


def test_rows_beyond_the_limit_are_not_looked_at(tmp_path):
    path = write(tmp_path / "c.jsonl", *[GOOD, "[]"] * 30)
    assert len(read_files([path])[1]) == 30
    assert [len(found) for found in read_files([path], limit=1)] == [1, 0]
    assert [len(found) for found in read_files([path], limit=5)] == [3, 2]


def test_parquet_values_become_json_values(tmp_path):
    rows = [
        {
            "prompt": [{"role": "user", "content": "a", "name": None}],
            "label": 1.5,
            "when": datetime.datetime(2026, 1, 2, 3, 4, 5),
            "much": decimal.Decimal("1.50"),
            "number": float("nan"),
        },
        {"prompt": [{"role": "user", "content": "b", "name": "n"}], "label": None},
    ]
    pairs = pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64()))
    path = write_parquet(tmp_path / "a.parquet", rows, pairs=pairs)
    first, second = good(path)
    assert first.prompt == ({"role": "user", "content": "a"},)
    assert first.metadata == {"when": "2026-01-02T03:04:05", "much": "1.50", "number": None, "pairs": [["k", 1]]}
    assert second.prompt == ({"role": "user", "content": "b", "name": "n"},)
    assert second.label is None
    assert json.loads(json.dumps(first.metadata)) == first.metadata


def test_bad_rows_of_parquet_are_named_and_the_others_kept(tmp_path):
    prompts = ["a", "", "c", None, "e", "f"]
    raw = pa.array([b"x", b"x", b"\xff\xfe", b"x", b"x", b"x"]).view(pa.string())
    numbers = pa.array([1.0, 1.0, 1.0, 1.0, float("inf"), 1.0])
    rows = [{"prompt": prompt, "label": 1} for prompt in prompts]
    path = write_parquet(tmp_path / "a.parquet", rows, text=raw, number=numbers)
    kept, bad = read_files([path])
    assert [row.origin for row in kept] == [f"{path}:1", f"{path}:6"]
    assert [row.place for row in bad] == [f"{path}:{number}" for number in (2, 3, 4, 5)]
    reasons = ["expected text, got none", "text: expected UTF-8 text", "got null or nothing", "number: expected finite"]
    assert all(reason in row.reason for reason, row in zip(reasons, bad, strict=True))
    (only,) = read_files([write_parquet(tmp_path / "b.parquet", rows[:1], raw=pa.array([b"x"]))])[1]
    assert "raw: expected text, numbers, lists or objects, got bytes; drop the column" in only.reason


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_files([tmp_path / "missing.jsonl"])
    with pytest.raises(DataError, match="No such file"):
        read_files([tmp_path / "missing.parquet"])
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(DataError, match="Is a directory"):
        read_files([tmp_path / "d.jsonl"])
    with pytest.raises(DataError, match="has no rows"):
        read_files([write(tmp_path / "empty.jsonl", " ", "")])
    with pytest.raises(DataError, match=r"ends in \.jsonl or \.parquet"):
        list(read_values(write(tmp_path / "a.csv", "x")))
    path = write(tmp_path / "no.parquet", "this is text and not parquet at all")
    with pytest.raises(DataError, match="expected a parquet file, cannot be read"):
        read_files([path])
    twice = pa.table([pa.array(["a"]), pa.array([1]), pa.array([2])], names=["prompt", "label", "label"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match="expected each column once, got label twice"):
        read_files([tmp_path / "twice.parquet"])


def test_a_damaged_page_says_how_far_reading_went(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"prompt": [f"prompt {n} " * 20 for n in range(4000)], "label": list(range(4000))})
    parquet.write_table(table, path, row_group_size=1000, use_dictionary=False, compression="zstd")
    content = bytearray(path.read_bytes())
    offset = parquet.ParquetFile(path).metadata.row_group(3).column(0).data_page_offset
    content[offset + 40 : offset + 400] = b"\0" * 360
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: expected a parquet file, cannot be read after row \d+"):
        read_files([path])
