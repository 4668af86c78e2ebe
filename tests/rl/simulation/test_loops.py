import pytest

from rl.rollout.dispatch import get_dispatch
from rl.simulation.generation import Generation, SimGroup
from rl.simulation.lengths import LengthLaw, draw_groups
from rl.simulation.loops import LoopResult, LoopSettings, TrainCost, simulate


def step_seconds(running: int) -> float:
    return 0.01 + 0.001 * running


def batches_of(steps: int, groups: int = 24, seed: int = 0, sigma: float = 1.0) -> list[list[SimGroup]]:
    law = LengthLaw(median=100, sigma=sigma, cap=1000)
    return [draw_groups(law, groups, 4, seed, 0, step, step * groups) for step in range(steps)]


def run(batches, train: TrainCost, settings: LoopSettings, engines: int = 2, seats: int = 16) -> LoopResult:
    return simulate(batches, Generation(step_seconds, engines, seats, get_dispatch("fcfs")), train, settings)


def generating(batch) -> float:
    generation = Generation(step_seconds, 2, 16, get_dispatch("fcfs"))
    generation.submit(batch)
    generation.run()
    return generation.now


def test_synchronous_steps_are_sums() -> None:
    batches, train = batches_of(3), TrainCost(0.5, 1e-3, 0.25)
    result = run(batches, train, LoopSettings("sync", transfer_seconds=0.3, update_seconds=0.1))
    for batch, seconds in zip(batches, result.step_seconds, strict=True):
        # The stand-still of the last transfer is part of its own step.
        expected = generating(batch) + train.chunk(batch) + 0.25 + 0.3 + 0.1
        assert seconds == pytest.approx(expected)
    assert result.most_stale == 0


def test_colocated_steps_add_two_switches() -> None:
    batches, train = batches_of(2), TrainCost(0.5, 1e-3)
    plain = run(batches, train, LoopSettings("sync"))
    turns = run(batches, train, LoopSettings("colocated", switch_seconds=0.7))
    assert turns.makespan == pytest.approx(plain.makespan + 2 * 2 * 0.7)


def test_streaming_is_faster_and_trains_the_same_sets_once() -> None:
    batches, train = batches_of(3), TrainCost(0.0, 3e-4)
    sync, streaming = (run(batches, train, LoopSettings(mode, chunk_groups=4)) for mode in ("sync", "streaming"))
    assert streaming.makespan < sync.makespan
    assert streaming.makespan > sum(map(generating, batches))
    for result in (sync, streaming):
        for batch, trained in zip(batches, result.trained, strict=True):
            assert sorted(trained) == [group.order for group in batch]
    assert streaming.trainer_idle < sync.trainer_idle


def test_one_huge_chunk_is_synchronous() -> None:
    batches, train = batches_of(2), TrainCost(0.1, 1e-3)
    assert run(batches, train, LoopSettings("streaming", chunk_groups=1000)) == run(
        batches, train, LoopSettings("sync")
    )


@pytest.mark.parametrize("staleness", [1, 2])
@pytest.mark.parametrize("in_flight", ["finish", "continue"])
def test_sets_are_strict_and_staleness_bounded(staleness: int, in_flight: str) -> None:
    batches, train = batches_of(6), TrainCost(0.1, 5e-4)
    settings = LoopSettings("async", 4, staleness, transfer_seconds=0.5, update_seconds=0.05, in_flight=in_flight)
    result = run(batches, train, settings)
    assert result.most_stale == staleness
    for batch, trained in zip(batches, result.trained, strict=True):
        assert sorted(trained) == [group.order for group in batch]
    assert result.makespan < run(batches, train, LoopSettings("sync", transfer_seconds=0.5)).makespan


def test_overlap_approaches_the_slower_side() -> None:
    """Even sets and training a little slower than generation: a step is the training of a set."""
    batches = batches_of(12, sigma=0.1)
    tokens = sum(group.tokens for batch in batches for group in batch) / len(batches)
    train = TrainCost(0.0, 1.2 * generating(batches[0]) / tokens)
    result = run(batches, train, LoopSettings("async", 6, 1))
    assert result.mean_step_seconds(skip=1) == pytest.approx(1.2 * generating(batches[0]), rel=0.03)
    assert result.trainer_idle < 0.1


def test_faults() -> None:
    with pytest.raises(ValueError, match="sync has 0"):
        LoopSettings("sync", staleness=1)
    with pytest.raises(ValueError, match="in_flight"):
        LoopSettings("async", in_flight="drop")
    generation = Generation(step_seconds, 1, 4, get_dispatch("fcfs"))
    generation.accept(0, False)
    with pytest.raises(RuntimeError, match="nothing happens"):
        simulate(batches_of(1), generation, TrainCost(0.1, 0.1), LoopSettings("sync"))
