"""Supervised pairs."""

from __future__ import annotations

import numpy as np
import pytest

from rl.data.dataset import PromptDataset
from rl.data.sources import DataError, Row, reasoning_gym_rows
from rl.data.supervised import sft_examples


def test_only_answer_and_end_are_learnt(tokenizer):
    (example,) = sft_examples([Row("2+3", answer="5")], tokenizer, template="{prompt}=", answer_template=" {answer}!")
    assert tokenizer.decode(example.tokens) == "2+3= 5!<eos>"
    assert example.tokens.dtype == np.int32
    assert example.loss_mask.dtype == np.bool_
    assert tokenizer.decode(example.tokens[example.loss_mask]) == " 5!<eos>"
    assert (example.text, example.answer) == ("2+3=", " 5!")


@pytest.mark.parametrize("chat", [False, True])
def test_prompts_are_tokenised_as_for_rollout(tokenizer, chat):
    rows = reasoning_gym_rows("chain_sum", 5, 77)
    dataset = PromptDataset(rows, tokenizer, shuffle=False, chat=chat)
    for index, example in enumerate(sft_examples(rows, tokenizer, chat=chat)):
        prompt = dataset.prompt(0, index)
        assert example.tokens[~example.loss_mask].tolist() == prompt.tokens.tolist()
        assert example.answer == rows[index].answer


def test_refusals(tokenizer):
    with pytest.raises(DataError, match=r"2 of 3 rows(.|\n)*x:1: expected an answer(.|\n)*x:3: expected an answer"):
        sft_examples([Row("a", origin="x:1"), Row("b", answer="c"), Row("d", answer="", origin="x:3")], tokenizer)
    with pytest.raises(ValueError, match=r"with \{answer\}"):
        sft_examples([], tokenizer, answer_template="x")


def test_running_text_learns_the_prompt_too(tokenizer):
    (example,) = sft_examples([Row("2+3", answer="5")], tokenizer, learn_prompts=True)
    assert example.loss_mask.tolist() == [False] + [True] * (len(example.tokens) - 1)
    assert tokenizer.decode(example.tokens) == "2+35<eos>"
