"""What a micro-batch is expected to take, beside what the planner counts for plain training."""

import pytest

from rl.config import from_dict
from rl.models.architecture import architecture
from rl.planning import constants
from rl.planning.activations import logits_forward
from rl.planning.memory import passing, trainer_memory
from rl.planning.memory_by_stage import expected_memory
from rl.planning.plan import models_on_ranks
from tests.rl.planning.models import TINY
from tests.rl.test_config import PPO, changed

CHANGES = [("trainer.ranks", 4), ("trainer.parallel", {"pp": 2, "ep": 2}), *PPO, ("algorithm.kl.coef", 0.1)]
ROWS = 4096


@pytest.fixture(scope="module")
def given():
    config, arch = from_dict(changed(*CHANGES)), architecture(TINY["mixtral"])
    return config, arch, expected_memory(config, arch)


def test_one_micro_batch_is_a_share_of_what_the_planner_counts(given):
    config, arch, expected = given
    actor = models_on_ranks(config, arch)[0]
    rows = config.trainer.tokens_per_micro_batch
    counted = trainer_memory([actor], 4, 8, distributed_optimizer=True)
    beyond = 1 + constants.ALLOCATOR_SHARE
    held, moving = expected("actor", 0, rows)
    # Of two in flight.
    assert 2 * held == pytest.approx(beyond * counted[0].bytes_of("activations"))
    assert moving == pytest.approx(beyond * passing(actor, 0) + constants.PEER_BYTES)
    # Logits of one in flight do not pass, they stay until its backward.
    held, moving = expected("actor", 1, rows)
    logits = logits_forward(arch, actor.parallel, actor.work)
    assert held == pytest.approx(beyond * (counted[1].bytes_of("activations") + logits))
    assert beyond * (passing(actor, 1) - logits) <= moving - constants.PEER_BYTES <= beyond * passing(actor, 1)


def test_it_grows_with_rows(given):
    _, _, expected = given
    for name in ("actor", "critic"):
        small, large = (expected(name, 0, rows)[0] for rows in (ROWS, 2 * ROWS))
        assert large == pytest.approx(2 * small)


def test_a_reference_holds_nothing_between_its_operations(given):
    _, _, expected = given
    held, moving = expected("reference", 1, ROWS)
    assert held == 0
    assert moving > constants.PEER_BYTES
