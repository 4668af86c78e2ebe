"""What a node does, in order: the rules of the module, on random schedules."""

import itertools

import pytest

from megatron_ultraep.pipeline.baselines import one_f_one_b, random_schedule
from megatron_ultraep.pipeline.problem import Operation, PipelineModel, Problem
from megatron_ultraep.pipeline.simulate import simulate
from megatron_ultraep.pipeline.steps import message_of, steps_of
from tests.megatron_ultraep.pipeline.test_executor import random_problem


@pytest.mark.parametrize("seed", range(30))
def test_the_rules_hold(seed):
    schedule = random_schedule(random_problem(seed), seed)
    timeline = simulate(schedule)
    end = {operation: when[1] for (_, operation), when in timeline.times().items()}
    posted_by_connection = {}
    for node in range(schedule.problem.nodes):
        steps = steps_of(schedule, node, timeline)
        assert [step.operation for step in steps] == schedule.operations(node)
        posted = [message for step in steps for message in step.post]
        # Every receive is posted once, in the order of sending, and not after its consumer.
        assert [end[m.producer] for m in posted] == sorted(end[m.producer] for m in posted)
        needed = [step.receive for step in steps if step.receive is not None]
        assert sorted(posted, key=lambda m: m.consumer) == sorted(needed, key=lambda m: m.consumer)
        seen = set()
        for step in steps:
            seen.update(step.post)
            assert step.receive is None or step.receive in seen
            assert step.send == message_of(schedule, step.operation)
        # Posted before the operation during which the message is sent: what ran earlier had ended by then.
        for before, step in itertools.pairwise(steps):
            assert all(end[before.operation] <= end[message.producer] for message in step.post)
        for message in posted:
            key = message.source, node, message.consumer.model, message.consumer.backward
            posted_by_connection.setdefault(key, []).append(message.consumer.microbatch)
    # First in, first out on every connection.
    assert all(order == sorted(order) for order in posted_by_connection.values())


def test_plain_1f1b_by_hand():
    """Two stages, two micro-batches: node 1 asks for each forward while node 0 still computes it."""
    problem = Problem(
        2, (PipelineModel.uniform("actor", stages=2, microbatches=2, forward=1, backward=2, activation=1),)
    )
    schedule = one_f_one_b(problem, 0)
    timeline = simulate(schedule)

    def of(microbatch, stage, backward):
        return Operation(0, 0, stage, microbatch, backward)

    first = steps_of(schedule, 0, timeline)
    # F0 ends at 1, F1 at 2; the gradients of node 1 are sent at 4 and 7.
    assert [step.operation for step in first] == [of(0, 0, False), of(1, 0, False), of(0, 0, True), of(1, 0, True)]
    assert [[m.producer for m in step.post] for step in first] == [[], [], [of(0, 1, True)], [of(1, 1, True)]]
    assert [step.send and step.send.consumer for step in first] == [of(0, 1, False), of(1, 1, False), None, None]
    second = steps_of(schedule, 1, timeline)
    # F0 runs from 1 to 2, B0 from 2 to 4: both forwards are asked for before the first operation that ends after them.
    assert [[m.producer for m in step.post] for step in second] == [[of(0, 0, False)], [of(1, 0, False)], [], []]
    assert [step.receive and step.receive.producer for step in second] == [of(0, 0, False), None, of(1, 0, False), None]
