"""Storage that fails: a real HTTP server and a real S3 server that refuse, break off, hang; disks and
processes that go."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import random
import subprocess
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.asyn import get_loop
from fsspec.implementations.memory import MemoryFileSystem

from metaloom.datasets.cache import _LEDGER, BlockCache, block_key
from metaloom.datasets.connection import Persistence
from metaloom.datasets.drivers import credentials_advice
from metaloom.datasets.storage import Extent, MissingFile, Storage, StorageSettings, TruncatedFile
from metaloom.errors import StreamError
from tests.commands import run_silently
from tests.faults import hammer_cache
from tests.flaky_server import FlakyServer, running_flaky_server
from tests.object_store import ACCESS_KEY, SECRET_KEY, ObjectStore

CONTENT = random.Random(1).randbytes(5000)
FAST = StorageSettings(num_attempts=4, backoff_s=0.001, max_backoff_s=0.01, timeout_s=60.0, block_bytes=1000)


def extent(start: int, length: int, name: str = "a.tar", file_bytes: int = 5000) -> Extent:
    return Extent(name, start, length, file_bytes)


@pytest.fixture
def server() -> Iterator[FlakyServer]:
    """A server with `set/a.tar`, also as a bucket named `set`."""
    with running_flaky_server() as running:
        running.files["/set/a.tar"] = CONTENT
        yield running


@pytest.fixture(params=["http", "s3"])
def url(
    request: pytest.FixtureRequest, server: FlakyServer, s3: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The URL of `set` on the flaky server, by one of two drivers."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    return f"{server.url}/set" if request.param == "http" else "s3://set"


def test_a_fault_that_passes_is_never_seen(url: str, server: FlakyServer) -> None:
    with Storage(url, StorageSettings(backoff_s=0.001)) as storage:
        for fault in ("503", "500", "429", "reset", "cut", "short"):
            server.faults.extend([fault, fault])
            before = storage.num_retries
            contents = storage.read_extents([extent(100, 50), extent(2999, 2)])
            assert contents == [CONTENT[100:150], CONTENT[2999:3001]]
            assert not server.faults
            # aiohttp itself asks again, once, where a connection is reset.
            assert storage.num_retries - before == 2 or fault == "reset"


def test_a_request_that_hangs_is_made_again(url: str, server: FlakyServer) -> None:
    server.faults.append("stall")
    with Storage(url, StorageSettings(backoff_s=0.001, timeout_s=1.0)) as storage:
        assert storage.read_extents([extent(100, 50)]) == [CONTENT[100:150]]
        assert storage.num_retries >= 1  # one more, where connecting took a second


def test_a_range_may_come_with_the_checksum_of_the_whole_object(url: str, server: FlakyServer) -> None:
    checksum = base64.b64encode(zlib.crc32(CONTENT).to_bytes(4, "big")).decode()
    server.range_headers = {"x-amz-checksum-crc32": checksum}  # as rclone's server has it
    with Storage(url, FAST) as storage:
        assert storage.read_extents([extent(100, 50)]) == [CONTENT[100:150]]
        assert storage.num_retries == 0


def test_a_server_that_asks_for_a_pause_gets_it(
    url: str, server: FlakyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def no_wait(self: Persistence, attempt: int, asked_s: float) -> float:
        asked.append(asked_s)
        return 0.0

    monkeypatch.setattr(Persistence, "wait_s", no_wait)
    with Storage(url, FAST) as storage:
        for pause in ("7", "Wed, 21 Oct 2026 07:28:00 GMT"):
            server.error_headers = {"Retry-After": pause}
            server.faults.append("503")
            assert storage.read_extents([extent(0, 10)]) == [CONTENT[:10]]
    assert asked == [7.0, 0.0]


def test_a_fault_that_stays_is_a_clear_error_after_the_last_attempt(url: str, server: FlakyServer) -> None:
    faults = {
        "503": "503|Service Unavailable",
        "500": "500|Internal Server Error",
        "reset": "Connection|Disconnected",
        "cut": "Content|payload|Response",
        "short": "only 5 of 10 bytes came",
    }
    with Storage(url, StorageSettings(num_attempts=3, backoff_s=0.001)) as storage:
        for fault, reason in faults.items():
            server.faults.extend([fault] * 20)
            match = (
                rf"{url}/a.tar: bytes 100 to 110 could not be read in 3 attempts over \d s; the last failed "
                rf"with: .*({reason}).*\. The storage, or the way there, is at fault, not the data: see"
            )
            with pytest.raises(StreamError, match=match) as caught:
                storage.read_extents([extent(100, 10)])
            assert type(caught.value) is StreamError
            server.faults.clear()
        assert storage.num_retries == 2 * len(faults)


def test_a_storage_that_hangs_is_a_clear_error_after_the_last_attempt(server: FlakyServer) -> None:
    server.faults.extend(["stall"] * 2)
    match = r"2 attempts .* the last failed with: no answer within 0\.3 s"
    storage = Storage(f"{server.url}/set", StorageSettings(num_attempts=2, timeout_s=0.3))
    with storage, pytest.raises(StreamError, match=match):
        storage.read_extents([extent(100, 10)])


def test_a_refusal_is_told_at_once_with_where_credentials_are_looked_for(
    url: str, server: FlakyServer
) -> None:
    places = "~/.netrc" if url.startswith("http") else "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    match = rf"bytes 0 to 10 may not be read .* come from the environment: .*{places}"
    with Storage(url, FAST) as storage:
        for fault in ("401", "403"):
            server.faults.append(fault)
            with pytest.raises(StreamError, match=match):
                storage.read_extents([extent(0, 10)])
    assert len(server.requests) == 2


def test_each_scheme_has_its_own_advice() -> None:
    assert "GOOGLE_APPLICATION_CREDENTIALS" in credentials_advice("gcs://bucket/x")
    assert "HF_TOKEN" in credentials_advice("hf://datasets/a/b")
    assert "AWS_ACCESS_KEY_ID" in credentials_advice("filecache::s3a://bucket/x")
    assert "Change the permissions of the file" in credentials_advice("/data/x")
    assert "the driver of abfs:// documents" in credentials_advice("abfs://container/x")


def test_a_missing_file_is_told_at_once(url: str) -> None:
    with Storage(url, FAST) as storage:
        with pytest.raises(MissingFile, match=r"/b\.tar is missing"):
            storage.read_extents([extent(0, 10, "b.tar")])
        assert storage.num_retries == 0


def test_a_truncated_file_is_no_fault_of_the_storage(url: str) -> None:
    for start in (4995, 6000):  # a short answer; status 416
        with Storage(url, FAST) as storage:
            with pytest.raises(TruncatedFile, match="has 5000 bytes instead of 9000: it is truncated"):
                storage.read_extents([extent(start, 10, file_bytes=9000)])
            assert storage.num_retries == 3


def test_a_size_that_cannot_be_looked_up_for_now_is_not_a_missing_file(server: FlakyServer) -> None:
    """fsspec's http says FileNotFoundError to whatever goes wrong there."""
    with Storage(f"{server.url}/set", FAST) as storage:
        for fault in ("503", "reset"):
            server.head_faults.append(fault)
            server.faults.append(fault)
            server.files["/set/a.tar"] = CONTENT
            assert storage.size("a.tar") == 5000
        server.head_faults.extend(["503"] * 9)
        del server.files["/set/a.tar"]
        with pytest.raises(MissingFile):
            storage.size("a.tar")


