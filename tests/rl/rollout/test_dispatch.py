import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.rollout.dispatch import (
    EngineState,
    WaitingGroup,
    engines_for_longest,
    get_dispatch,
    group_latency,
    longest_first,
)

POLICIES = ("fcfs", "random", "longest_first", "skew_aware")


def step_seconds(running: int) -> float:
    return 0.01 + 0.0005 * running


def make(name: str, **more):
    return get_dispatch(name, **({"step_seconds": step_seconds} if name == "skew_aware" else {}), **more)


def groups(*tokens: float | None, samples: int = 4) -> list[WaitingGroup]:
    return [WaitingGroup(f"p{i}", i, samples, each) for i, each in enumerate(tokens)]


def engines(*outstanding: int, seats: int = 8, speeds=None) -> list[EngineState]:
    return [
        EngineState(i, seats, held, None if speeds is None else speeds[i], True) for i, held in enumerate(outstanding)
    ]


def test_first_come_first_served_to_the_emptiest_while_there_is_room() -> None:
    assert make("fcfs").assign(groups(1, 2, 3, 4), engines(12, 4)) == [(0, 1), (1, 1), (2, 0), (3, 1)]
    assert make("fcfs").assign(groups(1, 2), engines(16, 13)) == []
    # The order of submission counts, not the place in the list; an empty engine takes what is larger than its room.
    late, early = WaitingGroup("late", 9, 40, None), WaitingGroup("early", 2, 40, None)
    assert make("fcfs").assign([late, early], engines(0, seats=8)) == [(1, 0)]


def test_faster_engines_get_more() -> None:
    sent = make("fcfs").assign(groups(*[1.0] * 4), engines(0, 0, speeds=[300.0, 100.0]))
    assert [engine for _, engine in sent].count(0) == 3
    # An unknown speed is the mean of the others.
    some = [EngineState(0, 8, 0, 100.0, True), EngineState(1, 8, 0, None, True)]
    assert make("fcfs").assign(groups(1, 1), some) == [(0, 0), (1, 1)]


def test_longest_first_by_batch_and_unknown_ones_in_the_middle() -> None:
    some = groups(10, None, 30, 20)
    assert longest_first(some) == [2, 1, 3, 0]
    assert longest_first([*some, WaitingGroup("next", 4, 4, 99, batch=1)]) == [2, 1, 3, 0, 4]
    assert [position for position, _ in make("longest_first").assign(some, engines(0, 0))] == [2, 1, 3, 0]


def test_random_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    some, idle = groups(*[None] * 20), engines(0, 0, 0, seats=40)
    first = make("random", seed=1).assign(some, idle)
    assert first == make("random", seed=1).assign(some, idle)
    assert first != make("random", seed=2).assign(some, idle)
    assert sorted(position for position, _ in first) == list(range(20))


def test_the_longest_are_alone_on_their_engines() -> None:
    tokens = [1000.0] * 2 + [10.0] * 8
    policy = make("skew_aware")
    sent = policy.assign(groups(*tokens), engines(0, 0, 0, 0, seats=16))
    of_long = {engine for position, engine in sent if position < 2}
    of_rest = {engine for position, engine in sent if position >= 2}
    assert len(sent) == 10
    assert of_long
    assert of_long == set(policy.dedicated)
    assert not of_long & of_rest
    # A group that comes back keeps its class; when its engines are gone, the others take it.
    lost = groups(*tokens)[0]
    assert {engine for _, engine in policy.assign([lost], engines(0, 0, 0, 0, seats=16))} <= of_long
    alive = [
        EngineState(state.index, 16, 0, None, state.index not in of_long) for state in engines(0, 0, 0, 0, seats=16)
    ]
    assert policy.assign([lost], alive)[0][1] not in of_long


def test_without_predictions_nothing_is_isolated() -> None:
    policy = make("skew_aware")
    assert len(policy.assign(groups(None, None, None, None, None), engines(0, 0))) == 5
    assert policy.dedicated == ()


def test_engines_of_the_long_help_with_the_rest_up_to_their_batch() -> None:
    policy = make("skew_aware", fraction=0.25)
    some = groups(1000.0, *[100.0] * 3, samples=4)
    policy.assign(some, engines(0, 0, seats=4))
    (dedicated,) = policy.dedicated
    held = [16, 16]
    held[dedicated] = 0
    assert policy.assign(some[1:], engines(*held, seats=4)) == [(0, dedicated)]
    held[dedicated] = 2
    assert policy.assign(some[1:], engines(*held, seats=4)) == []


