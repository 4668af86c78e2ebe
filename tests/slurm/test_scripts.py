"""The launchers' command lines: what they would run, what they refuse, what they make of exit codes. Needs no Slurm."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts" / "slurm"
NO_JOB = {n: v for n, v in os.environ.items() if not n.startswith("SLURM_") and n != "PYTHONPATH"}
IN_JOB = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "4"}


def call(script, *arguments, **environment):
    return subprocess.run(
        [str(SCRIPTS / script), *arguments],
        cwd=ROOT,
        env=NO_JOB | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.sh")))
def test_syntax(script):
    assert subprocess.run(["bash", "-n", str(SCRIPTS / script)], check=False).returncode == 0


# ------------------------------------------------------------------ what would run


def test_launch_with_a_virtual_environment():
    shown = call("launch.sh", "recipes/smoke.yaml", "run.seed=3", "data.x=a b", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("srun --nodes=N --ntasks=N --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=60 ")
    assert "--output=logs/slurm/JOB/attempt-0/%N.log" in shown.stdout
    assert f"env PYTHONPATH={ROOT}" in shown.stdout
    program = f"{ROOT}/.venv/bin/python -u -m rl.slurm.node --state logs/slurm/JOB/attempt-0 --nodes NODES --tmp /tmp"
    assert f"{program} -- recipes/smoke.yaml run.seed=3 data.x=a\\ b" in shown.stdout
    assert "container" not in shown.stdout


def test_launch_with_enroot_and_pyxis():
    more = ["--mounts", "/data:/data", "--interface", "ib0", "--tmp", "/scratch", "--logs", "/l"]
    shown = call("launch.sh", "--container", "/images/u.sqsh", *more, "recipes/smoke.yaml", "--dry-run").stdout
    assert "--container-image=/images/u.sqsh --container-name=ultraep" in shown
    assert f"--container-mounts={ROOT}:{ROOT}\\,/l:/l\\,/data:/data --container-workdir={ROOT}" in shown
    assert " python3 -u -m rl.slurm.node --state /l/JOB/attempt-0 " in shown
    assert "--tmp /scratch --interface ib0 -- recipes/smoke.yaml" in shown


@pytest.mark.parametrize("gpus", [False, True])
def test_launch_with_apptainer(gpus):
    environment = {"SLURM_GPUS_ON_NODE": "8"} if gpus else {}
    shown = call(
        "launch.sh", "recipes/smoke.yaml", "--container", "u.sif", "--python", "/p", "--dry-run", **environment
    )
    nv = "--nv " if gpus else ""
    assert f" apptainer exec {nv}--bind {ROOT}:{ROOT} --pwd {ROOT} u.sif env PYTHONPATH={ROOT} /p -u" in shown.stdout


def test_submit_shows_script_command_and_nodes():
    shown = call("submit.sh", "--dry-run", "--nodes=4", "recipes/smoke.sbatch", "run.seed=3", "--interface", "ib0")
    assert shown.returncode == 0, shown.stderr
    assert "#SBATCH --signal=B:USR1@" in shown.stdout
    assert "# submitted by: sbatch --nodes=4 recipes/smoke.sbatch run.seed=3 --interface ib0" in shown.stdout
    assert "--interface ib0 -- recipes/smoke.yaml trainer.ranks_per_node=1 run.seed=3" in shown.stdout


@pytest.mark.parametrize("script", sorted((ROOT / "recipes").glob("*.sbatch")), ids=lambda path: path.stem)
def test_every_recipe(script):
    text = script.read_text()
    for line in (
        "#SBATCH --signal=B:USR1@",
        "#SBATCH --requeue",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --open-mode=append",
    ):
        assert line in text
    command = ["bash", str(script), "--dry-run", "run.seed=3"]
    shown = subprocess.run(command, cwd=ROOT, env=NO_JOB, capture_output=True, text=True, timeout=60, check=False)
    assert shown.returncode == 0, shown.stderr
    assert f" -- recipes/{script.stem}.yaml " in shown.stdout
    assert shown.stdout.rstrip().endswith("run.seed=3")


def test_megatron():
    arguments = ["--per-node", "8", "--dry-run", "--", "--ultraep-slots", "2", "pretrain_gpt.py", "--lr", "1e-4"]
    shown = call("megatron.sh", *arguments).stdout
    assert "-m torch.distributed.run --nnodes=N --nproc-per-node=8 --rdzv-backend=c10d" in shown
    assert "--rdzv-endpoint=NODES:PORT --rdzv-id=JOB-0 --max-restarts=0" in shown
    assert "-m megatron_ultraep.launch --ultraep-slots 2 pretrain_gpt.py --lr 1e-4" in shown


def test_megatron_sbatch_passes_the_jobs_arguments():
    script = SCRIPTS / "megatron.sbatch"
    last = script.read_text().strip().splitlines()[-1]
    assert last == 'exec scripts/slurm/megatron.sh -- --ultraep-slots 2 --ultraep-node-size 8 "$@"'
    assert "#SBATCH --requeue" in script.read_text()


@pytest.mark.parametrize("script", ["launch.sh", "submit.sh", "attach.sh", "megatron.sh"])
def test_help(script):
    shown = call(script, "--help")
    assert shown.returncode == 0
    assert f"scripts/slurm/{script}" in shown.stdout
    assert "set -" not in shown.stdout


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (["launch.sh"], "expected a recipe, RECIPE.yaml, came nothing"),
        (["launch.sh", "run.seed=3"], "came run.seed=3"),
        (["launch.sh", "recipes/none.yaml"], "expected the recipe recipes/none.yaml"),
        (["launch.sh", "recipes/smoke.yaml"], "this is no Slurm job"),
        (["launch.sh", "recipes/smoke.yaml", "--contaner", "x"], "unknown option --contaner"),
        (["launch.sh", "recipes/smoke.yaml", "--container"], "expected a value after --container"),
        (["submit.sh", "recipes/smoke.yaml"], "expected recipes/NAME.sbatch, came recipes/smoke.yaml"),
        (["submit.sh", "--nodes", "4", "recipes/smoke.sbatch"], "sbatch options are written --name=value"),
        (["submit.sh", "scripts/slurm/megatron.sbatch"], "nobody would stop the run"),
        (
            ["submit.sh", "--dry-run", "recipes/smoke.sbatch", "trainer.ranks=3"],
            "recipes/smoke.yaml cannot run as it is",
        ),
        (["attach.sh", "smoke"], "expected the id of a running job, came smoke"),
        (["attach.sh", "--logs", "/nowhere", "12"], "no logs of job 12"),
        (["megatron.sh", "pretrain_gpt.py"], "comes after --"),
        (["megatron.sh", "--"], "expected a script after --"),
        (["megatron.sh", "--", "pretrain_gpt.py"], "--per-node"),
    ],
)
def test_refusals(line, sentence):
    if "--dry-run" in line and not (ROOT / ".venv/bin/ultraep-rl").exists():
        pytest.skip("recipes are checked where the virtual environment is")
    result = call(*line)
    assert result.returncode == 2
    assert sentence in result.stderr


# ------------------------------------------------------------------ requeue


@pytest.fixture
def slurm(tmp_path):
    """Programs of Slurm that note what they are asked; ``srun`` does what ``srun.sh`` says."""
    programs = tmp_path / "bin"
    programs.mkdir()
    scripts = {
        "srun": f'state=$(ls -d {tmp_path}/logs/77/attempt-*); source "{tmp_path}/srun.sh"',
        "scontrol": f'echo "$@" >>{tmp_path}/asked; case "$1" in show) [ "$2" = hostnames ] && printf "n1\\nn2\\n" || '
        'echo "EndTime=2030-01-02T03:04:05";; esac',
        "sleep": f'[ "$1" = 60 ] && echo slept >>{tmp_path}/asked || exec /bin/sleep "$@"',
    }
    for name, text in scripts.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (programs / name).chmod(0o755)
    return tmp_path


def launch(slurm, behaviour, *arguments, **environment):
    (slurm / "srun.sh").write_text(behaviour)
    return subprocess.Popen(
        [str(SCRIPTS / "launch.sh"), "recipes/smoke.yaml", "--logs", str(slurm / "logs"), *arguments],
        cwd=ROOT,
        env=NO_JOB | IN_JOB | {"PATH": f"{slurm / 'bin'}:{os.environ['PATH']}", "TZ": "UTC"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    ("code", "requeued", "said"),
    [
        (0, False, "the run ended (code 0)"),
        (1, False, "the run ended (code 1)"),
        (75, True, "stopped to go on later"),
        (76, True, "a node was lost"),
        (124, False, "raise --time, or checkpoint more often"),
    ],
)
def test_codes(slurm, code, requeued, said):
    process = launch(slurm, f"echo {code} >$state/code; exit 9")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert said in output
    assert ("requeue 77\nslept" in (slurm / "asked").read_text()) == requeued


def test_without_a_code_file_the_steps_own_code_counts(slurm):
    process = launch(slurm, "exit 143")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output


def test_enough_requeues(slurm):
    process = launch(slurm, "echo 76 >$state/code", "--max-requeues", "3", SLURM_RESTART_COUNT="3")
    output, _ = process.communicate(timeout=60)
    assert "requeued 3 times already" in output
    assert "requeue 77" not in (slurm / "asked").read_text()
    assert (slurm / "logs" / "77" / "attempt-3").is_dir()


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGUSR2, False)])
def test_signals_ask_to_stop(slurm, number, requeued):
    wait = "touch $state/up; while [ ! -f $state/stop ]; do sleep 0.1; done; echo 75 >$state/code"
    process = launch(slurm, wait)
    up = slurm / "logs" / "77" / "attempt-0" / "up"
    deadline = time.monotonic() + 60
    while not up.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert (up.parent / "stop").read_text() == "1893553445\n"  # 2030-01-02T03:04:05 UTC
    assert ("requeue 77" in (slurm / "asked").read_text()) == requeued
