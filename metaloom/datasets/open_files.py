"""Local files read by place, of which the most recently used stay open."""

from __future__ import annotations

import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable


class OpenFiles:
    """Reads at any place of many files, by several threads.

    Args:
        path_of: the path of a file by name.
        num_files: how many stay open.
    """

    def __init__(self, path_of: Callable[[str], str], num_files: int) -> None:
        self._path_of = path_of
        self._num_files = num_files
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def announce(self, name: str, start: int, length: int) -> None:
        """Says that these bytes will be read: the disk fetches all that was announced at once, and not one
        after the other. Nothing, where the system knows no such call.

        Raises:
            OSError: the file cannot be opened.
        """
        if sys.platform == "linux":
            os.posix_fadvise(self._descriptor(name).number, start, length, os.POSIX_FADV_WILLNEED)

    def read(self, name: str, start: int, length: int) -> bytes:
        """Bytes `start` to `start + length`; fewer, where the file ends before.

        Raises:
            OSError: it cannot be opened or read.
        """
        descriptor = self._descriptor(name)
        content = os.pread(descriptor.number, length, start)
        if len(content) == length or not content:
            return content
        parts = [content]  # one call reads 2 GiB at most
        while content and (missing := length - sum(map(len, parts))):
            content = os.pread(descriptor.number, missing, start + length - missing)
            parts.append(content)
        return b"".join(parts)

    def close(self) -> None:
        """Closes all files; the next read opens them again."""
        with self._lock:
            self._open.clear()

    def _descriptor(self, name: str) -> _Descriptor:
        with self._lock:
            descriptor = self._open.get(name)
            if descriptor is not None:
                self._open.move_to_end(name)
                return descriptor
        opened = _Descriptor(self._path_of(name))
        with self._lock:
            descriptor = self._open.setdefault(name, opened)
            while len(self._open) > self._num_files:
                self._open.popitem(last=False)
        return descriptor


class _Descriptor:
    """An open file, closed when the last one who reads it lets go: never while another thread reads by its
    number, which the next file to be opened would get."""

    def __init__(self, path: str) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)
