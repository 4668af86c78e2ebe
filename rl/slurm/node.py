"""One process on every node of a Slurm job: they form a private Ray cluster, and the first runs ``ultraep-rl train``.

    srun --ntasks-per-node=1 python -m rl.slurm.node --state DIR --nodes n1,n2 -- recipes/x.yaml a.b=c

1. The head (the first of ``--nodes``) makes a token, starts Ray on a free port of the job's, and writes where it is to
   ``DIR/head.json``. DIR is the attempt's own directory, on a file system that all nodes share.
2. Other nodes read it, report to the head (``rl.slurm.control``) and start Ray for its address, with its token: Ray
   itself turns away who has another. Nobody looks for a cluster, so nobody finds a stranger's.
3. When all are there, the head runs ``ultraep-rl train ... ray.address=HEAD --resume auto``.
4. It ends with the run's exit code, or with 76 when a node was lost; the launcher makes a requeue of 75 and 76.

``DIR/stop`` (its content: when the job's time is over, in seconds of ``time.time()``, or nothing) asks the run to stop
after its iteration. One that is not through shortly before that time is ended, as a scheduler would.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rl.config import ConfigError, RunConfig, load
from rl.files import write_atomic
from rl.placement import Placement, place
from rl.slurm import control, network
from rl.slurm.ray_node import NodeSettings, RayNode, RayStartError

# Exit codes beside those of rl.cli: a node was lost; no checkpoint was made in this attempt's time; SIGTERM.
NODE_LOST, OUT_OF_TIME, TERMINATED = 76, 124, 143
STOPPED = 75
_NO_FAULT_OF_NODES = (0, 2, 3, STOPPED)

_HEAD_S = 600.0  # for the head to be there
_JOIN_S = 600.0  # for all nodes to be there
_BEFORE_END_S = 60.0  # before the job's time is over, to end a run that did not stop by itself
_ASK_AGAIN_S = 5.0
_CANCEL_S = 2.0  # for Ray to end by itself when the job is cancelled: Slurm kills after KillWait, 30 s
_TERM_S = 45.0  # for a run that was sent SIGTERM


@dataclass(frozen=True)
class Task:
    """What this process was started with.

    Attributes:
        job: id of the Slurm job.
        node: name of this node, as Slurm has it.
        nodes: all, the head first.
        state: the attempt's directory, shared by all nodes.
        tmp: where Ray's files may go, on the node's own disk.
        interface: network interface to use; None: found.
        cpus: CPU tokens of this node.
        recipe, overrides: of ``ultraep-rl train``.
    """

    job: int
    node: str
    nodes: tuple[str, ...]
    state: Path
    tmp: Path
    interface: str | None
    cpus: int
    recipe: str
    overrides: tuple[str, ...]

    @property
    def directory(self) -> Path:
        """Of Ray's files: short, for sockets are in it, and of no other job."""
        return self.tmp / f"ultraep-{os.getuid()}-{self.job}"

    def settings(self, address: str, object_store_mib: int | None) -> NodeSettings:
        return NodeSettings(address, self.directory, self.state / f"{self.node}.ray.log", self.cpus, object_store_mib)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    task = _parse(arguments)
    is_head = task.node == task.nodes[0]
    code = 1
    signal.signal(signal.SIGTERM, _interrupt)
    # Who is started from here ignores it too: the run until it listens, and Ray for good.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        config = load(Path(task.recipe), list(task.overrides))
        code = _head(task, config) if is_head else _other(task, config)
    except (ConfigError, control.ControlError, network.NetworkError, RayStartError) as error:
        print(f"{task.node}: {error}", file=sys.stderr, flush=True)
        code = 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        code = TERMINATED
    finally:
        if is_head:  # srun's own code is the largest of all nodes'
            write_atomic(task.state / "code", f"{code}\n".encode())
    return code


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """The job is cancelled: clean up in the seconds that Slurm gives (KillWait), and do not be disturbed in it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


# ------------------------------------------------------------------ the head


def _head(task: Task, config: RunConfig) -> int:
    interface, address = network.own_address(task.interface)
    token = secrets.token_hex(32)
    _set_environment(interface, address, token)
    channel = control.HeadControl(address, token, task.nodes[1:])
    ray_node = RayNode.head(task.settings(address, config.ray.object_store_mib), task.job)
    try:
        where = f"{address}:{ray_node.port}"
        head = {"ray": where, "address": address, "control": channel.port, "token": token, "job": task.job}
        _write_private(task.state / "head.json", json.dumps(head))
        _write_attach(task, where, token)
        _say(f"head {task.node}: Ray at {where} ({interface}), waiting for {len(task.nodes) - 1} more node(s)")
        channel.wait_for_all(_JOIN_S)
        offered = _wait_for_ray(where, task.nodes, channel)
        _check_room(place(config), offered)
        return _run(task, config, where, channel)
    except KeyboardInterrupt:
        ray_node.stop(grace_s=_CANCEL_S)
        raise
    finally:
        channel.end()
        for name in ("head.json", "attach.env"):  # the token dies with its cluster
            (task.state / name).unlink(missing_ok=True)
        ray_node.stop(keep_logs=task.state / f"{task.node}.workers")


def _run(task: Task, config: RunConfig, address: str, channel: control.HeadControl) -> int:
    """The run itself, watched: exit code."""
    train = [sys.executable, "-m", "rl.cli", "train", task.recipe, *task.overrides]
    checkpoints = config.output_dir / "checkpoints"
    begun_with = _newest(checkpoints)
    process = subprocess.Popen([*train, f"ray.address={address}", "--resume", "auto"], stdin=subprocess.DEVNULL)
    try:
        return _watch(task, process, checkpoints, begun_with, channel)
    finally:
        process.kill()
        process.wait()


def _watch(
    task: Task,
    process: subprocess.Popen[bytes],
    checkpoints: Path,
    begun_with: str | None,
    channel: control.HeadControl,
) -> int:
    """Until the run is over, by itself or because it has to be: exit code. ``begun_with``: newest checkpoint before."""
    end = None  # when the run is ended if it does not end by itself
    asked = 0.0
    while process.poll() is None:
        if channel.lost:
            _say(f"lost {', '.join(channel.lost)}: ending the run")
            _terminate(process)
            return NODE_LOST
        if end is None and (until := _asked_to_stop(task.state / "stop")) is not None:
            _say("asked to stop")
            end = until - min(_BEFORE_END_S, (until - time.time()) / 2)
        if end is not None and time.monotonic() > asked + _ASK_AGAIN_S:  # it may not have listened yet
            process.send_signal(signal.SIGUSR1)
            asked = time.monotonic()
        if end is not None and time.time() > end:
            _terminate(process)
            if process.returncode in (0, 3, STOPPED):
                break
            newest = _newest(checkpoints)
            _say(f"time is over before the iteration was; newest checkpoint: {newest}")
            return STOPPED if newest != begun_with else OUT_OF_TIME
        time.sleep(0.5)
    code = process.returncode
    if code == STOPPED and _newest(checkpoints) == begun_with:
        _say(f"stopped before an iteration was finished; newest checkpoint: {begun_with}")
        return OUT_OF_TIME  # the next attempt would get no further
    # A rank that lost its peer often fails before anybody knows that a node is gone.
    if code not in _NO_FAULT_OF_NODES and len(task.nodes) > 1 and channel.wait_for_loss(control.SILENCE_S + 5):
        _say(f"lost {', '.join(channel.lost)}")
        return NODE_LOST
    return code if code >= 0 else 128 - code


def _wait_for_ray(address: str, nodes: Sequence[str], channel: control.HeadControl) -> dict[str, float]:
    """Until Ray has all nodes; what they offer together.

    Raises:
        ControlError: some did not come.
    """
    import ray  # reads the token when it is imported

    from rl.rank_nodes import live_nodes

    ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    try:
        deadline = time.monotonic() + _JOIN_S
        while len(there := live_nodes()) < len(nodes):
            if channel.lost:
                raise control.ControlError(f"{', '.join(channel.lost)} left before Ray was up there; see its log")
            if time.monotonic() > deadline:
                names = ", ".join(node["NodeManagerHostname"] for node in there)
                raise control.ControlError(
                    f"waited {_JOIN_S:g} s for Ray to have {len(nodes)} nodes ({', '.join(nodes)}), it has "
                    f"{names}; see NODE.ray.log beside this log"
                )
            time.sleep(0.5)
        _say(
            "Ray has " + ", ".join(f"{n['NodeManagerHostname']} ({n['Resources'].get('CPU', 0):g} CPUs)" for n in there)
        )
        return dict(ray.cluster_resources())
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, _interrupt)  # Ray took it over


def _check_room(wanted: Placement, offered: dict[str, float]) -> None:
    """Raises ConfigError: nodes offer less than the actors ask for, which would wait for ever."""
    from rl.config import Violation

    short = [
        Violation(
            "trainer.ranks, rollout.engines", f"expected {name}s for {count} processes, the job has {there:g}; {do}"
        )
        for name, count, there, do in (
            ("CPU", wanted.ray_cpus, offered.get("CPU", 0), "ask for more nodes, or --cpus-per-task (--exclusive)"),
            ("GPU", wanted.ray_gpus, offered.get("GPU", 0), "ask for more nodes, or --gpus-per-node"),
        )
        if there < count
    ]
    if short:
        raise ConfigError("this job's nodes", short)


def _terminate(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM: the run saves what is whole if it can."""
    process.terminate()
    try:
        process.wait(_TERM_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _asked_to_stop(file: Path) -> float | None:
    """None: not asked; else when time is over."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return float(text) if text else float("inf")


def _newest(checkpoints: Path) -> str | None:
    return max((p.name for p in checkpoints.glob("step_*") if p.suffix != ".partial"), default=None)


# ------------------------------------------------------------------ other nodes


def _other(task: Task, config: RunConfig) -> int:
    head = _read_head(task)
    interface, address = network.own_address(task.interface, peer=head["address"])
    _set_environment(interface, address, head["token"])
    channel = control.NodeControl(head["address"], head["control"], head["token"], task.node, _HEAD_S)
    try:
        ray_node = RayNode.worker(task.settings(address, config.ray.object_store_mib), head["ray"])
        try:
            _say(f"{task.node}: joined {head['ray']} from {address} ({interface})")
            over = channel.wait_for_end()
        except KeyboardInterrupt:
            ray_node.stop(grace_s=_CANCEL_S)
            raise
        finally:
            ray_node.stop(keep_logs=task.state / f"{task.node}.workers")
    finally:
        channel.close()
    if not over:
        _say(f"{task.node}: lost the head {task.nodes[0]}")
    return 0 if over else NODE_LOST


def _read_head(task: Task) -> dict[str, Any]:
    """What the head wrote.

    Raises:
        ControlError: nothing within the limit, or it is another job's.
    """
    file, deadline = task.state / "head.json", time.monotonic() + _HEAD_S
    while True:
        with contextlib.suppress(OSError):
            os.listdir(task.state)  # network file systems look again at what was not there
        try:
            head: dict[str, Any] = json.loads(file.read_text())
        except OSError as error:
            if time.monotonic() > deadline:
                raise control.ControlError(
                    f"waited {_HEAD_S:g} s for {file} from the head {task.nodes[0]}; is it on a file "
                    "system that all nodes share (--logs), and did the head start?"
                ) from error
            time.sleep(0.5)
            continue
        if head["job"] != task.job:
            raise control.ControlError(f"{file} is of job {head['job']}, this is job {task.job}; remove it")
        return head


# ------------------------------------------------------------------ both


def _set_environment(interface: str, address: str, token: str) -> None:
    """Of this process and of everything that Ray starts: the token, and one interface for all traffic."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "VLLM_HOST_IP": address}
    os.environ.pop("RAY_ADDRESS", None)  # of a cluster of the user's
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, interface)


