"""The read-ahead: order, errors, threads and workers (how these end: tests/faults/test_data_workers.py)."""

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metaloom.datasets import (
    Affine,
    ClassEpisodes,
    DocumentEpisodes,
    Episode,
    EpisodeSource,
    EpisodeStream,
    Index,
    ReadAhead,
    Ways,
    drawn_ahead,
    read_ahead,
    share_of_rank,
    slice_for_rank,
)
from metaloom.datasets.workers import OwnThread, WorkerProcess, packed_draw
from metaloom.errors import StreamError
from tests.sources import Numbers as FakeEpisodes
from tests.sources import Surroundings, same_episode


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
    return [thread for thread in threading.enumerate() if thread.name == "metaloom-read-ahead"]


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


def test_a_number_of_workers_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="num_workers is -1; it must be at least 0"):
        drawn_ahead(len, ["a"], read_ahead=1, num_workers=-1)


def test_more_than_is_kept_ready_cannot_be_taken_together() -> None:
    with (
        drawn_ahead(len, ["a", "bb"], read_ahead=1) as ahead,
        pytest.raises(ValueError, match="2 were asked for at a time, of which at most 1 are kept ready"),
    ):
        ahead.take(2)


@given(
    num=st.integers(0, 9),
    read_ahead=st.integers(1, 4),
    counts=st.lists(st.integers(1, 4), max_size=9),
)
def test_what_is_taken_together_is_in_order_and_ends_with_the_arguments(
    num: int, read_ahead: int, counts: list[int]
) -> None:
    with drawn_ahead(str, range(num), read_ahead=read_ahead) as ahead:
        taken = [text for count in counts for text in ahead.take(min(count, read_ahead))]
        assert taken + list(ahead) == [str(n) for n in range(num)]


def test_all_that_comes_before_an_error_is_given_although_it_is_drawn_after_it() -> None:
    is_raised = threading.Event()

    def draw(number: int) -> int:
        if number == 9:
            is_raised.set()
            raise StreamError("9 is broken")
        if number % 2 == 0:
            is_raised.wait(10)
            time.sleep(0.02)
        return number

    drawers = [OwnThread(draw), OwnThread(draw)]
    with ReadAhead(drawers, range(20), limit=20, drawer_of=lambda place, number: number % 2) as ahead:
        assert ahead.take(9) == list(range(9))
        with pytest.raises(StreamError, match="9 is broken"):
            ahead.take(1)


# ---------------------------------------------------------------- worker processes


class Lent:
    """A worker that is lent to one stream after the other, since starting one takes a while."""

    max_asked = WorkerProcess.max_asked

    def __init__(self, worker: WorkerProcess[int, Episode]) -> None:
        self._worker = worker
        self._asked: deque[int] = deque()
        self.drawn: list[int] = []

    def ask(self, number: int) -> None:
        self._worker.ask(number)
        self._asked.append(number)

    def answer(self) -> Episode:
        self.drawn.append(self._asked.popleft())
        return self._worker.answer()

    def stop(self) -> None:
        """What it draws now takes no time."""

    def end(self) -> None:
        while self._asked:
            self.answer()


