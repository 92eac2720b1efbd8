"""One process's way to the files at a URL: a request is made until it is answered, or the storage counts as
down."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from fsspec.implementations.local import LocalFileSystem

from metaloom.datasets.drivers import (
    Meaning,
    asked_pause_s,
    close_filesystem,
    credentials_advice,
    described,
    meaning,
    open_for_requests,
    read_range,
    read_size,
    read_whole,
    shown,
)
from metaloom.datasets.extents import Extent
from metaloom.errors import StreamError

T = TypeVar("T")

_RANDOM = random.SystemRandom()  # jitter must not move any generator that decides data


class MissingFile(StreamError):
    """A file that is not at its URL."""


class TruncatedFile(StreamError):
    """A file that is shorter at its URL than was recorded."""


class _ShortAnswerError(OSError):
    """Fewer bytes came back than were asked for."""


@dataclass(frozen=True)
class Persistence:
    """How long a request is tried.

    Attributes:
        num_attempts: how often it is made.
        backoff_s: before attempt n + 1, a wait is drawn evenly from 0 to `backoff_s * 2**(n - 1)` ("full
            jitter"), so that readers that failed together do not come back together.
        max_backoff_s: where the doubling ends.
        timeout_s: how long one attempt may take, and how much of the pause that a server asks for it gets
            before the wait.
    """

    num_attempts: int
    backoff_s: float
    max_backoff_s: float
    timeout_s: float

    def wait_s(self, attempt: int, asked_s: float = 0.0) -> float:
        """How long to wait after attempt number `attempt`, from 1, has failed, and the server has asked for a
        pause of `asked_s`; drawn anew every time."""
        longest_s = min(self.max_backoff_s, self.backoff_s * 2 ** (attempt - 1))
        return min(self.timeout_s, asked_s) + _RANDOM.uniform(0.0, longest_s)


class Connection:
    """Requests for the files at a URL, from the process that made this; at most `num_connections` at once.

    The coroutines run on the event loop of the drivers. They may be called from several threads.

    Attributes:
        num_bytes, num_requests, num_retries: what came from storage; attempts made, of which so many again.

    Raises:
        StreamError: the scheme of the URL is unknown, or its driver is not installed.
    """

    def __init__(self, url: str, num_connections: int, persistence: Persistence) -> None:
        self.process = os.getpid()
        self.num_bytes = 0
        self.num_requests = 0
        self.num_retries = 0
        self._url = url
        self._shown_url = shown(url).rstrip("/")
        self._persistence = persistence
        self._slots = asyncio.Semaphore(num_connections)
        self._lock = threading.Lock()
        self._true_sizes: dict[str, int] = {}  # of files that were found to be shorter than recorded
        self._filesystem, self._root = open_for_requests(url, num_connections, persistence.timeout_s)
        self.is_local = isinstance(self._filesystem, LocalFileSystem)

    def close(self) -> None:
        """Ends connections that are kept open; the next request opens them again."""
        close_filesystem(self._filesystem)

    def path(self, name: str) -> str:
        """Where the driver finds a file.

        Raises:
            StreamError: the name leads out of the folder.
        """
        if name.startswith("/") or ".." in name.split("/"):
            raise StreamError(
                f"{self._shown_url}: {name!r} is not the name of a file in this folder; names are relative, "
                "without '..'. The index of the data set is damaged, or not to be trusted."
            )
        if "?" in self._root and self._root.startswith("http"):
            folder, query = self._root.split("?", 1)  # a signature that holds for the whole folder
            return f"{folder.rstrip('/')}/{name}?{query}"
        return f"{self._root}/{name}"

    def count(self, num_bytes: int = 0, num_requests: int = 0, num_retries: int = 0) -> None:
        """Adds to the counters."""
        with self._lock:
            self.num_bytes += num_bytes
            self.num_requests += num_requests
            self.num_retries += num_retries

    async def fetch(self, extent: Extent) -> bytes:
        """The bytes of an extent.

        A file that was found to be shorter than recorded is taken to stay so, and not asked for what it
        lacks.

        Raises:
            MissingFile, TruncatedFile: the file is not there; it is shorter than `file_bytes`.
            StreamError: the storage cannot be reached, refuses, or fails in every attempt.
        """
        if self._true_sizes.get(extent.name, extent.file_bytes) < extent.stop:
            raise self._truncated(extent)
        path, what = self.path(extent.name), f"bytes {extent.start} to {extent.stop}"

        async def request() -> bytes:
            timeout_s = self._persistence.timeout_s
            content = await read_range(self._filesystem, path, extent.start, extent.stop, timeout_s)
            self.count(num_bytes=len(content))
            if len(content) < extent.length:
                raise _ShortAnswerError(f"only {len(content)} of {extent.length} bytes came")
            if len(content) > extent.length:
                raise StreamError(
                    f"{self._shown_url}/{extent.name}: this server sends {len(content)} bytes when it is "
                    f"asked for {extent.length}, so it does not serve byte ranges. Serve the data set from "
                    "one that does, or copy it to local disk."
                )
            return content

        answer = await self._persistently(extent.name, what, request)
        if not isinstance(answer, _Failure):
            return answer
        if answer.is_short:
            size = await self.size(extent.name)
            if size is not None and size < extent.file_bytes:
                self._true_sizes[extent.name] = size
                raise self._truncated(extent)
        raise StreamError(answer.message)

    async def size(self, name: str) -> int | None:
        """The size of a file in bytes as it is now; None where the storage does not tell.

        Raises:
            MissingFile: there is no such file.
            StreamError: the storage cannot be reached, refuses, or fails in every attempt.
        """
        path = self.path(name)
        answer = await self._persistently(name, "its size", lambda: read_size(self._filesystem, path))
        if isinstance(answer, _Failure):
            raise StreamError(answer.message)
        return answer

    async def whole(self, name: str) -> bytes:
        """A file whose size is not known.

        Raises:
            MissingFile: there is no such file.
            StreamError: the storage cannot be reached, refuses, or fails in every attempt.
        """
        path = self.path(name)
        answer = await self._persistently(name, "all of it", lambda: read_whole(self._filesystem, path))
        if isinstance(answer, _Failure):
            raise StreamError(answer.message)
        self.count(num_bytes=len(answer))
        return answer

    async def _persistently(self, name: str, what: str, request: Callable[[], Awaitable[T]]) -> T | _Failure:
        """What `request` returns, the first time that it does; or how it failed the last time.

        Raises:
            MissingFile, StreamError: what no further attempt can change.
        """
        rules = self._persistence
        begin = time.monotonic()
        for attempt in range(1, rules.num_attempts + 1):
            self.count(num_requests=1, num_retries=int(attempt > 1))
            try:
                async with self._slots, asyncio.timeout(rules.timeout_s) as limit:
                    return await request()
            except StreamError:
                raise
            # Drivers raise all kinds; what they mean is not in their types alone.
            except Exception as error:
                reason = f"no answer within {rules.timeout_s:g} s" if limit.expired() else described(error)
                found, asked_s = meaning(error), asked_pause_s(error)
                is_short = isinstance(error, _ShortAnswerError) or found is Meaning.BEYOND_THE_END
            # Raised outside of the handler: a driver's error, which would be shown as the context of this
            # one, may hold credentials.
            if found is Meaning.MISSING:
                raise self._missing(name, what, reason)
            if found is Meaning.FORBIDDEN:
                raise self._forbidden(name, what, reason)
            if attempt < rules.num_attempts:
                await asyncio.sleep(rules.wait_s(attempt, asked_s))
        return _Failure(
            f"{self._shown_url}/{name}: {what} could not be read in {rules.num_attempts} attempts over "
            f"{time.monotonic() - begin:.0f} s; the last failed with: {reason}. The storage, or the way "
            "there, is at fault, not the data: see whether it can be reached from this host and is up, then "
            "start again.",
            is_short,
        )

    def _missing(self, name: str, what: str, reason: str) -> MissingFile:
        return MissingFile(
            f"{self._shown_url}/{name} is missing (asked for {what}; {reason}). Copy the file there, or "
            "correct the URL."
        )

    def _forbidden(self, name: str, what: str, reason: str) -> StreamError:
        return StreamError(
            f"{self._shown_url}/{name}: {what} may not be read ({reason}). {credentials_advice(self._url)}"
        )

    def _truncated(self, extent: Extent) -> TruncatedFile:
        return TruncatedFile(
            f"{self._shown_url}/{extent.name} has {self._true_sizes[extent.name]} bytes instead of "
            f"{extent.file_bytes}: it is truncated, and bytes {extent.start} to {extent.stop} are not all "
            "there. Copy the file there again."
        )


@dataclass(frozen=True)
class _Failure:
    """How the last attempt at a request ended; `is_short` says that fewer bytes came than were asked for."""

    message: str
    is_short: bool
