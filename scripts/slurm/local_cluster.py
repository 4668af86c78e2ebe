#!/usr/bin/env python3
"""A real Slurm cluster of several nodes on one Linux machine, to try jobs on; needs root, slurm-wlm, munge, iproute2.

    sudo apt-get install slurm-wlm munge iproute2
    sudo scripts/slurm/local_cluster.py start DIR --nodes 2 --cpus 8
    export SLURM_CONF=DIR/slurm.conf            # then sinfo, sbatch, srun, ...
    sudo scripts/slurm/local_cluster.py kill DIR n2       # the node is gone, with everything on it
    sudo scripts/slurm/local_cluster.py revive DIR n2     # it boots again
    sudo scripts/slurm/local_cluster.py stop DIR

Debian's slurmd knows no --enable-multiple-slurmd, and jobs that see one host cannot show what goes wrong between two.
So every node is a set of Linux namespaces with what a node has of its own: host name, network interface and address,
process ids, /tmp and /dev/shm. Node names resolve inside nodes only. The rest of the file system is shared, as the home
directory of a cluster is. slurmctld and munged run outside, on the bridge's address.

Everything is below DIR (a short path: munge's socket is in it) but the bridge and its interfaces; `stop` removes both.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "scontrol", "sinfo", "munged", "ip", "unshare", "nsenter", "mount")
LIMIT_S = 60.0

# Timeouts are short, so that the end of a node is noticed within half a minute and a job starts again soon.
SLURM_CONF = """\
ClusterName=local{number}
SlurmctldHost={host}({prefix}.1)
SlurmctldPort={port}
SlurmdPort={slurmd_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=20
CryptoType=crypto/munge
StateSaveLocation={directory}/state
SlurmctldPidFile={directory}/slurmctld.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmdLogFile={directory}/slurmd-%n.log
SlurmdSpoolDir={directory}/spool-%n
PlugStackConfig={directory}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=5,batch_sched_delay=1,bf_interval=5
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
SlurmctldTimeout=60
SlurmdTimeout={down_after}
KillWait=20
MinJobAge=3600
UnkillableStepTimeout=30
ReturnToService=2
JobRequeue=1
{nodes}
PartitionName=local Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""

# The first process of a node: its end is the end of all others there.
NODE_INIT = """\
set -eu
directory="$1" name="$2" address="$3"
mount --make-rprivate /
mount --bind "$directory/hosts" /etc/hosts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount --bind "$directory/tmp-$name" /tmp
hostname "$name"
for _ in $(seq 300); do ip link show eth0 >/dev/null 2>&1 && break; sleep 0.1; done
ip link set lo up
ip addr add "$address/24" dev eth0
ip link set eth0 up
export SLURM_CONF="$directory/slurm.conf"
slurmd -D -N "$name" &
daemon=$!
trap 'kill $daemon 2>/dev/null' TERM
# Orphans of jobs become ours: bash reaps them while it waits.
while kill -0 $daemon 2>/dev/null; do wait -n $daemon || true; done
"""


@dataclass
class Cluster:
    """What ``start`` made; ``cluster.json`` in its directory.

    Attributes:
        number: of the subnet and the bridge.
        nodes: by name the process id of the node's first process, 0 when it is down.
        daemons: process ids of munged and slurmctld.
    """

    directory: Path
    number: int
    cpus: int
    nodes: dict[str, int]
    daemons: dict[str, int] = field(default_factory=dict)

    @property
    def bridge(self) -> str:
        return f"uslurm{self.number}"

    @property
    def prefix(self) -> str:
        return f"10.213.{self.number}"

    def address(self, name: str) -> str:
        return f"{self.prefix}.{10 + int(name.removeprefix('n'))}"

    def link(self, name: str) -> str:
        """The outer end of a node's interface."""
        return f"us{self.number}{name}"

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.directory / "slurm.conf")}

    def save(self) -> None:
        (self.directory / "cluster.json").write_text(json.dumps(asdict(self) | {"directory": str(self.directory)}))

    @classmethod
    def load(cls, directory: Path) -> Cluster:
        directory = directory.absolute()
        file = directory / "cluster.json"
        if not file.is_file():
            sys.exit(f"expected a directory that `start` made, {directory} has no cluster.json")
        return cls(**json.loads(file.read_text()) | {"directory": directory})


