import dataclasses
import itertools
import json

import numpy as np
import pytest

from rl.evaluation import (
    EvalResult,
    drop_evals_after,
    eval_files,
    eval_metrics,
    eval_path,
    judge,
    ks,
    pass_at_k,
    read_eval,
    summarize,
    summarize_samples,
    write_eval,
)
from rl.types import Prompt, Sample


def make_sample(ordinal=0, reward=1.0, response="4", label="4", text="2 + 2 = ü", **changes):
    prompt = Prompt(
        uid=f"eval/0/{ordinal}",
        ordinal=ordinal,
        epoch=0,
        text=text,
        tokens=np.array([1, 2, 3], dtype=np.int32),
        label=label,
        metadata={"data_source": "sums"},
    )
    sample = Sample(
        sample_id=f"{prompt.uid}/0",
        prompt=prompt,
        response_tokens=np.array([4, 5], dtype=np.int32),
        rollout_logprobs=np.zeros(2, dtype=np.float32),
        weight_versions=((0, 0),),
        finish_reason="stop",
        routes=None,
        histogram=None,
        response_text=response,
        reward=reward,
    )
    return dataclasses.replace(sample, **changes)


def test_samples_come_back(tmp_path):
    samples = [make_sample(0), make_sample(1, None, reward_error="it broke\n", label={"entry": [1, None]})]
    path = write_eval(tmp_path, 12, samples)
    assert path == tmp_path / "eval" / "step_00012.jsonl"
    again = read_eval(path)
    for before, after in zip(samples, again, strict=True):
        assert after.sample_id == before.sample_id
        assert (after.prompt.uid, after.prompt.text) == (before.prompt.uid, before.prompt.text)
        assert (after.prompt.label, after.prompt.metadata) == (before.prompt.label, before.prompt.metadata)
        np.testing.assert_array_equal(after.tokens, before.tokens)
        assert (after.response_text, after.reward, after.reward_error) == (
            before.response_text,
            before.reward,
            before.reward_error,
        )
    assert len(path.read_text().splitlines()) == 2
    assert json.loads(path.read_text().splitlines()[0])["finish_reason"] == "stop"


def test_files_are_found_by_step(tmp_path):
    for step in (100000, 0, 20):
        write_eval(tmp_path, step, [make_sample()])
    (tmp_path / "eval" / "step_x.jsonl").write_text("")
    assert list(eval_files(tmp_path)) == [0, 20, 100000]
    assert eval_files(tmp_path)[20] == eval_path(tmp_path, 20)
    assert eval_files(tmp_path / "none") == {}


def test_evaluations_of_rolled_back_steps_are_dropped(tmp_path):
    for step in (0, 10, 20):
        write_eval(tmp_path, step, [make_sample()])
    drop_evals_after(tmp_path, 10)
    assert list(eval_files(tmp_path)) == [0, 10]


def test_summarize():
    assert summarize(3, [1.0, 0.5, None, 0.0]) == EvalResult(3, 4, 0.25, 0.375)
    assert summarize(3, [1.0, 0.5, None, 0.0], correct_from=0.5).accuracy == 0.5
    assert summarize(3, [1.0 - 1e-12]).accuracy == 1.0
    with pytest.raises(ValueError, match="at least one sample"):
        summarize(3, [])


def test_pass_at_k_by_hand():
    # 2 of 4 are correct: of the 6 pairs, 1 has none.
    assert pass_at_k(4, 2, 1) == 0.5
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6)
    assert pass_at_k(4, 2, 3) == 1.0
    assert pass_at_k(4, 0, 4) == 0.0
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5)
    for arguments in [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)]:
        with pytest.raises(ValueError, match="expected 0 <= correct"):
            pass_at_k(*arguments)


def test_pass_at_k_is_the_mean_over_all_choices():
    rng = np.random.default_rng(5)
    for _ in range(20):
        correct = rng.random(int(rng.integers(1, 7))) < 0.4
        for k in range(1, len(correct) + 1):
            choices = [any(some) for some in itertools.combinations(correct, k)]
            assert pass_at_k(len(correct), int(correct.sum()), k) == pytest.approx(np.mean(choices))


def test_several_samples_of_a_prompt():
    rewards = {"a": [1.0, 0.0, 1.0, None], "b": [0.0, 0.0, 0.0, 0.5]}
    samples = [
        make_sample(ordinal, reward, sample_id=f"eval/0/{ordinal}/{k}")
        for k in range(4)
        for ordinal, group in enumerate(rewards.values())
        for reward in [group[k]]
    ]
    result = summarize_samples(3, samples)
    assert (result.count, result.samples, result.accuracy, result.reward_mean) == (2, 4, 0.25, 2.5 / 8)
    assert result.pass_at == ((1, 0.25), (2, pytest.approx(5 / 12)), (4, 0.5))
    assert summarize_samples(3, samples, correct_from=0.5).pass_at[-1] == (4, 1.0)
    assert eval_metrics(result) == {
        "eval/accuracy": 0.25,
        "eval/reward/mean": 2.5 / 8,
        "eval/avg@4": 0.25,
        "eval/pass@1": 0.25,
        "eval/pass@2": pytest.approx(5 / 12),
        "eval/pass@4": 0.5,
    }
    assert eval_metrics(summarize(3, [1.0])) == {"eval/accuracy": 1.0, "eval/reward/mean": 1.0}
    assert [ks(n) for n in (1, 2, 3, 4, 6, 8)] == [(), (1, 2), (1, 2, 3), (1, 2, 4), (1, 2, 4, 6), (1, 2, 4, 8)]


def results(*accuracies):
    return [EvalResult(step, 10, accuracy, 0.0) for step, accuracy in enumerate(accuracies)]


@pytest.mark.parametrize(
    ("accuracies", "met"),
    [((0.3, 0.1, 0.6), [True, True]), ((0.31, 0.9), [False, True]), ((0.2, 0.9, 0.59), [True, False])],
)
def test_judge(accuracies, met):
    judgements = judge(results(*accuracies), 0.3, 0.6)
    assert [judgement.met for judgement in judgements] == met
    assert [judgement.step for judgement in judgements] == [0, len(accuracies) - 1]


def test_judge_without_thresholds_or_results():
    assert judge(results(0.5), None, None) == []
    assert [j.met for j in judge([], 0.3, 0.6)] == [False, False]
    # One evaluation is the one before training: nothing shows what training did.
    assert [j.met for j in judge(results(0.2), None, 0.1)] == [False]
