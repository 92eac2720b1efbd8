"""Bytes of the files of a data set, at any fsspec URL: many requests at once, tried again where they fail."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from metaloom.datasets.cache import BlockCache, block_key
from metaloom.datasets.connection import Connection, MissingFile, Persistence, TruncatedFile
from metaloom.datasets.drivers import open_filesystem, request_loop, shown
from metaloom.datasets.extents import Extent, Pieces, block_of, coalesced, parts_by_block
from metaloom.datasets.open_files import OpenFiles
from metaloom.errors import StreamError

__all__ = [
    "Extent",
    "MissingFile",
    "Storage",
    "StorageSettings",
    "TruncatedFile",
    "open_filesystem",
]

T = TypeVar("T")

_REQUEST_BYTES = 4 << 20  # neighbours are asked for together up to here
_NUM_OPEN_FILES = 64


@dataclass(frozen=True)
class StorageSettings:
    """How files are read.

    Attributes:
        cache_folder: where blocks of remote files are kept on local disk, for all processes of the host; None
            keeps none. Local files are never kept.
        cache_limit_bytes: the most that all blocks in that folder may take.
        block_bytes: the size of a block; with a cache, nothing less is asked for.
        num_connections: the most requests at once, of one `Storage` in one process.
        num_attempts, backoff_s, max_backoff_s, timeout_s: as `Persistence` has them.
    """

    cache_folder: str | None = None
    cache_limit_bytes: int = 20 << 30
    block_bytes: int = 1 << 20
    num_connections: int = 8
    num_attempts: int = 6
    backoff_s: float = 0.5
    max_backoff_s: float = 20.0
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("cache_limit_bytes", "block_bytes", "num_connections", "num_attempts", "timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be positive")
        if self.backoff_s < 0 or self.max_backoff_s < 0:
            raise ValueError(f"backoffs are {self.backoff_s} s and {self.max_backoff_s} s; no less than 0")


class Storage:
    """Files beside each other at one path or fsspec URL, read by name.

    It may be used by several threads, pickled, and carried over a fork: every process opens its own
    connections. Requests run on fsspec's event loop, so there are no threads of its own to end; `close`
    closes connections.

    Files on local disk are read directly, others through the block cache, if there is one.

    Args:
        digest: tells the data from others that were or will be at this URL: no block that was kept of another
            digest is ever used.

    Raises:
        StreamError: the scheme of the URL is unknown, or its driver is not installed.
    """

    def __init__(self, url: str, settings: StorageSettings | None = None, *, digest: str = "") -> None:
        self.url = url
        self.settings = settings or StorageSettings()
        self.digest = digest
        self._shown_url = shown(url).rstrip("/")
        self._open_anew()
        self._cache: BlockCache | None = None
        if self.settings.cache_folder is not None and not self._connection.is_local:
            self._cache = BlockCache(Path(self.settings.cache_folder), self.settings.cache_limit_bytes)

    def __reduce__(self) -> tuple[Callable[..., Storage], tuple[str, StorageSettings, str]]:
        return _storage, (self.url, self.settings, self.digest)

    def __repr__(self) -> str:
        return f"Storage({self._shown_url!r})"

    def __enter__(self) -> Storage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes connections and files of this process. Reading opens them again."""
        self._files.close()
        if self._connection.process == os.getpid():
            self._connection.close()

    @property
    def num_bytes_fetched(self) -> int:
        """What came from storage in this process, in bytes: nothing that came from the cache."""
        return self._connection.num_bytes

    @property
    def num_requests(self) -> int:
        """The requests made in this process, each attempt counted."""
        return self._connection.num_requests

    @property
    def num_retries(self) -> int:
        """The requests made in this process because the one before had failed."""
        return self._connection.num_retries

    def local_path(self, name: str) -> Path | None:
        """The file itself, whether or not it exists, if the URL is local; else None.

        Raises:
            StreamError: the name leads out of the folder.
        """
        return Path(self._connection.path(name)) if self._connection.is_local else None

    def size(self, name: str) -> int:
        """The size of a file in bytes, as it is now.

        Raises:
            MissingFile: there is no such file.
            StreamError: it cannot be looked up, or the storage does not tell sizes.
        """
        size = self._wait(self._renewed().size(name))
        if size is None:
            raise StreamError(
                f"{self._shown_url}/{name}: this server does not tell how large the file is. Serve the data "
                "set from one that answers HEAD with Content-Length."
            )
        return size

    def read(self, name: str) -> bytes:
        """A whole file, never from the cache: for the few files that describe the others.

        Raises:
            MissingFile: there is no such file.
            StreamError: it cannot be read.
        """
        connection = self._renewed()
        size = self._wait(connection.size(name))
        if size is None:
            return self._wait(connection.whole(name))
        file = Extent(name, 0, size, size)
        return self._fetched(connection, coalesced([file], _REQUEST_BYTES)).cut(file)

    def read_extents(self, extents: Sequence[Extent]) -> list[bytes]:
        """The bytes of every extent, in order.

        With a cache, whole blocks are asked for and kept; without one, only what the extents cover. Either
        way neighbours go into one request of up to 4 MiB, and `num_connections` requests run at once. What
        is returned, and the blocks around it, is held in memory.

        Raises:
            MissingFile: a file is not there.
            TruncatedFile: a file is shorter than `file_bytes`, as its storage says when it is asked.
            StreamError: the storage cannot be reached, refuses, or fails in every attempt.
        """
        connection = self._renewed()
        if connection.is_local:
            if len(extents) > 1:
                self._announce(extents)
            return [self._local(connection, extent) for extent in extents]
        if self._cache is None:
            pieces = self._fetched(connection, coalesced(extents, _REQUEST_BYTES))
            return [pieces.cut(extent) for extent in extents]
        block_bytes = self.settings.block_bytes
        rows = [parts_by_block(extent, block_bytes) for extent in extents]
        kept = {part: self._kept(self._cache, part) for row in rows for part in row}
        missing = {block_of(part, block_bytes) for part, content in kept.items() if content is None}
        # A multiple of the block, so that what comes is whole blocks.
        request_bytes = max(1, _REQUEST_BYTES // block_bytes) * block_bytes
        pieces = self._fetched(connection, coalesced(missing, request_bytes), self._cache)
        return [b"".join(kept[part] or pieces.cut(part) for part in row) for row in rows]

    def forget(self, extent: Extent) -> None:
        """The next read of these bytes comes from storage: they turned out to be wrong, so their blocks
        go."""
        if self._cache is not None:
            for part in parts_by_block(extent, self.settings.block_bytes):
                self._cache.remove(self._key(block_of(part, self.settings.block_bytes)))

    def take_notes(self) -> list[str]:
        """What the user should know and was not told yet: that the cache fails, once in a process."""
        return [] if self._cache is None else self._cache.take_notes()

    def _open_anew(self) -> None:
        settings = self.settings
        persistence = Persistence(
            settings.num_attempts, settings.backoff_s, settings.max_backoff_s, settings.timeout_s
        )
        self._connection = Connection(self.url, settings.num_connections, persistence)
        self._files = OpenFiles(self._connection.path, _NUM_OPEN_FILES)

    def _renewed(self) -> Connection:
        """The connection of this process: neither event loops nor locks survive a fork."""
        if self._connection.process != os.getpid():
            self._open_anew()
        return self._connection

    def _key(self, block: Extent) -> str:
        block_bytes = self.settings.block_bytes
        file = (self.digest, self._shown_url, block.name, block.file_bytes)
        return block_key(*file, block.start // block_bytes, block_bytes)

    def _kept(self, cache: BlockCache, part: Extent) -> bytes | None:
        block = block_of(part, self.settings.block_bytes)
        return cache.read(self._key(block), block.length, part.start - block.start, part.stop - block.start)

    def _announce(self, extents: Sequence[Extent]) -> None:
        with contextlib.suppress(OSError):  # the read that follows looks into it
            for extent in extents:
                self._files.announce(extent.name, extent.start, extent.length)

    def _local(self, connection: Connection, extent: Extent) -> bytes:
        try:
            content = self._files.read(extent.name, extent.start, extent.length)
        except OSError:
            content = b""
        if len(content) == extent.length:
            connection.count(num_bytes=extent.length, num_requests=1)
            return content
        # Gone, short, or a network mount that stumbles: looked into and tried again like a remote file.
        self._files.close()
        return self._fetched(connection, [extent]).cut(extent)

    def _fetched(
        self, connection: Connection, extents: Sequence[Extent], cache: BlockCache | None = None
    ) -> Pieces:
        """The extents, all asked for at once; whole blocks of them are put into the cache as they come."""
        pieces = Pieces()
        loop = request_loop()
        waiting = {asyncio.run_coroutine_threadsafe(connection.fetch(e), loop): e for e in extents}
        try:
            for future in as_completed(waiting):
                extent, content = waiting[future], future.result()
                pieces.add(extent, content)
                if cache is not None:
                    for block in parts_by_block(extent, self.settings.block_bytes):
                        cache.put(self._key(block), pieces.cut(block))
        finally:
            for future in waiting:
                future.cancel()  # after one has failed, nobody waits for the others
        return pieces

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, request_loop())
        try:
            return future.result()
        finally:
            future.cancel()


def _storage(url: str, settings: StorageSettings, digest: str) -> Storage:
    return Storage(url, settings, digest=digest)
