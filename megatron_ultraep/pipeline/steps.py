"""From a valid schedule to the flat list of what one node does: receives to post, one operation, one send.

1. A send comes right after its producer.
2. Receives are posted in the order in which their messages are sent, over all nodes, in the simulated time of the
   schedule: so what travels on one connection is asked for in the order in which it comes.
3. A receive is posted before the operation during which its message is sent. Posted earlier, it would occupy the device
   while it waits; posted later, the transfer would begin later.
4. A receive is never posted after the operation that needs it.

Every rank of a node does the same; messages go to the rank at the same place in the neighbour's node.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ultraep.pipeline.problem import Operation, Schedule
from megatron_ultraep.pipeline.simulate import Timeline


@dataclass(frozen=True)
class Message:
    """What one operation hands to the next of its micro-batch.

    Attributes:
        producer, consumer: the operations; the consumer's ``backward`` tells the direction.
        source, target: nodes.
    """

    producer: Operation
    consumer: Operation
    source: int
    target: int


@dataclass(frozen=True)
class Step:
    """What a node does next.

    Attributes:
        post: receives to post first, in order; some are for later steps.
        operation: what to run then.
        receive: what it needs, posted here or earlier; None on the first stage of its direction.
        send: what its result becomes; None on the last stage of its direction.
    """

    post: tuple[Message, ...]
    operation: Operation
    receive: Message | None
    send: Message | None


def message_of(schedule: Schedule, producer: Operation) -> Message | None:
    """What an operation hands on; None at the end of its direction."""
    replica = schedule.problem.models[producer.model].nodes[producer.replica]
    stage = producer.stage + (-1 if producer.backward else 1)
    if not 0 <= stage < len(replica):
        return None
    consumer = Operation(producer.model, producer.replica, stage, producer.microbatch, producer.backward)
    return Message(producer, consumer, replica[producer.stage], replica[stage])


def steps_of(schedule: Schedule, node: int, timeline: Timeline) -> tuple[Step, ...]:
    """What ``node`` does, in order; the timeline is the schedule's."""
    times = {operation: when for (_, operation), when in timeline.times().items()}
    end = {operation: when[1] for operation, when in times.items()}
    mine = timeline.operations[node]
    place = {operation: i for i, operation in enumerate(mine)}
    messages = (message_of(schedule, operation) for operation in times)
    incoming = [message for message in messages if message is not None and message.target == node]
    incoming.sort(key=lambda m: (end[m.producer], times[m.producer][0], m.source, m.consumer))
    post: list[list[Message]] = [[] for _ in mine]
    limit, position = len(mine), len(mine) - 1
    for message in reversed(incoming):
        while position > 0 and end[mine[position - 1]] > end[message.producer]:
            position -= 1
        limit = min(limit, position, place[message.consumer])
        post[limit].append(message)
    wanted = {message.consumer: message for message in incoming}
    return tuple(
        Step(tuple(reversed(post[i])), operation, wanted.get(operation), message_of(schedule, operation))
        for i, operation in enumerate(mine)
    )
