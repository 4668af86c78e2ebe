"""A run whose iterations are profiled: traces of driver, ranks and engines, and the numbers of the run without."""

from types import SimpleNamespace

import pytest

from megatron_ultraep.runtime import ranges
from rl.config import from_dict
from rl.metrics import read_metrics
from rl.orchestration.profiling import profiled
from rl.rollout.fleet import EngineDied
from tests.rl.orchestration.command import Command, tiny_config
from tests.rl.test_config import changed
from tests.rl.training.profiled import range_names

CHANGES = {
    "run__steps": 3,
    "balance": {"enabled": True, "gate": False, "min_tokens": 1, "tolerance": 0.0},
    "algorithm__preset": "ppo",
    "critic": {},
    "data__samples_per_prompt": 4,
    "evaluation": {"prompts": 8, "at_start": False, "at_end": False},
    "checkpoint": {"every": 0},
}


def run(directory, **changes):
    directory.mkdir()
    command = Command(tiny_config(directory, **CHANGES | changes))
    try:
        assert command.end(600) == 0, command.output()[-3000:]
    finally:
        command.kill()
    return command.run_directory


def numbers(directory):
    """What is learnt and from what, without times."""
    return {
        step: {name: value for name, value in values.items() if name.startswith(("train/", "reward/", "moe/"))}
        for step, values in read_metrics(directory).items()
    }


@pytest.mark.slow
def test_traces_of_profiled_iterations(tmp_path):
    plain = run(tmp_path / "plain")
    profiled = run(tmp_path / "profiled", profile={"steps": [2, 3], "ranks": [1], "engines": True})
    assert numbers(profiled) == numbers(plain)
    assert not (plain / "profile").exists()
    files = sorted(path.name for path in (profiled / "profile").iterdir())
    assert files == [f"step_{step:05d}_{who}.json.gz" for step in (2, 3) for who in ("driver", "engine_0", "rank_1")]
    for step in (2, 3):
        driver, rank, engine = (
            range_names(profiled / "profile" / f"step_{step:05d}_{who}.json.gz")
            for who in ("driver", "rank_1", "engine_0")
        )
        phases = {f"iteration {step}", "generate", "old_logprob", "values", "train", "train_critic", "weight_update"}
        assert phases <= set(driver)
        assert driver["reward"] >= 1
        assert engine["engine step"] >= 2
        # Optimizer steps are counted from 0, one of each model in an iteration.
        for model, passes in {"actor": ("old_logprob", "train"), "critic": ("old_logprob", "train")}.items():
            for pass_ in passes:
                for layer in (1, 2):
                    key = f"{model}/{pass_}/step {step - 1}/micro-batch 0"
                    assert rank[f"layer {layer} moe forward | {key}"] == 1
                    assert rank[f"layer {layer} backward | {key}"] == int(pass_ == "train")
        assert {"balance: plan", "optimizer", "export", "logprobs", "values", "train"} <= set(rank)


class Processes:
    """A pool of engines or a trainer that notes what it is told; engine 1 is dead."""

    def __init__(self, told, dead=()):
        self.told, self.dead = told, dead

    def indices(self):
        return [0, 1, 2]

    def profile(self, settings, paths):
        for index, path in paths.items():
            if index in self.dead:
                raise EngineDied(f"engine {index} died")
            self.told.append((index, path.name))

    def end_profile(self, indices):
        self.told.append(list(indices))
        return []


@pytest.fixture
def state(tmp_path):
    raw = changed(
        ("profile", {"steps": [2], "engines": True, "ranks": None}),
        ("run.output_dir", str(tmp_path)),
        ("trainer.ranks", 2),
    )
    said, trainer, pool = [], [], []
    return SimpleNamespace(
        config=from_dict(raw),
        directory=tmp_path,
        step=1,
        trainer=Processes(trainer),
        pool=Processes(pool, dead=(1,)),
        say=said.append,
        said=said,
    )


def test_an_engine_that_died_has_no_trace_and_ends_no_run(state):
    with profiled(state):
        assert ranges.on()
    assert not ranges.on()
    assert state.trainer.told == [(0, "step_00002_rank_0.json.gz"), (1, "step_00002_rank_1.json.gz"), [0, 1]]
    assert state.pool.told == [(0, "step_00002_engine_0.json.gz"), (2, "step_00002_engine_2.json.gz"), [0], [2]]
    assert state.said[0] == "no trace of engine 1: engine 1 died"
    assert "iteration" in range_names(state.directory / "profile" / "step_00002_driver.json.gz").popitem()[0]


def test_other_iterations_are_as_they_are(state):
    state.step = 2
    with profiled(state):
        assert not ranges.on()
    assert state.trainer.told == state.pool.told == []


def test_an_iteration_that_raises_leaves_nothing(state):
    with pytest.raises(KeyError), profiled(state):
        raise KeyError
    assert not ranges.on()
    assert not (state.directory / "profile").exists()
