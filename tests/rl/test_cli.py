import json
import subprocess
import sys
import time
import types

import pytest
import yaml
from typer.testing import CliRunner

from rl import cli, versions
from rl.config import ConfigError, from_dict, to_dict
from rl.evaluation import write_eval
from rl.ledger import Ledger, LedgerError, ResumeError
from tests.rl.models.test_architecture import DEEPSEEK_V3, OLMOE, QWEN3_MOE
from tests.rl.test_config import BASE, changed
from tests.rl.test_evaluation import make_sample

MODEL = QWEN3_MOE | {"max_position_embeddings": 8192}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Calls the command in an empty directory; `run.calls` are the calls of the loop, `run.behave` what it does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(versions, "untested", lambda device: [])
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny" / "config.json").write_text(json.dumps(MODEL))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(BASE))
    loop = types.ModuleType("rl.orchestration.sync")

    def invoke(*args):
        return CliRunner().invoke(cli.app, list(args))

    def loop_run(config, resume):
        invoke.calls.append((config, resume))
        return invoke.behave()

    invoke.calls = []
    invoke.behave = lambda: 0
    loop.run = loop_run
    monkeypatch.setitem(sys.modules, "rl.orchestration.sync", loop)
    return invoke


def make_run(directory, config=BASE):
    facts = {"versions": {}, "topology": {}, "seeds": {}, "data_digests": {}}
    Ledger.create(directory, config=to_dict(from_dict(config)), **facts).close()


def test_train_runs_the_loop(run):
    result = run("train", "c.yaml", "run.seed=3", "sampling.max_tokens=16")
    assert result.exit_code == 0, result.output
    ((config, resume),) = run.calls
    assert (config.run.seed, config.sampling.max_tokens, resume) == (3, 16, None)


@pytest.mark.parametrize("code", [0, 1, 3, 130])
def test_the_loops_code_is_the_commands(run, code):
    run.behave = lambda: code
    assert run("train", "c.yaml").exit_code == code


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "--resume runs/smoke"),
        (RuntimeError("engine 0 died"), 1, "run failed: RuntimeError: engine 0 died"),
        (LedgerError("lost"), 1, "lost"),
        (ResumeError("fields differ"), 2, "fields differ"),
        (ConfigError("x", []), 2, "x: 0 error"),
    ],
)
def test_exceptions_become_codes(run, error, code, said):
    def fail():
        raise error

    run.behave = fail
    result = run("train", "c.yaml")
    assert result.exit_code == code
    assert said in result.stderr


def test_wrong_configuration(run):
    result = run("train", "c.yaml", "run.sed=1", "sampling.top_k=3")
    assert result.exit_code == 2
    assert "2 errors" in result.stderr
    assert "Did you mean `run.seed`" in result.stderr
    assert run.calls == []


@pytest.mark.parametrize("args", [["train"], ["train", "c.yaml", "--nonsense"], ["nonsense"], ["train", "none.yaml"]])
def test_wrong_usage(run, args):
    assert run(*args).exit_code == 2


def test_missing_files(run):
    no_task = ["data.eval.reasoning_gym=null", "data.eval.size=null", "data.eval.seed=null"]
    result = run("train", "c.yaml", "model.path=gone", "data.eval.files=gone.jsonl", *no_task)
    assert result.exit_code == 2
    assert "model.path: expected a Hugging Face directory" in result.stderr
    assert "data.eval.files: expected a file" in result.stderr
    assert run("train", "c.yaml", "model.path=gone", "model.create=a.b:c").exit_code == 0


def test_untested_versions(run, monkeypatch):
    monkeypatch.setattr(versions, "untested", lambda device: [f"torch ({device}) is odd."])
    result = run("train", "c.yaml")
    assert result.exit_code == 2
    assert "--allow-untested" in result.stderr
    assert run("train", "c.yaml", "trainer.backend=nccl").stderr.count("torch (cuda) is odd") == 1
    result = run("train", "c.yaml", "--allow-untested")
    assert result.exit_code == 0
    assert "warning: untested versions: torch (cpu) is odd." in result.stderr
    assert run.calls[-1][0].allow_untested


def test_a_run_is_not_overwritten(run, tmp_path):
    make_run(tmp_path / "runs" / "smoke")
    result = run("train", "c.yaml")
    assert result.exit_code == 2
    assert "continue it with --resume" in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["c.yaml", "--resume"],
        ["--resume", "c.yaml"],
        ["c.yaml", "--resume", "auto", "run.seed=4"],
        ["c.yaml", "--resume", "run.seed=4"],
        ["c.yaml", "--resume", "runs/smoke"],
        ["c.yaml", "--resume=runs/smoke"],
        ["c.yaml", "--resume", "--allow-changes"],
    ],
)
def test_resume(run, tmp_path, args):
    make_run(tmp_path / "runs" / "smoke")
    result = run("train", *args)
    assert result.exit_code == 0, result.output
    ((config, resume),) = run.calls
    assert str(resume) == "runs/smoke"
    assert config.output_dir == resume
    assert config.run.seed == (4 if "run.seed=4" in args else 0)
    assert config.allow_changes == ("--allow-changes" in args)


