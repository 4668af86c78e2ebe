"""What a sandbox does before it becomes the program: run by ``rl.rewards.sandbox``, needs the standard library only.

usage: sandbox_child.py STATUS_FD SETTINGS_JSON

1. As root, become nobody: root is exempt from the limit on processes.
2. Enter namespaces of its own for users, network, processes, IPC and mounts. The network namespace has no device that
   is up. Where that is refused, go on only if settings allow the network.
3. Make every mount read-only but the working directory, where the kernel can (5.12 and later).
4. Fork twice: the first child is process 1 of the namespace, so that whatever the program has started ends with it; the
   second takes the limits, says ``ready`` on STATUS_FD and becomes the program.

Anything that fails before that is said on STATUS_FD, and nothing runs.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys

NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
NOBODY = 65534
FAILED = 125

libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """The program must not run; the message says why."""


def main() -> int:
    status, settings = int(sys.argv[1]), json.loads(sys.argv[2])
    os.set_inheritable(status, False)
    try:
        isolated = isolate(settings)
    except (Refused, OSError) as error:
        os.write(status, f"refused: {error}".encode())
        return FAILED
    # After the change of user, which clears it: if the caller dies, all of this does.
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if not isolated:
        return run(status, settings)
    first = os.fork()
    if first == 0:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os._exit(run(status, settings))
    os.close(status)
    return exit_code(os.waitpid(first, 0)[1])


def run(status: int, settings: dict) -> int:
    """Fork the program and wait for it; its exit code, 128 + n if signal n ended it."""
    program = os.fork()
    if program == 0:
        try:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            os.chdir(settings["directory"])
            for name, value in settings["limits"].items():
                lower(getattr(resource, name), value)
            os.write(status, b"ready")
            os.execve(settings["argv"][0], settings["argv"], settings["environment"])
        except BaseException as error:
            os.write(status, f"refused: cannot start {settings['argv'][0]}: {error}".encode())
        os._exit(FAILED)
    os.close(status)
    while True:  # process 1 also inherits what the program leaves behind
        pid, code = os.wait()
        if pid == program:
            return exit_code(code)


def isolate(settings: dict) -> bool:
    """Steps 1 to 3; False if namespaces are refused and the network is allowed."""
    uid, gid = os.getuid(), os.getgid()
    if uid == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self belongs to root
        uid = gid = NOBODY
    if libc.unshare(NEWUSER | NEWNET | NEWPID | NEWIPC | NEWNS) != 0:
        reason = os.strerror(ctypes.get_errno())
        if settings["allow_network"]:
            return False
        raise Refused(f"the network cannot be cut off: this machine refuses user namespaces ({reason})")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    only_writable(settings["directory"].encode())
    return True


def only_writable(directory: bytes) -> None:
    """Make mounts read-only except the directory, if the kernel can."""
    if libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None) or libc.mount(directory, directory, None, MS_BIND, None):
        return
    if set_read_only(b"/", AT_RECURSIVE, True):
        set_read_only(directory, 0, False)


def set_read_only(path: bytes, flags: int, on: bool) -> bool:
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY if on else 0, 0 if on else MOUNT_ATTR_RDONLY, 0, 0)
    return libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, path, flags, attributes, ctypes.sizeof(attributes)) == 0


def lower(limit: int, value: int) -> None:
    _, hard = resource.getrlimit(limit)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))


def exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    os._exit(main())
