"""Reading samples: what is broken for good is named by shard and key, asked for twice, and raises nothing."""

import pickle
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from metaloom.datasets import (
    BrokenSample,
    Index,
    Sample,
    SampleReader,
    SplitSamples,
    StorageSettings,
    write_shards,
)
from metaloom.datasets.broken import SampleError
from metaloom.datasets.members import Members
from metaloom.datasets.reader import OVERHEAD_BYTES, Decoded
from metaloom.datasets.storage import Extent, Storage
from metaloom.errors import StreamError

NUM_SAMPLES = 8
TEXT_BYTES = 700


def texts(members: Members) -> dict[str, Any]:
    return {"text": np.frombuffer(members["txt"], np.uint8)}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of four samples each: `a/0` to `a/7`, of classes 0 to 3."""
    folder = tmp_path_factory.mktemp("original")
    samples = [
        Sample(f"a/{n}", {"cls": b"%d" % (n // 2), "txt": bytes([n]) * TEXT_BYTES}, {"class": n // 2})
        for n in range(NUM_SAMPLES)
    ]
    write_shards(
        folder,
        {"train": SplitSamples(samples, classes=("p", "q", "r", "s"))},
        dataset="mine",
        layout="classes",
        source={},
        shard_limit_bytes=4 * (2 * 512 + 512 + 1024),
    )
    assert len(list(folder.glob("*.tar"))) == 2
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(original, tmp_path / "set"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Extent]:
    """What storage is asked for, as it happens."""
    extents: list[Extent] = []
    read_extents = Storage.read_extents

    def noted(self: Storage, wanted: Sequence[Extent]) -> list[bytes]:
        extents.extend(wanted)
        return read_extents(self, wanted)

    monkeypatch.setattr(Storage, "read_extents", noted)
    return extents


def reader_of(folder: Path, *, memory_bytes: int = 1 << 20, limit: int = 1 << 20) -> SampleReader:
    index = Index.load(folder, StorageSettings(num_attempts=2, backoff_s=0.001))
    return SampleReader(index, "train", texts, memory_bytes=memory_bytes, sample_limit_bytes=limit)


def is_sample(found: Decoded | BrokenSample, number: int) -> bool:
    return not isinstance(found, BrokenSample) and found["text"].tolist() == [number] * TEXT_BYTES


def break_byte(reader: SampleReader, folder: Path, number: int, at: int) -> str:
    """Flips a bit of a sample, `at` bytes behind its start; its shard's name."""
    name = reader.index.shards[int(reader.table.shard[number])].name
    content = bytearray((folder / name).read_bytes())
    content[int(reader.table.offset[number]) + at] ^= 1
    (folder / name).write_bytes(content)
    return name


def test_samples_come_in_the_order_asked_for_and_each_is_fetched_once(
    folder: Path, asked: list[Extent]
) -> None:
    numbers = [5, 0, 5, 7, 0]
    reader = reader_of(folder)
    for _ in range(2):
        assert all(is_sample(found, n) for n, found in zip(numbers, reader.read(numbers), strict=True))
    assert [(e.name, e.start) for e in asked] == [
        (reader.index.shards[int(reader.table.shard[n])].name, int(reader.table.offset[n])) for n in (5, 0, 7)
    ]
    assert reader.read([]) == []


@pytest.mark.parametrize("at", [3, 512, 1100, 1024 + 512 + TEXT_BYTES, 2559], ids=str)
def test_a_flipped_bit_anywhere_names_shard_and_key_and_was_asked_for_twice(
    at: int, folder: Path, asked: list[Extent]
) -> None:
    reader = reader_of(folder)
    shard = break_byte(reader, folder, 6, at)
    found = reader.read([5, 6, 7])
    assert is_sample(found[0], 5)
    assert is_sample(found[2], 7)
    assert isinstance(found[1], BrokenSample)
    assert (found[1].url, found[1].shard, found[1].key) == (str(folder), shard, "a/6")
    assert str(found[1]).startswith(f"{folder}/{shard}: sample 'a/6' is damaged: bytes ")
    assert "have crc32" in found[1].reason
    start = int(reader.table.offset[6])
    assert [e.start for e in asked].count(start) == 2
    assert reader.read([6]) == [found[1]]  # what is known is not asked again
    assert len(asked) == 4


