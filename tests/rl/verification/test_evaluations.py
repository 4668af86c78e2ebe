import dataclasses

import pytest

from rl.config import from_dict, to_dict
from rl.evaluation import read_eval, write_eval
from rl.ledger import Ledger, LedgerError
from rl.verification.evaluations import run_config, verify_eval
from tests.rl.test_config import changed
from tests.rl.test_evaluation import make_sample


def make_run(directory, *changes):
    config = from_dict(changed(("reward.path", "rl.rewards.builtin:exact_match"), *changes))
    Ledger.create(directory, config=to_dict(config), versions={}, topology={}, seeds={}, data_digests={}).close()
    return config


def save(directory, step, right, count=10):
    samples = [
        make_sample(index, reward=float(index < right), response="4" if index < right else "5")
        for index in range(count)
    ]
    return write_eval(directory, step, samples)


THRESHOLDS = ("evaluation.success", {"before_max": 0.3, "after_min": 0.6})


def test_accuracy_is_computed_again(tmp_path):
    config = make_run(tmp_path, THRESHOLDS)
    save(tmp_path, 0, 2)
    save(tmp_path, 20, 7)
    found = verify_eval(tmp_path)
    assert [(result.step, result.accuracy) for result in found.results] == [(0, 0.2), (20, 0.7)]
    assert found.mismatches == ()
    assert not found.missed
    assert "at least 60.0%: met" in found.render()
    assert run_config(Ledger.read(tmp_path)) == config


def test_thresholds_are_judged_on_recomputed_rewards(tmp_path):
    make_run(tmp_path, THRESHOLDS)
    save(tmp_path, 0, 2)
    path = save(tmp_path, 20, 5)
    # Recorded rewards that claim more than the responses earn.
    write_eval(tmp_path, 20, [dataclasses.replace(sample, reward=1.0) for sample in read_eval(path)])
    found = verify_eval(tmp_path)
    assert found.results[1].accuracy == 0.5
    assert found.missed
    assert len(found.mismatches) == 5
    assert "step 20, eval/0/5/0: recorded 1.0, computed 0.0" in found.render()
    assert "MISSED" in found.render()


def test_nothing_to_verify(tmp_path):
    with pytest.raises(LedgerError, match=r"run\.json"):
        verify_eval(tmp_path)
    make_run(tmp_path)
    with pytest.raises(LedgerError, match="not evaluated yet"):
        verify_eval(tmp_path)
