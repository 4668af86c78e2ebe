"""The rewards that come along."""

from __future__ import annotations

import json

import pytest

from rl.data.sources import reasoning_gym_rows
from rl.rewards.builtin import exact_match, extract_answer, reasoning_gym
from rl.rewards.loading import load_reward
from rl.rewards.runner import RewardRunner


@pytest.mark.parametrize("task", ["chain_sum", "arc_1d", "knights_knaves", "base_conversion", "simple_equations"])
def test_reasoning_gym_gives_full_marks_to_right_answers(task, make_sample):
    for row in reasoning_gym_rows(task, 3, 5):
        label = json.loads(json.dumps(row.label))
        assert reasoning_gym(make_sample(f" {row.answer}\n", label), {}) == 1.0
        assert reasoning_gym(make_sample("nonsense", label), {}) < 0.1


def test_partial_credit_is_the_tasks_own_unless_refused(make_sample):
    (row,) = reasoning_gym_rows("chain_sum", 1, 5)
    sample = make_sample("x" * len(row.answer) + row.answer, row.label)
    assert reasoning_gym(sample, {}) == 0.5
    assert reasoning_gym(sample, {"full_credit_only": True}) == 0.0


def test_through_the_runner(make_sample):
    rows = reasoning_gym_rows("chain_sum", 6, 5)
    args = {"answer_tag": "answer"}
    rewards = RewardRunner(load_reward("rl.rewards.builtin:reasoning_gym", args), args)
    samples = [make_sample(f"so <answer>{row.answer}</answer>", row.label) for row in rows] + [make_sample("", "12")]
    scored = rewards.score(samples)
    assert [s.reward for s in scored] == [1.0] * 6 + [0.0]
    assert "ValueError: expected a label with task, args and entry, got '12'" in scored[-1].reward_error


@pytest.mark.parametrize(
    ("response", "label", "args", "expected"),
    [
        (" 12\n", "12", {}, 1.0),
        ("12", 12, {}, 1.0),
        ("12.", "12", {}, 0.0),
        ("Yes", "yes", {}, 0.0),
        ("Yes", "yes ", {"ignore_case": True}, 1.0),
        ("b", ["a", "b"], {}, 1.0),
        ("c", ["a", "b"], {}, 0.0),
        ("<answer>1</answer> no, <answer> 2 </answer>", "2", {"answer_tag": "answer"}, 1.0),
        ("2", "2", {"answer_tag": "answer"}, 0.0),
    ],
)
def test_exact_match(response, label, args, expected, make_sample):
    assert exact_match(make_sample(response, label), args) == expected


@pytest.mark.parametrize(
    ("text", "args", "expected"),
    [
        ("1 2 3", {"answer_regex": r"\d"}, "3"),
        ("x = 4, y = 5;", {"answer_regex": r"x = (\d)"}, "4"),
        ("none", {"answer_regex": r"\d"}, None),
        ("<a>open <a>\n7\n</a>", {"answer_tag": "a"}, "7"),
        ("<a>7", {"answer_tag": "a"}, None),
    ],
)
def test_extract_answer(text, args, expected):
    assert extract_answer(text, args) == expected


def test_refusals(make_sample):
    with pytest.raises(ValueError, match=r"unknown reward args \['anwser_tag'\]"):
        exact_match(make_sample("", "x"), {"anwser_tag": "a"})
    with pytest.raises(ValueError, match="got both"):
        extract_answer("", {"answer_tag": "a", "answer_regex": "b"})
    with pytest.raises(ValueError, match="expected a regular expression"):
        extract_answer("", {"answer_regex": "("})
    for label in (None, [], {"a": 1}, [[1]]):
        with pytest.raises(ValueError, match="expected a label"):
            exact_match(make_sample("", label), {})
