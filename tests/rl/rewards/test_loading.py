"""Import paths and signatures."""

from __future__ import annotations

import asyncio
import sys

import pytest

from rl.rewards.loading import RewardLoadError, label_check, load_reward

MODULE = """
import functools

NUMBER = 3

def plain(sample, args): return len(sample.response_text) * args["scale"]
async def asynchronous(sample, args): return 1.0
def verl(data_source, solution_str, ground_truth, extra_info=None):
    return [data_source, solution_str, ground_truth, extra_info]
def verl_without_info(solution_str, ground_truth, data_source, *, strict=False): return [data_source, strict]
async def verl_any(data_source, solution_str, ground_truth, **others): return sorted(others)
def verl_batch(data_sources, solution_strs, ground_truths, extra_infos=None):
    return [data_sources, solution_strs, ground_truths, extra_infos]
async def slime(args, sample, **kwargs): return [args, sample]
async def slime_group(args, samples, **kwargs): return [args, samples]
def group(samples, args): return [samples, args]
def checked(sample, args): return 1
def check_args(args):
    if "bad" in args: raise ValueError("expected no bad")
def check_label(label):
    if not isinstance(label, int): raise ValueError("expected a number")
checked.check_args = check_args
checked.check_label = check_label
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
    for name in ("my_rewards", "needs_more", "broken", "for_slime"):
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


def test_verls_own_columns_reach_the_function(make_sample):
    metadata = {"data_source": "gsm8k", "ability": "math", "extra_info": {"index": 3}}
    sample = make_sample("4", label="5", metadata=metadata)
    assert load_reward("my_rewards:verl").call(sample, {}) == ["gsm8k", "4", "5", {"index": 3}]
    reward = load_reward("my_rewards:verl_batch")
    assert (reward.style, reward.of_groups) == ("compute_scores", True)
    assert reward.call([sample, sample], {}) == [["gsm8k"] * 2, ["4"] * 2, ["5"] * 2, [{"index": 3}] * 2]


def test_slime_functions_get_what_slime_gives(make_sample):
    sample = make_sample("4", label="5", metadata={"metadata": {"rm_type": "math"}, "origin": "x:1"})
    reward = load_reward("my_rewards:slime")
    assert (reward.style, reward.is_async, reward.of_groups) == ("slime", True, False)
    args, given = asyncio.run(reward.call(sample, {"scale": 2}))
    assert args.scale == 2
    assert getattr(args, "other", 3) == 3
    with pytest.raises(AttributeError, match=r"args\.rm_url: set rm_url in reward\.args"):
        _ = args.rm_url
    assert (given.prompt, given.response, given.label, given.metadata) == ("Q", "4", "5", {"rm_type": "math"})
    assert (given.tokens, given.response_length, given.group_index, given.index) == ([1, 2, 3], 2, 0, 0)
    assert given.status == given.Status.COMPLETED
    reward = load_reward("my_rewards:slime_group")
    assert (reward.style, reward.of_groups) == ("slime_group", True)
    _, group = asyncio.run(reward.call([sample, sample], {}))
    assert [each.response for each in group] == ["4", "4"]
    assert load_reward("my_rewards:group").style == "samples"


def test_a_reward_may_import_slimes_sample(tmp_path, make_sample):
    (tmp_path / "for_slime.py").write_text(
        "from slime.utils.types import Sample\n"
        "async def custom_rm(args, sample: Sample, **kwargs) -> float:\n"
        "    assert isinstance(sample, Sample) and sample.status == Sample.Status.COMPLETED\n"
        "    return float(len(sample.response))\n"
    )
    (tmp_path / "more_slime.py").write_text("from slime.rollout.rm_hub import math\n")
    for path in ("for_slime.py:custom_rm", "for_slime.custom_rm"):
        assert asyncio.run(load_reward(path).call(make_sample("four"), {})) == 4.0
    assert "slime" not in sys.modules
    with pytest.raises(RewardLoadError, match=r"slime\.rollout"):
        load_reward("more_slime:f")


def test_a_file_can_be_named(tmp_path, make_sample):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "my reward.py").write_text(
        "calls = []\ndef f(sample, args): calls.append(1); return len(calls)"
    )
    path = f"{tmp_path}/sub/my reward.py:f"
    assert load_reward(path).call(make_sample(""), {}) == 1
    assert load_reward("sub/my reward.py:f").call(make_sample(""), {}) == 2  # the same module
    with pytest.raises(RewardLoadError, match="has no 'g'"):
        load_reward("sub/my reward.py:g")
    (tmp_path / "broken_file.py").write_text("1 / 0")
    with pytest.raises(RewardLoadError, match=r"importing broken_file\.py failed: ZeroDivisionError"):
        load_reward("broken_file.py:f")


def test_functions_bring_checks_of_args_and_labels():
    with pytest.raises(RewardLoadError, match=r"reward 'my_rewards:checked': expected no bad"):
        load_reward("my_rewards:checked", {"bad": 1})
    assert label_check("my_rewards:plain") is None
    for needs_label, refused in [(None, [None, "", "a"]), (True, [None, "", "a"]), (False, ["", "a"])]:
        check = label_check("my_rewards:checked", needs_label=needs_label)
        check(1)
        for label in (None, "", "a"):
            if label in refused:
                with pytest.raises(ValueError, match=r"expected a (number|value because the reward)"):
                    check(label)
            else:
                check(label)
    check = label_check("my_rewards:plain", needs_label=True)
    check([])
    with pytest.raises(ValueError, match="got null"):
        check(None)
    assert label_check("my_rewards:plain", needs_label=False) is None


def test_the_key_of_a_mapping_is_not_an_argument_of_verls_functions(make_sample):
    reward = load_reward("my_rewards:verl", {"reward_key": "acc"})
    assert reward.key == "acc"
    assert reward.call(make_sample("4"), {"reward_key": "acc"})[1] == "4"
    with pytest.raises(RewardLoadError, match="expected a text as reward_key"):
        load_reward("my_rewards:plain", {"reward_key": 1})


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