def _write_attach(task: Task, address: str, token: str) -> None:
    """What a shell needs to see the job's Ray, for ``scripts/slurm/attach.sh``."""
    values = {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    path = f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH\n"
    text = path + "".join(f"export {name}={shlex.quote(value)}\n" for name, value in values.items())
    _write_private(task.state / "attach.env", text)


def _write_private(file: Path, text: str) -> None:
    """Whole or not at all, readable by us alone."""
    partial = file.with_name(f"{file.name}.{socket.gethostname()}.partial")
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
        stream.write(text)
    partial.rename(file)


def _say(text: str) -> None:
    print(f"[slurm {time.strftime('%H:%M:%S')}] {text}", flush=True)


def _parse(arguments: Sequence[str] | None) -> Task:
    parser = argparse.ArgumentParser(prog="python -m rl.slurm.node", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--nodes", required=True, help="names of all nodes, the head first, commas between")
    parser.add_argument("--tmp", type=Path, default=Path("/tmp"))
    parser.add_argument("--interface")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parsed = parser.parse_args(arguments)
    return Task(
        job=int(os.environ["SLURM_JOB_ID"]),
        node=os.environ["SLURMD_NODENAME"],
        nodes=tuple(parsed.nodes.split(",")),
        state=parsed.state.absolute(),
        tmp=parsed.tmp,
        interface=parsed.interface or None,
        cpus=int(os.environ.get("SLURM_CPUS_ON_NODE", "1")),
        recipe=parsed.recipe,
        overrides=tuple(parsed.overrides),
    )


if __name__ == "__main__":
    sys.exit(main())
