"""Google Cloud Storage and the Hugging Face Hub, read by their official drivers from servers that answer in
their words, refuse, break off, hang."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import pytest
from gcsfs.retry import HttpError
from google.auth.exceptions import RefreshError
from huggingface_hub import constants as hub_constants
from numpy.typing import NDArray

from metaloom.datasets import Index
from metaloom.datasets.connection import Persistence
from metaloom.datasets.drivers import Meaning, meaning
from metaloom.datasets.extents import block_of, parts_by_block
from metaloom.datasets.members import Members
from metaloom.datasets.reader import SampleReader
from metaloom.datasets.storage import Extent, MissingFile, Storage, StorageSettings, TruncatedFile
from metaloom.errors import StreamError
from tests import commands, tiny_sets
from tests.cloud_servers import (
    GOOGLE_TOKEN,
    HUB_TOKEN,
    SIGNATURE,
    CloudServer,
    google_key,
    running_google_storage,
    running_hub,
)

CONTENT = random.Random(1).randbytes(5000)
FAST = StorageSettings(num_attempts=4, backoff_s=0.001, max_backoff_s=0.01, timeout_s=60.0, block_bytes=1000)


def extent(start: int, length: int, name: str = "a.tar", file_bytes: int = 5000) -> Extent:
    return Extent(name, start, length, file_bytes)


@dataclass(frozen=True)
class Cloud:
    """A storage that runs, with all that finds it and opens it in the environment.

    Attributes:
        url, path: a folder with `a.tar`, for users and for the server.
        places: where users are told that credentials come from.
        credentials: the variable of the environment that has them.
        secrets: what no message may show.
    """

    server: CloudServer
    url: str
    path: str
    places: str
    credentials: str
    secrets: tuple[str, ...]

    @property
    def is_google(self) -> bool:
        return self.url.startswith("gs")


@pytest.fixture(params=["gs", "hf"])
def cloud(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "GOOGLE_CLOUD_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    # No credentials of a user are found, and no other server is asked: not for those of a machine of
    # Google's, nor for what the Hub's library wants to know of who calls.
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "gcloud"))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setattr(hub_constants, "HF_TOKEN_PATH", str(tmp_path / "hub" / "token"))
    monkeypatch.setattr(hub_constants, "HF_HUB_DISABLE_TELEMETRY", True)
    if request.param == "gs":
        with running_google_storage() as server:
            key = google_key(tmp_path, server)
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
            monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(key))
            server.authorization = f"Bearer {GOOGLE_TOKEN}"
            server.files["/bucket/some/set/a.tar"] = CONTENT
            secrets = (GOOGLE_TOKEN, "PRIVATE KEY", key.read_text().split("\\n")[2])
            yield Cloud(
                server,
                "gs://bucket/some/set",
                "/bucket/some/set",
                "GOOGLE_APPLICATION_CREDENTIALS, the path of a key file, or `gcloud auth",
                "GOOGLE_APPLICATION_CREDENTIALS",
                secrets,
            )
    else:
        with running_hub() as server:
            monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
            monkeypatch.setenv("HF_ENDPOINT", server.url)  # for children; this process has read it already
            monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server.url})
            server.authorization = f"Bearer {HUB_TOKEN}"
            server.files["/datasets/user/set/some/set/a.tar"] = CONTENT
            yield Cloud(
                server,
                "hf://datasets/user/set/some/set",
                "/datasets/user/set/some/set",
                "HF_TOKEN, or `hf auth login`",
                "HF_TOKEN",
                (HUB_TOKEN,),
            )


def _raw(members: Members) -> dict[str, NDArray[np.uint8]]:
    return {name: np.frombuffer(payload, np.uint8) for name, payload in members.items()}


@pytest.mark.parametrize("has_cache", [False, True])
def test_samples_are_those_of_local_disk_and_no_other_byte_is_fetched(
    has_cache: bool, cloud: Cloud, tmp_path: Path
) -> None:
    local = tiny_sets.class_set(tmp_path / "set", shard_limit_bytes=20_000)
    cloud.server.upload(tmp_path / "set", cloud.path)
    rules = StorageSettings(str(tmp_path / "cache") if has_cache else None, block_bytes=1000)
    index = Index.load(cloud.url, rules)
    assert index.digest == local.digest
    reader = SampleReader(index, "train", _raw, memory_bytes=0)
    table, numbers = index.split("train"), [0, 7, 8, 41, 79]
    before = len(cloud.server.content_requests())
    expected = SampleReader(local, "train", _raw).read(numbers)
    for _ in range(2):
        np.testing.assert_equal(reader.read(numbers), expected)
    asked = set()
    for number in numbers:
        shard = index.shards[int(table.shard[number])]
        sample = Extent(shard.name, int(table.offset[number]), int(table.length[number]), shard.num_bytes)
        for part in parts_by_block(sample, 1000):
            needed = block_of(part, 1000) if has_cache else part
            asked |= {(shard.name, place) for place in range(needed.start, needed.stop)}
    requests = cloud.server.content_requests()[before:]
    fetched = [(name, place) for name, places in requests for place in places]
    assert len(index.shards) > 1
    assert set(fetched) == asked
    assert len(fetched) == (1 if has_cache else 2) * len(asked)
    assert index.storage.num_retries == 0
    index.storage.close()


def test_a_fault_that_passes_is_never_seen_and_each_attempt_is_one_request(cloud: Cloud) -> None:
    queues = [cloud.server.faults]
    if not cloud.is_google:
        queues.append(cloud.server.stored_faults)
    with Storage(cloud.url, FAST) as storage:
        for faults in queues:
            for fault in ("503", "500", "429", "reset", "cut", "short"):
                faults.extend([fault, fault])
                retries, requests = storage.num_retries, len(cloud.server.content_requests())
                assert storage.read_extents([extent(100, 50)]) == [CONTENT[100:150]]
                assert not faults
                assert len(cloud.server.content_requests()) - requests == 3
                # aiohttp itself asks again, once, where a connection is reset.
                assert storage.num_retries - retries == 2 or (fault == "reset" and cloud.is_google)
        cloud.server.head_faults.extend(["503"] * 3)
        assert storage.size("a.tar") == 5000
        assert not cloud.server.head_faults


def test_a_fault_that_stays_is_a_clear_error_after_so_many_requests(cloud: Cloud) -> None:
    with Storage(cloud.url, FAST) as storage:
        cloud.server.faults.extend(["503"] * 50)
        match = rf"{cloud.url}/a.tar: bytes 0 to 10 could not be read in 4 attempts .*(internal error|503)"
        with pytest.raises(StreamError, match=match) as caught:
            storage.read_extents([extent(0, 10)])
        assert type(caught.value) is StreamError
        assert (storage.num_retries, len(cloud.server.content_requests())) == (3, 4)
        cloud.server.head_faults.extend(["503"] * 50)
        with pytest.raises(StreamError, match="its size could not be read in 4 attempts"):
            storage.size("a.tar")
        look_up = "/storage/v1/b/bucket/o/some" if cloud.is_google else "/paths-info/"
        assert sum(look_up in path and "/download/" not in path for _, path, _ in cloud.server.requests) == 4


def test_a_server_that_asks_for_a_pause_gets_it(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def no_wait(self: Persistence, attempt: int, asked_s: float) -> float:
        asked.append(asked_s)
        return 0.0

    monkeypatch.setattr(Persistence, "wait_s", no_wait)
    used_up = {
        "ratelimit": '"resolvers";r=0;t=257',
        "ratelimit-policy": '"fixed window";"resolvers";q=3000;w=300',
    }
    with Storage(cloud.url, FAST) as storage:
        for headers in ({"Retry-After": "7"}, used_up, {"ratelimit": '"resolvers";r=12;t=257'}):
            cloud.server.error_headers = headers
            cloud.server.faults.append("429")
            assert storage.read_extents([extent(0, 10)]) == [CONTENT[:10]]
    # gcsfs does not pass on what Google asks for.
    assert asked == ([0.0, 0.0, 0.0] if cloud.is_google else [7.0, 257.0, 0.0])


def test_a_storage_that_hangs_is_left_after_the_time_limit(cloud: Cloud) -> None:
    with Storage(cloud.url, FAST) as storage:
        storage.read_extents([extent(0, 10)])  # connected and allowed
    rules = StorageSettings(num_attempts=2, backoff_s=0.001, timeout_s=0.3)
    with Storage(cloud.url, rules) as storage:
        cloud.server.faults.extend(["stall"] * 2)
        match = r"2 attempts .* the last failed with: no answer within 0\.3 s"
        with pytest.raises(StreamError, match=match):
            storage.read_extents([extent(100, 10)])
        assert storage.read_extents([extent(100, 10)]) == [CONTENT[100:110]]
    _wait_until(lambda: all(thread.name != "metaloom-storage" for thread in threading.enumerate()))


@pytest.mark.parametrize("cloud", ["gs"], indirect=True)  # the Hub's need no fetching
def test_an_access_token_that_does_not_come_holds_up_no_other_storage(cloud: Cloud) -> None:
    cloud.server.token_faults.append("stall")
    rules = StorageSettings(num_attempts=1, timeout_s=0.3)
    with Storage(cloud.url, rules) as storage, pytest.raises(StreamError, match=r"no answer within 0\.3 s"):
        storage.read_extents([extent(100, 10)])
    with Storage(cloud.url, FAST) as storage:
        assert storage.read_extents([extent(100, 10)]) == [CONTENT[100:110]]


@pytest.mark.parametrize("is_passing", [False, True])
def test_whether_an_access_token_was_refused_or_could_not_be_fetched_is_told_apart(is_passing: bool) -> None:
    error = HttpError({"code": 401, "message": "Invalid Credentials"})
    error.__cause__ = RefreshError("planted", retryable=is_passing)  # type: ignore[no-untyped-call]
    assert meaning(error) is (Meaning.TRANSIENT if is_passing else Meaning.FORBIDDEN)


def _wait_until(holds: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_missing_file_is_told_at_once(cloud: Cloud) -> None:
    with Storage(cloud.url, FAST) as storage:
        for attempt in (lambda: storage.read("b.tar"), lambda: storage.read_extents([extent(0, 9, "b.tar")])):
            with pytest.raises(MissingFile, match=r"/b\.tar is missing"):
                attempt()
        assert storage.num_retries == 0
    parent, name = cloud.url.rsplit("/", 1)
    with Storage(parent, FAST) as storage, pytest.raises(MissingFile, match=r"folder|no file"):
        storage.size(name)
    with pytest.raises(StreamError, match=r"holds no index\.json, so it is not a finished metaloom data set"):
        Index.load(cloud.url, FAST)


def test_a_file_that_was_cut_is_truncated(cloud: Cloud) -> None:
    for start in (4995, 6000):  # a short answer; status 416
        with Storage(cloud.url, FAST) as storage:
            with pytest.raises(TruncatedFile, match="has 5000 bytes instead of 9000: it is truncated"):
                storage.read_extents([extent(start, 10, file_bytes=9000)])
            assert storage.num_retries == 3


def test_a_refusal_is_told_at_once_with_where_credentials_are_looked_for(cloud: Cloud) -> None:
    match = rf"may not be read .*{cloud.url.split(':')[0]}:// come from the environment: {cloud.places}"
    with Storage(cloud.url, FAST) as storage:
        for fault in ("401", "403"):
            cloud.server.faults.append(fault)
            with pytest.raises(StreamError, match=match):
                storage.read_extents([extent(0, 10)])
            cloud.server.head_faults.extend([fault] * 9)  # gcsfs looks in several ways
            with pytest.raises(StreamError, match=match):
                storage.size("a.tar")
            cloud.server.head_faults.clear()
            assert storage.read_extents([extent(0, 10)]) == [CONTENT[:10]]  # it is not remembered
        assert storage.num_retries == 0


def test_without_credentials_public_data_is_read_and_private_data_asked_for(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(cloud.credentials)
    with Storage(cloud.url, FAST) as storage:
        for attempt in (lambda: storage.read("a.tar"), lambda: storage.read_extents([extent(0, 10)])):
            with pytest.raises(StreamError, match=f"may not be read .*{cloud.places}"):
                attempt()
        cloud.server.authorization = None
        assert storage.read("a.tar") == CONTENT
        assert storage.num_retries == 0


def test_a_bucket_or_repository_that_is_not_there_is_told_at_once(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "gs://no-such-bucket/x" if cloud.is_google else "hf://datasets/user/other"
    with Storage(url, FAST) as storage:
        for attempt in (lambda: storage.read("b"), lambda: storage.read_extents([extent(0, 9, "b")])):
            with pytest.raises(MissingFile, match=r"/b is missing .*(no-such-bucket|repository not found)"):
                attempt()
        monkeypatch.delenv("HF_TOKEN", raising=False)
        if not cloud.is_google:  # of which the Hub says nothing to those who say nothing
            with pytest.raises(StreamError, match=f"may not be read .*make sure you are .*{cloud.places}"):
                storage.read("b")


def test_no_error_log_or_note_shows_a_secret(cloud: Cloud, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    shown: list[str] = []
    with Storage(cloud.url, StorageSettings(num_attempts=2, backoff_s=0.001)) as storage:
        assert storage.read_extents([extent(0, 10)]) == [CONTENT[:10]]
        attempts: list[Callable[[], object]] = [
            lambda: storage.read_extents([extent(0, 10)]),
            lambda: storage.size("a.tar"),
        ]
        for faults in (cloud.server.faults, cloud.server.stored_faults, cloud.server.head_faults):
            for fault in ("503", "500", "429", "401", "403", "404", "416", "cut", "reset", "short", "whole"):
                for attempt in attempts:
                    faults.extend([fault] * 6)
                    try:
                        attempt()
                    except StreamError as error:
                        shown += [repr(error), *traceback.format_exception(error)]
                    faults.clear()
        shown += [repr(storage), *storage.take_notes()]
    assert len(shown) > 40
    assert [secret for secret in cloud.secrets if secret in "".join(shown) + caplog.text] == []
    # The Hub's HTTP client logs addresses, at a level that is off by default.
    assert SIGNATURE not in "".join(shown)


def test_a_storage_in_use_is_carried_over_a_fork(cloud: Cloud) -> None:
    with Storage(cloud.url, FAST) as storage:
        storage.read_extents([extent(0, 10)])
        pid = os.fork()
        if pid == 0:  # with the parent's connections, and without its event loop
            try:
                os._exit(0 if storage.read_extents([extent(5, 10)]) == [CONTENT[5:15]] else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert storage.read_extents([extent(0, 10)]) == [CONTENT[:10]]


def test_a_program_that_never_closes_a_storage_ends_in_silence(cloud: Cloud) -> None:
    code = (
        "from metaloom.datasets.storage import *\n"
        f"kept = Storage({cloud.url!r})\n"
        "assert len(kept.read('a.tar')) == 5000\n"
        "kept.read_extents([Extent('a.tar', 0, 10, 5000)])\n"
    )
    commands.run_silently(code)


def test_a_set_is_verified_by_a_command(cloud: Cloud, tmp_path: Path) -> None:
    tiny_sets.class_set(tmp_path / "set")
    cloud.server.upload(tmp_path / "set", cloud.path)
    output = commands.run_well("data", "verify", cloud.url, cwd=tmp_path)
    assert f"tiny at {cloud.url} is whole: 10 shards, 204800 bytes" in output
