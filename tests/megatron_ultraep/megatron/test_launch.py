"""The launcher and the import line: what they parse, how a script runs, what is hooked; a job with and without them."""

import gzip
import importlib
import json
import os
import shlex
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest

import megatron_ultraep
from megatron_ultraep import launch
from megatron_ultraep.config import BalanceConfig
from megatron_ultraep.megatron import training
from megatron_ultraep.megatron.microbatch import current_key_or_none
from tests.ranks import RANK_ENVIRONMENT

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]

# ---- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "pretrain.py"
    path.write_text("")
    return str(path)


def test_flags_end_at_the_script(script):
    line = ["--ultraep-slots", "3", "--no-ultraep-gate", script, "--num-layers", "4", "-h", "train.py"]
    config, path, its_arguments = launch.parse(line)
    assert config == BalanceConfig(slots=3, gate=False)
    assert (path, its_arguments) == (script, ["--num-layers", "4", "-h", "train.py"])


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (["--ultraep-slotz", "3", "SCRIPT"], "there is no flag --ultraep-slotz; is --ultraep-slots meant?"),
        (["SCRIPT", "--ultraep-slots", "3"], "--ultraep-slots comes after the script's path"),
        (["SCRIPT", "--lr", "1", "--no-ultraep-gate"], "--no-ultraep-gate comes after the script's path"),
        (["SCRIPT", "--ultraep-slotz", "3"], "--ultraep-slotz comes after the script's path"),
        (["--num-layers", "4", "SCRIPT"], "only --ultraep-* flags go before the script's path, got --num-layers"),
        (["--ultraep-slots", "3"], "the path of a script is expected"),
        ([], "the path of a script is expected"),
        (["--ultraep-enabled", "false", "SCRIPT"], "there is no script false"),
        (["--no-ultraep-gate", "--ultraep-token-ns", "5", "SCRIPT"], "the gate, which is off"),
        (["--no-ultraep-enabled", "--ultraep-profile", "SCRIPT"], "a model that is balanced, and enabled is off"),
    ],
)
def test_wrong_lines_stop_with_a_sentence(line, sentence, script, capsys):
    with pytest.raises(SystemExit) as stopped:
        launch.main([script if word == "SCRIPT" else word for word in line])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_help_lists_the_flags(capsys):
    with pytest.raises(SystemExit) as stopped:
        launch.main(["--help"])
    assert stopped.value.code == 0
    assert "--ultraep-slots" in capsys.readouterr().out


# ---- the script, and hooks into a loop of the shape of Megatron's ----------------------------------------------------


@pytest.fixture
def process(monkeypatch, tmp_path):
    """This process as a fresh one, whose training loop is `job_loop`; with a balancer that notes what is done to it."""
    monkeypatch.setattr(training, "_decision", None)
    monkeypatch.setattr(training, "_hooks", None)
    monkeypatch.setattr(training, "TARGET", "job_loop")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "path", [str(HERE), *sys.path])
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.delitem(sys.modules, "job_loop", raising=False)
    notes = types.SimpleNamespace(attached=[], closed=0)

    class Balancer:
        def metrics(self):
            return {"moe/imbalance_before/mean": 2.0, "moe/replicas/max": 3.0, "moe/skipped/gate": 0.25}

        def close(self):
            notes.closed += 1

    def attach(model, config):
        notes.attached.append((model, config))
        return Balancer()

    monkeypatch.setattr(megatron_ultraep, "attach", attach, raising=False)
    yield notes
    sys.modules.pop("job_loop", None)


JOB = """
import sys
import sibling
from job_loop import pretrain
from megatron_ultraep.megatron.microbatch import current_key_or_none

assert __name__ == "__main__"
keys = []
model = pretrain(lambda: ["chunk 0", "chunk 1"], lambda data, chunk: keys.append((chunk, current_key_or_none())))
sibling.seen.update(argv=list(sys.argv), keys=keys, model=model)
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A script beside a module of its own, into which it writes what it saw."""
    (tmp_path / "sibling.py").write_text("seen = {}\n")
    (tmp_path / "job.py").write_text(JOB)
    yield str(tmp_path / "job.py")
    sys.modules.pop("sibling", None)


def test_a_script_runs_as_it_would_alone(process, job, capsys):
    launch.main(["--ultraep-slots", "3", job, "--lr", "1"])
    seen = sys.modules["sibling"].seen
    assert seen["argv"] == [job, "--lr", "1"]
    assert process.attached == [(["chunk 0", "chunk 1"], BalanceConfig(slots=3))]
    assert process.closed == 1
    assert capsys.readouterr().err == ""


