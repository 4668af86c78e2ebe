"""Iterations planned from rollout's routes: what is prepared, in which order; and runs of the loop, on beside off."""

import dataclasses
import json

import numpy as np
import pytest
import yaml

from megatron_ultraep.megatron.groups import ParallelLayout
from megatron_ultraep.megatron.migrate import MoveReport
from megatron_ultraep.plan.foresight import solve_step
from megatron_ultraep.replay import histogram
from rl.config.sections import BalanceSection
from rl.ledger import Ledger
from rl.metrics import METRICS, read_metrics
from rl.models.architecture import read_architecture
from rl.orchestration.ahead import Ahead, Moved, Passes, merged_for_ledger, merged_metrics
from rl.orchestration.experience import Packing
from rl.training import checkpoint
from rl.training.foresight import expert_groups, group_loads
from tests.rl.orchestration.command import ROOT, Command, ledger_lines
from tests.rl.training.balancing import biased_model
from tests.rl.training.planning import skewed_samples, told

STEPS = 3
LAYOUT = ParallelLayout(world=4, ep=4)


@pytest.fixture(scope="module")
def arch(tmp_path_factory):
    return read_architecture(biased_model(tmp_path_factory.mktemp("ahead") / "m", strength=25.0))


def count(requests):
    """As engines do."""
    return [histogram(reference.handle[first:stop], 8) for reference, first, stop in requests]


def make_ahead(arch, layout=LAYOUT, **fields):
    groups = expert_groups(layout, told(layout, arch.experts, arch.layers, node_size=2))
    section = BalanceSection(enabled=True, gate=False, **fields)
    return Ahead(section, groups, Packing(layout, 64), topk=arch.topk, count=count, timeout_s=120)


class Moves:
    """Stands for the trainer."""

    def __init__(self):
        self.homes = []

    def __call__(self, homes):
        self.homes.append(dict(homes))
        return MoveReport(bytes=1000, experts=2 * len(homes), waves=1, seconds=0.1)


def batches_of(samples):
    return np.array_split(np.arange(len(samples)), 2)


@pytest.mark.parametrize("layout", [LAYOUT, ParallelLayout(world=4, tp=2, ep=4)], ids=["ep4", "tp2xep4"])
def test_plans_are_those_of_the_batches_that_will_run(arch, layout):
    samples = skewed_samples(arch, 1)
    with make_ahead(arch, layout, foresight=True, compose=True) as ahead:
        passes = Passes(
            ahead, samples, batches_of(samples), replay_old=False, replay_train=True, recompute_old=True, moved=Moved()
        )
        old = passes.old()
        assert old.plans is None
        assert old.layout == ahead.packing.layout_of(samples)
        for number, batch in enumerate(passes.batches):
            found = passes.training(number)
            mine = [samples[i] for i in batch]
            assert found.layout.sample_ids == tuple(s.sample_id for s in mine)
            assert found.gain.after.tokens <= found.gain.before.tokens
            histograms = {s.sample_id: s.histogram for s in mine}
            counted = {
                rows: count([(next(s.routes for s in mine if s.sample_id == rows[0]), rows[1], rows[1] + rows[2])])[0]
                for rows in _needed(ahead, found.layout)
            }
            (loads,) = group_loads(ahead.groups, found.layout, histograms, counted, topk=arch.topk, tp_size=layout.tp)
            expected = solve_step(loads, ahead.groups[0].layouts({}), ahead.groups[0].settings)
            assert np.array_equal(found.plans.steps[0].replica_expert, expected.replica_expert)
            assert np.array_equal(found.plans.steps[0].loads, expected.loads)
        metrics = merged_metrics([passes])
        micro_batches = [passes.training(number).layout.num_microbatches for number in range(2)]
        share = sum(micro_batches) / (sum(micro_batches) + old.layout.num_microbatches)
        assert metrics["moe/foresight/planned_fraction"] == pytest.approx(share)
        assert merged_for_ledger([passes])["plans"][0] is None
        assert len(merged_for_ledger([passes])["plans"][1]) == 16


def _needed(ahead, layout):
    from rl.training.foresight import counts_needed

    return counts_needed(ahead.groups, layout, ahead.packing.layout.tp)