@pytest.mark.parametrize(("samples", "seats", "count"), [(10, 4, 3), (64, 64, 1), (65, 64, 1), (7, 8, 5)])
def test_latency_of_equal_engines_is_the_published_formula(samples: int, seats: int, count: int) -> None:
    best = min(step_seconds(b) * 500 * math.ceil(samples / (count * b)) for b in range(1, min(seats, samples) + 1))
    assert group_latency(step_seconds, samples, 500.0, [seats] * count, [1.0] * count) == pytest.approx(best)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.integers(2, 9),
    st.integers(1, 16),
    st.integers(1, 120),
    st.integers(1, 400),
    st.floats(1.0, 50.0),
)
def test_the_enumeration_finds_the_optimum(count: int, seats: int, long: int, rest: int, longer: float) -> None:
    """Against a search written out: every split, every batch size of either side."""

    def latency(samples: int, tokens: float, engines: int) -> float:
        share = math.ceil(samples / engines)
        return min(step_seconds(b) * tokens * math.ceil(share / b) for b in range(1, min(seats, share) + 1))

    every = {k: max(latency(long, 100 * longer, k), latency(rest, 100, count - k)) for k in range(1, count)}
    k, seconds = engines_for_longest(step_seconds, (long, 100 * longer), (rest, 100.0), [seats] * count, [1.0] * count)
    assert seconds == pytest.approx(min(every.values()))
    assert every[k] == pytest.approx(seconds)


def test_fast_engines_count_for_more() -> None:
    alone = group_latency(step_seconds, 8, 100.0, [8], [2.0])
    assert alone == pytest.approx(group_latency(step_seconds, 8, 100.0, [8], [1.0]) / 2)
    # 12 samples on speeds 2 and 1: 8 and 4.
    assert group_latency(step_seconds, 12, 100.0, [8, 8], [2.0, 1.0]) == pytest.approx(
        max(step_seconds(8) / 2, step_seconds(4)) * 100
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(POLICIES),
    st.lists(st.tuples(st.integers(1, 9), st.one_of(st.none(), st.floats(1, 1e4))), min_size=1, max_size=40),
    st.integers(1, 5),
    st.integers(1, 6),
    st.randoms(use_true_random=False),
)
def test_every_group_goes_out_exactly_once(name, wanted, count, seats, random) -> None:
    """Engines give room in any order, refuse for a while, and groups come in two lots."""
    policy = make(name)
    all_groups = [WaitingGroup(f"p{i}", i, samples, tokens) for i, (samples, tokens) in enumerate(wanted)]
    waiting, later = all_groups[::2], all_groups[1::2]
    held: dict[int, list[WaitingGroup]] = {index: [] for index in range(count)}
    sent: list[str] = []
    for _ in range(20 * len(all_groups) + 20):
        states = [
            EngineState(
                i, seats, sum(g.samples for g in held[i]), random.choice([None, 50.0, 100.0]), random.random() < 0.7
            )
            for i in range(count)
        ]
        pairs = policy.assign(waiting, states)
        assert len({position for position, _ in pairs}) == len(pairs)
        for position, index in pairs:
            assert states[index].accepting
            held[index].append(waiting[position])
            sent.append(waiting[position].uid)
        for index in {index for _, index in pairs}:
            own = [g.samples for g in held[index]]
            assert len(own) == 1 or sum(own) <= 2 * seats
        waiting = [group for position, group in enumerate(waiting) if position not in {p for p, _ in pairs}]
        waiting, later = waiting + later, []
        busy = [index for index in held if held[index]]
        if busy and random.random() < 0.8:
            held[random.choice(busy)].pop(0)
        if not waiting:
            break
    assert sorted(sent) == sorted(group.uid for group in all_groups)


@pytest.mark.parametrize("name", POLICIES)
def test_idle_engines_that_accept_get_something(name: str) -> None:
    """Whatever the classes of what waits: else nothing would ever happen again."""
    policy = make(name)
    some = groups(*[float(10 * i) for i in range(1, 11)])
    policy.assign(some, engines(0, 0, 0))
    for lone in some:
        assert policy.assign([lone], engines(0, 0, 0))


def test_faults() -> None:
    with pytest.raises(ValueError, match="one of fcfs, random"):
        get_dispatch("best")
    with pytest.raises(ValueError, match=r"measure_latency\.py"):
        get_dispatch("skew_aware")
    with pytest.raises(ValueError, match="seed do not suit"):
        get_dispatch("fcfs", seed=3)
    with pytest.raises(ValueError, match="fill >= 1"):
        get_dispatch("fcfs", fill=0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        make("skew_aware", fraction=1.0)
