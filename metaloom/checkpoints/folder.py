"""A folder of checkpoints at a path or an fsspec URL: whole files written, ranges read, everything tried
again that may be right the next time."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fsspec.implementations.local import LocalFileSystem

from metaloom.datasets.connection import Persistence
from metaloom.datasets.drivers import (
    Meaning,
    asked_pause_s,
    close_filesystem,
    credentials_advice,
    described,
    meaning,
    open_for_requests,
    shown,
)
from metaloom.errors import CheckpointError, StreamError
from metaloom.files import replace_file, sync_folder

T = TypeVar("T")

# Some two minutes of a storage that is down; whoever writes in the background comes again after that.
PERSISTENCE = Persistence(num_attempts=8, backoff_s=0.5, max_backoff_s=20.0, timeout_s=60.0)

_NUM_CONNECTIONS = 8
# What of a local or mounted file system may pass; a full disk or a folder that may not be written does not.
_PASSING = {errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EIO, errno.ESTALE, errno.ETIMEDOUT}


class MissingFileError(CheckpointError):
    """A file that is not there."""


class Sink(Protocol):
    """What bytes are written to."""

    def write(self, content: bytes | memoryview, /) -> object: ...


class Folder:
    """The files under one path or URL, by names relative to it.

    Args:
        persistence: how long a request is tried.

    Attributes:
        shown: the path or URL as messages may have it.
        local: the path, where it is one of a file system; None for an object store.

    Raises:
        CheckpointError: the scheme of the URL is unknown, or its driver is not installed.
    """

    def __init__(self, url: str | Path, persistence: Persistence = PERSISTENCE) -> None:
        self.url = str(url).rstrip("/") or "/"
        self.shown = shown(self.url)
        self._persistence = persistence
        try:
            self._filesystem, self._root = open_for_requests(
                self.url, _NUM_CONNECTIONS, persistence.timeout_s
            )
        except StreamError as error:
            raise CheckpointError(str(error)) from None
        self.local = Path(self._root) if isinstance(self._filesystem, LocalFileSystem) else None

    def close(self) -> None:
        """Ends connections; the next request opens them again."""
        close_filesystem(self._filesystem)

    def sizes(self) -> dict[str, int]:
        """The size in bytes of every file in the folder and in its folders, by name; empty where there is no
        such folder.

        Raises:
            CheckpointError: it cannot be listed.
        """

        def find() -> dict[str, int]:
            if self.local is not None:
                return _sizes_under(self.local)
            self._filesystem.invalidate_cache()
            found: dict[str, dict[str, Any]] = self._filesystem.find(self._root, detail=True)
            prefix = f"{self._root}/"
            return {
                path.removeprefix(prefix): int(info["size"])
                for path, info in found.items()
                if path.startswith(prefix) and info["type"] == "file"
            }

        try:
            return self._attempted("", "listed", find)
        except MissingFileError:
            return {}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes of a file from `start` to `stop`; fewer where it ends before.

        Raises:
            MissingFileError: there is no such file.
            CheckpointError: it cannot be read.
        """

        def cat() -> bytes:
            if self.local is None:
                return bytes(self._filesystem.cat_file(self._path(name), start=start, end=stop))
            with (self.local / name).open("rb") as file:
                file.seek(start)
                return file.read() if stop is None else file.read(stop - start)

        return self._attempted(name, "read", cat)

    def write(self, name: str, content: bytes) -> None:
        """Makes or replaces a file, at once: readers find all of it, or what was before. On a file system it
        is on disk on return.

        Raises:
            CheckpointError: it cannot be written.
        """

        def put() -> None:
            if self.local is None:
                self._filesystem.pipe_file(self._path(name), content)
                return
            path = self.local / name
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, content)

        self._attempted(name, "written", put)

    def write_stream(self, name: str, fill: Callable[[Sink], T]) -> T:
        """Makes or replaces a file of what `fill` writes, and returns what it returns. Where an attempt
        fails, `fill` is called again, from its start. On a file system the file is on disk on return.

        Raises:
            CheckpointError: it cannot be written.
        """

        def put() -> T:
            with self._opened(name) as file:
                return fill(file)

        try:
            return self._attempted(name, "written", put)
        except CheckpointError:
            # Half a file takes the room that a full disk lacks.
            with contextlib.suppress(CheckpointError):
                self.remove([name])
            raise

    def remove(self, names: list[str]) -> None:
        """Deletes files; those that are not there are passed over.

        Raises:
            CheckpointError: one cannot be deleted.
        """
        for name in names:

            def delete(name: str = name) -> None:
                if self.local is None:
                    self._filesystem.rm_file(self._path(name))
                else:
                    (self.local / name).unlink()

            with contextlib.suppress(MissingFileError):
                self._attempted(name, "deleted", delete)

    def remove_folder(self, name: str) -> None:
        """Deletes what is under a name, the folder included.

        Raises:
            CheckpointError: something there cannot be deleted.
        """
        if self.local is not None:
            path = self.local / name
            with contextlib.suppress(MissingFileError):
                self._attempted(name, "deleted", lambda: shutil.rmtree(path))
            return
        self.remove([path for path in self.sizes() if path.startswith(f"{name}/")])

    def sync(self) -> None:
        """Which names the folder holds is on disk, where it is one of a file system."""
        if self.local is not None:
            sync_folder(self.local)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[Sink]:
        if self.local is not None:
            path = self.local / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as local:
                yield local
                local.flush()
                os.fsync(local.fileno())
            return
        remote = self._filesystem.open(self._path(name), "wb")
        try:
            yield remote
            remote.close()
        except BaseException:
            # Else it would be closed when it is collected, which makes an object of what there is.
            remote.closed = True
            with contextlib.suppress(Exception):
                remote.discard()
            raise

    def _attempted(self, name: str, what: str, call: Callable[[], T]) -> T:
        rules, begin = self._persistence, time.monotonic()
        for attempt in range(1, rules.num_attempts + 1):
            try:
                return call()
            except (CheckpointError, AssertionError):
                raise
            # Drivers raise all kinds; what they mean is not in their types alone.
            except Exception as error:
                reason, found, pause_s = described(error), meaning(error), asked_pause_s(error)
                number = error.errno if isinstance(error, OSError) else None
                is_final = self.local is not None and number not in _PASSING
                if isinstance(error, OSError) and self.local is not None:
                    reason = error.strerror or str(error)
            # Raised outside of the handler: a driver's error may hold credentials.
            if found is Meaning.MISSING and what != "written":
                raise MissingFileError(f"{self._shown(name)} is missing.")
            if found is Meaning.FORBIDDEN:
                advice = credentials_advice(self.url)
                raise CheckpointError(f"{self._shown(name)} cannot be {what}: {reason}. {advice}")
            if is_final:
                raise CheckpointError(f"{self._shown(name)} cannot be {what}: {reason}.")
            if attempt < rules.num_attempts:
                time.sleep(rules.wait_s(attempt, pause_s))
        raise CheckpointError(
            f"{self._shown(name)} could not be {what} in {rules.num_attempts} attempts over "
            f"{time.monotonic() - begin:.0f} s; the last failed with: {reason}. See whether the storage is "
            "up and can be reached from this host."
        )

    def _shown(self, name: str) -> str:
        return f"{self.shown}/{name}" if name else self.shown


def _sizes_under(root: Path) -> dict[str, int]:
    """The size of every file; those that go while this looks are passed over."""
    sizes: dict[str, int] = {}

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for folder, _, names in os.walk(root, onerror=fail):
        for name in names:
            path = Path(folder) / name
            with contextlib.suppress(FileNotFoundError):
                sizes[path.relative_to(root).as_posix()] = path.stat().st_size
    return sizes