def test_a_batch_with_a_sample_without_routes_is_planned_on_exact_loads(arch):
    samples = skewed_samples(arch, 1)
    samples[2] = dataclasses.replace(samples[2], routes=None, histogram=None)
    moves = Moves()
    with make_ahead(arch, foresight=True, compose=True, reorder=True) as ahead:
        assert ahead.reorder(samples, batches_of(samples), moves) == Moved()
        passes = Passes(
            ahead, samples, batches_of(samples), replay_old=True, replay_train=True, recompute_old=False, moved=Moved()
        )
        first, second = passes.training(0), passes.training(1)
        assert first.plans is None
        assert first.gain is None
        assert second.plans is not None
    assert moves.homes == []


def test_experts_move_where_it_pays_and_the_next_plans_know(arch):
    samples, moves = skewed_samples(arch, 1), Moves()
    with make_ahead(arch, reorder=True) as ahead:
        moved = ahead.reorder(samples, batches_of(samples), moves)
        assert moved.report.experts > 0
        assert moves.homes == [moved.homes]
        assert ahead.homes == moved.homes
        layouts = dict(zip(ahead.groups[0].numbers, ahead.groups[0].layouts(ahead.homes), strict=True))
        assert all(layouts[number].home_slot == home_slot for number, home_slot in moved.homes.items())
        saved = json.loads(json.dumps(ahead.to_json()))
        digest = ahead.homes_digest
    with make_ahead(arch, reorder=True) as resumed:
        resumed.restore(saved, moves)
        assert resumed.homes == moved.homes == moves.homes[1]
        assert resumed.homes_digest == digest
    with make_ahead(arch) as stays:  # reordering was turned off
        stays.restore(saved, moves)
        assert stays.homes == {}
    with make_ahead(arch, ParallelLayout(world=2, ep=2), reorder=True) as other:
        other.restore(saved, moves)
        assert other.homes == {}
    assert len(moves.homes) == 2


def test_experts_move_during_rollout_by_the_iteration_before(arch):
    samples, moves = skewed_samples(arch, 1), Moves()
    with make_ahead(arch, reorder=True) as now:
        expected = now.reorder(samples, batches_of(samples), Moves()).homes
    with make_ahead(arch, reorder=True, reorder_by="previous") as ahead:
        assert ahead.begin_reorder(moves) is None, "there was no iteration yet"
        ahead.remember(samples, batches_of(samples))
        begun = ahead.begin_reorder(moves)
        assert begun.result(60).homes == expected == ahead.homes
        assert moves.homes == [expected]
        assert ahead.begin_reorder(moves) is None, "once for each iteration"


def test_without_balancing_passes_are_packed_by_length(arch):
    samples = skewed_samples(arch, 1)
    packing = Packing(LAYOUT, 64)
    with Ahead(BalanceSection(), (), packing, topk=2, count=count, timeout_s=60) as ahead:
        passes = Passes(
            ahead, samples, batches_of(samples), replay_old=True, replay_train=True, recompute_old=True, moved=Moved()
        )
        found = passes.training(1)
        assert found.plans is None
        assert found.layout == packing.layout_of([samples[i] for i in passes.batches[1]])
        assert merged_metrics([passes]) == merged_for_ledger([passes]) == {}


# ------------------------------------------------------------------ whole runs
PLANNED = {"foresight": True, "reorder": True, "compose": True, "node_size": 2}
STRENGTH = 0.6


def odd(sample, args):
    """A reward that any model gets now and then: the share of odd tokens."""
    return float(np.mean(sample.response_tokens % 2))


