"""Answers that are read while they come."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Generator, Iterator
from typing import Any

from metaloom.k8s.refusals import InterruptedStreamError, reason_of

LONGEST_LINE_BYTES = 1 << 20


class Lines:
    """The lines of an answer, as they come. Another thread may close it: then no more come.

    Raises:
        InterruptedStreamError: when read, and the connection breaks off. A line that was cut is not told.
    """

    def __init__(self, response: Any, what: str) -> None:
        self._response = response
        self._what = what
        self._is_closed = False
        self._lines: Generator[str, None, None] = self._read()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._lines)

    def close(self) -> None:
        """Ends the connection, also under a thread that waits for a line."""
        self._is_closed = True
        _wake(self._response)
        try:
            self._lines.close()
        except ValueError:
            # A thread is in it. It wakes, and closes the rest itself: here that would wait for its lock.
            return
        self._response.close()

    def _read(self) -> Generator[str, None, None]:
        import urllib3

        kept = b""
        try:
            for chunk in self._response.stream(1 << 16):
                *lines, kept = (kept + chunk).split(b"\n")
                for line in lines:
                    yield _text(line)
                if len(kept) > LONGEST_LINE_BYTES:
                    yield _text(kept)
                    kept = b""
        except (urllib3.exceptions.HTTPError, OSError, ValueError, AttributeError) as error:
            # The last two are what closing under a waiting thread looks like from inside.
            if self._is_closed:
                return
            if not isinstance(error, urllib3.exceptions.HTTPError | OSError):
                raise
            raise InterruptedStreamError(f"{self._what} broke off: {reason_of(error)}.") from None
        finally:
            _wake(self._response)
            self._response.close()
        if kept:
            yield _text(kept)


def _wake(response: Any) -> None:
    """Ends the connection for good: closing alone would not wake a thread that waits for its next bytes."""
    sock = getattr(response.connection, "sock", None)
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def _text(line: bytes) -> str:
    return line.decode(errors="replace").removesuffix("\r")