def test_forward_steps_run_under_their_keys(process, job):
    launch.main([job])
    keys = sys.modules["sibling"].seen["keys"]
    assert current_key_or_none() is None
    for chunk in ("chunk 0", "chunk 1"):
        mine = [(key.pass_, key.step, key.microbatch) for name, key in keys if name == chunk]
        trained = [("train", step, i) for step in range(4) for i in range(2)]
        evaluated = [("eval", step, i) for step in (1, 3) for i in range(2)]
        assert sorted(mine) == sorted(trained + evaluated)


def test_metrics_are_logged_once_per_interval(process, job):
    launch.main([job])
    loop = sys.modules["job_loop"]
    assert [(name, iteration) for name, _, iteration in loop.scalars if name.endswith("before/mean")] == [
        ("moe/imbalance_before/mean", 2),
        ("moe/imbalance_before/mean", 4),
    ]
    assert [(len(metrics), iteration) for metrics, iteration in loop.logged] == [(3, 2), (3, 4)]
    after = loop.printed[loop.printed.index("iteration 2") + 1]
    assert after == " ultraep iteration        2/       4 | imbalance before: 2.0000 | left alone (gate): 25.0% |"


def test_switched_off_leaves_everything_as_it_is(process, job):
    finders = list(sys.meta_path)
    launch.main(["--no-ultraep-enabled", job])
    loop = sys.modules["job_loop"]
    assert not any(hasattr(getattr(loop, name), "__wrapped__") for name in training._EXPECTED)
    assert sys.meta_path == finders
    assert process.attached == []
    assert loop.logged == []
    assert all(key is None for _, key in sys.modules["sibling"].seen["keys"])


def test_a_loop_that_is_imported_already_is_hooked(process):
    loop = importlib.import_module("job_loop")
    training.install(BalanceConfig())
    loop.pretrain(lambda: ["chunk"], lambda data, chunk: None)
    assert process.attached == [(["chunk"], BalanceConfig())]


def test_exit_code_and_errors_of_the_script_are_its_own(process, tmp_path):
    path = tmp_path / "fails.py"
    path.write_text("import sys; sys.exit(7)")
    with pytest.raises(SystemExit) as stopped:
        launch.main([str(path)])
    assert stopped.value.code == 7


def test_a_script_without_megatron_training_is_told(process, script, capsys):
    launch.main([script])
    assert "nothing was balanced" in capsys.readouterr().err


def test_another_config_is_refused(process):
    training.install(BalanceConfig())
    training.install(BalanceConfig())
    with pytest.raises(ValueError, match="do it once"):
        training.install(BalanceConfig(slots=5))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda loop: delattr(loop, "training_log"), "it has no function training_log"),
        (lambda loop: setattr(loop, "training_log", lambda loss_dict: None), r"no parameters \['iteration'\]"),
        (lambda loop: setattr(loop, "train", lambda: None), "train does not call get_forward_backward_func"),
    ],
)
def test_a_loop_that_looks_different_is_refused(process, change, sentence):
    loop = importlib.import_module("job_loop")
    change(loop)
    with pytest.raises(training.HookError, match=sentence):
        training.install(BalanceConfig())


def test_import_line_takes_its_flags_out_of_the_command_line(process, monkeypatch):
    monkeypatch.delitem(sys.modules, "megatron_ultraep.enable", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "1", "--ultraep-slots", "3", "--bf16", "--no-ultraep-gate"])
    importlib.import_module("megatron_ultraep.enable")
    assert sys.argv == ["train.py", "--lr", "1", "--bf16"]
    assert training.decision() == BalanceConfig(slots=3, gate=False)


def test_import_line_does_nothing_under_the_launcher(process, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "megatron_ultraep.enable", raising=False)
    path = tmp_path / "has_line.py"
    path.write_text("import megatron_ultraep.enable\n")
    launch.main(["--no-ultraep-enabled", str(path)])
    assert training.decision() == BalanceConfig(enabled=False)


# ---- a job on megatron.training --------------------------------------------------------------------------------------

ARGUMENTS = shlex.split("""
--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64
--micro-batch-size 2 --global-batch-size 8 --train-iters 4 --lr 1e-3 --lr-decay-style constant --mock-data
--tokenizer-type NullTokenizer --vocab-size 255 --make-vocab-size-divisible-by 64 --num-experts 8 --moe-router-topk 2
--expert-model-parallel-size 2 --moe-ffn-hidden-size 32 --moe-router-load-balancing-type aux_loss
--moe-aux-loss-coeff 1e-2 --moe-token-dispatcher-type alltoall --normalization RMSNorm --swiglu --disable-bias-linear
--position-embedding-type rope --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
--log-interval 1 --eval-iters 1 --eval-interval 2 --num-workers 0
--transformer-impl local --distributed-backend gloo --disable-gloo-process-groups --use-cpu-initialization
--no-rope-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion
--no-bias-swiglu-fusion --no-bias-dropout-fusion
""")
BALANCE = ["--ultraep-min-tokens", "1", "--no-ultraep-gate"]
RANKS = 2
LIMIT = 400.0  # seconds; a job takes 10 on an idle machine