def test_a_server_that_tells_no_sizes_is_read_whole_and_refuses_size(server: FlakyServer) -> None:
    server.tells_sizes = False
    with Storage(f"{server.url}/set", FAST) as storage:
        assert storage.read_extents([extent(5, 5)]) == [CONTENT[5:10]]
        assert storage.read("a.tar") == CONTENT


def test_a_server_without_ranges_is_refused(server: FlakyServer) -> None:
    server.faults.append("whole")
    match = "sends 5000 bytes when it is asked for 10, so it does not serve byte ranges"
    with Storage(f"{server.url}/set", FAST) as storage, pytest.raises(StreamError, match=match):
        storage.read_extents([extent(0, 10)])


def test_a_password_of_netrc_is_used(
    server: FlakyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.authorization = "Basic " + base64.b64encode(b"reader:planted-password").decode()
    with Storage(f"{server.url}/set", FAST) as storage, pytest.raises(StreamError, match="may not be read"):
        storage.read_extents([extent(0, 10)])
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login reader password planted-password\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with Storage(f"{server.url}/set", FAST) as storage:
        assert storage.read_extents([extent(0, 10)]) == [CONTENT[:10]]


def test_after_one_refusal_nothing_hangs_on(server: FlakyServer) -> None:
    server.faults.extend(["stall", "stall", "stall", "403"])
    rules = StorageSettings(timeout_s=60.0, num_connections=4)
    with Storage(f"{server.url}/set", rules) as storage:
        with pytest.raises(StreamError, match="may not be read"):
            storage.read_extents([extent(1000 * number, 10) for number in range(4)])
        _wait_until(lambda: not asyncio.all_tasks(get_loop()))
        assert storage.read_extents([extent(0, 10)]) == [CONTENT[:10]]


def _wait_until(holds: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


SECRETS = ("planted-password", "planted-signature", "planted-token", ACCESS_KEY, SECRET_KEY)


@pytest.mark.parametrize("kind", ["user", "query", "s3"])
def test_no_error_log_or_note_shows_a_secret(
    kind: str,
    server: FlakyServer,
    s3: ObjectStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    host = server.url.removeprefix("http://")
    url = {
        "user": f"http://reader:planted-password@{host}/set",
        "query": f"http://{host}/set?X-Amz-Credential={ACCESS_KEY}&X-Amz-Signature=planted-signature"
        "&token=planted-token",
        "s3": "s3://set",
    }[kind]
    (tmp_path / "file").write_bytes(b"")
    broken_cache = str(tmp_path / "file" / "cache")
    rules = StorageSettings(broken_cache, block_bytes=1000, num_attempts=2, backoff_s=0.001)
    shown: list[str] = []
    with Storage(url, rules) as storage:
        assert storage.read_extents([extent(0, 10)]) == [CONTENT[:10]]
        attempts: list[Callable[[], object]] = [
            lambda: storage.read_extents([extent(0, 10)]),
            lambda: storage.size("b.tar"),
            lambda: storage.read("../b.tar"),
        ]
        for fault in ("503", "403", "404", "416", "500", "cut", "short", "whole"):
            for attempt in attempts:
                server.faults.extend([fault, fault])
                with pytest.raises(StreamError) as caught:
                    attempt()
                server.faults.clear()
                shown += [repr(caught.value), *traceback.format_exception(caught.value)]
        shown += [repr(storage), *storage.take_notes(), caplog.text]
    assert storage.take_notes() == []
    assert len(shown) > 40
    assert [secret for secret in SECRETS if secret in "".join(shown)] == []


def test_waits_double_up_to_a_cap_and_are_drawn_from_all_of_it() -> None:
    rules = Persistence(num_attempts=9, backoff_s=0.5, max_backoff_s=3.0, timeout_s=1.0)
    for attempt, longest in enumerate([0.5, 1.0, 2.0, 3.0, 3.0, 3.0], start=1):
        waits = sorted(rules.wait_s(attempt) for _ in range(400))
        assert 0 <= waits[0] < 0.1 * longest  # each fails by chance once in 10^18
        assert 0.9 * longest < waits[-1] <= longest
    assert 0.7 <= rules.wait_s(1, asked_s=0.7) <= 1.2
    assert 1.0 <= rules.wait_s(1, asked_s=300.0) <= 1.5  # no more than one attempt may take


# S3, by moto's server.


@pytest.mark.parametrize("has_cache", [False, True])
def test_files_in_a_bucket_are_read(has_cache: bool, s3: ObjectStore, tmp_path: Path) -> None:
    url = f"{s3.new_bucket()}/some/set"
    large = random.Random(2).randbytes((9 << 20) + 17)
    s3.put(f"{url}/large.tar", large)
    s3.put(f"{url}/index.json", b'{"a": 1}')
    s3.put(f"{url}/empty", b"")
    rules = StorageSettings(str(tmp_path) if has_cache else None)
    extents = [Extent("large.tar", place, 70_000, len(large)) for place in range(0, 9 << 20, 700_001)]
    with Storage(url, rules) as storage:
        names = ("index.json", "empty", "large.tar")
        assert [storage.read(name) for name in names] == [b'{"a": 1}', b"", large]
        assert storage.size("large.tar") == len(large)
        before = storage.num_bytes_fetched
        for _ in range(2):
            assert storage.read_extents(extents) == [large[e.start : e.stop] for e in extents]
        fetched = storage.num_bytes_fetched - before
        assert fetched == (9 << 20 if has_cache else 2 * 70_000 * len(extents))  # all blocks but the last
        assert storage.num_retries == 0
        assert storage.local_path("large.tar") is None


def test_an_object_that_is_not_there_is_missing(s3: ObjectStore) -> None:
    url = s3.new_bucket()
    s3.put(f"{url}/a.tar", CONTENT)
    with Storage(url, FAST) as storage:
        assert storage.read_extents([extent(0, 10)]) == [CONTENT[:10]]
        s3.delete(f"{url}/a.tar")
        for attempt in (lambda: storage.read("a.tar"), lambda: storage.read_extents([extent(0, 10)])):
            with pytest.raises(MissingFile, match=r"/a\.tar is missing"):
                attempt()
    storage = Storage("s3://no-such-bucket/x", FAST)
    with storage, pytest.raises(MissingFile, match="bucket does not exist"):
        storage.read("index.json")


def test_an_object_that_was_cut_is_truncated(s3: ObjectStore) -> None:
    url = s3.new_bucket()
    s3.put(f"{url}/a.tar", CONTENT[:3000])
    for start in (2995, 4000):
        storage = Storage(url, FAST)
        with storage, pytest.raises(TruncatedFile, match="has 3000 bytes instead of 5000"):
            storage.read_extents([extent(start, 10)])


def test_credentials_that_are_not_there_are_asked_for(
    s3: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = s3.new_bucket()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    match = "Unable to locate credentials.*come from the environment: AWS_ACCESS_KEY_ID and AWS_SECRET"
    with Storage(url, FAST) as storage, pytest.raises(StreamError, match=match):
        storage.read("a.tar")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    s3.put(f"{url}/a.tar", CONTENT)
    with Storage(url, FAST) as storage:  # no connection of another storage is used
        assert storage.read("a.tar") == CONTENT


def test_a_server_that_is_down_is_told(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    match = "could not be read in 4 attempts .*Could not connect to the endpoint"
    with Storage("s3://bucket/x", FAST) as storage, pytest.raises(StreamError, match=match):
        storage.read_extents([extent(0, 10)])


def test_a_storage_in_use_is_carried_over_a_fork(url: str) -> None:
    with Storage(url, FAST) as storage:
        storage.read_extents([extent(0, 10)])
        pid = os.fork()
        if pid == 0:  # with the parent's connections, and without its event loop
            try:
                is_right = storage.read_extents([extent(5, 10), extent(50, 5)]) == [
                    CONTENT[5:15],
                    CONTENT[50:55],
                ]
                os._exit(0 if is_right and storage.num_requests == 2 else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert storage.read_extents([extent(0, 10)]) == [CONTENT[:10]]  # the child closed none of ours


def test_a_program_that_never_closes_a_storage_ends_in_silence(s3: ObjectStore, server: FlakyServer) -> None:
    url = s3.new_bucket()
    s3.put(f"{url}/a.tar", CONTENT)
    code = (
        "from metaloom.datasets.storage import *\n"
        f"for url in ({url!r}, {server.url!r} + '/set'):\n"
        "    kept = Storage(url)\n"
        "    kept.read_extents([Extent('a.tar', 0, 10, 5000)])\n"
    )
    run_silently(code)


# A driver without an event loop, which fails as it is told.


class FaultyFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """Files in memory; each read calls `before`, which may raise, wait or count."""

    protocol = "faulty"
    cachable = False
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    before: ClassVar[Callable[[int], None]] = staticmethod(lambda start: None)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("faulty://", "memory://")))

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **options: object
    ) -> bytes:
        type(self).before(start or 0)
        return bytes(super().cat_file(path, start, end))


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FaultyFileSystem]]:
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    FaultyFileSystem().pipe("/set/a.tar", CONTENT)
    monkeypatch.setattr(FaultyFileSystem, "before", staticmethod(lambda start: None))
    yield FaultyFileSystem
    FaultyFileSystem.store.clear()


def _set(faulty: type[FaultyFileSystem], before: Callable[[int], None]) -> None:
    faulty.before = staticmethod(before)


def test_so_many_requests_run_at_once_and_no_more(faulty: type[FaultyFileSystem]) -> None:
    together = threading.Barrier(4, timeout=30)
    running, most = [0], [0]
    lock = threading.Lock()

    def before(start: int) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        together.wait()  # breaks, if no four come together
        time.sleep(0.02)  # for a fifth to come
        with lock:
            running[0] -= 1

    _set(faulty, before)
    storage = Storage("faulty://set", StorageSettings(num_connections=4, num_attempts=1))
    extents = [extent(400 * number, 10) for number in range(12)]
    assert storage.read_extents(extents) == [CONTENT[e.start : e.stop] for e in extents]
    assert most[0] == 4


def test_a_driver_that_hangs_is_left_behind(faulty: type[FaultyFileSystem]) -> None:
    going_on, calls = threading.Event(), []

    def before(start: int) -> None:
        calls.append(start)
        if len(calls) == 1:
            going_on.wait()

    _set(faulty, before)
    storage = Storage("faulty://set", StorageSettings(timeout_s=0.1, backoff_s=0.001))
    assert storage.read_extents([extent(7, 10)]) == [CONTENT[7:17]]
    assert calls == [7, 7]
    going_on.set()
    _wait_until(lambda: all(thread.name != "metaloom-storage" for thread in threading.enumerate()))


@pytest.mark.parametrize(
    "error",
    [
        OSError(5, "planted EIO"),
        TimeoutError("planted"),
        ConnectionResetError("planted"),
        RuntimeError("planted"),
        ValueError("planted"),
    ],
    ids=repr,
)
def test_an_error_of_any_kind_is_tried_again_and_told_in_the_end(
    error: Exception, faulty: type[FaultyFileSystem]
) -> None:
    failures = [error] * 3

    def before(start: int) -> None:
        if failures:
            raise failures.pop()

    _set(faulty, before)
    storage = Storage("faulty://set", FAST)
    assert storage.read_extents([extent(7, 10)]) == [CONTENT[7:17]]
    assert storage.num_retries == 3
    failures.extend([error] * 4)
    with pytest.raises(StreamError, match=f"4 attempts .*{type(error).__name__}: .*planted"):
        storage.read_extents([extent(7, 10)])


def test_a_permission_that_lacks_is_told_at_once(faulty: type[FaultyFileSystem]) -> None:
    def before(start: int) -> None:
        raise PermissionError("planted")

    _set(faulty, before)
    storage = Storage("faulty://set", FAST)
    with pytest.raises(StreamError, match=r"may not be read \(PermissionError: planted\)"):
        storage.read_extents([extent(7, 10)])
    assert storage.num_retries == 0


# Processes that share a cache.


def test_processes_that_are_killed_leave_a_cache_that_works_and_keeps_its_limit(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.faults.hammer_cache", str(tmp_path), "3", "3"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    result = json.loads(finished.stdout)
    assert 0.9 * hammer_cache.LIMIT_BYTES < result["most"] <= hammer_cache.LIMIT_BYTES
    assert min(result["kills"], result["kills_in_change"], result["hits"]) > 0, result

    cache = BlockCache(tmp_path, hammer_cache.LIMIT_BYTES)
    for name in range(2 * hammer_cache.NUM_BLOCKS):
        cache.put(block_key(f"new {name}"), bytes(1000))
        assert hammer_cache.on_disk(tmp_path) <= hammer_cache.LIMIT_BYTES
    found = 0
    for name in range(hammer_cache.NUM_BLOCKS):
        size = hammer_cache.size_of(name)
        content = cache.read(block_key(str(name)), size, 0, size)
        assert content in (None, hammer_cache.content_of(name))
        found += content is not None
    assert found > 5
    assert not (tmp_path / "metaloom-cache.partial").exists()
    ledger = _LEDGER.unpack((tmp_path / "metaloom-cache.lock").read_bytes())
    assert ledger == (b"mlc1", 0, hammer_cache.on_disk(tmp_path))
    assert cache.take_notes() == []


def test_processes_read_through_one_cache_from_a_flaky_server(server: FlakyServer, tmp_path: Path) -> None:
    server.faults.extend(["503", "reset", "cut", "short"] * 10)
    code = (
        "import random, sys\n"
        "from metaloom.datasets.storage import Extent, Storage, StorageSettings\n"
        "content = random.Random(1).randbytes(5000)\n"
        "draws = random.Random(int(sys.argv[1]))\n"
        f"rules = StorageSettings({str(tmp_path)!r}, 1500, block_bytes=250, num_attempts=20,\n"
        "                        backoff_s=0.01, max_backoff_s=0.05)\n"
        f"with Storage({server.url + '/set'!r}, rules) as storage:\n"
        "    for _ in range(40):\n"
        "        starts = [draws.randrange(4900) for _ in range(3)]\n"
        "        extents = [Extent('a.tar', start, 100, 5000) for start in starts]\n"
        "        assert storage.read_extents(extents) == [content[start : start + 100] for start in starts]\n"
        "    assert storage.take_notes() == []\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, str(seed)]) for seed in range(3)]
    assert [child.wait(120) for child in children] == [0, 0, 0]
    assert 0 < hammer_cache.on_disk(tmp_path) <= 1500
    assert not server.faults
