"""Plans of whole configurations, the changes that would make them fit, and the command."""

import json

import pytest
from typer.testing import CliRunner

from rl.cli import app
from rl.config import ConfigError, from_dict, load
from rl.planning.plan import PlanError, make_plan, read_dimensions
from rl.planning.render import render
from tests.rl.planning.models import ROOT, TINY

QWEN = str(ROOT / "recipes" / "models" / "qwen3-30b-a3b.json")


def configuration(**sections):
    base = {
        "run": {"name": "planned"},
        "model": {"path": "nowhere"},
        "data": {
            "train": {"files": ["x.jsonl"]},
            "prompts_per_step": 64,
            "samples_per_prompt": 16,
            "max_prompt_tokens": 1024,
        },
        "reward": {"path": "rl.rewards.math:math_verify"},
        "sampling": {"max_tokens": 8192},
        "rollout": {"engines": 8, "device": "cuda", "max_model_len": 9216, "kv_cache_gib": 10},
        "trainer": {
            "ranks": 8,
            "backend": "nccl",
            "parallel": {"ep": 8},
            "tokens_per_micro_batch": 9216,
            "recompute": "full",
        },
        "stream": {"colocated": True},
        "plan": {"gpu": "h200", "dimensions": QWEN},
    }
    for name, values in sections.items():
        base[name] = base.get(name, {}) | values if isinstance(values, dict) else values
    return from_dict(base)


def test_a_plan_that_fits():
    config = configuration()
    plan = make_plan(config)
    assert plan.fits
    assert plan.gpus == 8
    assert plan.cluster.nodes(plan.gpus) == 1
    assert [phase.name for phase in plan.phases] == [
        "generation",
        "old log-probs",
        "training",
        "weights",
        "turns",
        "other",
    ]
    for phase in plan.phases:
        assert phase.seconds >= phase.bound >= 0
    assert plan.step_seconds == sum(phase.seconds for phase in plan.phases)
    text = render(config, plan)
    assert "30.53 billion parameters" in text
    assert text.endswith("fits")
    assert json.loads(json.dumps(plan.to_json()))["fits"] is True


def test_balancing_takes_slots_and_saves_activations():
    stock = make_plan(configuration(trainer={"recompute": "none"}))
    balanced = make_plan(configuration(trainer={"recompute": "none"}, balance={"enabled": True}))
    assert balanced.fullest.bytes_of("replica slots") > 0
    assert balanced.fullest.total < stock.fullest.total
    training = [next(p for p in plan.phases if p.name == "training").seconds for plan in (balanced, stock)]
    assert training[0] < training[1]


def test_overlapping_takes_the_longer_of_both():
    config = configuration(
        stream={"colocated": False, "staleness": 1}, trainer={"ranks": 16}, plan={"gpu": "h200", "dimensions": QWEN}
    )
    plan = make_plan(config)
    assert plan.gpus == 24
    assert plan.step_seconds == max(
        plan.phases[0].seconds, sum(phase.seconds for phase in plan.phases if phase.name != "generation")
    )


@pytest.mark.parametrize(
    ("rollout", "dimensions", "mode"),
    [
        ({}, "qwen3-30b-a3b", "CUDA graphs"),
        ({"cuda_graphs": False}, "qwen3-30b-a3b", "eager"),
        ({}, "deepseek-v3", "eager"),
    ],
)
def test_decoding_is_planned_as_engines_decode(rollout, dimensions, mode):
    config = configuration(
        rollout=rollout,
        plan={"dimensions": str(ROOT / "recipes" / "models" / f"{dimensions}.json")},
        allow_untested=True,
    )
    generation = make_plan(config).phases[0]
    assert generation.name == "generation"
    assert f"({mode})" in generation.note


def test_other_models_are_planned_too():
    config = configuration(
        algorithm={"advantage": "gae", "kl": {"coef": 0.1}},
        critic={"recompute": "full"},
        plan={"gpu": "b200"},
        allow_untested=True,
    )
    plan = make_plan(config)
    names = {part.name.split(":")[0] for part in plan.fullest.parts if ":" in part.name}
    assert names == {"actor", "critic", "reference"}
    assert {"reference", "values", "critic"} <= {phase.name for phase in plan.phases}


def test_on_cpus_nothing_is_compared(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY["qwen3_moe"]))
    config = load(ROOT / "recipes" / "smoke.yaml", [f"model.path={tmp_path}"])
    plan = make_plan(config)
    assert plan.fits
    assert plan.limit is None
    assert plan.phases == ()
    assert "on CPUs" in render(config, plan)


def test_a_model_on_disk_comes_first(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY["mixtral"]))
    assert read_dimensions(configuration(model={"path": str(tmp_path)})).family == "mixtral"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"plan": {"dimensions": None}}, "found neither"),
        ({"plan": {"dimensions": "nowhere.json"}}, "nowhere.json"),
        ({"trainer": {"parallel": {"pp": 8, "vpp": 4}}}, "virtual stages are cut evenly"),
        ({"trainer": {"parallel": {"ep": 8, "tp": 8}, "sequence_parallel": True}}, "key/value heads"),
    ],
)
def test_what_cannot_be_planned(sections, message):
    with pytest.raises((ConfigError, PlanError), match=message):
        make_plan(configuration(**sections))


def test_a_model_that_is_not_supported(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(PlanError, match="unheard_of"):
        make_plan(configuration(model={"path": str(tmp_path)}))


def test_refusals_of_today_are_named():
    config = configuration(
        rollout={"tensor_parallel": 16, "engines": 4, "kv_cache_gib": 0.02},
        stream={"colocated": False},
        allow_untested=True,
    )
    refused = "\n".join(make_plan(config).refused)
    assert "rollout.tensor_parallel = 16: an engine must fit on one node, of 8 GPUs" in refused
    assert "less than one sample" in refused


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe, file = "recipes/qwen3-30b-a3b-1x8-h200.yaml", tmp_path / "plan.json"
    fits = run(recipe, "--json", file)
    assert fits.exit_code == 0, fits.output
    document = json.loads(file.read_text())
    assert document["planned"] is True
    assert document["trainer"][0]["bytes"] == sum(part["bytes"] for part in document["trainer"][0]["parts"])
    over = run(recipe, "plan.gpu=h100")
    assert over.exit_code == 1
    assert "would fit with" in over.output
    assert run(recipe, "trainer.parallel.tp=8", "trainer.sequence_parallel=true").exit_code == 2
    assert run(recipe, "trainer.parallel.nope=7").exit_code == 2
    assert run("nowhere.yaml").exit_code == 2