def second_megatron() -> Path:
    found = [path for path in (ROOT / ".venv").glob("megatron-core-*") if (path / "megatron" / "training").is_dir()]
    if not found:
        pytest.skip("no Megatron-core with megatron.training is unpacked in .venv: run scripts/setup_env.sh")
    return found[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_job(words, directory, **environment):
    """Losses by iteration, and what the ranks printed, of `python words` on two ranks."""
    base = {name: value for name, value in os.environ.items() if not name.startswith(("ULTRAEP", "PYTEST"))}
    shared = {
        "PYTHONPATH": os.pathsep.join([str(second_megatron()), str(ROOT)]),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "MOCK_LOSSES": str(directory / "losses"),
    }
    ranks = []
    try:
        for rank in range(RANKS):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-W", "ignore", *map(str, words)],
                    env=base | RANK_ENVIRONMENT | shared | own | environment,
                    stdout=(directory / f"rank{rank}").open("w"),
                    stderr=subprocess.STDOUT,
                    cwd=directory,
                )
            )
        codes = [rank.wait(LIMIT) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    printed = "".join((directory / f"rank{rank}").read_text() for rank in range(RANKS))
    assert codes == [0] * RANKS, printed[-6000:]
    records = [json.loads(line) for line in (directory / "losses").read_text().splitlines()]
    return {record["iteration"]: record["lm loss"] for record in records}, printed


@pytest.fixture(scope="module")
def stock_losses(tmp_path_factory):
    words = [HERE / "cpu_job.py", HERE / "pretrain_mock.py", *ARGUMENTS]
    losses, printed = run_job(words, tmp_path_factory.mktemp("stock"))
    assert "ultraep" not in printed
    return losses


def launched(directory):
    words = ["-m", "megatron_ultraep.launch", *BALANCE, "--ultraep-record", "loads"]
    return [*words, HERE / "cpu_job.py", HERE / "pretrain_mock.py", *ARGUMENTS], {}


def imported(directory):
    script = directory / "with_line.py"
    script.write_text("import megatron_ultraep.enable\n" + (HERE / "pretrain_mock.py").read_text())
    return [HERE / "cpu_job.py", script, *ARGUMENTS, *BALANCE, "--ultraep-record", "loads"], {}


def specified(directory):
    spec = ["--spec", "megatron_ultraep.megatron.spec", "gpt_layer_spec"]
    words = [HERE / "cpu_job.py", HERE / "pretrain_mock.py", *ARGUMENTS, *spec]
    return words, {"ULTRAEP_ARGS": " ".join([*BALANCE, "--ultraep-record", "loads"])}


@pytest.mark.parametrize("way", [launched, imported, specified])
def test_a_job_trains_the_same_and_is_balanced(way, stock_losses, tmp_path):
    words, environment = way(tmp_path)
    losses, printed = run_job(words, tmp_path, **environment)
    assert set(losses) == set(stock_losses) == {1, 2, 3, 4}
    assert max(abs(losses[i] - stock_losses[i]) for i in losses) < 1e-5
    lines = [line.split("|") for line in printed.splitlines() if line.startswith(" ultraep iteration")]
    assert len(lines) == 4
    for line in lines:
        before, after, replicas = (float(part.rpartition(":")[2]) for part in line[1:4])
        assert 1.0 <= after < before
        assert replicas > 0
    assert list((tmp_path / "loads").glob("*.npz")), "no load records were written"


@pytest.mark.slow
@pytest.mark.parametrize("way", [launched, specified])
def test_ranges_are_in_the_trace_of_the_jobs_own_profiler(way, stock_losses, tmp_path):
    words, environment = way(tmp_path)
    if environment:
        environment = {"ULTRAEP_ARGS": environment["ULTRAEP_ARGS"] + " --ultraep-profile"}
    else:
        words.insert(words.index("megatron_ultraep.launch") + 1, "--ultraep-profile")
    own = "--profile --use-pytorch-profiler --profile-step-start 2 --profile-step-end 3 --profile-ranks 0"
    losses, _ = run_job([*words, *shlex.split(own), "--tensorboard-dir", tmp_path / "tb"], tmp_path, **environment)
    assert max(abs(losses[i] - stock_losses[i]) for i in losses) < 1e-5
    (trace,) = tmp_path.rglob("torch_profile/*.json.gz")
    with gzip.open(trace, "rt") as file:
        names = {event["name"] for event in json.load(file)["traceEvents"]}
    for layer in (1, 2):
        for part in ("", " attention", " moe"):
            for kind in ("forward", "backward"):
                assert f"layer {layer}{part} {kind} | model/train/step 1/micro-batch 1" in names
    assert {"balance: plan", "balance: weights, forward"} <= names