def obstacle() -> str | None:
    """Why no cluster can be started here; None: nothing is missing."""
    if os.geteuid() != 0:
        return "a local Slurm cluster needs root, for namespaces and daemons"
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge iproute2"
    tried = subprocess.run(["unshare", "-n", "-u", "-m", "-p", "-i", "-f", "true"], capture_output=True, check=False)
    return None if tried.returncode == 0 else "this machine allows no namespaces (unshare failed)"


def start(directory: Path, nodes: int, cpus: int, down_after: int = 20) -> Cluster:
    """Start everything and wait until all nodes are idle.

    Args:
        directory: of the cluster, made here.
        nodes: how many, named n1, n2, ...
        cpus: that Slurm counts on each; not bound to the machine's.
        down_after: seconds of silence after which Slurm gives a node up; clusters often have 300.
    """
    if (why := obstacle()) is not None:
        sys.exit(why)
    directory = directory.absolute()
    if len(str(directory)) > 60:
        sys.exit(f"expected a directory of at most 60 characters (sockets are in it), came {directory}")
    directory.mkdir(parents=True)
    directory.chmod(0o755)  # munged refuses what others could write to
    number = next(n for n in range(1, 255) if not Path(f"/sys/class/net/uslurm{n}").exists())
    cluster = Cluster(directory, number, cpus, {f"n{i + 1}": 0 for i in range(nodes)})
    cluster.save()
    try:
        _write_files(cluster, down_after)
        _run("ip", "link", "add", cluster.bridge, "type", "bridge")
        _run("ip", "addr", "add", f"{cluster.prefix}.1/24", "dev", cluster.bridge)
        _run("ip", "link", "set", cluster.bridge, "up")
        munged = ["munged", "--foreground", "--num-threads=2", "--force", f"--socket={directory}/munge.socket"]
        files = [f"--{name}-file={directory}/munge.{end}" for name, end in (("key", "key"), ("pid", "pid"))]
        logs = [f"--log-file={directory}/munge.log", f"--seed-file={directory}/munge.seed"]
        cluster.daemons["munged"] = _spawn(cluster, [*munged, *files, *logs], "munged.out")
        _until(lambda: (directory / "munge.socket").exists(), "munged's socket", directory / "munged.out")
        cluster.daemons["slurmctld"] = _spawn(cluster, ["slurmctld", "-D"], "slurmctld.out")
        for name in cluster.nodes:
            boot(cluster, name)
        for name in cluster.nodes:
            wait_state(cluster, name, "idle")
    except BaseException:
        stop(cluster)
        raise
    return cluster


def boot(cluster: Cluster, name: str) -> None:
    """Start a node that is down."""
    if _alive(cluster.nodes[name]):
        sys.exit(f"{name} runs already")
    tmp = cluster.directory / f"tmp-{name}"
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    tmp.chmod(0o1777)
    unshare = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    init = ["bash", "-c", NODE_INIT, "node", str(cluster.directory), name, cluster.address(name)]
    outer = _spawn(cluster, [*unshare, *init], f"node-{name}.out")
    children = Path(f"/proc/{outer}/task/{outer}/children")
    _until(lambda: children.read_text().split() != [], f"the first process of {name}", None)
    inner = int(children.read_text().split()[0])
    cluster.nodes[name] = inner
    cluster.save()
    outside = cluster.link(name)
    _run("ip", "link", "add", outside, "type", "veth", "peer", "name", f"{outside}i")
    _run("ip", "link", "set", outside, "master", cluster.bridge, "up")
    # The interface's arrival is what the node waits for, so it gets its name on the way.
    _until(lambda: os.readlink(f"/proc/{inner}/ns/net") != os.readlink("/proc/self/ns/net"), f"{name}'s network", None)
    _run("ip", "link", "set", f"{outside}i", "netns", str(inner), "name", "eth0")


def kill(cluster: Cluster, name: str) -> None:
    """End a node at once: every process on it, and its interface; nobody is told."""
    _end(cluster.nodes[name])
    if Path(f"/sys/class/net/{cluster.link(name)}").exists():  # closing connections would keep it for minutes
        _run("ip", "link", "del", cluster.link(name))
    cluster.nodes[name] = 0
    cluster.save()


