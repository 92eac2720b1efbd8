"""The read-ahead: order, errors, and its thread."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaloom.datasets import Episode, EpisodeSource, EpisodeStream, share_of_rank, slice_for_rank
from metaloom.errors import StreamError


class Numbers(EpisodeSource):
    """Episodes that hold their number; notes which were drawn, and fails at one."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.drawn: list[int] = []
        self.fail_at = fail_at

    def episode(self, number: int) -> Episode:
        if number == self.fail_at:
            raise StreamError(f"episode {number} is broken")
        self.drawn.append(number)
        part = {"inputs": np.array([number]), "targets": np.array([number])}
        return Episode(number=number, task=str(number), support=part, query=part)


def own_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "metaloom-episodes"]


@given(num=st.integers(0, 50), world_size=st.integers(1, 12))
def test_the_ranks_shares_are_contiguous_nearly_equal_and_all(num: int, world_size: int) -> None:
    shares = [slice_for_rank(num, rank, world_size) for rank in range(world_size)]
    assert [i for share in shares for i in share] == list(range(num))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(num=st.integers(1, 50), world_size=st.integers(1, 12))
def test_in_lockstep_shares_are_equally_long_and_hold_everything_once_beside_dummies(
    num: int, world_size: int
) -> None:
    shares = [share_of_rank(num, rank, world_size, is_lockstep=True) for rank in range(world_size)]
    assert {len(share.positions) for share in shares} == {-(-num // world_size)}
    real = [share.positions[: len(share.positions) - share.num_dummies] for share in shares]
    assert [i for positions in real for i in positions] == list(range(num))
    # What a dummy repeats is there, whatever the rank has of its own.
    assert {i for s in shares for i in s.positions[len(s.positions) - s.num_dummies :]} <= {0}


def test_out_of_lockstep_there_are_no_dummies() -> None:
    shares = [share_of_rank(4, rank, 3, is_lockstep=False) for rank in range(3)]
    assert [share.positions for share in shares] == [(0, 1), (2,), (3,)]
    assert {share.num_dummies for share in shares} == {0}


def test_a_rank_in_lockstep_gets_the_steps_first_episode_as_its_dummies() -> None:
    source = Numbers()
    words = {"tasks_per_step": 4, "world_size": 3, "start_step": 2, "stop_step": 3}
    with EpisodeStream(source, rank=2, is_lockstep=True, **words) as stream:
        assert stream.share.num_dummies == 1
        [(_, episodes)] = list(stream)
    assert [episode.number for episode in episodes] == [11, 8]
    numbers = Numbers()
    with EpisodeStream(numbers, rank=0, is_lockstep=True, **words) as stream:
        assert stream.share.num_dummies == 0
        [(_, episodes)] = list(stream)
    assert [episode.number for episode in episodes] == numbers.drawn == [8, 9]


def test_a_rank_beyond_the_world_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"rank is 2; it must be at least 0 and below world_size, which is 2"
    ):
        slice_for_rank(4, 2, 2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_all_ranks_together_see_the_same_order(world_size: int) -> None:
    steps: dict[int, list[int]] = {}
    for rank in range(world_size):
        with EpisodeStream(
            Numbers(), tasks_per_step=5, rank=rank, world_size=world_size, start_step=3, stop_step=7
        ) as stream:
            for step, episodes in stream:
                steps.setdefault(step, []).extend(e.number for e in episodes)
    assert steps == {step: [5 * step + i for i in range(5)] for step in range(3, 7)}


def test_no_more_than_read_ahead_steps_are_drawn_before_they_are_asked_for() -> None:
    source = Numbers()
    with EpisodeStream(source, tasks_per_step=2, rank=0, world_size=1, start_step=0, read_ahead=3) as stream:
        deadline = time.monotonic() + 10
        while len(source.drawn) < 6 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        assert source.drawn == list(range(6))
        assert next(stream)[0] == 0


def test_an_error_is_raised_in_the_consumer_after_the_steps_before_it() -> None:
    stream = EpisodeStream(Numbers(fail_at=5), tasks_per_step=2, rank=0, world_size=1, start_step=0)
    assert [next(stream)[0], next(stream)[0]] == [0, 1]
    with pytest.raises(StreamError, match="episode 5 is broken"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)
    stream.close()
    assert own_threads() == []


def test_close_ends_the_thread_and_the_stream() -> None:
    stream = EpisodeStream(Numbers(), tasks_per_step=2, rank=0, world_size=1, start_step=0)
    next(stream)
    assert len(own_threads()) == 1
    stream.close()
    stream.close()
    assert own_threads() == []
    with pytest.raises(StopIteration):
        next(stream)


def test_leaving_the_block_by_an_error_ends_the_thread() -> None:
    with (
        pytest.raises(KeyError),
        EpisodeStream(Numbers(), tasks_per_step=2, rank=0, world_size=1, start_step=0),
    ):
        raise KeyError
    assert own_threads() == []


def test_close_wakes_a_consumer_that_waits() -> None:
    release = threading.Event()

    class Stuck(EpisodeSource):
        def episode(self, number: int) -> Episode:
            release.wait(10)
            raise StreamError("too late to be heard")

    stream = EpisodeStream(Stuck(), tasks_per_step=1, rank=0, world_size=1, start_step=0)
    seen: list[object] = []
    consumer = threading.Thread(target=lambda: seen.extend(stream))
    consumer.start()
    closer = threading.Thread(target=stream.close)
    closer.start()
    consumer.join(timeout=10)
    release.set()
    closer.join(timeout=10)
    assert not consumer.is_alive()
    assert seen == []


def test_a_read_ahead_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="read_ahead is 0; it must be at least 1"):
        EpisodeStream(Numbers(), tasks_per_step=1, rank=0, world_size=1, start_step=0, read_ahead=0)
