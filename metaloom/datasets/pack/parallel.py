"""Samples made by several processes, in the order of their descriptions: their number changes no byte."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from types import TracebackType

from metaloom.datasets.members import BLOCK, padded
from metaloom.datasets.pack.plan import BadSample, Content, Item, SampleMaker
from metaloom.datasets.reader import SAMPLE_LIMIT_BYTES
from metaloom.errors import StreamError

CHUNK = 32  # samples that go to a process at a time
_MADE_IN_ADVANCE = 2  # chunks per process, besides one that is being made
# Members that say what a sample is of, not what it shows.
_ABOUT = ("json", "target.npy")


@dataclass(frozen=True)
class Made:
    """A sample's content and the digest of what it shows, or why there is none."""

    content: Content | None
    digest: bytes
    reason: str = ""


def make_chunk(maker: SampleMaker, items: Sequence[Item]) -> list[Made]:
    """What becomes of each description."""
    return [_made(maker, item) for item in items]


class Workers:
    """Processes that make samples; use it in a `with` block, which ends them.

    Ctrl-C is left to the process that started them; when that is gone, they end too.

    Args:
        num_processes: 1 makes samples in this process.
    """

    def __init__(self, maker: SampleMaker, *, num_processes: int) -> None:
        self._maker = maker
        self._num_processes = num_processes
        self._pool: ProcessPoolExecutor | None = None
        self._others: frozenset[BaseProcess] = frozenset()

    def __enter__(self) -> Workers:
        if self._num_processes > 1:
            self._others = frozenset(multiprocessing.active_children())
            self._pool = ProcessPoolExecutor(
                self._num_processes,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(self._maker,),
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is None:
            return
        if kind is not None:
            # What they are at is of no use any more, and may take long.
            for process in frozenset(multiprocessing.active_children()) - self._others:
                process.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def make(self, items: Iterable[Item]) -> Iterator[tuple[Item, Made]]:
        """Every description with what became of it, in order.

        At most 3 chunks per process are there at a time.

        Raises:
            StreamError: a process was ended from outside.
        """
        source = iter(items)
        chunks: Iterator[list[Item]] = iter(lambda: list(itertools.islice(source, CHUNK)), [])
        if self._pool is None:
            for chunk in chunks:
                yield from zip(chunk, make_chunk(self._maker, chunk), strict=True)
            return
        waiting: deque[tuple[list[Item], Future[list[Made]]]] = deque()
        try:
            for chunk in chunks:
                with _interrupts_wait():
                    waiting.append((chunk, self._pool.submit(_make, chunk)))
                if len(waiting) >= self._num_processes * (1 + _MADE_IN_ADVANCE):
                    yield from _first(waiting)
            while waiting:
                yield from _first(waiting)
        except BrokenProcessPool as error:
            raise StreamError(
                "a process that makes samples was ended from outside, perhaps for lack of memory; the data "
                "set is not finished. Run the same command again, with fewer --processes if memory is short."
            ) from error


def _first(waiting: deque[tuple[list[Item], Future[list[Made]]]]) -> Iterator[tuple[Item, Made]]:
    chunk, future = waiting.popleft()
    return zip(chunk, future.result(), strict=True)


def _made(maker: SampleMaker, item: Item) -> Made:
    try:
        content = maker.content(item)
    except BadSample as error:
        return Made(None, b"", str(error))
    num_bytes = _num_bytes_in_a_tar(item.key, content)
    if num_bytes > SAMPLE_LIMIT_BYTES:
        return Made(
            None, b"", f"takes up to {num_bytes} bytes in a shard; readers take {SAMPLE_LIMIT_BYTES} at most"
        )
    shown = {name: payload for name, payload in content.members.items() if name not in _ABOUT}
    digest = hashlib.sha256()
    for name, payload in sorted((shown or content.members).items()):
        digest.update(f"{name} {len(payload)}\n".encode())
        digest.update(payload)
    return Made(content, digest.digest()[:16])


def _num_bytes_in_a_tar(key: str, content: Content) -> int:
    """The most that a sample's entries can take: each has its headers, and there may be a `cls` besides."""
    headers = 3 * BLOCK + 2 * padded(len(key.encode()))
    return BLOCK + headers + sum(headers + padded(len(payload)) for payload in content.members.values())


# What follows runs in the processes.

_maker: SampleMaker | None = None


def _begin(maker: SampleMaker) -> None:
    global _maker
    _maker = maker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="metaloom-parent", daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone: nobody else would tell it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _make(items: list[Item]) -> list[Made]:
    assert _maker is not None
    return make_chunk(_maker, items)


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """A Ctrl-C comes when the block ends; processes that it starts inherit that, and never get one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
