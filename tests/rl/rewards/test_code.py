"""Code against tests, in every form that tests come in."""

from __future__ import annotations

import json

import pytest

from rl.rewards.code import ProblemTests, extract_code, parse_tests
from rl.rewards.loading import RewardLoadError, label_check, load_reward
from rl.rewards.runner import RewardRunner

pytestmark = pytest.mark.usefixtures("isolation")

PATH = "rl.rewards.code:code_execution"
ARGS = {"time_s": 60, "cpu_s": 60}


def score(make_sample, responses, label, **args):
    args = ARGS | args
    rewards = RewardRunner(load_reward(PATH, args), args, timeout_s=300, concurrency=2)
    scored = rewards.score([make_sample(response, label) for response in responses])
    assert [sample.reward_error for sample in scored] == [None] * len(responses)
    return [sample.reward for sample in scored]


def fenced(code):
    return f"Here:\n```python\n{code}\n```\nThat is all."


def test_dialogues(make_sample):
    label = json.dumps({"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7"]})
    add = fenced("a, b = map(int, input().split())\nprint(a + b, end=' \\n\\n')")
    responses = [
        add,
        fenced("input(); print(3)"),
        fenced("print(1 +"),
        fenced("input(); print(3); raise SystemExit(1)"),
        "",
    ]
    assert score(make_sample, responses, label) == [1.0, 0.0, 0.0, 0.0, 0.0]
    label = [{"input": "1 2", "output": "3"}, {"input": "3 4", "output": "7"}]
    assert score(make_sample, responses[:2], label, partial_credit=True) == [1.0, 0.5]
    assert score(make_sample, responses[1:2], label, max_tests=1) == [1.0]


def test_functions(make_sample):
    label = {"fn_name": "add", "inputs": [[1, 2], "3\n4"], "outputs": [3, "[7]"]}
    responses = [
        fenced("def add(a, b): print('noise'); return a + b"),
        fenced("class Solution:\n    def add(self, a, b): return a + b"),
        fenced("def add(a, b): return 3"),
        fenced("def other(): pass"),
    ]
    assert score(make_sample, responses, label) == [1.0, 1.0, 0.0, 0.0]


def test_assertions_and_those_who_go_round_them(make_sample):
    label = ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]
    responses = [
        fenced("def add(a, b): return a + b"),
        fenced("def add(a, b): return 3"),
        fenced("import os; os._exit(0)"),
        fenced("import sys; sys.exit(0)"),
        fenced("print('0 1'); print('1 1')\ndef add(a, b): raise SystemExit(0)"),
        fenced("raise ValueError"),
    ]
    assert score(make_sample, responses, label) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert score(make_sample, responses[:2], {"tests": "\n".join(label)}) == [1.0, 0.0]
    assert score(make_sample, responses[1:2], label, partial_credit=True) == [0.5]


def test_one_that_hangs_or_eats_memory_gets_nothing(make_sample):
    responses = [fenced("while True: pass"), fenced("x = bytearray(1 << 34)\ndef f(): pass")]
    assert score(make_sample, responses, "f()", time_s=3) == [0.0, 0.0]


def test_extraction():
    assert extract_code("x = 1") == "x = 1"
    assert extract_code("```python\na\n```\n```py\nb\n```") == "b\n"
    assert extract_code("```\na\n```\ntext") == "a\n"
    assert extract_code("```python\nnever closed") == ""
    assert extract_code("```json\n{}\n```") == ""


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (None, "expected tests as Python text"),
        ("", "expected tests as Python text"),
        (3, "expected tests as Python text"),
        ([], "expected tests as Python text"),
        (["assert 1", 2], "expected tests as Python text"),
        ("{bad", "begins like JSON and is none"),
        ({"input": "a"}, "got an object with input"),
        ({"inputs": [], "outputs": []}, "of the same length >= 1, got 0 and 0"),
        ({"inputs": ["a"], "outputs": "a"}, "got 1 and str"),
        ({"inputs": [1], "outputs": [1]}, "name the function in fn_name"),
        ({"inputs": [1], "outputs": [1], "fn_name": "a b"}, "expected a function's name"),
        ([{"input": "a"}], "expected input and output in each test"),
    ],
)
def test_labels_that_hold_no_tests(label, expected):
    with pytest.raises(ValueError, match=expected):
        label_check(PATH)(label)


def test_tests_and_args():
    assert parse_tests('["assert 1"]') == ProblemTests(checks=({"code": "assert 1"},))
    for args, expected in [
        ({"timeout": 1}, "unknown reward args"),
        ({"time_s": 0}, "expected time_s > 0"),
        ({"partial_credit": 1}, "expected true or false as partial_credit"),
    ]:
        with pytest.raises(RewardLoadError, match=expected):
            load_reward(PATH, args)
