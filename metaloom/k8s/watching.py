"""A watch that goes on: after connections that break, and after the server has forgotten where it was."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from metaloom.k8s.refusals import Answer, Attempt, InterruptedStreamError, foreign_answer, refusal
from metaloom.k8s.streams import Lines

Object = dict[str, Any]

# A watch is opened anew after so long: a connection that is dead without a word is not waited on for ever.
WATCH_S = 60
# One that was told something goes on through an outage of so long.
OUTAGE_S = 600.0


class Watched:
    """Events, (kind, object), of all objects that are selected. Another thread may close it.

    Args:
        list_all: (how long to wait for a server that is away) -> all objects, and their version.
        open_stream: (version, seconds after which the server is to end it, seconds of silence after which it
            is dead, how long to wait for a server that is away) -> the lines, or the answer that is none.
        attempt: for messages.
        deadline: of `time.monotonic()`; None: it never ends by itself.
    """

    def __init__(
        self,
        list_all: Callable[[float], tuple[list[Object], str]],
        open_stream: Callable[[str, int, float, float], Lines | Answer],
        attempt: Attempt,
        deadline: float | None,
    ) -> None:
        self._list_all = list_all
        self._open_stream = open_stream
        self._attempt = attempt
        self._known: dict[str, Object] = {}
        self._version = ""
        self._outage_s = 0.0
        self._is_closed = threading.Event()
        self._lines: Lines | None = None
        self._events = self._tell(deadline)

    def __iter__(self) -> Iterator[tuple[str, Object]]:
        return self

    def __next__(self) -> tuple[str, Object]:
        return next(self._events)

    def close(self) -> None:
        """Ends it, also under a thread that waits for an event."""
        self._is_closed.set()
        if self._lines is not None:
            self._lines.close()

    def _tell(self, deadline: float | None) -> Iterator[tuple[str, Object]]:
        quiet_s = 0.0
        while not self._is_closed.is_set():
            if not self._version:
                yield from self._listed()
            left_s = None if deadline is None else deadline - time.monotonic()
            if left_s is not None and left_s <= 0:
                return
            begin, version = time.monotonic(), self._version
            yield from self._watched(left_s)
            # A server that ends each watch at once is not asked again without a pause.
            is_quick = self._version in (version, "") and time.monotonic() - begin < 1
            quiet_s = min(max(2 * quiet_s, 0.05), 5.0) if is_quick else 0.0
            if deadline is not None:
                quiet_s = min(quiet_s, max(deadline - time.monotonic(), 0.0))
            self._is_closed.wait(quiet_s)

    def _listed(self) -> Iterator[tuple[str, Object]]:
        """What differs from what was told; deletions first, since a name may have been taken again."""
        objects, self._version = self._list_all(self._outage_s)
        self._outage_s = OUTAGE_S
        found = {obj["metadata"]["uid"]: obj for obj in objects}
        for uid in [uid for uid in self._known if uid not in found]:
            yield "DELETED", self._known.pop(uid)
        for obj in found.values():
            yield from self._news(obj)

    def _news(self, obj: Object) -> Iterator[tuple[str, Object]]:
        uid = obj["metadata"]["uid"]
        known = self._known.get(uid)
        self._known[uid] = obj
        if known is None:
            yield "ADDED", obj
        elif known["metadata"]["resourceVersion"] != obj["metadata"]["resourceVersion"]:
            yield "MODIFIED", obj

    def _watched(self, left_s: float | None) -> Iterator[tuple[str, Object]]:
        """What one connection tells."""
        seconds = WATCH_S if left_s is None else min(WATCH_S, max(int(left_s), 1))
        silence_s = seconds + 10.0 if left_s is None else min(seconds + 10.0, left_s)
        lines = self._open_stream(self._version, seconds, silence_s, self._outage_s)
        if isinstance(lines, Answer):
            if lines.status != 410:
                raise refusal(lines, self._attempt)
            self._version = ""
            return
        self._lines = lines
        if self._is_closed.is_set():
            lines.close()
        try:
            for line in lines:
                yield from self._event(line)
                if not self._version:
                    return
        except InterruptedStreamError:
            return
        finally:
            lines.close()

    def _event(self, line: str) -> Iterator[tuple[str, Object]]:
        try:
            event = json.loads(line)
            kind, obj = event["type"], event["object"]
            if kind == "ERROR":
                self._failed(obj)
                return
            self._version = str(obj["metadata"]["resourceVersion"])
        except (ValueError, KeyError, TypeError):
            raise foreign_answer(Answer(200, "a watch", line.encode()), self._attempt) from None
        if kind == "DELETED":
            if self._known.pop(obj["metadata"]["uid"], None) is not None:
                yield "DELETED", obj
        elif kind in ("ADDED", "MODIFIED"):
            yield from self._news(obj)

    def _failed(self, status: Object) -> None:
        """A watch that the server ends with an error: where it can go on, from a new list."""
        code = int(status.get("code") or 500)
        if code in (401, 403):
            raise refusal(Answer(code, "application/json", json.dumps(status).encode()), self._attempt)
        self._version = ""
