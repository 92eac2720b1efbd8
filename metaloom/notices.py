"""Notices that a host is about to be taken away, as clouds give them to machines that are lent cheaply."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

_TIMEOUT_S = 2.0


@dataclasses.dataclass(frozen=True)
class Source:
    """What tells it; at least one of the first two.

    Attributes:
        file: a path; it is there then.
        url: an http URL; it answers with status 200 then.
        pattern: what the answer has to match besides, anywhere; None for nothing.
        header: of the request, as `Name: value`.
    """

    file: str | None
    url: str | None
    pattern: str | None = None
    header: str | None = None

    def look(self) -> str | None:
        """What has told it, in words; None where nothing did, or does not answer."""
        if self.file is not None and Path(self.file).exists():
            return f"a notice: {self.file} is there"
        if self.url is None:
            return None
        request = urllib.request.Request(self.url)
        if self.header is not None:
            name, _, value = self.header.partition(":")
            request.add_header(name.strip(), value.strip())
        try:
            # Not through a proxy: a cloud answers a machine itself.
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(request, timeout=_TIMEOUT_S) as answer:
                text = answer.read(1 << 16).decode(errors="replace")
                is_notice = answer.status == 200
        except (OSError, ValueError):  # urllib's errors are OSErrors: mostly a 404, which is the rule
            return None
        if not is_notice or (self.pattern is not None and re.search(self.pattern, text) is None):
            return None
        return f"a notice: {self.url} says {' '.join(text.split())[:80]!r}"


@contextlib.contextmanager
def watching(source: Source, *, every_s: float, on_notice: Callable[[str], None]) -> Iterator[None]:
    """In this context a thread looks every `every_s` seconds, and tells of the first notice."""
    is_over = threading.Event()

    def watch() -> None:
        while True:
            found = source.look()
            if found is not None:
                on_notice(found)
                return
            if is_over.wait(every_s):
                return

    thread = threading.Thread(target=watch, name="metaloom-notices", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
