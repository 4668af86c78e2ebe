"""Run a program that nobody trusts: limited, without a network, in an empty directory, and gone afterwards.

1. Time, CPU time, address space, file size, processes and open files are limited; so is what is read of its output.
2. It has no network. Where the machine does not let users make namespaces (some containers), it is refused with
   ``SandboxError``, unless ``Limits.allow_network``; then processes that leave its process group may outlive it, too.
3. It starts in an empty directory that is removed. Where the kernel can (Linux 5.12), all else is read-only.
4. When it ends or is late, it and all that it has started are killed.

It can read what any user of the machine can read. That is a fence against mistakes and against the usual tricks of
a model that is rewarded for passing tests, not against an attacker: use a virtual machine for that.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_CHILD = Path(__file__).with_name("sandbox_child.py")
_START_S = 60.0
_NOBODY = 65534
_OWN_PROCESSES = 2
_PATH = "/usr/local/bin:/usr/bin:/bin"


class SandboxError(RuntimeError):
    """The sandbox cannot be made, so nothing was run; the message says what to do."""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        time_s: seconds until it is killed.
        cpu_s: seconds of CPU time of each of its processes, rounded up.
        memory_mib: address space of each of its processes.
        file_mib: size of a file that it writes.
        processes: processes and threads at a time.
        output_bytes: kept of standard output, and of standard error; more is read and dropped.
        allow_network: run it even where the network cannot be cut off.
    """

    time_s: float = 10.0
    cpu_s: float = 10.0
    memory_mib: int = 1024
    file_mib: int = 16
    processes: int = 16
    output_bytes: int = 65_536
    allow_network: bool = False

    def resources(self) -> dict[str, int]:
        """By the names of the module ``resource``."""
        return {
            "RLIMIT_CPU": max(1, -int(-self.cpu_s // 1)),
            "RLIMIT_AS": self.memory_mib * 2**20,
            "RLIMIT_FSIZE": self.file_mib * 2**20,
            "RLIMIT_NPROC": self.processes + _OWN_PROCESSES,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
        }


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        exit_code: 0 if all went well, 128 + n if signal n ended it; None if it was late.
        stdout, stderr: what was kept, undecodable bytes replaced.
        truncated: there was more output.
        seconds: that it ran.
    """

    exit_code: int | None
    stdout: str
    stderr: str
    truncated: bool
    seconds: float


def run(
    argv: Sequence[str], limits: Limits | None = None, *, stdin: str = "", files: Mapping[str, str] | None = None
) -> Outcome:
    """Run a program and wait for it.

    Args:
        argv: absolute path of the program, and its arguments.
        limits: what it may use; None: ``Limits()``.
        stdin: its standard input.
        files: texts to put into its directory first, by name.

    Raises:
        SandboxError: the sandbox cannot be made.
    """
    limits = limits or Limits()
    directory = Path(tempfile.mkdtemp(prefix="ultraep-sandbox-")).resolve()
    try:
        for name, text in (files or {}).items():
            (directory / name).write_text(text, encoding="utf-8", errors="replace")
        directory.chmod(0o700)
        if os.getuid() == 0:
            os.chown(directory, _NOBODY, _NOBODY)
        with tempfile.TemporaryFile() as given:
            given.write(stdin.encode("utf-8", errors="replace"))
            given.seek(0)
            return _run(argv, limits, directory, given.fileno())
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def python() -> list[str]:
    """A Python for programs in a sandbox, without the user's own settings: this one.

    As root, programs run as nobody. If this Python is where nobody may not go (below ``/root``), it is the system's,
    which lacks this one's packages.

    Raises:
        SandboxError: nobody can run any.
    """
    candidates = [
        sys.executable,
        *(found for name in ("python3", "python") if (found := shutil.which(name, path=_PATH))),
    ]
    for found in candidates:
        prefixes = (found, sys.prefix, sys.base_prefix) if found == sys.executable else (found,)
        if os.getuid() != 0 or all(_open_to_all(Path(path)) for path in prefixes):
            return [found, "-I", "-B"]
    raise SandboxError(
        f"as root, programs run as nobody, who cannot run {' or '.join(candidates)}; install Python where all "
        f"users can run it ({_PATH})"
    )


def _open_to_all(path: Path) -> bool:
    """Whether any user can reach and execute it."""
    path = path.resolve()
    return all(step.stat().st_mode & 0o001 for step in (path, *path.parents))


@lru_cache(maxsize=2)
def check(allow_network: bool = False) -> None:
    """Try a sandbox once, so that a run is refused before it starts.

    Raises:
        SandboxError: it cannot be made here.
    """
    outcome = run([*python(), "-c", "print('it runs')"], Limits(time_s=60, cpu_s=60, allow_network=allow_network))
    if outcome.exit_code != 0 or outcome.stdout != "it runs\n":
        raise SandboxError(f"{python()[0]} does not run in a sandbox: {outcome}")


def _run(argv: Sequence[str], limits: Limits, directory: Path, stdin: int) -> Outcome:
    settings = {
        "argv": list(argv),
        "directory": str(directory),
        "limits": limits.resources(),
        "allow_network": limits.allow_network,
        "environment": {
            "PATH": _PATH,
            "HOME": str(directory),
            "TMPDIR": str(directory),
            "LANG": "C.UTF-8",
            "PYTHONIOENCODING": "utf-8",
            "OMP_NUM_THREADS": "1",
        },
    }
    said, status = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(_CHILD), str(status), json.dumps(settings)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[status],
            start_new_session=True,
            cwd="/",
        )
    except BaseException:
        os.close(said)
        raise
    finally:
        os.close(status)
    try:
        with open(said, "rb", buffering=0) as channel:
            _wait_ready(channel, argv)
        return _collect(process, limits)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def _wait_ready(channel: object, argv: Sequence[str]) -> None:
    """Until the program has taken over."""
    text = b""
    deadline = time.monotonic() + _START_S
    with selectors.DefaultSelector() as selector:
        selector.register(channel, selectors.EVENT_READ)  # type: ignore[arg-type]
        while selector.select(max(0.0, deadline - time.monotonic())):
            part = channel.read(4096)  # type: ignore[attr-defined]
            if not part:
                break
            text += part
        else:
            raise SandboxError(
                f"the sandbox for {argv[0]} was not ready within {_START_S:g} s; the machine is too busy"
            )
    if text != b"ready":
        reason = text.decode(errors="replace").removeprefix("ready").removeprefix("refused: ") or "it ended early"
        raise SandboxError(
            f"no sandbox: {reason}; let this user make namespaces (sysctl user.max_user_namespaces, container "
            "profile), or set allow_network: true in the reward's args to run programs with a network"
        )


def _collect(process: subprocess.Popen[bytes], limits: Limits) -> Outcome:
    """Read until the program and all that hold its output have ended, or its time is up."""
    began = time.monotonic()
    kept = {process.stdout: bytearray(), process.stderr: bytearray()}
    truncated = late = False
    with selectors.DefaultSelector() as selector:
        for pipe in kept:
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map() and not late:
            ready = selector.select(max(0.0, began + limits.time_s - time.monotonic()))
            late = time.monotonic() - began >= limits.time_s
            for key, _ in ready:
                part = os.read(key.fd, 65_536)
                if not part:
                    selector.unregister(key.fileobj)
                room = limits.output_bytes - len(kept[key.fileobj])  # type: ignore[index]
                truncated |= len(part) > room
                kept[key.fileobj] += part[:room]  # type: ignore[index]
    code: int | None = None
    if not late:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(max(0.0, began + limits.time_s - time.monotonic()))
    stdout, stderr = (bytes(kept[pipe]).decode(errors="replace") for pipe in (process.stdout, process.stderr))
    return Outcome(code, stdout, stderr, truncated, time.monotonic() - began)
