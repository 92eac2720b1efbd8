"""An HTTP server on 127.0.0.1 that serves byte ranges, and fails when it is told to."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

# What becomes of one GET: an answer with that status; a connection that is reset; a body that ends early,
# on a connection that ends too, or with a Content-Length that says so; none before the test ends; the whole
# file.
FAULTS = ("503", "500", "403", "401", "404", "416", "reset", "cut", "short", "stall", "whole")


class FlakyServer(ThreadingHTTPServer):
    """Files by path, and the faults that the next GETs (and HEADs, in `head_faults`) will meet, first come
    first.

    Attributes:
        requests: method, path and Range of every request.
        password: if set, what `user` has to give.
    """

    daemon_threads = False
    block_on_close = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.faults: deque[str] = deque()
        self.head_faults: deque[str] = deque()
        self.requests: list[tuple[str, str, str]] = []
        self.authorization: str | None = None
        self.is_ending = threading.Event()
        self.tells_sizes = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: FlakyServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(0.2)  # a connection that is kept open must not keep the test waiting

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Quiet."""

    def do_HEAD(self) -> None:
        fault = self._next(self.server.head_faults)
        content = self.server.files.get(urlsplit(self.path).path)
        if fault is not None:
            self._fail(fault, content or b"", 0, 0)
        elif content is None:
            self._answer("404", b"")
        elif self.server.tells_sizes:
            self._answer("200", content, has_body=False)
        else:
            self.send_response(200)
            self.end_headers()
            self.close_connection = True

    def do_GET(self) -> None:
        fault = self._next(self.server.faults)
        if self.server.authorization not in (None, self.headers.get("Authorization")):
            return self._answer("401", b"")
        content = self.server.files.get(urlsplit(self.path).path)
        if content is None:
            return self._answer("404", b"")
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(asked[1]), min(int(asked[2]) + 1, len(content))) if asked else (0, len(content))
        if fault is not None:
            return self._fail(fault, content, start, stop)
        if asked is None:
            return self._answer("200", content)
        if start >= len(content):
            return self._answer("416", b"")
        return self._answer("206", content[start:stop])

    def _next(self, faults: deque[str]) -> str | None:
        self.server.requests.append((self.command, self.path, self.headers.get("Range", "")))
        return faults.popleft() if faults else None

    def _fail(self, fault: str, content: bytes, start: int, stop: int) -> None:
        body = content[start:stop]
        if fault.isdigit():
            self._answer(fault, b"no")
        elif fault == "reset":
            linger = struct.pack("ii", 1, 0)  # closing then sends RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            self.connection.close()
        elif fault == "cut":
            self._answer("206", body[: len(body) // 2], length=len(body))
            self.close_connection = True
        elif fault == "short":
            self._answer("206", body[: len(body) // 2])
        elif fault == "stall":
            self.server.is_ending.wait()
            self.close_connection = True
        elif fault == "whole":
            self._answer("200", content)

    def _answer(self, status: str, body: bytes, *, length: int | None = None, has_body: bool = True) -> None:
        self.send_response(int(status))
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if has_body and self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def running_flaky_server() -> Iterator[FlakyServer]:
    """A server that answers; at the end it and its threads are gone."""
    with FlakyServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.is_ending.set()
            server.shutdown()
            thread.join()
