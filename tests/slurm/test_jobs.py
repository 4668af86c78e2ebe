"""Jobs on a real Slurm of two nodes: the smoke recipe, lost nodes, time limits, neighbours, a Megatron job.

Run by `pytest -m slow tests/slurm -s`, as root with slurm-wlm and munge; each test prints what its job did.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from rl.evaluation import eval_files, read_eval, summarize
from scripts.check_megatron_job import CPU, MODEL, SMALL
from scripts.slurm import local_cluster
from tests.rl.orchestration.command import tiny_config
from tests.slurm.jobs import ROOT, Job, launcher_script, prompts_in_order, sessions

PER_STEP = 2  # prompts of a step of tiny_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(local_cluster.obstacle() is not None, reason=str(local_cluster.obstacle())),
]


@pytest.fixture(scope="module")
def shared():
    """A directory that all nodes share: /tmp is each node's own."""
    directory = Path(tempfile.mkdtemp(prefix="us-", dir="/var/tmp"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(shared):
    cluster = local_cluster.start(shared / "c", nodes=2, cpus=8)
    yield cluster
    local_cluster.stop(cluster)


@pytest.fixture
def directory(shared, request):
    path = shared / request.node.name.replace("[", "-").rstrip("]")
    path.mkdir()
    return path


def tiny(directory, prompts, **changes):
    """A run of ``prompts / 2`` steps, a rank on each node."""
    train = {"reasoning_gym": "chain_sum", "size": prompts, "seed": 0}
    train["args"] = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    return tiny_config(directory, data__train=train, trainer__ranks_per_node=1, **changes)


def smoke(cluster, directory):
    run = [f"run.output_dir={directory}/run", f"model.path={directory}/model", "logging.wandb=off"]
    return Job.submit(cluster, directory, ROOT / "recipes/smoke.sbatch", *run)


def smoke_learnt(directory):
    """The smoke recipe's bars, from the saved samples, and its prompts."""
    files = eval_files(directory / "run")
    accuracy = {s: summarize(s, [x.reward for x in read_eval(file)]).accuracy for s, file in files.items()}
    print(f"held-out accuracy by step: {accuracy}")
    assert accuracy[0] <= 0.3
    assert accuracy[25] >= 0.6
    prompts_in_order(directory / "run", prompts=4000, steps=25, per_step=64)


def test_smoke_on_two_nodes(cluster, directory):
    job = smoke(cluster, directory)
    assert job.end(3000) == "COMPLETED 0:0", job.output
    print(job.output)
    smoke_learnt(directory)
    assert sessions(directory / "run") == ["finished"]
    ranks = next((directory / "logs" / str(job.number)).glob("attempt-0/n1.log")).read_text()
    assert "Ray has n1 (4 CPUs), n2 (4 CPUs)" in ranks or "Ray has n2 (4 CPUs), n1 (4 CPUs)" in ranks


def test_smoke_with_a_node_killed_and_resumed(cluster, directory):
    job = smoke(cluster, directory)
    job.until(lambda: job.steps >= 12, "twelve steps", 3000)
    local_cluster.kill(cluster, "n2")
    job.until(lambda: job.state.startswith("PENDING"), "the job to be queued again", 300)
    killed_after = job.steps
    local_cluster.boot(cluster, "n2")
    assert job.end(3000) == "COMPLETED 0:0", job.output
    print(job.output)
    print(f"n2 was killed after step {killed_after}; sessions ended: {sessions(directory / 'run')}")
    smoke_learnt(directory)
    assert len(sessions(directory / "run")) == 2


@pytest.mark.parametrize("victim", ["n2", "n1"])
def test_lost_node(cluster, directory, victim):
    """n1 is the head, and runs the launcher itself: then Slurm notices by its time-out."""
    prompts, config = 200, tiny(directory, 200, checkpoint__every=5)
    job = Job.submit(cluster, directory, launcher_script(directory, config, "#SBATCH --time=60"))
    job.until(lambda: job.steps >= 8, "eight steps")
    local_cluster.kill(cluster, victim)
    job.until(lambda: job.state.startswith("PENDING"), "the job to be queued again", 300)
    killed_after = job.steps
    assert killed_after < prompts // PER_STEP, "the run was over before the node died"
    local_cluster.boot(cluster, victim)
    assert job.end() == "COMPLETED 0:0", job.output
    print(job.output)
    print(f"{victim} was killed after step {killed_after}; sessions ended: {sessions(directory / 'run')}")
    if victim == "n2":
        assert "lost n2: ending the run" in job.output  # whoever requeued the job first, the launcher or Slurm
    prompts_in_order(directory / "run", prompts, prompts // PER_STEP, PER_STEP)
    assert sessions(directory / "run")[-1] == "finished"
    assert len(sessions(directory / "run")) == 2


def test_a_dead_node_is_not_waited_for(shared, directory):
    """On a cluster that takes 300 s to notice, as many do: the launcher requeues the job long before."""
    config = tiny(directory, 200, checkpoint__every=5)
    cluster = local_cluster.start(shared / "d", nodes=2, cpus=8, down_after=300)
    try:
        job = Job.submit(cluster, directory, launcher_script(directory, config, "#SBATCH --time=60"))
        job.until(lambda: job.steps >= 8, "eight steps")
        local_cluster.kill(cluster, "n2")
        job.until(lambda: "a node was lost (code 76)" in job.launcher_output, "the launcher to requeue", 280)
        local_cluster.boot(cluster, "n2")
        assert job.end() == "COMPLETED 0:0", job.output
        print(job.output)
        # Slurm may tell the node, once it is back, to end the job it had: then that attempt goes the same way.
        assert sessions(directory / "run")[-1] == "finished"
        prompts_in_order(directory / "run", 200, 100, PER_STEP)
    finally:
        local_cluster.stop(cluster)


def test_time_limit(cluster, directory):
    """Asked to stop before its time is over, requeued, resumed; as often as it takes."""
    prompts = 1200
    config = tiny(directory, prompts, checkpoint__every=0)  # then the only checkpoints are those of stops
    script = launcher_script(directory, config, "#SBATCH --time=5", "#SBATCH --signal=B:USR1@120")
    job = Job.submit(cluster, directory, script)
    assert job.end(3400) == "COMPLETED 0:0", job.output
    print(job.output)
    ended = sessions(directory / "run")
    print(f"sessions ended: {ended}")
    assert len(ended) >= 2
    assert set(ended[:-1]) == {"stopped"}, "a run was broken off by the time limit"
    assert ended[-1] == "finished"
    assert not (directory / "run" / "steps.rolled_back.jsonl").exists()
    prompts_in_order(directory / "run", prompts, prompts // PER_STEP, PER_STEP)


CONNECT = """
import ray, sys
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
print("NODES", sorted(n["NodeManagerHostname"] for n in ray.nodes() if n["Alive"]))
"""


def test_two_jobs_on_the_same_nodes_have_clusters_of_their_own(cluster, directory):
    """Each sees its own two nodes; one's token does not open the other. One is then stopped for good."""
    prompts, jobs = 600, []
    for name in ("a", "b"):
        own = directory / name
        own.mkdir()
        config = tiny(own, prompts, checkpoint__every=50)
        jobs.append(Job.submit(cluster, own, launcher_script(own, config, "#SBATCH --time=60")))
    for job in jobs:
        job.until(lambda job=job: job.steps >= 1, "a step")
    heads = [json.loads(next(job.directory.glob("logs/*/attempt-0/head.json")).read_text()) for job in jobs]
    print("clusters:", [head["ray"] for head in heads])
    assert heads[0]["ray"] != heads[1]["ray"]
    assert heads[0]["token"] != heads[1]["token"]
    python = str(ROOT / ".venv/bin/python")
    for job, head in zip(jobs, heads, strict=True):
        assert "NODES ['n1', 'n2']" in job.attach(python, "-c", CONNECT, head["ray"])
    stranger = jobs[0].attach(python, "-c", CONNECT, heads[1]["ray"])
    assert "InvalidAuthToken" in stranger
    assert "NODES" not in stranger
    assert all(job.steps < prompts // PER_STEP for job in jobs), "a run was over before both were looked at"
    jobs[0].command("scancel", "--batch", "--signal=USR2", str(jobs[0].number))
    assert jobs[0].end() == "FAILED 75:0", jobs[0].output
    assert sessions(jobs[0].directory / "run") == ["stopped"]
    assert "requeue" not in jobs[0].launcher_output
    assert jobs[1].end() == "COMPLETED 0:0", jobs[1].output
    prompts_in_order(jobs[1].directory / "run", prompts, prompts // PER_STEP, PER_STEP)
    for job in jobs:
        print(job.output)
    for name in ("n1", "n2"):  # nothing is left
        assert not list((cluster.directory / f"tmp-{name}").glob("ultraep-*"))


def test_cancelled_and_submitted_again(cluster, directory):
    """A cancelled job leaves nothing on its nodes, and its run goes on in another job."""
    script = launcher_script(directory, tiny(directory, 160, checkpoint__every=5), "#SBATCH --time=60")
    job = Job.submit(cluster, directory, script)
    job.until(lambda: job.steps >= 8, "eight steps")
    job.command("scancel", str(job.number))
    assert job.end().startswith("CANCELLED"), job.output
    job.until(lambda: job.command("sinfo", "-h", "-o", "%T").strip() == "idle", "idle nodes", 120)
    for name in ("n1", "n2"):
        assert not list((cluster.directory / f"tmp-{name}").glob("ultraep-*"))
    again = Job.submit(cluster, directory, script)
    assert again.end() == "COMPLETED 0:0", again.output
    print(again.output)
    assert len(sessions(directory / "run")) == 2
    prompts_in_order(directory / "run", 160, 80, PER_STEP)


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11), reason="tests what megatron.training of 0.19.2 does on Python 3.11"
)
def test_megatron_job(cluster, directory):
    """scripts/slurm/megatron.sbatch over two nodes, a rank on each, on CPUs."""
    job_files = ROOT / "tests" / "megatron_ultraep" / "megatron"
    arguments = (MODEL.format(iterations=4, **SMALL) + CPU).split()
    flags = ["--no-ultraep-gate", "--ultraep-min-tokens", "1"]
    script = directory / "job.sbatch"
    second_megatron = next((ROOT / ".venv").glob("megatron-core-*"))
    script.write_text(
        "#!/usr/bin/env bash\n#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n#SBATCH --cpus-per-task=2\n"
        f"export PYTHONPATH={second_megatron} OMP_NUM_THREADS=1\n"
        'exec scripts/slurm/megatron.sh --per-node 1 --interface eth0 "$@"\n'
    )
    submit = ["sbatch", f"--output={directory}/job.out", str(script), "--logs", f"{directory}/logs", "--", *flags]
    job = Job(cluster, 0, directory)
    shown = job.command(*submit, str(job_files / "cpu_job.py"), str(job_files / "pretrain_mock.py"), *arguments)
    job.number = int(shown.split()[-1])
    assert job.end(900) == "COMPLETED 0:0", job.output
    print(job.output)
    lines = [line for line in job.output.splitlines() if line.startswith(" ultraep iteration")]
    assert len(lines) == 4, job.output
