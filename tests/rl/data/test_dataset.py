"""Order, cursors and prompts."""

from __future__ import annotations

import json
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.data.dataset import Cursor, PromptDataset, epoch_order
from rl.data.sources import DataError, Row


def rows(count: int) -> list[Row]:
    return [Row(f"what is {n}", n, {"n": n}, origin=f"x.jsonl:{n + 1}") for n in range(count)]


class CharacterTokenizer:
    """One token per character: enough to test order with."""

    chat_template = None

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(character) for character in text]}


@given(
    count=st.integers(1, 12),
    seed=st.integers(0, 2**40),
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    shuffle=st.booleans(),
    data=st.data(),
)
def test_every_ordinal_of_an_epoch_once_and_resume_at_any_batch(count, seed, sizes, shuffle, data):
    dataset = PromptDataset(rows(count), CharacterTokenizer(), seed=seed, shuffle=shuffle)
    cursor, cursors, batches = Cursor(), [], []
    for size in sizes:
        cursors.append(cursor)
        batch, cursor = dataset.batch(cursor, size)
        assert len(batch) == size
        batches.append(batch)
    taken = [prompt for batch in batches for prompt in batch]
    assert dataset.consumed(cursor) == len(taken)
    assert [(p.epoch, p.ordinal) for p in taken] == [divmod(n, count) for n in range(len(taken))]
    for epoch in range(cursor.epoch):
        labels = Counter(p.label for p in taken if p.epoch == epoch)
        assert labels == Counter(range(count))
    assert len({p.uid for p in taken}) == len(taken)

    # Another process with the same data, from the cursor that was stored.
    at = data.draw(st.integers(0, len(sizes) - 1))
    again = PromptDataset(rows(count), CharacterTokenizer(), seed=seed, shuffle=shuffle)
    stored = Cursor.from_json(json.loads(json.dumps(cursors[at].to_json())))
    resumed, after = again.batch(stored, sizes[at])
    assert [p.uid for p in resumed] == [p.uid for p in batches[at]]
    assert [p.label for p in resumed] == [p.label for p in batches[at]]
    assert after == [*cursors, cursor][at + 1]


def test_orders_are_permutations_that_differ_by_epoch_and_seed():
    orders = [epoch_order(100, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert not any(np.array_equal(order, np.arange(100)) for order in orders)
    # What runs that are already under way rely on.
    assert epoch_order(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert epoch_order(5, 3, 2, shuffle=False).tolist() == [0, 1, 2, 3, 4]


def test_prompt(tokenizer):
    dataset = PromptDataset(rows(3), tokenizer, shuffle=False, template="{x} Q: {prompt} A:", split="eval")
    prompt = dataset.prompt(2, 1)
    assert prompt.uid == "eval/2/1"
    assert prompt.text == "{x} Q: what is 1 A:"
    assert prompt.tokens.dtype == np.int32
    assert tokenizer.decode(prompt.tokens) == prompt.text
    assert (prompt.label, prompt.metadata) == (1, {"origin": "x.jsonl:2", "n": 1})
    assert pickle.loads(pickle.dumps(prompt)).uid == prompt.uid


def test_chat_templates(tokenizer):
    messages = ({"role": "system", "content": "S"}, {"role": "user", "content": "U"})
    dataset = PromptDataset([Row("hi"), Row(messages)], tokenizer, chat=True, shuffle=False)
    assert dataset.prompt(0, 0).text == "<bos>user: hi\nassistant: "
    assert dataset.prompt(0, 1).text == "<bos>system: S\nuser: U\nassistant: "
    assert dataset.prompt(0, 1).tokens.tolist().count(tokenizer.bos_token_id) == 1


def test_bad_prompts_are_all_named(tokenizer):
    chat = Row(({"role": "user", "content": "U"},), origin="x.jsonl:9")
    with pytest.raises(DataError) as error:
        PromptDataset([*rows(12), chat], tokenizer, template="{prompt}", max_prompt_tokens=4)
    message = str(error.value)
    assert "3 of 13 rows" in message
    for part in ("x.jsonl:11: expected a prompt of at most 4 tokens, got 5", "x.jsonl:12: ", "x.jsonl:9: "):
        assert part in message, message
    assert "set chat to true" in message


def test_refusals(tokenizer):
    with pytest.raises(DataError, match="train data has no rows"):
        PromptDataset([], tokenizer)
    with pytest.raises(ValueError, match="seed in 0"):
        PromptDataset(rows(1), tokenizer, seed=-1)
    with pytest.raises(ValueError, match=r"with \{prompt\}"):
        PromptDataset(rows(1), tokenizer, template="Q: {} A:")
    with pytest.raises(ValueError, match="got both"):
        PromptDataset(rows(1), tokenizer, template="Q {prompt}", chat=True)
    with pytest.raises(ValueError, match="this one has none"):
        PromptDataset(rows(1), CharacterTokenizer(), chat=True)
    dataset = PromptDataset(rows(3), tokenizer)
    with pytest.raises(ValueError, match=r"ordinal in 0\.\.2.*resume with the data"):
        dataset.batch(Cursor(0, 3), 1)
    with pytest.raises(ValueError, match="at least 1 prompt"):
        dataset.batch(Cursor(), 0)
    for value in ({"epoch": 0}, {"epoch": 0, "ordinal": -1}, {"epoch": True, "ordinal": 0}):
        with pytest.raises(ValueError, match="epoch and ordinal"):
            Cursor.from_json(value)
