"""Blocks on local disk: found again, the oldest out first, never above the limit, and no reason to stop."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import tempfile
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaloom.datasets import cache as cache_module
from metaloom.datasets.cache import BlockCache, block_key


def content_of(name: object, num_bytes: int) -> bytes:
    return random.Random(f"{name}").randbytes(num_bytes)


def read(cache: BlockCache, name: object, num_bytes: int) -> bytes | None:
    return cache.read(block_key(str(name)), num_bytes, 0, num_bytes)


def put(cache: BlockCache, name: object, num_bytes: int) -> None:
    cache.put(block_key(str(name)), content_of(name, num_bytes))


def bytes_on_disk(folder: Path) -> int:
    """All but the lock's file."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return sum(path.stat().st_size for path in files)


def test_a_block_is_found_again_also_in_parts(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "deep" / "cache", 1000)
    assert read(cache, "a", 100) is None
    put(cache, "a", 100)
    for view in (cache, BlockCache(cache.folder, 1000)):
        assert view.read(block_key("a"), 100, 17, 40) == content_of("a", 100)[17:40]
    assert cache.take_notes() == []


def test_keys_tell_every_part_of_the_identity() -> None:
    parts = [("a", "b", 1), ("a", "b1"), ("ab", 1), ("a", "b", 11), ("", "a", "b", 1)]
    assert len({block_key(*identity) for identity in parts}) == len(parts)


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 1000)
    for name in range(10):
        put(cache, name, 100)
    for name in (0, 3, 1):
        assert read(cache, name, 100)
    put(cache, "new", 100)
    assert [name for name in range(10) if not (tmp_path / _place(name)).exists()] == [2]
    for letter in "xyz":
        put(cache, letter, 100)
    assert [name for name in range(10) if not (tmp_path / _place(name)).exists()] == [2, 4, 5, 6]


def _place(name: object) -> str:
    key = block_key(str(name))
    return f"{key[:2]}/{key[2:]}"


steps = st.lists(
    st.tuples(st.sampled_from(["put", "read", "remove"]), st.integers(0, 14), st.integers(0, 1)), max_size=60
)


@settings(deadline=None, max_examples=60)
@given(steps=steps, limit=st.integers(50, 1200))
def test_the_cache_is_a_least_recently_used_one_with_a_low_mark(
    steps: list[tuple[str, int, int]], limit: int
) -> None:
    """Against a dictionary in order of use, with two views of one folder in turn."""
    sizes = [60 + 17 * name % 101 for name in range(15)]
    model: OrderedDict[int, int] = OrderedDict()
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        views = [BlockCache(folder, limit), BlockCache(folder, limit)]
        for step, name, view in steps:
            size = sizes[name]
            if step == "put":
                put(views[view], name, size)
                if name not in model and size <= limit:
                    if sum(model.values()) + size > limit:
                        while sum(model.values()) > min(limit - size, limit * 9 // 10):
                            model.popitem(last=False)
                    model[name] = size
            elif step == "remove":
                views[view].remove(block_key(str(name)))
                model.pop(name, None)
            else:
                expected = content_of(name, size) if name in model else None
                assert read(views[view], name, size) == expected
                if name in model:
                    model.move_to_end(name)
            assert bytes_on_disk(folder) == sum(model.values()) <= limit
        assert [n for n in range(15) if read(views[0], n, sizes[n])] == sorted(model)
        assert views[0].take_notes() + views[1].take_notes() == []


def test_a_block_above_the_limit_is_not_kept_and_costs_no_other(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 1000)
    put(cache, "a", 100)
    put(cache, "b", 1001)
    assert read(cache, "b", 1001) is None
    assert read(cache, "a", 100) is not None
    put(cache, "c", 1000)
    assert read(cache, "c", 1000) is not None
    assert bytes_on_disk(tmp_path) == 1000


def test_a_lower_limit_holds_from_the_next_block_on(tmp_path: Path) -> None:
    for name in range(10):
        put(BlockCache(tmp_path, 1000), name, 100)
    put(BlockCache(tmp_path, 300), "new", 100)
    assert bytes_on_disk(tmp_path) == 300


def test_a_block_of_another_length_is_not_used_and_is_replaced(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 1000)
    put(cache, "a", 100)
    (tmp_path / _place("a")).write_bytes(b"torn")
    assert read(cache, "a", 100) is None
    (tmp_path / _place("a")).write_bytes(bytes(150))
    assert read(cache, "a", 100) is None
    put(cache, "a", 100)
    assert read(cache, "a", 100) == content_of("a", 100)
    for name in range(9):
        put(cache, name, 100)
    assert bytes_on_disk(tmp_path) <= 1000


def test_files_of_others_in_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_bytes(bytes(5000))
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / "notes").write_bytes(bytes(5000))
    cache = BlockCache(tmp_path, 300)
    for name in range(10):
        put(cache, name, 100)
    assert bytes_on_disk(tmp_path) == 10_300
    assert cache.take_notes() == []


