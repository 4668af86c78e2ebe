"""The accountant of staleness: what may start, what a step trained on, and that resuming forgets nothing it needs."""

import random

import numpy as np
import pytest

from rl.orchestration.staleness import StalenessAccountant, StaleSample
from rl.types import Prompt, Sample


def sample(length: int, *versions: tuple[int, int]) -> Sample:
    tokens = np.zeros(length, np.int32)
    prompt = Prompt("train/0/0", 0, 0, "", tokens)
    return Sample("train/0/0/0", prompt, tokens, np.zeros(length, np.float32), versions, "stop", None, None)


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_as_many_batches_run_ahead_as_the_bound_allows(bound: int) -> None:
    accountant = StalenessAccountant(bound)
    for batch in range(bound + 1):
        assert accountant.may_admit()
        assert accountant.admit() == batch
    assert not accountant.may_admit()
    with pytest.raises(RuntimeError, match=f"batch {bound + 1} would be {bound + 1} steps stale"):
        accountant.admit()
    accountant.completed()
    assert not accountant.may_admit(), "training alone is not enough: engines must have the weights"
    accountant.delivered(7, 1)
    assert accountant.may_admit()


def test_synchronous_training_never_overlaps() -> None:
    accountant = StalenessAccountant(0)
    for step in range(5):
        accountant.admit()
        assert not accountant.may_admit()
        accountant.completed()
        accountant.delivered(step + 1, step + 1)


@pytest.mark.parametrize("seed", range(20))
def test_no_token_is_older_than_the_bound_whatever_the_order(seed: int) -> None:
    """Random loops: batches start when they may, updates arrive late, and are skipped."""
    rng = random.Random(seed)
    bound = rng.randrange(4)
    accountant = StalenessAccountant(bound)
    accountant.delivered(0, 0)
    versions, newest, pending = {}, 0, []
    for _ in range(200):
        if accountant.may_admit() and rng.random() < 0.7:
            versions[accountant.admit()] = newest
        if accountant.trained < accountant.admitted and rng.random() < 0.5:
            batch = accountant.trained
            found = accountant.measure(batch, [sample(4, (0, versions[batch]))])
            assert found.largest <= bound
            accountant.completed()
            pending.append(accountant.trained)
            accountant.announce(pending[-1], pending[-1])
        if pending and rng.random() < 0.5:
            newest = pending[-1]
            pending.clear()
            accountant.delivered(newest, newest)
    assert accountant.trained > 10


def test_tokens_are_weighed_and_mixed_samples_counted() -> None:
    accountant = StalenessAccountant(2)
    for version, steps in ((5, 0), (6, 1), (7, 2)):
        accountant.announce(version, steps)
    found = accountant.measure(2, [sample(10, (0, 5), (6, 6)), sample(4, (0, 7))])
    assert found.mean == pytest.approx((6 * 2 + 4 * 1 + 4 * 0) / 14)
    assert (found.largest, found.mixed) == (2, 0.5)
    empty = accountant.measure(2, [])
    assert (empty.mean, empty.largest, empty.mixed) == (0.0, 0, 0.0)


def test_too_old_and_unknown_tokens_are_refused_by_name() -> None:
    accountant = StalenessAccountant(1)
    accountant.announce(1, 0)
    with pytest.raises(StaleSample, match="train/0/0/0: tokens that are 2 steps old"):
        accountant.measure(2, [sample(3, (0, 1))])
    with pytest.raises(StaleSample, match="weight version 9"):
        accountant.measure(0, [sample(3, (0, 9))])


def test_a_resumed_run_begins_with_the_step_of_its_checkpoint() -> None:
    accountant = StalenessAccountant(1, trained=7)
    accountant.delivered(12, 7)  # the same weights under another name than before
    assert accountant.admit() == 7
    assert accountant.admit() == 8
    assert not accountant.may_admit()
    assert accountant.measure(7, [sample(2, (0, 12))]).largest == 0
    assert accountant.measure(8, [sample(2, (0, 12))]).largest == 1


def test_mistakes_are_errors() -> None:
    accountant = StalenessAccountant(1)
    with pytest.raises(RuntimeError, match="never started"):
        accountant.completed()
    with pytest.raises(ValueError, match="got step 3"):
        accountant.delivered(1, 3)
    with pytest.raises(ValueError, match=">= 0"):
        StalenessAccountant(-1)
    accountant.admit()
    accountant.completed()
    accountant.delivered(2, 1)
    accountant.delivered(1, 0)  # an update that was overtaken resolves last
    assert accountant.admit() == 1
    assert accountant.admit() == 2