def test_damage_that_a_second_request_does_not_show_is_no_damage(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = reader_of(folder)
    read_extents, forgotten = Storage.read_extents, []
    faults = iter([True])

    def torn_once(self: Storage, wanted: Sequence[Extent]) -> list[bytes]:
        return [
            b"x" + content[1:] if next(faults, False) else content for content in read_extents(self, wanted)
        ]

    monkeypatch.setattr(Storage, "read_extents", torn_once)
    monkeypatch.setattr(Storage, "forget", lambda _, extent: forgotten.append(extent))
    assert is_sample(reader.read([2])[0], 2)
    assert [extent.start for extent in forgotten] == [int(reader.table.offset[2])]


def test_a_torn_block_of_the_cache_is_fetched_anew(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/reader-set", recursive=True)
    settings = StorageSettings(cache_folder=str(tmp_path_factory.mktemp("cache")))
    try:
        index = Index.load("memory://reader-set", settings)
        assert all(is_sample(s, n) for n, s in enumerate(SampleReader(index, "train", texts).read(range(8))))
        blocks = [
            file
            for file in Path(str(settings.cache_folder)).rglob("*")
            if file.is_file() and file.parent.name != "columns" and file.stat().st_size > 5000
        ]
        assert len(blocks) == 2
        for block in blocks:
            content = bytearray(block.read_bytes())
            content[4000] ^= 1
            block.write_bytes(content)
        again = SampleReader(Index.load("memory://reader-set", settings), "train", texts)
        assert all(is_sample(s, n) for n, s in enumerate(again.read(range(8))))
    finally:
        memory.rm("/reader-set", recursive=True)


def test_samples_of_a_missing_shard_are_named_and_the_others_read(folder: Path) -> None:
    reader = reader_of(folder)
    (folder / "train-00001.tar").unlink()
    found = reader.read(range(NUM_SAMPLES))
    assert all(is_sample(sample, n) for n, sample in enumerate(found[:4]))
    assert [str(sample) for sample in found[4:]] == [
        f"{folder}/train-00001.tar: sample 'a/{n}' is lost: the shard is missing" for n in range(4, 8)
    ]


def test_samples_behind_the_end_of_a_truncated_shard_are_named(folder: Path) -> None:
    reader = reader_of(folder)
    shard = folder / "train-00000.tar"
    shard.write_bytes(shard.read_bytes()[: int(reader.table.offset[2]) + 100])
    found = reader.read(range(4))
    assert [is_sample(sample, n) for n, sample in enumerate(found)] == [True, True, False, False]
    for number, sample in enumerate(found[2:], start=2):
        assert str(sample).startswith(f"{folder}/train-00000.tar: sample 'a/{number}' is cut off: ")


def test_an_empty_shard_loses_its_samples_one_by_one(folder: Path) -> None:
    reader = reader_of(folder)
    (folder / "train-00000.tar").write_bytes(b"")
    found = reader.read([0, 1, 4])
    assert [isinstance(sample, BrokenSample) for sample in found] == [True, True, False]
    assert "sample 'a/1' is cut off: " in str(found[1])


def test_a_sample_over_the_size_limit_is_not_even_fetched(folder: Path, asked: list[Extent]) -> None:
    reader = reader_of(folder, limit=2000)
    requests = reader.index.storage.num_requests
    found = reader.read(range(NUM_SAMPLES))
    reason = f"has {int(reader.table.length[0])} bytes, over the limit of 2000"
    assert found[0] == BrokenSample(str(folder), "train-00000.tar", "a/0", reason)
    assert all(isinstance(sample, BrokenSample) for sample in found)
    assert asked == []
    assert reader.index.storage.num_requests == requests


def _write(folder: Path, members: dict[str, bytes], **attributes: int) -> None:
    write_shards(
        folder,
        {"train": SplitSamples([Sample("k", members, attributes)], classes=("p", "q", "r", "s"))},
        dataset="mine",
        layout="classes" if attributes else "documents",
        source={},
    )


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (b"2", "cannot be decoded: its cls says class 2, the index 1"),
        (b"dog", "cannot be decoded: 'dog' is no class number"),
        (b"-1", "cannot be decoded: '-1' is no class number"),
    ],
)
def test_a_class_that_is_not_that_of_the_index_is_named(cls: bytes, reason: str, tmp_path: Path) -> None:
    _write(tmp_path, {"cls": cls, "txt": b"x"}, **{"class": 1})
    (found,) = reader_of(tmp_path).read([0])
    assert found == BrokenSample(str(tmp_path), "train-00000.tar", "k", reason)


def test_a_sample_without_cls_is_of_the_class_of_the_index(tmp_path: Path) -> None:
    _write(tmp_path, {"txt": b"x"}, **{"class": 1})
    (found,) = reader_of(tmp_path).read([0])
    assert not isinstance(found, BrokenSample)


