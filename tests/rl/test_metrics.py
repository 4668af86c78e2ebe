import json
import logging
import math
import sys
import types

import numpy as np
import pytest

from rl.metrics import METRICS, SECTIONS, MetricLogger, read_metrics


def steps(directory):
    return [json.loads(line).get("step") for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_metrics_come_back_merged_by_step(tmp_path):
    with MetricLogger(tmp_path) as metrics:
        metrics.log(1, {"train/loss": 1, "rollout/reward/mean": np.float32(0.5)})
        metrics.log(1, {"warmup/loss": 9.0}, axis="warmup_step")
        metrics.log(2, {"train/loss": np.array(0.25), "train/kl": None, "eval/accuracy": math.nan})
        metrics.log(1, {"train/loss": 3.0, "eval/accuracy": 0.5})
    found = read_metrics(tmp_path)
    assert list(found) == [1, 2]
    assert found[1] == {"train/loss": 3.0, "rollout/reward/mean": 0.5, "eval/accuracy": 0.5}
    assert found[2]["train/loss"] == 0.25
    assert "train/kl" not in found[2]
    assert math.isnan(found[2]["eval/accuracy"])
    assert read_metrics(tmp_path, "warmup_step") == {1: {"warmup/loss": 9.0}}


def test_a_line_is_in_the_file_when_log_returns(tmp_path):
    metrics = MetricLogger(tmp_path)
    metrics.log(1, {"train/loss": 1.0})
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize("name", ["loss", "training/loss", "train/", "train"])
def test_unknown_names_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="metric name"):
        MetricLogger(tmp_path).log(1, {name: 1.0})


@pytest.mark.parametrize("value", ["high", [1.0, 2.0], np.zeros(2)])
def test_values_must_be_numbers(tmp_path, value):
    with pytest.raises(ValueError, match="train/loss: expected a number"):
        MetricLogger(tmp_path).log(1, {"train/loss": value})


def test_unknown_axis(tmp_path):
    with pytest.raises(ValueError, match="axis"):
        MetricLogger(tmp_path).log(1, {"train/loss": 1.0}, axis="epoch")


def test_described_metrics_have_known_sections():
    assert {name.split("/")[0] for name in METRICS} == set(SECTIONS)


def test_resume_drops_later_steps_and_a_torn_line(tmp_path):
    with MetricLogger(tmp_path) as metrics:
        metrics.log(50, {"warmup/loss": 1.0}, axis="warmup_step")
        for step in range(1, 6):
            metrics.log(step, {"train/loss": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "train/lo')
    with MetricLogger(tmp_path, resume_step=3) as metrics:
        metrics.log(4, {"train/loss": 40.0})
    assert steps(tmp_path) == [None, 1, 2, 3, 4]
    assert read_metrics(tmp_path)[4] == {"train/loss": 40.0}
    assert read_metrics(tmp_path, "warmup_step") == {50: {"warmup/loss": 1.0}}


def test_a_new_run_starts_an_empty_file(tmp_path):
    with MetricLogger(tmp_path) as metrics:
        metrics.log(1, {"train/loss": 1.0})
    MetricLogger(tmp_path).close()
    assert steps(tmp_path) == []


def read_tensorboard(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_tensorboard_across_a_resume(tmp_path):
    with MetricLogger(tmp_path, tensorboard=True) as metrics:
        for step in range(1, 20):
            metrics.log(step, {"warmup/loss": step}, axis="warmup_step")
        for step in range(1, 6):
            metrics.log(step, {"train/loss": step})
    with MetricLogger(tmp_path, tensorboard=True, resume_step=3) as metrics:
        metrics.log(4, {"train/loss": 40})
    assert read_tensorboard(tmp_path / "tensorboard")["train/loss"] == {1: 1, 2: 2, 3: 3, 4: 40}
    assert len(read_tensorboard(tmp_path / "tensorboard" / "warmup")["warmup/loss"]) == 19


class FakeWandb(types.ModuleType):
    """Stands in for the package; fails on the n-th log when asked to."""

    def __init__(self, fail_at=None, fail_init=False):
        super().__init__("wandb")
        self.inits, self.logged, self.finished = [], [], []
        self.fail_at, self.fail_init = fail_at, fail_init
        self.Settings = lambda **settings: settings

    def init(self, **arguments):
        if self.fail_init:
            raise RuntimeError("no service")
        self.inits.append(arguments)
        return self

    def define_metric(self, *args, **kwargs):
        pass

    def log(self, values):
        if self.fail_at is not None and len(self.logged) >= self.fail_at:
            raise ConnectionError("broken pipe")
        self.logged.append(values)

    def finish(self, exit_code):
        self.finished.append(exit_code)


@pytest.fixture
def wandb(monkeypatch):
    def install(**arguments):
        fake = FakeWandb(**arguments)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return install


@pytest.mark.parametrize(
    ("setting", "key", "mode"),
    [("auto", None, "offline"), ("auto", "k", "online"), ("offline", "k", "offline"), ("online", None, "online")],
)
def test_wandb_mode(tmp_path, wandb, monkeypatch, setting, key, mode):
    fake = wandb()
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    MetricLogger(tmp_path, wandb=setting).close()
    assert fake.inits[0]["mode"] == mode
    assert fake.inits[0]["dir"] == str(tmp_path)


def test_wandb_continues_its_run_after_a_resume(tmp_path, wandb):
    fake = wandb()
    with MetricLogger(tmp_path, wandb="offline", name="a", config={"x": 1}) as metrics:
        metrics.log(7, {"train/loss": 1.0})
    MetricLogger(tmp_path, wandb="offline", resume_step=7).close(exit_code=3)
    assert fake.inits[0]["id"] == fake.inits[1]["id"]
    assert fake.logged == [{"step": 7, "train/loss": 1.0}]
    assert fake.finished == [0, 3]


def test_an_exception_marks_the_run_failed(tmp_path, wandb):
    fake = wandb()
    with pytest.raises(KeyError), MetricLogger(tmp_path, wandb="offline"):
        raise KeyError("x")
    assert fake.finished == [1]


def test_a_failing_tracker_is_reported_once_and_the_run_goes_on(tmp_path, wandb, caplog):
    wandb(fail_at=1)
    with caplog.at_level(logging.WARNING), MetricLogger(tmp_path, wandb="offline") as metrics:
        for step in range(1, 5):
            metrics.log(step, {"train/loss": 1.0})
    assert [record.getMessage() for record in caplog.records] == [
        "W&B failed and stays off for the rest of this run (ConnectionError: broken pipe); "
        "metrics.jsonl has all metrics."
    ]
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_a_tracker_that_cannot_start(tmp_path, wandb, caplog):
    wandb(fail_init=True)
    with caplog.at_level(logging.WARNING), MetricLogger(tmp_path, wandb="auto") as metrics:
        metrics.log(1, {"train/loss": 1.0})
    assert "no service" in caplog.text
    assert steps(tmp_path) == [1]
