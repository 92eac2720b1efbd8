"""Sources of episodes for tests of streams: light to import, since worker processes do so."""

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Container
from pathlib import Path
from typing import NoReturn

import numpy as np

from metaloom.datasets import Episode, EpisodeSource, EpisodeStream
from metaloom.errors import StreamError


class Numbers(EpisodeSource):
    """Episodes whose arrays follow from their number, some drawn faster than others."""

    def __init__(self, *, is_uneven: bool = False, noted_in: Path | None = None) -> None:
        self._is_uneven = is_uneven
        self._noted_in = noted_in

    def episode(self, number: int) -> Episode:
        if self._is_uneven:
            time.sleep(hashlib.sha256(str(number).encode()).digest()[0] / 255 * 0.001)
        if self._noted_in is not None:
            with self._noted_in.open("a") as file:  # one write of a line, which is whole
                file.write(f"{number}\n")
        rng = np.random.default_rng(number)
        support, query = (
            {"inputs": rng.normal(size=(3, number % 5)), "targets": np.array([number])} for _ in range(2)
        )
        return Episode(number=number, task=f"task {number}", support=support, query=query)


class OddError(StreamError):
    """An error that is made from other things than its text."""

    def __init__(self, key: str, number: int) -> None:
        super().__init__(f"sample {key!r} of episode {number} is broken")
        self.key = key


class Failing(Numbers):
    """Does something bad for some numbers."""

    def __init__(self, numbers: Container[int], kind: str, folder: Path) -> None:
        super().__init__()
        self._numbers, self._kind, self._folder = numbers, kind, folder

    def episode(self, number: int) -> Episode:
        return self._fail(number) if number in self._numbers else super().episode(number)

    def _fail(self, number: int) -> NoReturn:
        if self._kind == "odd":
            raise OddError("a/b", number)
        if self._kind == "system":
            raise FileNotFoundError(2, "No such file or directory", "/there")
        if self._kind == "local":

            class LocalError(Exception):
                pass

            raise LocalError(f"local to {number}")
        if self._kind == "exit":
            os._exit(3)
        if self._kind == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        (self._folder / f"{os.getpid()}.drawing").touch()
        time.sleep(600)
        raise AssertionError("nobody waits for so long")


def unpicklable(number: int) -> Callable[[], int]:
    """What no worker can send."""
    return lambda: number


class Surroundings(Numbers):
    """Tells of the process that draws, by the episode's task."""

    def __init__(self, source: EpisodeSource) -> None:
        super().__init__()
        self._source = source

    def episode(self, number: int) -> Episode:
        print("printed by a worker")
        drawn = self._source.episode(number)
        text = " ".join([os.environ["OMP_NUM_THREADS"], *sys.modules])
        return Episode(number=number, task=text, support=drawn.support, query=drawn.query)


def same_episode(a: Episode, b: Episode) -> bool:
    """Whether two episodes hold the same, bit for bit."""
    pairs = [(a.support, b.support), (a.query, b.query)]
    for one, other in ((a.rehearsal, b.rehearsal), (a.outer_rehearsal, b.outer_rehearsal)):
        if one is not None and other is not None:
            pairs.append((one, other))
        elif one is not other:
            return False
    return (a.number, a.task) == (b.number, b.task) and all(
        x.keys() == y.keys()
        and all(x[name].dtype == y[name].dtype and np.array_equal(x[name], y[name]) for name in x)
        for x, y in pairs
    )


def wait_for_what_is_stuck(folder: str) -> None:
    """A rank whose two workers never give what it waits for."""
    source = Failing(range(2), "stuck", Path(folder))
    with EpisodeStream(source, tasks_per_step=2, rank=0, world_size=1, start_step=0, num_workers=2) as stream:
        next(stream)