@pytest.fixture(scope="module")
def workers() -> Iterator[Sequence[WorkerProcess[int, Episode]]]:
    draw = packed_draw(FakeEpisodes(is_uneven=True).episode, noun="episode")
    started = [WorkerProcess[int, Episode](draw, name="lent", noun="episode") for _ in range(3)]
    for worker in started:
        worker.ask(0)  # the thread that starts a worker has to stay
    for worker in started:
        worker.answer()
    yield started
    for worker in started:
        worker.end()


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), tasks_per_step=st.integers(1, 17))
def test_each_episode_comes_once_and_the_same_over_ranks_workers_stops_and_restarts(
    workers: Sequence[WorkerProcess[int, Episode]], data: st.DataObject, tasks_per_step: int
) -> None:
    direct = FakeEpisodes()
    start = data.draw(st.integers(0, 70), label="first step")
    for _ in range(data.draw(st.integers(1, 3), label="starts")):
        world_size = data.draw(st.integers(1, 5), label="world size")
        num_workers = data.draw(st.integers(0, 3), label="workers")
        ahead = data.draw(st.integers(1, 3), label="read_ahead")
        is_lockstep = data.draw(st.booleans(), label="lockstep")
        num_steps = data.draw(st.integers(0, 4), label="steps")
        stop = data.draw(st.sampled_from([None, start + num_steps, start + num_steps + 1]), label="stop_step")
        seen: dict[int, list[Episode]] = {step: [] for step in range(start, start + num_steps)}
        for rank in range(world_size):
            with pytest.MonkeyPatch.context() as patch:
                lent = [Lent(worker) for worker in workers]
                waiting = iter(lent)
                patch.setattr(read_ahead, "WorkerProcess", lambda message, name, noun, w=waiting: next(w))
                with EpisodeStream(
                    FakeEpisodes(),
                    tasks_per_step=tasks_per_step,
                    rank=rank,
                    world_size=world_size,
                    start_step=start,
                    read_ahead=ahead,
                    stop_step=stop,
                    is_lockstep=is_lockstep,
                    num_workers=num_workers,
                ) as stream:
                    for _ in range(num_steps):
                        step, episodes = next(stream)
                        num_real = len(episodes) - stream.share.num_dummies
                        seen[step] += episodes[:num_real]
                        assert all(episode.number == step * tasks_per_step for episode in episodes[num_real:])
                    if stop == start + num_steps:
                        assert list(stream) == []
                # Whichever are not used draw nothing, and none draws what another does.
                assert [worker.drawn for worker in lent[num_workers:]] == [[]] * (3 - num_workers)
                drawn = [number for worker in lent for number in worker.drawn]
                assert len(drawn) == len(set(drawn))
        for step, episodes in seen.items():
            numbers = [step * tasks_per_step + i for i in range(tasks_per_step)]
            assert [episode.number for episode in episodes] == numbers
            assert all(same_episode(episode, direct.episode(episode.number)) for episode in episodes)
        start += num_steps


def test_workers_draw_no_more_than_read_ahead_steps_before_they_are_asked_for(tmp_path: Path) -> None:
    noted = tmp_path / "numbers"

    def drawn() -> list[int]:
        return sorted(map(int, noted.read_text().split())) if noted.exists() else []

    with EpisodeStream(
        FakeEpisodes(noted_in=noted),
        tasks_per_step=3,
        rank=0,
        world_size=1,
        start_step=0,
        read_ahead=2,
        num_workers=2,
    ) as stream:
        for num_given in range(3):
            deadline = time.monotonic() + 30
            while len(drawn()) < 3 * (num_given + 2) and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(0.05)
            assert drawn() == list(range(3 * (num_given + 2)))
            assert next(stream)[0] == num_given


def test_workers_draw_real_shards_as_their_parent_does(glyphs: Path, stdlib: Path) -> None:
    for source in (
        ClassEpisodes(Index.load(glyphs), "train", ways=Ways(5, 1, 2), seed=0, affine=Affine(rotate_deg=9)),
        DocumentEpisodes(
            Index.load(stdlib),
            "train",
            num_support=2,
            num_query=2,
            sequence_length=32,
            seed=0,
        ),
    ):
        with EpisodeStream(
            source, tasks_per_step=3, rank=0, world_size=1, start_step=5, stop_step=9, num_workers=2
        ) as stream:
            episodes = [episode for _, drawn in stream for episode in drawn]
        assert [episode.number for episode in episodes] == list(range(15, 27))
        assert all(same_episode(episode, source.episode(episode.number)) for episode in episodes)


def test_a_worker_imports_no_torch_computes_on_one_thread_and_prints_nothing_of_its_own(
    glyphs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = Surroundings(ClassEpisodes(Index.load(glyphs), "train", ways=Ways(5, 1, 2), seed=0))
    with drawn_ahead(source.episode, [0], read_ahead=1, num_workers=1) as ahead:
        num_threads, *modules = next(ahead).task.split()
    assert num_threads == "1"
    assert {"metaloom.datasets.shards", "numpy"} <= set(modules)
    assert not {"torch", "webdataset", "pydantic", "matplotlib", "mlflow"} & set(modules)
    output = capfd.readouterr()
    assert (output.out, output.err) == ("", "printed by a worker\n")
