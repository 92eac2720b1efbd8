"""An HTTP server on 127.0.0.1 that serves byte ranges, and fails when it is told to."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TypeVar
from urllib.parse import urlsplit

S = TypeVar("S", bound="FlakyServer")

# What becomes of one GET: an answer with that status; a connection that is reset; a body that ends early,
# on a connection that ends too, or with a Content-Length that says so; none before the test ends; the whole
# file.
FAULTS = ("503", "500", "403", "401", "404", "416", "reset", "cut", "short", "stall", "whole")


class FlakyServer(ThreadingHTTPServer):
    """Files by path, and the faults that the next GETs (and HEADs, in `head_faults`) will meet, first come
    first.

    Attributes:
        requests: method, path and Range of every request.
        authorization: if set, the header that has to come with every GET.
        error_headers: what comes with every refusal.
        range_headers: what comes with every range.
    """

    daemon_threads = False
    block_on_close = True

    def __init__(self, handler: type[Handler] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), handler or Handler)
        self.files: dict[str, bytes] = {}
        self.faults: deque[str] = deque()
        self.head_faults: deque[str] = deque()
        self.requests: list[tuple[str, str, str]] = []
        self.authorization: str | None = None
        self.error_headers: dict[str, str] = {}
        self.range_headers: dict[str, str] = {}
        self.is_ending = threading.Event()
        self.tells_sizes = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is no news."""


class Handler(BaseHTTPRequestHandler):
    """What a plain HTTP server says; the storages of `tests/cloud_servers.py` have their own words."""

    server: FlakyServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # it holds bodies back for 40 ms, as headers are written before them

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
            self._refuse("404")
        elif self.server.tells_sizes:
            self._answer("200", content, has_body=False)
        else:
            self.send_response(200)
            self.end_headers()
            self.close_connection = True

    def do_GET(self) -> None:
        self._get()

    def do_POST(self) -> None:
        self._post(self.rfile.read(int(self.headers["Content-Length"])))

    def _get(self) -> None:
        self._serve(self.server.files.get(urlsplit(self.path).path), self._next(self.server.faults))

    def _post(self, form: bytes) -> None:
        self._refuse("405")

    def _serve(self, content: bytes | None, fault: str | None) -> None:
        """Answers with a file, or the range of it that is asked for, unless there is a reason not to."""
        if not self._is_allowed():
            return self._refuse("401")
        if content is None:
            return self._refuse("404")
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(asked[1]), min(int(asked[2]) + 1, len(content))) if asked else (0, len(content))
        if fault is not None:
            return self._fail(fault, content, start, stop)
        if asked is None:
            return self._answer("200", content)
        if start >= len(content):
            return self._refuse("416")
        return self._answer("206", content[start:stop], headers=self.server.range_headers)

    def _is_allowed(self) -> bool:
        return self.server.authorization in (None, self.headers.get("Authorization"))

    def _refuse(self, status: str) -> None:
        """Answers with an error."""
        self._answer(status, b"no", headers=self.server.error_headers)

    def _next(self, faults: deque[str]) -> str | None:
        self.server.requests.append((self.command, self.path, self.headers.get("Range", "")))
        return faults.popleft() if faults else None

    def _fail(self, fault: str, content: bytes, start: int, stop: int) -> None:
        body = content[start:stop]
        if fault.isdigit():
            self._refuse(fault)
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

    def _answer(
        self,
        status: str,
        body: bytes,
        *,
        length: int | None = None,
        has_body: bool = True,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.send_response(int(status))
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if has_body and self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def running_flaky_server() -> Iterator[FlakyServer]:
    """A server that answers; at the end it and its threads are gone."""
    with running(FlakyServer()) as server:
        yield server


@contextlib.contextmanager
def running(made: S) -> Iterator[S]:
    """As `running_flaky_server`, of a server that was made."""
    with made as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.is_ending.set()
            server.shutdown()
            thread.join()
