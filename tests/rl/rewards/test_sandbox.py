"""Programs that misbehave: each limit holds, and nothing is left."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from rl.rewards import sandbox
from rl.rewards.sandbox import Limits, Outcome, SandboxError, check, python, run

pytestmark = pytest.mark.usefixtures("isolation")

PATIENT = {"time_s": 60.0, "cpu_s": 60.0}


def execute(code: str, stdin: str = "", **limits) -> Outcome:
    return run([*python(), "-c", code], Limits(**PATIENT | limits), stdin=stdin)


def test_a_program_gets_its_input_and_an_empty_directory():
    code = "import os; print(input(), os.listdir(), os.getcwd()); print('wrong', file=__import__('sys').stderr)"
    outcome = execute(code, stdin="hällo\n")
    text, _, directory = outcome.stdout.rpartition(" ")
    assert (outcome.exit_code, text, outcome.stderr, outcome.truncated) == (0, "hällo []", "wrong\n", False)
    assert not Path(directory.strip()).exists()
    outcome = run([*python(), "a.py"], Limits(**PATIENT), files={"a.py": "import sys; sys.exit(7)"})
    assert outcome.exit_code == 7
    assert execute("import os; os.abort()").exit_code == 128 + 6


def test_it_sees_nothing_of_the_environment(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    assert "SECRET_TOKEN" not in execute("import os; print(dict(os.environ))").stdout


@pytest.mark.parametrize(
    ("code", "limits", "said"),
    [
        ("x = bytearray(1 << 30)", {"memory_mib": 256}, "MemoryError"),
        ("open('x', 'wb').write(bytes(4 << 20))", {"file_mib": 1}, "File too large"),
        (
            "import os\nfor _ in range(40):\n    if os.fork() == 0: __import__('time').sleep(30)",
            {},
            "temporarily unavail",
        ),
        ("[open('/dev/null') for _ in range(100)]", {}, "Too many open files"),
        ("open('/tmp/left_by_a_sandbox', 'w')", {}, "Read-only file system"),
    ],
    ids=["memory", "file", "processes", "open files", "read-only"],
)
def test_limits_are_errors_in_the_program(code, limits, said):
    outcome = execute(code, **limits)
    assert outcome.exit_code == 1
    assert said in outcome.stderr


def test_cpu_time_is_limited():
    began = time.monotonic()
    outcome = execute("while True: pass", cpu_s=1, time_s=120)
    assert outcome.exit_code in (128 + 9, 128 + 24)  # SIGKILL, SIGXCPU
    assert time.monotonic() - began < 110


def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        outcome = execute(f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)")
    assert outcome.exit_code == 1
    assert "unreachable" in outcome.stderr


def test_one_that_is_late_is_killed_with_all_that_it_started():
    mark = f"{os.getpid()}.{time.monotonic_ns()}"
    code = f"import os, time\nif os.fork() == 0: os.setsid()\nopen('{mark}', 'w')\ntime.sleep(600)"
    began = time.monotonic()
    outcome = run([*python(), "-c", code], Limits(time_s=1))
    assert outcome.exit_code is None
    assert outcome.seconds >= 1
    assert time.monotonic() - began < 30
    assert _gone(mark)


def _gone(mark: str) -> bool:
    """Whether no process has the mark in its command line, within five seconds."""
    for _ in range(100):
        if not any(mark.encode() in _command_line(pid) for pid in os.listdir("/proc") if pid.isdecimal()):
            return True
        time.sleep(0.05)
    return False


def test_nothing_is_left_when_the_caller_is_killed():
    mark = f"mark{time.monotonic_ns()}"
    code = f"from rl.rewards.sandbox import *; run([*python(), '-c', 'import time; time.sleep(600); {mark}'])"
    with subprocess.Popen([sys.executable, "-c", code], cwd=Path(sandbox.__file__).parents[2]) as caller:
        deadline = time.monotonic() + 60
        while not any(_command_line(pid).endswith(f"{mark}\0".encode()) for pid in os.listdir("/proc")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        caller.kill()
    assert _gone(mark)


def _command_line(pid: str) -> bytes:
    try:
        return Path("/proc", pid, "cmdline").read_bytes()
    except OSError:
        return b""


def test_output_is_cut_and_does_not_fill_memory():
    outcome = execute("import sys\nfor _ in range(2000): sys.stdout.write('y' * 1000)", output_bytes=100)
    assert (outcome.exit_code, outcome.stdout, outcome.truncated) == (0, "y" * 100, True)
    assert not execute("print('y' * 99)", output_bytes=100).truncated


def test_what_a_program_leaves_running_does_not_hold_up_the_caller():
    outcome = execute("import os, time\nif os.fork() == 0: os.setsid(); time.sleep(600)\nelse: print('done')")
    assert (outcome.exit_code, outcome.stdout) == (0, "done\n")


def test_directories_are_removed_and_missing_programs_named():
    before = set(Path(tempfile.gettempdir()).glob("ultraep-sandbox-*"))
    with pytest.raises(SandboxError, match="cannot start /no/such/program"):
        run(["/no/such/program"])
    assert set(Path(tempfile.gettempdir()).glob("ultraep-sandbox-*")) <= before


REFUSING = """
import sys
sys.argv = sys.argv[1:]
path = sys.argv[0]
code = open(path).read().replace('libc.unshare(NEWUSER | NEWNET | NEWPID | NEWIPC | NEWNS)', '-1')
exec(compile(code, path, 'exec'))
"""


def test_without_namespaces_it_is_refused_unless_the_network_is_allowed(monkeypatch, tmp_path):
    refusing = tmp_path / "refusing.py"
    refusing.write_text(REFUSING)
    child = sandbox._CHILD
    popen = subprocess.Popen

    def start(argv, **settings):
        index = argv.index(str(child))
        return popen([*argv[:index], str(refusing), *argv[index:]], **settings)

    monkeypatch.setattr(sandbox.subprocess, "Popen", start)
    with pytest.raises(SandboxError, match=r"the network cannot be cut off.*allow_network: true"):
        execute("print(1)")
    outcome = execute("print(1)", allow_network=True)
    assert (outcome.exit_code, outcome.stdout) == (0, "1\n")


def test_check_is_quick_the_second_time():
    check()
    began = time.monotonic()
    check()
    assert time.monotonic() - began < 0.1
