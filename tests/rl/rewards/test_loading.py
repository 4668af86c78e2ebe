"""Import paths and signatures."""

from __future__ import annotations

import sys

import pytest

from rl.rewards.loading import RewardLoadError, load_reward

MODULE = """
import functools

NUMBER = 3

def plain(sample, args): return len(sample.response_text) * args["scale"]
async def asynchronous(sample, args): return 1.0
def verl(data_source, solution_str, ground_truth, extra_info=None):
    return [data_source, solution_str, ground_truth, extra_info]
def verl_without_info(solution_str, ground_truth, data_source, *, strict=False): return [data_source, strict]
async def verl_any(data_source, solution_str, ground_truth, **others): return sorted(others)
def one(sample): return 1
def keyword_only(sample, *, args): return 1
def three(sample, args, model): return 1
class Scorer:
    async def __call__(self, sample, args): return 2.0
    @staticmethod
    def score(sample, args): return 3.0
scorer = Scorer()
half = functools.partial(three, model=None)
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_not_there")
    (tmp_path / "broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)  # found there without PYTHONPATH
    yield
    for name in ("my_rewards", "needs_more", "broken"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("path", ["my_rewards:plain", "my_rewards.plain"])
def test_plain(path, make_sample):
    reward = load_reward(path)
    assert (reward.style, reward.is_async) == ("sample", False)
    assert reward.call(make_sample("four"), {"scale": 2}) == 8


def test_kinds():
    assert load_reward("my_rewards:asynchronous").is_async
    assert load_reward("my_rewards:scorer").is_async
    assert not load_reward("my_rewards:Scorer.score").is_async
    assert load_reward("my_rewards:half").style == "sample"


def test_verl_functions_get_what_verl_gives(make_sample):
    sample = make_sample("4", label="5", metadata={"data_source": "gsm8k", "origin": "x:1"})
    reward = load_reward("my_rewards:verl")
    assert reward.style == "compute_score"
    assert reward.call(sample, {}) == ["gsm8k", "4", "5", {"data_source": "gsm8k", "origin": "x:1"}]
    assert load_reward("my_rewards:verl_without_info", {"strict": True}).call(sample, {"strict": True}) == [
        "gsm8k",
        True,
    ]
    assert load_reward("my_rewards:verl_any", {"a": 1}).takes_extra_info


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("plain", "expected an import path like package.module:function"),
        ("my_rewards:", "expected an import path"),
        ("../x.py:f", "expected a Python file, found none at ../x.py"),
        ("no_such_module:f", "there is no module 'no_such_module'"),
        ("my_rewards.sub:f", "there is no module 'my_rewards.sub'"),
        ("my_rewards:plane", "my_rewards has no 'plane'; did you mean plain"),
        ("needs_more:f", "needs 'a_package_that_is_not_there', which is not installed"),
        ("broken:f", "importing broken failed: ZeroDivisionError: division by zero"),
        ("my_rewards:NUMBER", "expected a function, got a int"),
        ("my_rewards:Scorer", "expected a function, got the class Scorer"),
        ("my_rewards:one", "has the signature (sample); expected (sample, args), verl's"),
        ("my_rewards:keyword_only", "expected (sample, args)"),
        ("my_rewards:three", "missing a required argument: 'model'"),
    ],
)
def test_what_cannot_be_loaded_is_said_at_once(path, expected):
    with pytest.raises(RewardLoadError) as error:
        load_reward(path)
    assert expected in str(error.value)
    assert repr(path) in str(error.value)


def test_args_that_a_verl_function_does_not_take():
    with pytest.raises(RewardLoadError, match=r"unexpected keyword argument 'scale'.*change the reward's args"):
        load_reward("my_rewards:verl", {"scale": 1})