def wait_state(cluster: Cluster, name: str, state: str, limit_s: float = LIMIT_S) -> None:
    """Until Slurm sees a node in a state (``"idle"``, ``"down"``, ...)."""

    def reached() -> bool:
        shown = _output(cluster, "sinfo", "--noheader", "--nodes", name, "--format=%T")
        return shown.strip().rstrip("*") == state

    _until(reached, f"{name} to be {state}", cluster.directory / "slurmctld.log", limit_s)


def stop(cluster: Cluster) -> None:
    """End everything and remove the directory."""
    for name in cluster.nodes:
        kill(cluster, name)
    for pid in cluster.daemons.values():
        _end(pid)
    if Path(f"/sys/class/net/{cluster.bridge}").exists():
        _run("ip", "link", "del", cluster.bridge)
    shutil.rmtree(cluster.directory, ignore_errors=True)


def _write_files(cluster: Cluster, down_after: int) -> None:
    directory, names = cluster.directory, list(cluster.nodes)
    for name in ("state", *(f"spool-{n}" for n in names)):
        (directory / name).mkdir()
    key = directory / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    (directory / "plugstack.conf").write_text("")
    addresses = {n: cluster.address(n) for n in names} | {socket.gethostname(): f"{cluster.prefix}.1"}
    (directory / "hosts").write_text(
        "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items())
    )
    lines = [
        f"NodeName={n} NodeHostname={n} NodeAddr={cluster.address(n)} CPUs={cluster.cpus} RealMemory=8000 State=UNKNOWN"
        for n in names
    ]
    values = {
        "number": cluster.number,
        "host": socket.gethostname(),
        "prefix": cluster.prefix,
        "port": 16800 + cluster.number,
        "slurmd_port": 17100 + cluster.number,
        "directory": directory,
        "down_after": down_after,
        "nodes": "\n".join(lines),
    }
    (directory / "slurm.conf").write_text(SLURM_CONF.format(**values))


def _spawn(cluster: Cluster, command: list[str], output: str) -> int:
    environment = cluster.environment | {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
    with open(cluster.directory / output, "ab") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
        )
    return process.pid


def _end(pid: int) -> None:
    """Kill a process and wait for its end."""
    if not pid:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    _until(lambda: not _alive(pid), f"the end of process {pid}", None)


def _alive(pid: int) -> bool:
    """Whether the process runs; one that ended and was not waited for does not."""
    if not pid:
        return False
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def _until(condition: Callable[[], bool], what: str, log: Path | None, limit_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            shown = "" if log is None or not log.is_file() else ":\n" + log.read_text()[-2000:]
            raise TimeoutError(f"waited {limit_s:g} s for {what}{shown}")
        time.sleep(0.1)


def _output(cluster: Cluster, *command: str) -> str:
    result = subprocess.run(
        command, env=cluster.environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    return result.stdout


def _run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=LIMIT_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, takes in (("start", ()), ("stop", ()), ("kill", ("node",)), ("revive", ("node",))):
        command = commands.add_parser(name)
        command.add_argument("directory", type=Path, metavar="DIR")
        for argument in takes:
            command.add_argument(argument)
        if name == "start":
            command.add_argument("--nodes", type=int, default=2)
            command.add_argument("--cpus", type=int, default=8, help="that Slurm counts on each node")
            command.add_argument("--down-after", type=int, default=20, metavar="SECONDS", help="Slurm's SlurmdTimeout")
    arguments = parser.parse_args()
    if arguments.command == "start":
        cluster = start(arguments.directory, arguments.nodes, arguments.cpus, arguments.down_after)
        print(f"export SLURM_CONF={cluster.directory}/slurm.conf")
        return
    cluster = Cluster.load(arguments.directory)
    if arguments.command == "stop":
        stop(cluster)
        return
    if arguments.node not in cluster.nodes:
        sys.exit(f"expected one of {', '.join(cluster.nodes)}, came {arguments.node}")
    if arguments.command == "kill":
        kill(cluster, arguments.node)
    else:
        boot(cluster, arguments.node)
        wait_state(cluster, arguments.node, "idle")


if __name__ == "__main__":
    main()
