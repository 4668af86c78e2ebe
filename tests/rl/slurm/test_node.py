"""What the head of a job makes of its run: stops, lost nodes, time that is over."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from rl.config import ConfigError
from rl.slurm import control, node
from rl.slurm.node import NODE_LOST, OUT_OF_TIME, STOPPED

RUN = """
import signal, sys, time, pathlib
stop, checkpoint, code = sys.argv[1:4]
if stop == "late":  # while it imports
    pathlib.Path("up").touch()
    time.sleep(2)
if stop != "never":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
else:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
if checkpoint:
    pathlib.Path(checkpoint).mkdir(parents=True)
pathlib.Path("up").touch()
if code:
    sys.exit(int(code))
while True:
    time.sleep(0.1)
"""


class Channel:
    """A head's channel whose nodes are lost when the test says so."""

    def __init__(self):
        self.lost = ()
        self.lost_later = ()

    def wait_for_loss(self, limit_s):
        self.lost = self.lost_later
        return bool(self.lost)


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return node.Task(7, "n1", ("n1", "n2"), tmp_path, tmp_path, None, 4, "x.yaml", ())


def run(task, monkeypatch, *, stop="after the iteration", checkpoint="", code="", channel=None, until=None):
    """``_run`` with a process that does as told; ``until`` is written to the stop file once it is up."""
    real, directory = subprocess.Popen, task.state

    def popen(command, **options):
        assert command[1:] == ["-m", "rl.cli", "train", "x.yaml", "ray.address=1.2.3.4:5", "--resume", "auto"]
        process = real([sys.executable, "-c", RUN, stop, checkpoint, code], cwd=directory, **options)
        deadline = time.monotonic() + 60
        while not (directory / "up").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if until is not None:
            (directory / "stop").write_text(until)
        return process

    monkeypatch.setattr(node.subprocess, "Popen", popen)
    config = SimpleNamespace(output_dir=directory / "run")
    return node._run(task, config, "1.2.3.4:5", channel or Channel())


@pytest.mark.parametrize("code", [0, 1, 2, 3, 130])
def test_the_exit_code_is_the_runs(task, monkeypatch, code):
    assert run(task, monkeypatch, code=str(code)) == code


@pytest.mark.parametrize(("made", "code"), [(False, OUT_OF_TIME), (True, STOPPED)])
def test_asked_to_stop(task, monkeypatch, made, code):
    """It goes on from a checkpoint that this attempt made; without one it would never get any further."""
    checkpoint = str(task.state / "run" / "checkpoints" / "step_00000004") if made else ""
    assert run(task, monkeypatch, checkpoint=checkpoint, until="") == code


def test_asked_to_stop_before_it_listens(task, monkeypatch):
    monkeypatch.setattr(node, "_ASK_AGAIN_S", 0.5)
    before = node.signal.signal(node.signal.SIGUSR1, node.signal.SIG_IGN)  # as main does
    try:
        checkpoint = str(task.state / "run" / "checkpoints" / "step_00000004")
        assert run(task, monkeypatch, stop="late", checkpoint=checkpoint, until="") == STOPPED
    finally:
        node.signal.signal(node.signal.SIGUSR1, before)


@pytest.mark.parametrize(("made", "code"), [(False, OUT_OF_TIME), (True, STOPPED)])
def test_time_is_over_before_the_iteration(task, monkeypatch, made, code):
    (task.state / "run" / "checkpoints" / "step_00000003").mkdir(parents=True)
    checkpoint = str(task.state / "run" / "checkpoints" / "step_00000004") if made else ""
    assert run(task, monkeypatch, stop="never", checkpoint=checkpoint, until=f"{time.time() + 5}") == code


def test_a_lost_node_ends_the_run(task, monkeypatch):
    channel = Channel()
    channel.lost = ("n2",)
    assert run(task, monkeypatch, stop="never", channel=channel) == NODE_LOST


def test_a_run_that_fails_before_its_node_is_known_to_be_lost(task, monkeypatch):
    channel = Channel()
    channel.lost_later = ("n2",)
    assert run(task, monkeypatch, code="1", channel=channel) == NODE_LOST


def test_partial_checkpoints_do_not_count(tmp_path):
    assert node._newest(tmp_path) is None
    for name in ("step_00000002", "step_00000010", "step_00000012.partial", "reference"):
        (tmp_path / name).mkdir()
    assert node._newest(tmp_path) == "step_00000010"


def test_too_few_nodes_are_said_before_anything_waits_for_them():
    wanted = SimpleNamespace(ray_cpus=9, ray_gpus=8)
    node._check_room(wanted, {"CPU": 9.0, "GPU": 8.0})
    with pytest.raises(ConfigError) as refused:
        node._check_room(wanted, {"CPU": 8.0})
    assert "CPUs for 9 processes, the job has 8" in str(refused.value)
    assert "GPUs for 8 processes, the job has 0" in str(refused.value)


def test_a_head_of_another_job_is_refused(task):
    (task.state / "head.json").write_text('{"job": 8}')
    with pytest.raises(control.ControlError, match="of job 8, this is job 7"):
        node._read_head(task)


def test_no_head(task, monkeypatch):
    monkeypatch.setattr(node, "_HEAD_S", 0.0)
    with pytest.raises(control.ControlError, match="from the head n1"):
        node._read_head(task)


def test_tokens_are_for_our_eyes_only(task):
    before = os.umask(0)
    try:
        node._write_attach(task, "1.2.3.4:5", "s3cret")
    finally:
        os.umask(before)
    file = task.state / "attach.env"
    assert file.stat().st_mode & 0o777 == 0o600
    assert "export RAY_ADDRESS=1.2.3.4:5" in file.read_text()
    assert [path.name for path in task.state.iterdir()] == ["attach.env"]


def test_command_line(monkeypatch):
    monkeypatch.setattr(os, "environ", {"SLURM_JOB_ID": "12", "SLURMD_NODENAME": "b", "SLURM_CPUS_ON_NODE": "6"})
    task = node._parse(["--state", "s", "--nodes", "a,b", "--interface", "ib0", "--", "r.yaml", "x.y=1", "z=2"])
    assert task == node.Task(
        12, "b", ("a", "b"), Path("s").absolute(), Path("/tmp"), "ib0", 6, "r.yaml", ("x.y=1", "z=2")
    )
    assert task.directory.parent == Path("/tmp")
    assert task.directory.name.endswith("-12")