def test_resume_auto_starts_when_there_is_nothing(run):
    result = run("train", "c.yaml", "--resume")
    assert result.exit_code == 0
    assert "nothing to resume" in result.stderr
    assert run.calls[0][1] is None


def test_resume_of_another_directory(run, tmp_path):
    result = run("train", "c.yaml", "--resume", "elsewhere")
    assert result.exit_code == 2
    assert "found none in elsewhere" in result.stderr
    make_run(tmp_path / "elsewhere")
    assert run("train", "c.yaml", "--resume", "elsewhere").exit_code == 0
    assert str(run.calls[0][0].output_dir) == "elsewhere"


def test_dry_run_prints_what_can_be_loaded_again(run, tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "untested", lambda device: ["torch is odd."])
    result = run("train", "c.yaml", "--dry-run", "trainer.ranks=2", "trainer.parallel.ep=2", "model.path=gone")
    assert result.exit_code == 0
    assert run.calls == []
    raw = changed(("trainer", {"ranks": 2, "parallel": {"ep": 2}}), ("model.path", "gone"))
    assert from_dict(yaml.safe_load(result.stdout)) == from_dict(raw)
    assert "# 2 trainer ranks" in result.stdout
    assert "warning: torch is odd." in result.stderr
    assert "warning: model.path" in result.stderr
    assert not (tmp_path / "runs").exists()
    assert run("train", "c.yaml", "--dry-run", "run.sed=1").exit_code == 2


@pytest.mark.parametrize("flag", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("model", "overrides", "said"),
    [
        (
            DEEPSEEK_V3 | {"num_nextn_predict_layers": 1},
            [],
            "model.path: deepseek_v3: not supported: multi-token-predict",
        ),
        (
            DEEPSEEK_V3 | {"quantization_config": {"quant_method": "fp8"}},
            [],
            "quantized checkpoint (convert it to bf16",
        ),
        ({"model_type": "gpt2"}, [], "model.path: model_type 'gpt2' is not supported; supported: qwen3_moe"),
        ({"model_type": "glm4_moe"}, [], "model.path: glm4_moe: config.json has no num_hidden_layers"),
        (
            OLMOE,
            ["trainer.ranks=2", "trainer.parallel.tp=2", "trainer.parallel.ep=2", "trainer.sequence_parallel=true"],
            "trainer.parallel.tp: tensor parallelism is not tested with the attention of olmoe, came 2; set it to 1",
        ),
        (QWEN3_MOE, ["rollout.max_model_len=4096"], "rollout.max_model_len: the model is made for 512 positions"),
    ],
)
def test_models_that_cannot_be_trained_are_refused(run, tmp_path, flag, model, overrides, said):
    (tmp_path / "models" / "tiny" / "config.json").write_text(json.dumps(model))
    result = run("train", "c.yaml", *flag, *overrides)
    assert result.exit_code == 2
    assert said in result.stderr
    assert run.calls == []


def test_dry_run_is_fast_and_imports_nothing_heavy(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(changed(("model.path", str(tmp_path)))))
    script = (
        "import sys, rl.cli\n"
        "try: rl.cli.app(['train', sys.argv[1], '--dry-run'])\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'ray', 'vllm', 'megatron.core', 'transformers', 'numpy', 'matplotlib', 'wandb'}\n"
        "print(code, sorted(heavy & set(sys.modules)))\n"
    )
    start = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "c.yaml")], capture_output=True, text=True, check=True
    )
    assert process.stdout.strip().endswith("0 []")
    # About 0.5 s; the rest is room for a busy machine.
    assert time.monotonic() - start < 5


def test_report(run, tmp_path):
    assert run("report", "runs/smoke").exit_code == 2
    make_run(tmp_path / "runs" / "smoke")
    result = run("report", "runs/smoke")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == "runs/smoke/report.html"
    assert (tmp_path / "runs" / "smoke" / "report.html").is_file()


@pytest.mark.parametrize(("right", "recorded", "code"), [(7, 7, 0), (5, 5, 3), (7, 6, 1)])
def test_verify_eval(run, tmp_path, right, recorded, code):
    directory = tmp_path / "runs" / "smoke"
    make_run(
        directory,
        changed(
            ("reward.path", "rl.rewards.builtin:exact_match"),
            ("evaluation.success", {"before_max": 0.3, "after_min": 0.6}),
        ),
    )
    write_eval(directory, 0, [make_sample(i, float(i < 2), response="4" if i < 2 else "5") for i in range(10)])
    write_eval(
        directory, 9, [make_sample(i, float(i < recorded), response="4" if i < right else "5") for i in range(10)]
    )
    result = run("verify-eval", "runs/smoke")
    assert result.exit_code == code, result.output
    assert f"{right / 10:.1%}" in result.stdout


def test_verify_eval_without_a_run(run):
    assert run("verify-eval", "nowhere").exit_code == 2


def test_fields(run):
    result = run("fields", "trainer.optimizer")
    assert "trainer.optimizer.lr (float" in result.stdout
    assert "run.seed" not in result.stdout
    assert run("fields", "nonsense").exit_code == 2


def test_the_same_as_a_module():
    process = subprocess.run([sys.executable, "-m", "rl.cli", "--help"], capture_output=True, text=True, check=True)
    assert "verify-eval" in process.stdout