@pytest.mark.parametrize("damage", ["killed", "empty", "torn", "deleted"])
def test_a_count_that_was_left_wrong_is_mended(damage: str, tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 1000)
    for name in range(10):
        put(cache, name, 100)
    ledger = tmp_path / "metaloom-cache.lock"
    if damage == "killed":  # between the count and the block
        with ledger.open("r+b") as file:
            file.write(cache_module._LEDGER.pack(b"mlc1", 1, 100))
        (tmp_path / "metaloom-cache.partial").write_bytes(bytes(99))
    elif damage == "deleted":
        ledger.unlink()
    else:
        ledger.write_bytes(b"" if damage == "empty" else b"mlc1\0\0")
    put(cache, "new", 100)
    assert bytes_on_disk(tmp_path) == 1000
    assert [name for name in range(10) if not read(cache, name, 100)] == [0]
    assert cache_module._LEDGER.unpack(ledger.read_bytes()) == (b"mlc1", 0, 1000)


def test_a_full_cache_is_emptied_to_nine_tenths_at_once(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 1000)
    for name in range(101):
        put(cache, name, 10)
    assert [name for name in range(101) if read(cache, name, 10)] == list(range(10, 101))


def test_a_folder_that_is_emptied_meanwhile_is_made_again(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "cache", 1000)
    for _ in range(2):
        for name in range(12):
            put(cache, name, 100)
        assert read(cache, 11, 100) is not None
        shutil.rmtree(tmp_path / "cache")
    assert read(cache, 11, 100) is None
    assert cache.take_notes() == []


def test_a_full_disk_is_told_once_and_leaves_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = BlockCache(tmp_path, 1000)
    put(cache, "a", 100)
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    (tmp_path / "metaloom-cache.partial").symlink_to("/dev/full")
    put(cache, "b", 100)
    put(cache, "c", 100)
    (note,) = cache.take_notes()
    assert "No space left on device" in note
    assert "Reading goes on; what is not in the cache comes from storage every time. Make room there" in note
    assert cache.take_notes() == []
    assert not os.path.lexists(tmp_path / "metaloom-cache.partial")
    assert read(cache, "a", 100) == content_of("a", 100)
    put(cache, "d", 100)
    assert read(cache, "d", 100) is None  # five minutes have not passed
    now[0] += 301
    put(cache, "d", 100)
    assert read(cache, "d", 100) is not None


def test_a_folder_that_cannot_be_made_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = BlockCache(tmp_path / "file" / "cache", 1000)
    assert read(cache, "a", 100) is None
    put(cache, "a", 100)
    cache.remove(block_key("a"))
    (note,) = cache.take_notes()
    assert "NotADirectoryError" in note


def test_a_lock_that_a_stopped_process_holds_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_LOCK_TIMEOUT_S", 0.05)
    cache = BlockCache(tmp_path, 1000)
    put(cache, "a", 100)
    descriptor = os.open(tmp_path / "metaloom-cache.lock", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    put(cache, "b", 100)
    assert read(cache, "a", 100) is not None
    assert "another process holds" in cache.take_notes()[0]
    os.close(descriptor)


def test_threads_share_a_cache(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 1000)

    def work(seed: int) -> None:
        draws = random.Random(seed)
        for _ in range(300):
            name = draws.randrange(30)
            found = read(cache, name, 100)
            assert found in (None, content_of(name, 100))
            if found is None:
                put(cache, name, 100)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert 800 <= bytes_on_disk(tmp_path) <= 1000
    assert cache.take_notes() == []