def run(directory, name, balance, steps, *arguments):
    """A few iterations of the smoke recipe, routers skewed, in float64 on four ranks; returns its directory."""
    (directory / name).mkdir(exist_ok=True)
    config = yaml.safe_load((ROOT / "recipes" / "smoke.yaml").read_text())
    config["run"] |= {"steps": steps, "output_dir": str(directory / name / "run")}
    config["model"] |= {
        "path": str(directory / "model"),
        "create": "tests.rl.training.balancing:biased_task_model",
        "dtype": "float64",
    }
    config["model"]["create_args"] |= {"strength": STRENGTH}
    config["data"] |= {"prompts_per_step": 16}
    config["reward"] = {"path": "tests.rl.orchestration.test_ahead:odd"}
    config["trainer"] |= {
        "ranks": 4,
        "parallel": {"ep": 4},
        "tokens_per_micro_batch": 512,
        "distributed_optimizer": False,
    }
    config["trainer"]["optimizer"] |= {"clip_grad": 0.0}
    config["algorithm"]["routes"]["compare_own_every"] = 2
    config["warmup"] |= {"steps": 5, "batch_size": 32, "examples": 160}
    config["evaluation"] = {"prompts": 4, "at_start": False, "at_end": False}
    config["logging"] = {"wandb": "off", "tensorboard": False}
    config["balance"] = balance
    path = directory / name / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    command = Command(path, *arguments)
    try:
        assert command.end(600) == 0, command.output()[-3000:]
        assert command.orphans() == []
    finally:
        command.kill()
    return directory / name / "run"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same iterations: stock; with everything planned ahead, the last after a resume; and moving during rollout."""
    directory = tmp_path_factory.mktemp("ahead")
    every = {"enabled": True, "gate": False, "min_tokens": 1, "tolerance": 0.0, **PLANNED}
    off = run(directory, "off", {}, STEPS)
    run(directory, "on", every, STEPS - 1)
    return {
        "off": off,
        "on": run(directory, "on", every, STEPS, "--resume", "auto"),
        "meanwhile": run(directory, "meanwhile", every | {"reorder_by": "previous"}, STEPS),
    }


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", ["on", "meanwhile"])
def test_losses_are_those_of_the_run_without(runs, name):
    off, on = (read_metrics(runs[each]) for each in ("off", name))
    for step in range(1, STEPS + 1):
        assert on[step]["rollout/reward/mean"] == off[step]["rollout/reward/mean"]
        assert off[step]["train/grad_norm"] > 0
        for metric in ("train/loss", "train/grad_norm", "train/ppo_kl", "train/rollout_logprob_abs_diff"):
            assert on[step][metric] == pytest.approx(off[step][metric], rel=1e-7, abs=1e-10), metric
        assert not any(name.startswith(("moe/foresight", "moe/reorder", "moe/compose")) for name in off[step])


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_everything_was_planned_and_experts_moved(runs):
    metrics = read_metrics(runs["on"])
    for step in range(1, STEPS + 1):
        found = metrics[step]
        assert found["moe/foresight/planned_fraction"] == 1.0
        assert found["moe/imbalance_after/mean"] < found["moe/imbalance_before/mean"]
        assert found["moe/compose/fewer_tokens"] >= 0
        assert {n for n in found if n.startswith(("moe/f", "moe/reo", "moe/c"))} <= set(METRICS)
    assert metrics[1]["moe/reorder/experts_moved"] > 0
    assert metrics[1]["moe/reorder/bytes"] > 0
    report = (runs["on"] / "report.html").read_text()
    assert "Experts that changed their homes" in report


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_experts_moved_during_rollout(runs):
    metrics = read_metrics(runs["meanwhile"])
    assert metrics[1]["moe/reorder/experts_moved"] == 0, "there was no iteration before"
    assert metrics[2]["moe/reorder/experts_moved"] > 0
    for step in range(2, STEPS + 1):  # nobody waits for what rollout hides
        assert metrics[step]["perf/time/reorder"] < metrics[step]["moe/reorder/seconds"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_ledger_and_checkpoint_know_plans_and_homes(runs):
    assert len(Ledger.read(runs["on"]).records) == STEPS
    lines = ledger_lines(runs["on"])
    assert all(len(line["extra"]["plans"]) == 5 for line in lines)  # old log-probs, four optimizer steps
    assert all(len(digest) == 16 for line in lines for digest in line["extra"]["plans"])
    homes = {}
    for line in lines:
        homes |= line["extra"]["rehomed"]
    assert homes
    saved = checkpoint.loop_state(checkpoint.complete(runs["on"] / "checkpoints")[-1])
    assert saved["experts"] == {"ep": 4, "homes": homes}
    assert all("plans" not in line["extra"] for line in ledger_lines(runs["off"]))
    assert json.dumps(saved)
