"""Virtual streams: a fixed number of sequences that the episodes of a run are divided into.

Neither ranks nor workers nor steps come into the division, so what follows from a stream and a position in it
is the same for all of them. A stream is the unit of locality: whoever draws it meets neighbouring positions
one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

NUM_STREAMS = 64


def virtual_stream(number: int) -> tuple[int, int]:
    """The stream of episode `number`, 0 to NUM_STREAMS - 1, and the episode's position in it, from 0.

    Stream and position are the remainder and the quotient of number / NUM_STREAMS.
    """
    position, stream = divmod(number, NUM_STREAMS)
    return stream, position


def dealt_to_workers(tasks_per_step: int, positions: Sequence[int], num_workers: int) -> Callable[[int], int]:
    """Which of its workers, 0 to `num_workers` - 1, draws an episode of a rank, by the episode's number.

    Of the streams that the rank meets, each belongs to one worker, so that a worker's caches see one stretch
    of data. They are dealt in turn: in the order in which the rank meets them, if it meets all of them before
    one comes again, else by number. Where there are fewer streams than workers (64 tasks a step on as many
    ranks: one stream each), the episodes are dealt in turn instead. What is drawn does not depend on it.

    Args:
        tasks_per_step: of all ranks.
        positions: of the episodes in each step that the rank draws, without repetition.
    """
    place = {position: index for index, position in enumerate(positions)}
    period = NUM_STREAMS // math.gcd(tasks_per_step, NUM_STREAMS)  # steps until the same streams come again
    met = [
        virtual_stream(step * tasks_per_step + position)[0]
        for step in range(period)
        for position in positions
    ]
    streams = list(dict.fromkeys(met))
    if len(streams) < num_workers:

        def in_turn(number: int) -> int:
            step, position = divmod(number, tasks_per_step)
            return (step * len(place) + place[position]) % num_workers

        return in_turn
    if len(streams) < len(met):
        streams.sort()
    owner = {stream: index % num_workers for index, stream in enumerate(streams)}
    return lambda number: owner[virtual_stream(number)[0]]
