"""What trainer ranks are told to build."""

import pytest

from rl.config import from_dict
from rl.models import tiny
from rl.orchestration.actors import engine_config, trainer_spec
from tests.rl.test_config import PPO, changed

PP2 = [("trainer.ranks", 4), ("trainer.parallel", {"pp": 2, "ep": 2})]
LINEAR = {"lr": 1e-3, "schedule": "linear"}


@pytest.mark.parametrize(("decay_steps", "expected"), [(None, 60), (7, 7)])
def test_learning_rates_decay_until_the_end_of_the_run(decay_steps, expected):
    changes = [
        *PPO,
        ("trainer.optimizer", LINEAR | {"decay_steps": decay_steps}),
        ("critic.optimizer", LINEAR),
        ("algorithm.mini_batches", 2),
        ("algorithm.epochs_per_batch", 3),
    ]
    spec = trainer_spec(from_dict(changed(*changes)), iterations=10)
    assert spec.optimizer.decay_steps == expected
    assert spec.critic.optimizer.decay_steps == 60


def test_the_actors_schedule_leaves_out_iterations_in_which_the_critic_learns_alone():
    critic = [("critic.warmup_steps", 4), ("run.steps", 10), ("algorithm.mini_batches", 2)]
    spec = trainer_spec(from_dict(changed(*PPO, *critic, ("trainer.optimizer", LINEAR))), iterations=10)
    assert spec.optimizer.decay_steps == 12
    assert spec.critic.optimizer.decay_steps == 20


def test_the_partners_stages_lie_against_the_actors():
    critic = trainer_spec(from_dict(changed(*PP2, *PPO, ("critic.parallel", {"ep": 2}))), iterations=1)
    assert critic.layout.placement is None
    assert critic.layout_of("critic").placement == ((0,), (1,))
    kl = [("algorithm.kl.coef", 0.1), ("algorithm.mini_batches", 2)]
    reference = trainer_spec(from_dict(changed(*PP2, *kl)), iterations=1)
    assert reference.layout_of("reference").placement == ((1, 0),)
    off = trainer_spec(from_dict(changed(*PP2, *kl, ("fuse.training.mode", "off"))), iterations=1)
    assert off.reference_layout is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_float32_stream_is_of_both_and_engines_of_float32_models_have_none(dtype, tmp_path):
    model = tiny.qwen3_moe(tmp_path, layers=1)
    changes = [("path", str(model)), ("dtype", dtype), ("float32_residual", True)]
    changes = [(f"model.{name}", value) for name, value in changes]
    config = from_dict(changed(("allow_untested", True), *changes))
    assert trainer_spec(config, iterations=1).float32_residual
    assert engine_config(config).float32_residual == (dtype == "bfloat16")
