"""Blocks of remote files on local disk, up to a limit, for all processes of a host together.

A block is one file, `<folder>/<2 letters>/<62 letters>` of the sha256 of what it is. Files are only ever
written, replaced or deleted under one file lock, and room is made before a block is written. So the sum on
disk, half-written blocks included, is never above the limit. The lock's file is the ledger: the sum of all
blocks, and a flag that is set while they are changed. Whoever gets the lock after a process was killed finds
the flag, deletes what is half written and counts anew. A killed process leaves no lock: the kernel gives it
back.

Each hit sets the modification time, to the nanosecond; what was not used for the longest goes first. To find
it all blocks are looked at, so a cache that is full is emptied to 90 % of its limit at once.

Two processes that miss the same block at the same time both fetch it; the second finds it there, and keeps
that.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path

_LOCK_NAME = "metaloom-cache.lock"
_PARTIAL_NAME = "metaloom-cache.partial"
_FOLDER = re.compile(r"[0-9a-f]{2}")
_FILE = re.compile(r"[0-9a-f]{62}")
_LEDGER = struct.Struct("<4sIQ")  # magic, flag, sum of all blocks in bytes
_MAGIC = b"mlc1"
_LOCK_TIMEOUT_S = 10.0
_PAUSE_S = 300.0


def block_key(*identity: str | int) -> str:
    """The name of a block: the sha256 of all that tells it from others."""
    return hashlib.sha256("\0".join(map(str, identity)).encode()).hexdigest()


class BlockCache:
    """Blocks by key, shared by all processes that give the same folder; the least recently used go first.

    Nothing here raises for the sake of the disk: where it is full, read-only or broken, blocks are not
    kept, or not found, and `take_notes` says so once. Writing is tried again after five minutes.

    Files in the folder that are not blocks are never counted nor touched. A block is not checked when it is
    read, other than for its length: whoever reads has a checksum, and `remove`s a wrong one.

    Args:
        limit_bytes: the most that all blocks may take. Each process holds its own limit whenever it puts a
            block.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._notes: list[str] = []
        self._is_told = False
        self._paused_until = 0.0

    def read(self, key: str, num_bytes: int, start: int, stop: int) -> bytes | None:
        """Bytes `start` to `stop` of a block of `num_bytes`, which is now the most recently used; None if
        it is not there, or has another length."""
        try:
            descriptor = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._note(error)
            return None
        try:
            if os.fstat(descriptor).st_size != num_bytes:
                return None  # torn by a power cut; `put` replaces it
            content = os.pread(descriptor, stop - start, start)
            now = time.time_ns()
            os.utime(descriptor, ns=(now, now))
        except OSError as error:
            self._note(error)
            return None
        finally:
            os.close(descriptor)
        return content if len(content) == stop - start else None

    def put(self, key: str, content: bytes) -> None:
        """Keeps a block, and deletes others until there is room for it. One above the limit is not kept."""
        if len(content) > self.limit_bytes or time.monotonic() < self._paused_until:
            return
        try:
            with self._locked() as ledger:
                self._put(ledger, self._path(key), content)
        except OSError as error:
            self._paused_until = time.monotonic() + _PAUSE_S
            self._note(error)

    def remove(self, key: str) -> None:
        """Deletes a block, if it is there."""
        try:
            with self._locked() as ledger:
                path = self._path(key)
                if (held := _size(path)) is not None:
                    ledger.begin()
                    path.unlink()
                    ledger.commit(ledger.total - held)
        except OSError as error:
            self._note(error)

    def take_notes(self) -> list[str]:
        """What went wrong with the disk since the last call; each cache tells it once."""
        notes, self._notes = self._notes, []
        return notes

    def _put(self, ledger: _Ledger, path: Path, content: bytes) -> None:
        held = _size(path)
        if held == len(content):
            return
        ledger.begin()
        total = ledger.total
        if held is not None:
            path.unlink()
            total -= held
        if total + len(content) > self.limit_bytes:
            total = self._evict(len(content))
        partial = self.folder / _PARTIAL_NAME
        try:
            with partial.open("wb", buffering=0) as file:
                if file.write(content) != len(content):
                    raise OSError(f"{partial} could not be written in full")
            path.parent.mkdir(exist_ok=True)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)  # the flag stays set, and the next to come counts anew
            raise
        ledger.commit(total + len(content))

    def _evict(self, num_bytes: int) -> int:
        """The sum of the blocks that stay when the oldest are deleted, so that `num_bytes` fit."""
        blocks = sorted(self._blocks())
        total = sum(size for _, size, _ in blocks)
        goal = min(self.limit_bytes - num_bytes, self.limit_bytes * 9 // 10)
        for _, size, path in blocks:
            if total <= goal:
                break
            os.unlink(path)
            total -= size
        return total

    def _blocks(self) -> Iterator[tuple[int, int, str]]:
        """(modification time in ns, size in bytes, path) of every block."""
        with os.scandir(self.folder) as folders:
            names = [entry.path for entry in folders if _FOLDER.fullmatch(entry.name)]
        for name in names:
            with os.scandir(name) as files:
                for entry in files:
                    if _FILE.fullmatch(entry.name):
                        state = entry.stat(follow_symlinks=False)
                        yield state.st_mtime_ns, state.st_size, entry.path

    @contextlib.contextmanager
    def _locked(self) -> Iterator[_Ledger]:
        """The ledger, for as long as this thread alone may write; set right if it was left in the middle.

        Raises:
            OSError: the folder cannot be written to.
            TimeoutError: another process has had the lock for ten seconds; it may have been stopped.
        """
        descriptor = self._lock()
        try:
            ledger = _Ledger(descriptor)
            if not ledger.is_right:
                (self.folder / _PARTIAL_NAME).unlink(missing_ok=True)
                ledger.commit(sum(size for _, size, _ in self._blocks()))
            yield ledger
        finally:
            # Closing is not enough: a process forked in between has the descriptor too.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _lock(self) -> int:
        path = self.folder / _LOCK_NAME
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        wait_s = 0.0002
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Someone who emptied the folder deleted the lock's file too: others will lock a new one.
                if _is_same_file(descriptor, path):
                    return descriptor
            except BlockingIOError:
                pass
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise TimeoutError(f"another process holds {path} for more than {_LOCK_TIMEOUT_S:.0f} s")
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, 0.005)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key[2:]

    def _note(self, error: OSError) -> None:
        if self._is_told:
            return
        self._is_told = True
        self._notes.append(
            f"The cache in {self.folder} fails ({type(error).__name__}: {error}). Reading goes on; what is "
            "not in the cache comes from storage every time. Make room there, or name another folder for the "
            "cache."
        )


class _Ledger:
    """What the lock's file says, for the one who holds the lock.

    Attributes:
        total: the sum of all blocks in bytes, if it is right.
        is_right: False if nobody wrote it yet, or the last one did not finish.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        raw = os.pread(descriptor, _LEDGER.size, 0)
        magic, is_open, self.total = _LEDGER.unpack(raw) if len(raw) == _LEDGER.size else (b"", 1, 0)
        self.is_right = magic == _MAGIC and not is_open

    def begin(self) -> None:
        """Says that blocks are being changed, so that `total` will not be right until `commit`."""
        os.pwrite(self._descriptor, _LEDGER.pack(_MAGIC, 1, self.total), 0)

    def commit(self, total: int) -> None:
        """Says that the blocks are `total` bytes."""
        self.total = total
        os.pwrite(self._descriptor, _LEDGER.pack(_MAGIC, 0, total), 0)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
