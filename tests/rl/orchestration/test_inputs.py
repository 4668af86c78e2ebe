"""What a run reads before it starts; above all rows that cannot be used, 200 generated cases of them."""

from __future__ import annotations

import asyncio
import copy
import json
import random
import re
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from transformers import AutoTokenizer

from rl.config import ConfigError, from_dict
from rl.data.sources import DataError
from rl.models.tiny import train_tokenizer
from rl.orchestration.inputs import load_data
from rl.rewards.loading import Reward
from rl.rewards.runner import RewardRunner
from rl.types import Sample

STRICT_TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(train_tokenizer(["what is the sum"], tmp_path_factory.mktemp("tokenizer")))


def make_config(directory: Path, train, eval_=None, **changes):
    data = {"train": train, "eval": eval_, "prompts_per_step": 1, "samples_per_prompt": 4, "max_prompt_tokens": 60}
    reward = {"path": "rl.rewards.builtin:exact_match"} | changes.pop("reward", {})
    return from_dict(
        {
            "run": {"name": "x", "output_dir": str(directory / "run")},
            "model": {"path": str(directory), "dtype": "float32"},
            "data": data | changes,
            "reward": reward,
            "rollout": {"max_model_len": 1024},
        }
    )


def write(path: Path, rows) -> Path:
    """Rows as objects, or as bytes that are written as they are (JSONL only)."""
    if path.suffix == ".jsonl":
        path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
        return path
    arrays = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    columns = {name: pa.array(values) for name, values in arrays.items() if name != "raw"}
    if "raw" in arrays:
        columns["raw"] = pa.array(arrays["raw"]).view(pa.string())
    parquet.write_table(pa.table(columns), path)
    return path


def text_row(index):
    return {"prompt": f"{index} + 1?", "label": str(index + 1)}


def chat_row(index):
    return {"prompt": [{"role": "user", "content": f"{index} + 1?"}], "label": str(index + 1)}


# What is done to a good row, by name; and what the error says then.
ANY = {
    "no prompt": (lambda row: row | {"prompt": None}, "got null or nothing"),
    "no label": (lambda row: row | {"label": None}, "label: expected a label of text or a number"),
}
TEXT = ANY | {
    "empty": (lambda row: row | {"prompt": " \n"}, "prompt: expected text, got none"),
    "too long": (lambda row: row | {"prompt": "word " * 200}, "expected a prompt of at most 60 tokens, got"),
}
CHAT = ANY | {
    "no messages": (lambda row: row | {"prompt": []}, "got an empty list"),
    "no content": (lambda row: row | {"prompt": [{"role": "user", "content": None}]}, "[0].content: expected text"),
    "no role": (lambda row: row | {"prompt": [{"role": None, "content": "a"}]}, "[0].role: expected text"),
    "asks nothing": (lambda row: row | {"prompt": [{"role": "assistant", "content": "a"}]}, "the assistant's own"),
    "template refuses": (lambda row: row | {"prompt": [{"role": "tool", "content": "a"}]}, "no role tool"),
    "too long": (
        lambda row: row | {"prompt": [*row["prompt"], {"role": "user", "content": "word " * 200}]},
        "expected a prompt of at most 60 tokens, got",
    ),
}
JSONL = {
    "cut off": (lambda row: json.dumps(row).encode()[:-5], "expected a JSON object, got"),
    "no JSON": (lambda row: b"prompt,label", "expected a JSON object, got 'prompt,label'"),
    "a list": (lambda row: b"[1, 2]", "got a list"),
    "not UTF-8": (lambda row: b'{"prompt": "\xff\xfe", "label": "1"}', "expected UTF-8 text, byte 12 is not"),
    "half a pair": (lambda row: b'{"prompt": "\\udc00", "label": "1"}', "half of a surrogate pair"),
    "twice": (lambda row: b'{"prompt": "a", "prompt": "b", "label": "1"}', "expected each key once, got prompt twice"),
    "not finite": (lambda row: b'{"prompt": "a", "label": Infinity}', "expected JSON numbers, got Infinity"),
    "label missing": (lambda row: {"prompt": row["prompt"]}, "label missing (found prompt)"),
    "prompt missing": (lambda row: {"label": "1", "text": "a"}, "prompt missing (found label, text); set prompt_key"),
    "number": (lambda row: row | {"prompt": 7}, "text or a list of chat messages, got a number"),
    "label object": (lambda row: row | {"label": {"a": 1}}, "label: expected a label of text or a number"),
    "label empty list": (lambda row: row | {"label": []}, "label: expected a label of text or a number"),
    "images": (lambda row: row | {"images": ["a.png"]}, "images: expected text only, got 1"),
}
PARQUET = {
    "not UTF-8": (lambda row: row | {"raw": b"\xff\xfe"}, "raw: expected UTF-8 text"),
    "not finite": (lambda row: row | {"number": float("inf")}, "number: expected finite numbers, got inf"),
    "images": (lambda row: row | {"images": ["a.png"]}, "images: expected text only, got 1"),
}