def test_what_a_decoder_raises_is_the_reason_and_other_errors_pass(tmp_path: Path) -> None:
    _write(tmp_path, {"txt": b"x"})
    index = Index.load(tmp_path)

    def refuse(_: Members) -> Decoded:
        raise ValueError("it smells")

    def fail(_: Members) -> Decoded:
        raise ZeroDivisionError("a mistake of the program")

    (found,) = SampleReader(index, "train", refuse).read([0])
    assert str(found) == f"{tmp_path}/train-00000.tar: sample 'k' cannot be decoded: it smells"
    with pytest.raises(ZeroDivisionError):
        SampleReader(index, "train", fail).read([0])


def test_a_fault_of_storage_is_never_a_broken_sample(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Storage, extents: Sequence[Extent]) -> list[bytes]:
        raise StreamError("no answer in 6 attempts")

    monkeypatch.setattr(Storage, "read_extents", fail)
    reader = reader_of(folder)
    for _ in range(2):
        with pytest.raises(StreamError, match="no answer in 6 attempts") as caught:
            reader.read([0, 1])
        assert not isinstance(caught.value, SampleError)


@pytest.mark.parametrize("room", [0, 1, 3])
def test_memory_is_bounded_and_what_was_used_last_stays(room: int, folder: Path, asked: list[Extent]) -> None:
    kept_bytes = TEXT_BYTES + OVERHEAD_BYTES
    reader = reader_of(folder, memory_bytes=room * kept_bytes + kept_bytes // 2)
    model: list[int] = []  # least recently used first
    for number in (0, 1, 2, 0, 3, 0, 1, 4, 4, 5, 0, 6, 1):
        before = len(asked)
        assert is_sample(reader.read([number])[0], number)
        assert len(asked) - before == (number not in model)
        model = [*(n for n in model if n != number), number][-room:] if room else []
        assert reader.kept_bytes == len(model) * kept_bytes


def test_a_sample_that_does_not_fit_puts_out_no_other(folder: Path, asked: list[Extent]) -> None:
    def by_size(members: Members) -> Decoded:
        size = 10_000 if members["txt"][0] == 7 else 100
        return {"a": np.zeros(size, np.uint8), "b": np.zeros(size, np.uint8)}

    reader = SampleReader(Index.load(folder), "train", by_size, memory_bytes=1000 + 2 * OVERHEAD_BYTES)
    reader.read([0, 1])
    reader.read([7])
    assert reader.kept_bytes == 400 + 2 * OVERHEAD_BYTES
    reader.read([0, 1])
    assert len(asked) == 3


def test_arrays_are_read_only(folder: Path) -> None:
    reader = reader_of(folder)
    for _ in range(2):
        (found,) = reader.read([0])
        assert not isinstance(found, BrokenSample)
        with pytest.raises(ValueError, match="read-only"):
            found["text"][0] = 1


def test_threads_share_a_reader(folder: Path) -> None:
    reader = reader_of(folder, memory_bytes=3 * TEXT_BYTES)
    break_byte(reader, folder, 3, 600)
    started = threading.Barrier(6)

    def read(seed: int) -> bool:
        started.wait()
        rng = np.random.default_rng(seed)
        good = True
        for _ in range(60):
            numbers = rng.integers(NUM_SAMPLES, size=4).tolist()
            for number, found in zip(numbers, reader.read(numbers), strict=True):
                good &= isinstance(found, BrokenSample) if number == 3 else is_sample(found, number)
                good &= reader.kept_bytes <= 3 * TEXT_BYTES
        return good

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(read, range(6)))
    assert reader.kept_bytes <= 3 * TEXT_BYTES


def test_a_reader_is_pickled_empty(folder: Path) -> None:
    reader = reader_of(folder, memory_bytes=5000, limit=3000)
    reader.read(range(4))
    sent = pickle.dumps(reader)
    assert len(sent) < 1500
    copy = pickle.loads(sent)
    assert (copy.kept_bytes, reader.kept_bytes > 0) == (0, True)
    assert (copy._memory_bytes, copy._sample_limit_bytes) == (5000, 3000)
    assert is_sample(copy.read([5])[0], 5)


def test_broken_samples_have_an_order_and_travel_as_errors() -> None:
    first, second = (BrokenSample("u", "s", key, "r") for key in ("a", "b"))
    assert sorted([second, first]) == [first, second]
    error = SampleError(first, "Mend it.").after([second, first])
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.broken) == ("u/s: sample 'a' r. Mend it.", first)
    assert copy.all_broken == (second, first)
    assert isinstance(copy, StreamError)
