"""Byte ranges of files at fsspec URLs: cut, put together, found again, refused."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import random
import re
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaloom.datasets.extents import Extent, Pieces, block_of, coalesced, parts_by_block
from metaloom.datasets.open_files import OpenFiles
from metaloom.datasets.storage import MissingFile, Storage, StorageSettings, TruncatedFile, open_filesystem
from metaloom.errors import StreamError

FAST = StorageSettings(num_attempts=3, backoff_s=0.001, timeout_s=5.0, block_bytes=100)
CONTENT = random.Random(0).randbytes(1050)


def extent(start: int, length: int, name: str = "a.tar") -> Extent:
    return Extent(name, start, length, len(CONTENT))


def expected(extents: list[Extent]) -> list[bytes]:
    return [CONTENT[e.start : e.start + e.length] for e in extents]


@pytest.fixture
def memory() -> Iterator[str]:
    """A URL in memory with `a.tar`."""
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/set/a.tar", CONTENT)
    yield "memory://set"
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


extents_of_two_files = st.lists(
    st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 99), st.integers(0, 99)).map(
        lambda t: Extent(t[0], min(t[1:]), abs(t[1] - t[2]), 100)
    ),
    max_size=12,
)


@given(extents=extents_of_two_files, max_bytes=st.integers(1, 120))
def test_coalesced_extents_cover_each_byte_once_and_no_other(extents: list[Extent], max_bytes: int) -> None:
    asked = {(e.name, place) for e in extents for place in range(e.start, e.stop)}
    joined = coalesced(extents, max_bytes)
    covered = [(e.name, place) for e in joined for place in range(e.start, e.stop)]
    assert sorted(covered) == sorted(asked)
    assert all(1 <= e.length <= max_bytes for e in joined)
    # No two could have been one.
    for left, right in itertools.pairwise(joined):
        touching = left.name == right.name and left.stop == right.start
        assert not touching or left.length == max_bytes


@given(extents=extents_of_two_files, max_bytes=st.integers(1, 120))
def test_extents_are_cut_out_of_what_covers_them(extents: list[Extent], max_bytes: int) -> None:
    files = {name: random.Random(name).randbytes(100) for name in "ab"}
    pieces = Pieces()
    for part in reversed(coalesced(extents, max_bytes)):
        pieces.add(part, files[part.name][part.start : part.stop])
    for e in extents:
        assert pieces.cut(e) == files[e.name][e.start : e.stop]


@given(start=st.integers(0, 250), length=st.integers(0, 250), block_bytes=st.integers(1, 90))
def test_parts_lie_in_one_block_each_and_blocks_end_with_the_file(
    start: int, length: int, block_bytes: int
) -> None:
    whole = Extent("a", start, length, 500)
    parts = parts_by_block(whole, block_bytes)
    assert [p for part in parts for p in range(part.start, part.stop)] == list(range(start, start + length))
    for part in parts:
        block = block_of(part, block_bytes)
        assert block.start % block_bytes == 0
        assert block.start <= part.start < part.stop <= block.stop
        assert block.stop == min(block.start + block_bytes, 500)


def test_an_extent_outside_of_its_file_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bytes 1000 to 1051 of 'a\.tar' are not within its 1050 bytes"):
        extent(1000, 51)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="num_connections is 0; it has to be positive"):
        StorageSettings(num_connections=0)
    with pytest.raises(ValueError, match="backoffs are -1 s"):
        StorageSettings(backoff_s=-1)


@pytest.mark.parametrize("scheme", ["path", "file://", "memory://", "zip"])
def test_files_of_any_scheme_are_read(scheme: str, tmp_path: Path, memory: str) -> None:
    (tmp_path / "a.tar").write_bytes(CONTENT)
    (tmp_path / "index.json").write_bytes(b"{}")
    fsspec.filesystem("memory").pipe("/set/index.json", b"{}")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("a.tar", CONTENT)
        archive.writestr("index.json", b"{}")
    url = {
        "path": str(tmp_path),
        "file://": f"file://{tmp_path}/",
        "memory://": memory,
        "zip": f"zip://::file://{tmp_path}/set.zip",
    }[scheme]
    extents = [extent(0, 1050), extent(1049, 1), extent(300, 0), extent(512, 300), extent(500, 20)]
    with Storage(url, FAST) as storage:
        assert storage.read("index.json") == b"{}"
        assert storage.size("a.tar") == 1050
        assert storage.read_extents(extents) == expected(extents)
        assert storage.read_extents([]) == []
        path = tmp_path / "a.tar" if scheme in ("path", "file://") else None
        assert storage.local_path("a.tar") == path
        assert storage.num_retries == 0


def test_an_empty_file_is_read(memory: str) -> None:
    fsspec.filesystem("memory").pipe("/set/empty", b"")
    assert Storage(memory, FAST).read("empty") == b""


@pytest.mark.parametrize("has_cache", [False, True])
@settings(max_examples=40, deadline=None)
@given(places=st.lists(st.tuples(st.integers(0, 1049), st.integers(0, 400)), max_size=8))
def test_every_byte_is_right_and_comes_once(places: list[tuple[int, int]], has_cache: bool) -> None:
    """With a cache of blocks: once per block."""
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/given/a.tar", CONTENT)
    extents = [extent(start, min(length, 1050 - start)) for start, length in places]
    with tempfile.TemporaryDirectory() as folder:
        rules = StorageSettings(cache_folder=folder if has_cache else None, block_bytes=100, num_attempts=1)
        storage = Storage("memory://given", rules)
        assert storage.read_extents(extents) == expected(extents)
        touched = {place for e in extents for place in range(e.start, e.stop)}
        if has_cache:
            blocks = {place // 100 for place in touched}
            assert storage.num_bytes_fetched == sum(50 if block == 10 else 100 for block in blocks)
            filesystem.pipe("/given/a.tar", bytes(1050))
            assert storage.read_extents(extents) == expected(extents)  # of the cache alone
        else:
            assert storage.num_bytes_fetched == len(touched)


def test_neighbours_are_one_request(memory: str, tmp_path: Path) -> None:
    storage = Storage(memory, FAST)
    storage.read_extents([extent(0, 100), extent(100, 100), extent(150, 100), extent(500, 10)])
    assert (storage.num_requests, storage.num_bytes_fetched) == (2, 260)
    cached = Storage(memory, StorageSettings(cache_folder=str(tmp_path), block_bytes=100))
    cached.read_extents([extent(50, 1), extent(150, 1), extent(250, 1), extent(999, 1)])
    assert (cached.num_requests, cached.num_bytes_fetched) == (2, 400)


def test_other_data_at_the_same_url_never_gets_old_blocks(memory: str, tmp_path: Path) -> None:
    rules = StorageSettings(cache_folder=str(tmp_path))
    assert Storage(memory, rules, digest="one").read_extents([extent(0, 9)]) == [CONTENT[:9]]
    fsspec.filesystem("memory").pipe("/set/a.tar", bytes(1050))
    assert Storage(memory, rules, digest="one").read_extents([extent(0, 9)]) == [CONTENT[:9]]
    assert Storage(memory, rules, digest="two").read_extents([extent(0, 9)]) == [bytes(9)]


def test_what_is_forgotten_comes_from_storage_anew(memory: str, tmp_path: Path) -> None:
    storage = Storage(memory, StorageSettings(cache_folder=str(tmp_path), block_bytes=100))
    storage.read_extents([extent(0, 400)])
    fsspec.filesystem("memory").pipe("/set/a.tar", bytes(1050))
    storage.forget(extent(150, 100))
    assert storage.read_extents([extent(0, 400)]) == [CONTENT[:100] + bytes(200) + CONTENT[300:400]]


def test_local_files_are_never_kept_in_the_cache(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(CONTENT)
    storage = Storage(str(tmp_path), StorageSettings(cache_folder=str(tmp_path / "cache")))
    assert storage.read_extents([extent(5, 5)]) == [CONTENT[5:10]]
    assert not (tmp_path / "cache").exists()


def test_few_of_many_local_files_are_open_and_none_after_close(tmp_path: Path) -> None:
    for number in range(200):
        (tmp_path / f"{number}.tar").write_bytes(CONTENT[number:])
    extents = [Extent(f"{number}.tar", 3, 10, 1050 - number) for number in range(200)]
    before = len(os.listdir("/proc/self/fd"))
    with Storage(str(tmp_path)) as storage:
        for _ in range(2):
            assert storage.read_extents(extents) == [CONTENT[n + 3 : n + 13] for n in range(200)]
        assert 1 < len(os.listdir("/proc/self/fd")) - before <= 64
    assert len(os.listdir("/proc/self/fd")) == before


def test_no_file_is_closed_while_a_thread_reads_it(tmp_path: Path) -> None:
    """Its number would be that of the next file to be opened, and the bytes those of another file."""
    contents = {f"{number}": bytes([number]) * 200 for number in range(8)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    files = OpenFiles(lambda name: str(tmp_path / name), 2)

    def work(seed: int) -> None:
        draws = random.Random(seed)
        for _ in range(3000):
            name = str(draws.randrange(8))
            assert files.read(name, 0, 200) == contents[name]

    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
    finally:
        sys.setswitchinterval(interval_s)


@pytest.mark.parametrize("is_local", [False, True])
def test_threads_share_a_storage(is_local: bool, tmp_path: Path, memory: str) -> None:
    """Local: with more files than stay open, so that one thread closes what another might read."""
    names = [f"{number}.tar" for number in range(80)]
    contents = {name: random.Random(name).randbytes(1050) for name in names}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        fsspec.filesystem("memory").pipe(f"/set/{name}", content)
    rules = StorageSettings(cache_folder=str(tmp_path / "cache"), cache_limit_bytes=20_000, block_bytes=100)
    storage = Storage(str(tmp_path) if is_local else memory, rules)

    def work(seed: int) -> None:
        draws = random.Random(seed)
        for _ in range(200 if is_local else 8):
            extents = [extent(draws.randrange(900), 150, draws.choice(names)) for _ in range(5)]
            read = storage.read_extents(extents)
            assert read == [contents[e.name][e.start : e.start + e.length] for e in extents]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert storage.num_requests > 0
    assert not [t.name for t in threading.enumerate() if t.name == "metaloom-storage"]
    storage.close()


def test_a_storage_is_pickled_without_its_connections(memory: str, tmp_path: Path) -> None:
    storage = Storage(memory, StorageSettings(cache_folder=str(tmp_path)), digest="abc")
    storage.read_extents([extent(0, 10)])
    copy = pickle.loads(pickle.dumps(storage))
    assert (copy.url, copy.settings, copy.digest) == (storage.url, storage.settings, "abc")
    assert copy.read_extents([extent(0, 10)]) == [CONTENT[:10]]
    assert copy.num_bytes_fetched == 0  # the same blocks


def _read_in_child(storage: Storage, answers: Any) -> None:
    answers.put((storage.read_extents([extent(1, 20)]), storage.num_requests))


@pytest.mark.parametrize(("scheme", "method"), [("local", "fork"), ("local", "spawn"), ("memory", "fork")])
def test_a_storage_in_use_is_carried_into_another_process(
    scheme: str, method: str, tmp_path: Path, memory: str
) -> None:
    (tmp_path / "a.tar").write_bytes(CONTENT)
    storage = Storage(str(tmp_path) if scheme == "local" else memory, FAST)
    storage.read_extents([extent(0, 10), extent(20, 10)])
    context: Any = multiprocessing.get_context(method)
    answers = context.SimpleQueue()
    child = context.Process(target=_read_in_child, args=(storage, answers))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert answers.get() == ([CONTENT[1:21]], 1)
    answers.close()
    child.close()
    storage.close()


@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_a_missing_file_is_told_at_once(scheme: str, tmp_path: Path, memory: str) -> None:
    storage = Storage(str(tmp_path) if scheme == "local" else memory, FAST)
    for attempt in (lambda: storage.read("b"), lambda: storage.read_extents([extent(0, 9, "b")])):
        with pytest.raises(MissingFile, match=r"/b is missing \(asked for .*Copy the file there, or correct"):
            attempt()
    assert storage.num_retries == 0
    with pytest.raises(MissingFile, match="folder"):
        Storage(f"{tmp_path.parent}", FAST).size(tmp_path.name)


@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_a_truncated_file_is_told_after_the_last_attempt(scheme: str, tmp_path: Path, memory: str) -> None:
    (tmp_path / "a.tar").write_bytes(CONTENT)
    storage = Storage(str(tmp_path) if scheme == "local" else memory, FAST)
    match = "a.tar has 1050 bytes instead of 2000: it is truncated, and bytes 1000 to 1100 are not all there"
    with pytest.raises(TruncatedFile, match=match):
        storage.read_extents([Extent("a.tar", 1000, 100, 2000)])
    assert storage.num_retries == 2
    with pytest.raises(TruncatedFile, match="has 1050 bytes instead of 2000"):
        storage.read_extents([Extent("a.tar", 1500, 100, 2000)])
    assert storage.num_retries == 2  # known by now
    assert storage.read_extents([Extent("a.tar", 1000, 50, 2000)]) == [CONTENT[1000:]]


def test_a_local_file_that_was_replaced_by_a_longer_one_is_found(tmp_path: Path) -> None:
    """As a network mount has it when the file was not all there: the open file is not the file any more."""
    storage = Storage(str(tmp_path), FAST)
    (tmp_path / "a.tar").write_bytes(CONTENT[:100])
    assert storage.read_extents([Extent("a.tar", 0, 10, 100)]) == [CONTENT[:10]]
    (tmp_path / "new").write_bytes(CONTENT)
    (tmp_path / "new").replace(tmp_path / "a.tar")
    assert storage.read_extents([extent(500, 10)]) == [CONTENT[500:510]]
    assert storage.read_extents([extent(500, 10)]) == [CONTENT[500:510]]
    (tmp_path / "a.tar").unlink()
    assert storage.read_extents([extent(500, 10)]) == [CONTENT[500:510]]  # the new one is open


@pytest.mark.parametrize("name", ["../a.tar", "x/../../a.tar", "/etc/passwd"])
def test_a_name_that_leads_out_of_the_folder_is_refused(name: str, memory: str, tmp_path: Path) -> None:
    for url in (memory, str(tmp_path)):
        storage = Storage(url, FAST)
        with pytest.raises(StreamError, match="is not the name of a file in this folder"):
            storage.read(name)
        with pytest.raises(StreamError, match="is not the name of a file in this folder"):
            storage.read_extents([Extent(name, 0, 1, 1)])


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(StreamError, match=r"nosuch://x: this URL cannot be opened .*Give a path, or a URL"):
        Storage("nosuch://x")
    with pytest.raises(StreamError, match="this URL cannot be opened") as caught:
        open_filesystem("nosuch://me:planted-password@host/x")
    assert "planted" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "module", "fix"),
    [
        ("s3://bucket/set", "s3fs", r"pip install 'metaloom\[s3\]'"),
        ("gs://bucket/set", "gcsfs", r"pip install 'metaloom\[gs\]'"),
        ("hf://datasets/a/b", "huggingface_hub", r"pip install 'metaloom\[hf\]'"),
        ("https://host/set", "aiohttp", r"pip install 'metaloom\[http\]'"),
    ],
)
def test_a_driver_that_is_not_installed_is_named(url: str, module: str, fix: str) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from metaloom.datasets.storage import Storage\n"
        "from metaloom.errors import StreamError\n"
        f"try: Storage({url!r})\nexcept StreamError as error: print(error)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    scheme = url.split(":")[0]
    assert re.search(f"the driver of {scheme}:// is not installed .*{fix}", output.stdout)


def test_retries_draw_from_no_generator_that_decides_data(memory: str) -> None:
    fsspec.filesystem("memory").pipe("/set/a.tar", CONTENT)
    random.seed(7)
    np.random.seed(7)
    states = (random.getstate(), repr(np.random.get_state()))
    with pytest.raises(TruncatedFile):
        Storage(memory, FAST).read_extents([Extent("a.tar", 1000, 100, 2000)])
    assert (random.getstate(), repr(np.random.get_state())) == states