def make_case(seed: int, directory: Path):
    """Files with bad rows: (config changes, files, places with reasons, good prompts in order)."""
    rng = random.Random(seed)
    chat = rng.random() < 0.5
    reasons: dict[str, str] = {}
    prompts: list[str] = []
    files = []
    for number in range(rng.randint(1, 2)):
        ending = rng.choice(["jsonl", "parquet"])
        known = (CHAT if chat else TEXT) | (JSONL if ending == "jsonl" else PARQUET)
        path = directory / f"part{number}.{ending}"
        rows = []
        count = rng.randint(4, 9)
        bad = set(rng.sample(range(count), rng.randint(1, 3)))
        for index in range(count):
            row = (chat_row if chat else text_row)(100 * number + index)
            if index in bad:
                change, reason = known[rng.choice(sorted(known))]
                reasons[f"{path}:{index + 1}"] = reason
                row = change(row)
            else:
                prompts.append(f"{100 * number + index} + 1?")
            rows.append(row)
        files.append(str(write(path, rows)))
    return {"chat": chat}, files, reasons, prompts


@pytest.mark.parametrize("seed", range(160))
def test_bad_rows_are_named_and_no_other_row_is_lost(seed, tmp_path, tokenizer, capsys):
    changes, files, reasons, prompts = make_case(seed, tmp_path)
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = STRICT_TEMPLATE

    # Left out: the others are there, in order, and the list says why each is missing.
    config = make_config(tmp_path, {"files": files}, on_bad_row="skip", shuffle=False, **changes)
    data = load_data(config, strict)
    assert [re.sub(r"^user: |\n$", "", row.text) for row in map(prompt_of(data), range(len(prompts)))] == prompts
    lines = [json.loads(line) for line in (tmp_path / "run" / "skipped_rows.jsonl").read_text().splitlines()]
    listed = {line["place"]: line["reason"] for line in lines}
    assert set(listed) == set(reasons)
    assert all(reason in listed[place] for place, reason in reasons.items())
    assert {line["split"] for line in lines} == {"train"}
    count = "1 row" if len(reasons) == 1 else f"{len(reasons)} rows"
    assert f"data: {count} of train cannot be used and skipped" in capsys.readouterr().out

    # An error: it names them all.
    config = make_config(tmp_path, {"files": files}, **changes)
    with pytest.raises(DataError) as error:
        load_data(config, strict)
    named = dict(re.findall(r"(\S+:\d+): (.*)", str(error.value)))
    assert set(named) == set(reasons)
    assert all(reasons[place] in reason for place, reason in named.items())
    assert f"{len(reasons)} of {len(reasons) + len(prompts)} rows cannot be used" in str(error.value)


def prompt_of(data):
    return lambda index: data.train.prompt(0, index)


class Odd(Exception):
    def __str__(self):
        raise RuntimeError


def misbehave(how: str, release: threading.Event):
    """A reward that does what the response says."""

    def act(text):
        if text != how:
            return float(len(text))
        values = {"nan": float("nan"), "none": None, "text": "1", "mapping": {"acc": 1}, "complex": 1j}
        if how in values:
            return values[how]
        if how == "hang":
            release.wait(30)
            return 1.0
        raise {"raise": ValueError("wrong"), "exit": SystemExit(1), "odd": Odd(), "memory": MemoryError()}[how]

    return act


ERRORS = {
    "nan": "expected a finite number",
    "none": "expected a number, got NoneType",
    "text": "expected a number, got str",
    "mapping": "expected a mapping with 'score', got one with acc",
    "complex": "expected a number, got complex",
    "hang": "TimeoutError: no reward from m:f within 0.3 s",
    "raise": "ValueError: wrong",
    "exit": "SystemExit: 1",
    "odd": "Odd: (its message cannot be read)",
    "memory": "MemoryError",
}


@pytest.mark.parametrize("seed", range(40))
def test_rewards_that_raise_or_hang_name_file_and_row(seed, tmp_path, tokenizer):
    rng = random.Random(1000 + seed)
    how = sorted(ERRORS)[seed % len(ERRORS)]
    style = rng.choice(["sample", "compute_score", "slime", "samples"])
    is_async = rng.random() < 0.5
    on_error = rng.choice(["zero", "drop"])
    count = rng.randint(3, 8)
    ending = rng.choice(["jsonl", "parquet"])
    path = write(tmp_path / f"rows.{ending}", [text_row(index) for index in range(count)])
    data = load_data(make_config(tmp_path, {"files": str(path)}, shuffle=False), tokenizer)
    bad = set(rng.sample(range(count), rng.randint(1, 2)))
    samples = [
        Sample(f"train/0/{n}/0", data.train.prompt(0, n), np.ones(1, np.int32), np.zeros(1, np.float32), ((0, 0),),
               "stop", None, None, response_text=how if n in bad else "x" * n)
        for n in range(count)
    ]  # fmt: skip
    release = threading.Event()
    act = misbehave(how, release)
    calls = {
        "sample": lambda sample, args: act(sample.response_text),
        "compute_score": lambda data_source, solution_str, ground_truth: act(solution_str),
        "slime": lambda args, sample: act(sample.response),
        "samples": lambda samples, args: [act(sample.response_text) for sample in samples],
    }
    plain = calls[style]

    async def coroutine(*args, **keywords):
        if how == "hang":
            return await asyncio.to_thread(plain, *args, **keywords)
        return plain(*args, **keywords)

    reward = Reward("m:f", coroutine if is_async else plain, style, is_async)
    runner = RewardRunner(reward, {}, timeout_s=0.3 if how == "hang" else 30.0, on_error=on_error)
    scored = runner.score(samples)
    release.set()
    runner.close()
    for n, sample in enumerate(scored):
        if n in bad:
            assert sample.reward == (0.0 if on_error == "zero" else None)
            assert ERRORS[how] in sample.reward_error
            assert sample.reward_error.endswith(f"(prompt from {path}:{n + 1})")
        else:
            assert (sample.reward, sample.reward_error) == (float(n), None)
        assert replace(sample, reward=None, reward_error=None) == samples[n]


