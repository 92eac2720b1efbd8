"""Read-ahead: the episodes of each outer step, drawn in a thread while the step before is computed."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections import deque
from collections.abc import Iterator
from types import TracebackType

from metaloom.datasets.episodes import Episode, EpisodeSource


def slice_for_rank(num: int, rank: int, world_size: int) -> range:
    """The share of `num` things that belongs to a rank: contiguous, and equal to within one.

    The first `num % world_size` ranks have one more. Over all ranks, in order, the shares are range(num).
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}; it must be at least 0 and below world_size, which is {world_size}")
    share, rest = divmod(num, world_size)
    start = rank * share + min(rank, rest)
    return range(start, start + share + (rank < rest))


@dataclasses.dataclass(frozen=True)
class Share:
    """What one rank computes of things that are dealt to all ranks.

    Attributes:
        positions: of the things; those of dummies come last.
        num_dummies: how many are dummies, which repeat what counts elsewhere.
    """

    positions: tuple[int, ...]
    num_dummies: int


def share_of_rank(num: int, rank: int, world_size: int, *, is_lockstep: bool) -> Share:
    """The share of `slice_for_rank`; in lockstep filled up with dummies, so that all are equally long.

    A dummy repeats the first thing, which every rank can have, whatever it has of its own.
    """
    own = tuple(slice_for_rank(num, rank, world_size))
    num_dummies = math.ceil(num / world_size) - len(own) if is_lockstep else 0
    return Share((*own, *(0,) * num_dummies), num_dummies)


class EpisodeStream(Iterator[tuple[int, list[Episode]]]):
    """(step, this rank's episodes) for step = start_step, start_step + 1 ...

    The episodes of a step are those of numbers step * tasks_per_step + i, dealt to the ranks by
    `share_of_rank`; so neither the world size nor a resumption changes what a step sees. An error of the
    source is raised in the consumer, after the steps that were ready before it. Close the stream, or use it
    in a `with` block, to end its thread.

    Attributes:
        share: of this rank, in every step.

    Args:
        tasks_per_step: tasks of all ranks together.
        read_ahead: the number of steps that are kept ready.
        stop_step: the first step that is no longer given; None for no end.
        is_lockstep: whether every rank needs as many episodes as the others.
    """

    def __init__(
        self,
        source: EpisodeSource,
        *,
        tasks_per_step: int,
        rank: int,
        world_size: int,
        start_step: int,
        read_ahead: int = 2,
        stop_step: int | None = None,
        is_lockstep: bool = False,
    ) -> None:
        if read_ahead < 1:
            raise ValueError(f"read_ahead is {read_ahead}; it must be at least 1")
        self._source = source
        self._tasks_per_step = tasks_per_step
        self.share = share_of_rank(tasks_per_step, rank, world_size, is_lockstep=is_lockstep)
        self._next_step = start_step
        self._stop_step = stop_step
        self._read_ahead = read_ahead
        self._ready: deque[tuple[int, list[Episode]]] = deque()
        self._error: BaseException | None = None
        self._finished = False  # nothing will be added to _ready any more
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._draw_steps, name="metaloom-episodes", daemon=True)
        self._thread.start()

    def __next__(self) -> tuple[int, list[Episode]]:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._finished)
            if self._ready:
                item = self._ready.popleft()
                self._changed.notify_all()
                return item
            error, self._error = self._error, None
        if error is not None:
            raise error
        raise StopIteration

    def close(self) -> None:
        """Ends the thread, and with it the stream; may be called more than once."""
        with self._changed:
            self._finished = True
            self._ready.clear()
            self._error = None
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> EpisodeStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _draw_steps(self) -> None:
        try:
            step = self._next_step
            while (self._stop_step is None or step < self._stop_step) and self._wait_for_room():
                first = step * self._tasks_per_step
                # A dummy is drawn once, however often it is repeated.
                drawn = {i: self._source.episode(first + i) for i in dict.fromkeys(self.share.positions)}
                self._add(step, [drawn[i] for i in self.share.positions])
                step += 1
        except BaseException as error:  # whatever it is, the consumer must hear of it
            with self._changed:
                if not self._finished:
                    self._error = error
        finally:
            with self._changed:
                self._finished = True
                self._changed.notify_all()

    def _wait_for_room(self) -> bool:
        """True when another step may be drawn, False when the stream is closed."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._ready) < self._read_ahead or self._finished)
            return not self._finished

    def _add(self, step: int, episodes: list[Episode]) -> None:
        with self._changed:
            if not self._finished:
                self._ready.append((step, episodes))
                self._changed.notify_all()
