"""Virtual streams: how numbers are divided, and streams dealt to workers."""

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from metaloom.datasets import NUM_STREAMS, slice_for_rank, virtual_stream
from metaloom.datasets.streams import dealt_to_workers


def test_every_stream_has_every_position_once() -> None:
    places = [virtual_stream(number) for number in range(3 * NUM_STREAMS)]
    assert places[:2] == [(0, 0), (1, 0)]
    assert sorted(places) == [(stream, position) for stream in range(NUM_STREAMS) for position in range(3)]


ranks = st.tuples(st.integers(1, 130), st.integers(1, 9), st.integers(0, 8)).filter(
    lambda words: words[2] < min(words[0], words[1])
)


@given(words=ranks, num_workers=st.integers(1, 6))
def test_a_workers_streams_are_whole_and_its_share_of_a_step_fair(
    words: tuple[int, int, int], num_workers: int
) -> None:
    tasks_per_step, world_size, rank = words
    positions = slice_for_rank(tasks_per_step, rank, world_size)
    worker_of = dealt_to_workers(tasks_per_step, positions, num_workers)
    owners: dict[int, set[int]] = {}
    for step in range(2 * NUM_STREAMS):
        numbers = [step * tasks_per_step + position for position in positions]
        load = Counter(worker_of(number) for number in numbers)
        assert max(load.values()) <= math.ceil(len(numbers) / num_workers) + 1
        for number in numbers:
            owners.setdefault(virtual_stream(number)[0], set()).add(worker_of(number))
    assert set().union(*owners.values()) == set(range(num_workers))  # none is idle for ever
    if len(owners) >= num_workers:
        assert all(len(workers) == 1 for workers in owners.values())


def test_steps_that_begin_at_any_stream_are_shared_fairly() -> None:
    positions = slice_for_rank(21, 0, 2)
    worker_of = dealt_to_workers(21, positions, 3)
    for step in range(NUM_STREAMS):
        load = Counter(worker_of(21 * step + position) for position in positions)
        assert max(load.values()) <= 5  # of 11


def test_workers_take_turns_where_a_rank_has_fewer_streams_than_workers() -> None:
    worker_of = dealt_to_workers(128, [6, 7], 3)  # two streams alone
    assert [worker_of(128 * step + i) for step in range(3) for i in (6, 7)] == [0, 1, 2, 0, 1, 2]


def test_workers_take_turns_where_a_rank_has_one_task_in_each_step() -> None:
    worker_of = dealt_to_workers(6, [2], 3)
    assert [worker_of(6 * step + 2) for step in range(9)] == [0, 1, 2] * 3
