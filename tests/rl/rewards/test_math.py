"""Answers compared as mathematics, with a limit that holds outside the main thread."""

from __future__ import annotations

import time

import pytest

from rl.rewards.loading import RewardLoadError, label_check, load_reward
from rl.rewards.runner import RewardRunner

PATH = "rl.rewards.math:math_verify"

CASES = [
    ("4", "2 + 2 is \\boxed{4}", 1.0),
    (4, "so the answer is 4.", 1.0),
    ("\\frac{1}{2}", "it is $0.5$", 1.0),
    ("$\\frac{1}{2}$", "\\boxed{\\frac{2}{4}}", 1.0),
    ("x^2 + 2x + 1", "\\boxed{(x+1)^2}", 1.0),
    ("(1, 2)", "\\boxed{(1,2)}", 1.0),
    ("4", "first \\boxed{4}, no: \\boxed{5}", 0.0),
    ("4", "I do not know", 0.0),
    ("4", "", 0.0),
]


def test_answers_are_compared_as_expressions_in_threads(make_sample):
    args = {"timeout_s": 60}
    rewards = RewardRunner(load_reward(PATH, args), args, timeout_s=200)
    scored = rewards.score([make_sample(response, label) for label, response, _ in CASES])
    assert [sample.reward_error for sample in scored] == [None] * len(CASES)
    assert [sample.reward for sample in scored] == [reward for _, _, reward in CASES]


def test_a_late_answer_costs_its_own_sample(make_sample):
    args = {"timeout_s": 3}
    rewards = RewardRunner(load_reward(PATH, args), args, timeout_s=200)
    rewards.score([make_sample("\\boxed{4}", "4")])  # processes are up
    responses = ["\\boxed{4}", "\\boxed{" + "9^{" * 6 + "9" + "}" * 6 + "}", "\\boxed{4}", "\\boxed{4}"]
    began = time.monotonic()
    scored = rewards.score([make_sample(response, "4") for response in responses])
    assert time.monotonic() - began < 100
    assert [sample.reward for sample in scored] == [1.0, 0.0, 1.0, 1.0]
    assert [sample.reward_error is None for sample in scored] == [True, False, True, True]


def test_labels_and_args(make_sample):
    rewards = RewardRunner(load_reward(PATH), timeout_s=200)
    (scored,) = rewards.score([make_sample("\\boxed{4}", {"a": 1})])
    assert "expected a mathematical expression as text, or a number, got \"{'a': 1}\"" in scored.reward_error
    for args, expected in [({"limit": 1}, "unknown reward args"), ({"workers": 0}, "expected workers > 0")]:
        with pytest.raises(RewardLoadError, match=expected):
            load_reward(PATH, args)
    check = label_check(PATH)
    check("4")
    for label in (None, "", [1], True):
        with pytest.raises(ValueError, match="expected a mathematical expression"):
            check(label)