def test_a_tokenizer_without_a_chat_template_is_a_configuration_error(tmp_path, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    files = str(write(tmp_path / "a.jsonl", [chat_row(0)]))
    with pytest.raises(ConfigError, match=r"data\.chat: expected a tokenizer with a chat template"):
        load_data(make_config(tmp_path, {"files": files}, chat=True), bare)


def test_a_warm_up_must_end_texts_as_the_model_does(tmp_path, tokenizer):
    files = str(write(tmp_path / "a.jsonl", [{"prompt": "a", "label": "b", "answer": "c"}]))
    config = make_config(tmp_path, {"files": files})
    warm = config.model_copy(update={"warmup": config.warmup.model_copy(update={"steps": 1})})
    ends = config.model.path / "generation_config.json"
    ends.parent.mkdir(parents=True, exist_ok=True)
    ends.write_text(json.dumps({"eos_token_id": [tokenizer.eos_token_id + 1]}))
    with pytest.raises(ConfigError, match=rf"\(id {tokenizer.eos_token_id}\), but the model's config ends it with"):
        load_data(warm, tokenizer)
    load_data(config, tokenizer)
    ends.write_text(json.dumps({"eos_token_id": [7, tokenizer.eos_token_id]}))
    assert len(load_data(warm, tokenizer).warmup) == 1


def test_chat_args_reach_the_template(tmp_path, tokenizer):
    talking = copy.deepcopy(tokenizer)
    talking.chat_template = "{{ messages[0].content }}{% if loud %}!{% endif %}"
    files = str(write(tmp_path / "a.jsonl", [chat_row(0)]))
    data = load_data(make_config(tmp_path, {"files": files}, chat=True, chat_args={"loud": True}), talking)
    assert data.train.prompt(0, 0).text == "0 + 1?!"


def test_labels_that_are_not_needed_may_be_missing(tmp_path, tokenizer):
    files = str(write(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": "b", "label": None}]))
    with pytest.raises(DataError, match="label missing"):
        load_data(make_config(tmp_path, {"files": files}), tokenizer)
    data = load_data(make_config(tmp_path, {"files": files}, reward={"needs_label": False}), tokenizer)
    assert len(data.train) == 2
    with pytest.raises(DataError, match=r"label: expected a value because the reward needs one, got null"):
        load_data(make_config(tmp_path, {"files": files}, reward={"needs_label": True}), tokenizer)


def test_held_out_rows_are_cut_after_the_bad_ones(tmp_path, tokenizer):
    train = str(write(tmp_path / "a.jsonl", [text_row(0)]))
    held_out = str(write(tmp_path / "b.jsonl", [text_row(0), {"prompt": ""}, text_row(2), text_row(3), text_row(4)]))
    config = make_config(tmp_path, {"files": train}, {"files": held_out}, on_bad_row="skip")
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"prompts": 2})})
    data = load_data(config, tokenizer)
    assert [data.held_out.prompt(0, n).text for n in range(len(data.held_out))] == ["2 + 1?", "3 + 1?"]
    assert set(data.digests) == {"train", "eval"}


def test_nothing_usable_is_an_error_even_when_rows_are_skipped(tmp_path, tokenizer):
    files = str(write(tmp_path / "a.jsonl", [{"prompt": ""}, {"prompt": "b"}]))
    with pytest.raises(DataError, match=r"data\.train: .*a\.jsonl: 2 of 2 rows cannot be used"):
        load_data(make_config(tmp_path, {"files": files}, on_bad_row="skip"), tokenizer)
    files = str(write(tmp_path / "c.jsonl", [{"prompt": "word " * 200, "label": "1"}]))
    with pytest.raises(DataError, match="no rows that can be used"):
        load_data(make_config(tmp_path, {"files": files}, on_bad_row="skip"), tokenizer)


def test_the_order_does_not_depend_on_the_format(tmp_path, tokenizer):
    rows = [text_row(index) for index in range(20)]
    found = []
    for ending in ("jsonl", "parquet"):
        data = load_data(make_config(tmp_path, {"files": str(write(tmp_path / f"a.{ending}", rows))}), tokenizer)
        found.append((data.digests, [data.train.prompt(1, n).text for n in range(20)]))
    assert found[0] == found[1]
