"""The episodes of each outer step, drawn in the background while the step before is computed."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from types import TracebackType

from metaloom.datasets.episodes import Episode, EpisodeSource
from metaloom.datasets.read_ahead import ReadAhead, drawn_ahead
from metaloom.datasets.streams import dealt_to_workers


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
    `share_of_rank`, and those of a rank to its workers by their virtual streams (`dealt_to_workers`). So
    neither the world size, nor the number of workers, nor a resumption changes what a step sees. An error of
    the source is raised in the consumer, after the steps that come before it. Close the stream, or use it in
    a `with` block, to end its threads and workers.

    Attributes:
        share: of this rank, in every step.

    Args:
        source: picklable, if there are workers: each is sent it once.
        tasks_per_step: tasks of all ranks together.
        read_ahead: the number of steps that are drawn, or being drawn, and not given.
        stop_step: the first step that is no longer given; None for no end.
        is_lockstep: whether every rank needs as many episodes as the others.
        num_workers: processes of this rank that draw; with 0 a thread does.

    Raises:
        StreamError: the source cannot be sent to workers.
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
        num_workers: int = 0,
    ) -> None:
        if read_ahead < 1:
            raise ValueError(f"read_ahead is {read_ahead}; it must be at least 1")
        self.share = share_of_rank(tasks_per_step, rank, world_size, is_lockstep=is_lockstep)
        self._steps = itertools.count(start_step) if stop_step is None else iter(range(start_step, stop_step))
        self._drawn_positions = list(dict.fromkeys(self.share.positions))  # a dummy once, however often
        self._is_ended = False
        # A rank without tasks has steps, and nothing to draw.
        self._ahead: ReadAhead[int, Episode] | None = None
        if self._drawn_positions:
            steps = itertools.count(start_step) if stop_step is None else range(start_step, stop_step)
            worker_of = dealt_to_workers(tasks_per_step, self._drawn_positions, max(1, num_workers))
            self._ahead = drawn_ahead(
                source.episode,
                (step * tasks_per_step + i for step in steps for i in self._drawn_positions),
                read_ahead=read_ahead * len(self._drawn_positions),
                num_workers=num_workers,
                drawer_of=lambda place, number: worker_of(number),
            )

    def __next__(self) -> tuple[int, list[Episode]]:
        if self._is_ended:
            raise StopIteration
        episodes = [] if self._ahead is None else self._ahead.take(len(self._drawn_positions))
        if len(episodes) < len(self._drawn_positions):
            raise StopIteration
        drawn = dict(zip(self._drawn_positions, episodes, strict=True))
        return next(self._steps), [drawn[i] for i in self.share.positions]

    def close(self) -> None:
        """Ends threads and workers, and with them the stream; may be called more than once."""
        self._is_ended = True
        if self._ahead is not None:
            self._ahead.close()

    def __enter__(self) -> EpisodeStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
