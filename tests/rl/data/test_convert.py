"""Data sets of other tools: what is found by name, kept, renamed and refused."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from rl.cli import app
from rl.data.convert import convert
from rl.data.files import read_files
from rl.data.sources import DataError


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "1+1?"}],
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"index": 0},
}


def test_own_names_are_found(tmp_path):
    source = write(tmp_path / "a.jsonl", *[{"question": f"{n}+1?", "answer": str(n + 1), "level": n} for n in range(3)])
    result = convert([source], tmp_path / "new" / "b.jsonl")
    assert result.columns == {"question": "prompt", "answer": "label", "level": "kept"}
    assert result.render().splitlines()[:3] == [f"{result.output}: 3 rows", "columns:", "  question -> prompt"]
    rows, bad = read_files([result.output])
    assert bad == []
    assert [(row.prompt, row.label, row.metadata) for row in rows] == [
        (f"{n}+1?", str(n + 1), {"level": n}) for n in range(3)
    ]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_verls_file_loses_nothing(tmp_path, ending):
    source = write(tmp_path / "a.jsonl", VERL, VERL)
    result = convert([source], tmp_path / f"b.{ending}")
    assert result.columns["reward_model.ground_truth"] == "label (copied; reward_model is kept too)"
    before, after = read_files([source])[0], read_files([result.output])[0]
    assert [(row.prompt, row.label, row.metadata) for row in before] == [
        (row.prompt, row.label, row.metadata) for row in after
    ]


def test_there_and_back(tmp_path):
    rows = [
        {"prompt": "a", "label": 1, "metadata": {"k": [1, 2]}},
        {"prompt": "b", "label": None, "metadata": {"k": []}},
    ]
    source = write(tmp_path / "a.jsonl", *rows)
    convert([source], tmp_path / "b.parquet")
    back = convert([tmp_path / "b.parquet"], tmp_path / "c.jsonl").output
    assert [json.loads(line) for line in back.read_text().splitlines()] == rows


def test_columns_that_are_asked_for_win(tmp_path):
    source = write(tmp_path / "a.jsonl", {"question": "q", "text": "t", "answer": "a", "right": {"is": "r"}})
    result = convert([source], tmp_path / "b.jsonl", prompt_key="text", label_key="right.is")
    assert json.loads(result.output.read_text()) == {
        "prompt": "t",
        "label": "r",
        "question": "q",
        "answer": "a",
        "right": {"is": "r"},
    }
    result = convert([source], tmp_path / "c.jsonl", no_label=True)
    assert json.loads(result.output.read_text())["label"] is None
    with pytest.raises(DataError, match="label: the name is needed for another column"):
        convert([result.output], tmp_path / "d.jsonl", no_label=True)


def test_refusals(tmp_path):
    good = {"prompt": "p", "label": 1}
    source = write(tmp_path / "a.jsonl", good, {"prompt": "", "label": 1}, "{", good)
    with pytest.raises(
        DataError, match=r"2 of 4 rows cannot be used.*\n.*a\.jsonl:2: prompt.*\n.*a\.jsonl:3: expected"
    ):
        convert([source], tmp_path / "b.jsonl")
    assert not (tmp_path / "b.jsonl").exists()
    result = convert([source], tmp_path / "b.jsonl", skip_bad=True)
    assert (result.rows, [row.place for row in result.bad]) == (2, [f"{source}:2", f"{source}:3"])
    with pytest.raises(DataError, match="expected a file that does not exist"):
        convert([source], tmp_path / "b.jsonl")
    with pytest.raises(DataError, match=r"ends in \.jsonl or \.parquet"):
        convert([source], tmp_path / "b.csv")
    other = write(tmp_path / "c.jsonl", {"one": 1, "two": 2})
    with pytest.raises(DataError, match=r"a column for the prompt .*found one, two; name it with --prompt-key"):
        convert([other], tmp_path / "d.jsonl")
    mixed = write(tmp_path / "m.jsonl", {"prompt": "p", "label": 1}, {"prompt": "p", "label": "a"})
    with pytest.raises(DataError, match=r"values of one kind in the column label, came int, str.*write a \.jsonl"):
        convert([mixed], tmp_path / "m.parquet")
    clash = write(tmp_path / "k.jsonl", {"question": "q", "prompt": "p", "label": 1})
    with pytest.raises(DataError, match="prompt: the name is needed for another column"):
        convert([clash], tmp_path / "l.jsonl", prompt_key="question")
    with pytest.raises(DataError, match="rows cannot be used"):
        convert([write(tmp_path / "n.jsonl", "{")], tmp_path / "o.jsonl", skip_bad=True)


def test_the_command(tmp_path):
    source = write(tmp_path / "a.jsonl", {"question": "q", "answer": "a"})
    result = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "b.parquet")])
    assert result.exit_code == 0
    assert "question -> prompt" in result.stdout
    result = CliRunner().invoke(app, ["convert", str(source)])
    assert (result.exit_code, "expected at least one input and the output" in result.stderr) == (2, True)
    result = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "b.parquet")])
    assert (result.exit_code, "does not exist" in result.stderr) == (2, True)
