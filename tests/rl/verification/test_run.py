"""Verifying runs that are made by hand; real runs, and what is found when they are changed, are in
``tests/rl/orchestration/test_balancing.py``."""

import dataclasses
import json

import pytest

from rl.config import from_dict, to_dict
from rl.evaluation import eval_metrics, summarize_samples, write_eval
from rl.ledger import Ledger, LedgerError, StepRecord
from rl.metrics import MetricLogger
from rl.verification.run import verify_run
from tests.rl.test_config import changed
from tests.rl.test_evaluation import make_sample

SIZE = 12


def record(step, prompts=4, **fields):
    """Prompts in order, three steps an epoch."""
    consumed = tuple(divmod(i, SIZE) for i in range((step - 1) * prompts, step * prompts))
    return dataclasses.replace(
        StepRecord(
            step=step,
            weight_version=step + 1,
            epoch=consumed[0][0],
            consumed=consumed,
            sample_ids=tuple(f"train/{epoch}/{ordinal}/{k}" for epoch, ordinal in consumed for k in range(2)),
            rewards={"reward/mean": step / 8},
            extra={"optimizer_steps": 2},
        ),
        **fields,
    )


def make_run(directory, records, *changes):
    config = from_dict(
        changed(
            ("reward.path", "rl.rewards.builtin:exact_match"),
            ("run.output_dir", str(directory)),
            ("model.path", str(directory / "no-model")),
            *changes,
        )
    )
    facts = {"versions": {}, "topology": {}, "seeds": {}, "data_digests": {"train": "sha256:aa"}}
    with (
        Ledger.create(directory, config=to_dict(config), **facts) as ledger,
        MetricLogger(directory, wandb="off", tensorboard=False) as metrics,
    ):
        for each in records:
            ledger.append(each)
            values = {f"rollout/{name}": value for name, value in each.rewards.items()}
            metrics.log(each.step, values | {"perf/step_time": 1.0, "train/optimizer_steps": 2.0 * each.step + 5})
        samples = [
            make_sample(index, reward=float(index < 3), response="4" if index < 3 else "5") for index in range(8)
        ]
        write_eval(directory, 0, samples)
        metrics.log(0, eval_metrics(summarize_samples(0, samples, 1.0)))
    return directory


def mismatches(directory, **options):
    return {c.name: c.mismatches for c in verify_run(directory, **options).checks if c.mismatches}


def test_a_run_whose_data_and_model_are_gone(tmp_path):
    found = verify_run(make_run(tmp_path, [record(step) for step in (1, 2, 3, 4)]))
    assert found.mismatches == ()
    notes = {check.name: check.notes for check in found.checks if check.notes}
    assert "digests of train: the data cannot be read now" in notes["data"][0]
    assert notes["prompts"] == ["the ends of epochs: the data could not be read"]
    assert set(notes) == {"data", "prompts"}
    assert "not checked, data: digests of train" in found.render()
    assert not found.missed


def test_a_threshold_that_is_missed(tmp_path):
    found = verify_run(make_run(tmp_path, [record(1)], ("evaluation.success", {"before_max": 0.3})))
    assert (found.mismatches, found.missed) == ((), True)
    assert "threshold of evaluation.success was missed" in found.render()
    assert not verify_run(tmp_path, rewards=False).missed


@pytest.mark.parametrize(
    ("second", "check", "said"),
    [
        ({"weight_version": 1}, "ledger", "weight version 1 after 2"),
        ({"sample_ids": ("train/0/1/0",)}, "ledger", "prompts that it did not consume: train/0/1/0"),
        ({"sample_ids": ("train/0/5/0", "train/0/5/0")}, "ledger", "trained on before: train/0/5/0"),
        ({"route_digests": {"train/0/0/0": "ab"}}, "ledger", "did not train on: train/0/0/0"),
        (
            {"consumed": ((0, 4), (0, 6), (0, 7), (0, 8)), "sample_ids": ()},
            "prompts",
            "prompts 5 of epoch 0 were passed over",
        ),
        ({"extra": {"optimizer_steps": 1}}, "metrics", "2 optimizer steps since the step before, and the ledger has 1"),
    ],
)
def test_records_that_do_not_fit_together(tmp_path, second, check, said):
    found = mismatches(make_run(tmp_path, [record(1), record(2, **second)]))
    assert list(found) == [check]
    assert "step 2" in found[check][0] or check == "prompts"
    assert said in found[check][0]


def test_lines_of_an_earlier_version_have_no_digests(tmp_path):
    make_run(tmp_path, [record(1), record(2)])
    path = tmp_path / "steps.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "chain"}) + "\n" for line in lines))
    found = verify_run(tmp_path)
    assert found.mismatches == ()
    assert "digests of 2 lines" in found.checks[0].notes[0]


def test_a_damaged_file_does_not_end_the_other_checks(tmp_path):
    make_run(tmp_path, [record(1), record(2)])
    path = tmp_path / "metrics.jsonl"
    path.write_text("{]\n" + path.read_text())
    found = verify_run(tmp_path, rewards=False)
    counts = {check.name: check.count for check in found.checks}
    assert (counts["ledger"], counts["prompts"]) == (2, 8)
    assert {check.name for check in found.checks if check.mismatches} == {"metrics", "evaluations"}
    assert "metrics.jsonl line 1" in found.mismatches[0]


def test_nothing_to_verify(tmp_path):
    with pytest.raises(LedgerError, match=r"run\.json"):
        verify_run(tmp_path)
