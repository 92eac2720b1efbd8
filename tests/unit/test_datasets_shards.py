"""Shards, index and reader: the same bytes each time, and what is broken is named."""

import io
import json
import multiprocessing
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from metaloom.datasets import Index, Sample, ShardReader, SplitSamples, make_dataset, write_shards
from metaloom.datasets.shards import bytes_array
from metaloom.errors import StreamError


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    make_dataset("glyphs", folder / "glyphs", max_per_split=5, shard_limit_bytes=100_000)
    make_dataset("stdlib", folder / "stdlib", max_per_split=4)
    return folder


@pytest.fixture
def sets(originals: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(originals, tmp_path / "sets"))


def read_all(index: Index) -> dict[tuple[str, str, str], bytes]:
    reader = ShardReader(index)
    return {
        (split.name, split.keys[number], member): reader.read(split.name, number, member)
        for split in index.splits.values()
        for number in range(split.num_samples)
        for member in split.members
    }


@pytest.mark.parametrize("name", ["glyphs", "stdlib"])
def test_two_makings_give_the_same_bytes(name: str, originals: Path, tmp_path: Path) -> None:
    first = originals / name
    options: dict[str, Any] = (
        {"max_per_split": 5, "shard_limit_bytes": 100_000} if name == "glyphs" else {"max_per_split": 4}
    )
    make_dataset(name, tmp_path / "again", **options)
    files = sorted(file.name for file in first.iterdir())
    assert files == sorted(file.name for file in (tmp_path / "again").iterdir())
    for file in files:
        assert (first / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


@pytest.mark.parametrize("name", ["glyphs", "stdlib"])
def test_byte_ranges_equal_what_tarfile_reads(name: str, originals: Path) -> None:
    index = Index.load(originals / name)
    expected = {}
    for shard in index.shards:
        with tarfile.open(originals / name / shard.name) as tar:
            for member in tar:
                key, extension = member.name.split(".", 1)
                content = tar.extractfile(member)
                assert content is not None
                expected[shard.name.rsplit("-", 1)[0], key, extension] = content.read()
    assert read_all(index) == expected


def test_shards_are_read_by_plain_webdataset(originals: Path) -> None:
    # In a process of its own: webdataset imports torch, whose warnings are not ours.
    shards = sorted(str(file) for file in (originals / "glyphs").glob("train-*.tar"))
    assert len(shards) > 1
    code = (
        "import webdataset as wds, sys\n"
        "data = wds.WebDataset(sys.argv[1:], shardshuffle=False).decode('pil').to_tuple('png', 'cls')\n"
        "samples = list(data)\n"
        "assert all(image.size == (28, 28) for image, _ in samples)\n"
        "print(len(samples), sorted({number for _, number in samples}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *shards], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "60 [0, 1, 2, 3, 4]"


def test_the_package_needs_neither_torch_nor_webdataset_to_read() -> None:
    code = (
        "import sys, metaloom.datasets\n"
        "print(sorted({'torch', 'webdataset', 'matplotlib', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("chain", ["memory:/", "filecache::memory:/", "simplecache::memory:/"])
def test_a_data_set_is_read_from_any_fsspec_url(chain: str, originals: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(originals / "glyphs"), "/remote-glyphs", recursive=True)
    try:
        index = Index.load(f"{chain}/remote-glyphs")
        index.verify_digests()
        assert read_all(index) == read_all(Index.load(originals / "glyphs"))
    finally:
        memory.rm("/remote-glyphs", recursive=True)


def test_a_missing_index_names_the_directory_and_the_commands(tmp_path: Path) -> None:
    with pytest.raises(
        StreamError,
        match=r"nothing holds no index\.json.*`metaloom data make glyphs .*nothing` or `metaloom data "
        r"make stdlib .*nothing`",
    ):
        Index.load(tmp_path / "nothing")


@pytest.mark.parametrize("url", ["zork://bucket/set", "simplecache::zork://bucket/set"])
def test_an_unknown_scheme_is_named(url: str) -> None:
    with pytest.raises(StreamError, match=r"this URL cannot be opened: .*zork"):
        Index.load(url)


def edit_index(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "index.json").read_text())
    raw.update(changes)
    (folder / "index.json").write_text(json.dumps(raw))


def test_an_index_of_another_version_is_refused(sets: Path) -> None:
    edit_index(sets / "glyphs", version=2)
    with pytest.raises(StreamError, match=r"has version 2; this metaloom reads version 1"):
        Index.load(sets / "glyphs")


def test_another_json_file_is_refused(sets: Path) -> None:
    edit_index(sets / "glyphs", format="safetensors")
    with pytest.raises(StreamError, match=r"its format is 'safetensors', not 'metaloom-shards'"):
        Index.load(sets / "glyphs")


def test_a_truncated_index_is_refused(sets: Path) -> None:
    file = sets / "glyphs" / "index.json"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(StreamError, match=r"index\.json is not JSON .*the file is damaged\. Delete "):
        Index.load(sets / "glyphs")


def test_all_damage_to_the_tables_of_an_index_is_listed(sets: Path) -> None:
    raw = json.loads((sets / "glyphs" / "index.json").read_text())
    raw["digest"] = "0" * 64
    raw["splits"]["train"]["keys"].pop()
    raw["splits"]["validation"]["shard"][0] = 99
    raw["splits"]["test"]["members"]["png"]["offset"][0] = 10**9
    (sets / "glyphs" / "index.json").write_text(json.dumps(raw))
    with pytest.raises(
        StreamError,
        match=r"is damaged: its digest is not that of its list of shards; split 'train': columns of "
        r"different length; split 'validation': samples in shards that are not listed; split 'test': samples "
        r"beyond",
    ):
        Index.load(sets / "glyphs")
    del raw["splits"]["train"]["members"]["png"]["crc32"]
    (sets / "glyphs" / "index.json").write_text(json.dumps(raw))
    with pytest.raises(StreamError, match=r"is damaged: KeyError: 'crc32'"):
        Index.load(sets / "glyphs")


def test_all_missing_and_truncated_shards_are_listed_with_their_sizes(sets: Path) -> None:
    index = Index.load(sets / "glyphs")
    index.verify_sizes()
    train, validation = sets / "glyphs" / "train-00000.tar", sets / "glyphs" / "validation-00000.tar"
    size = train.stat().st_size
    train.write_bytes(train.read_bytes()[:1000])
    expected = validation.stat().st_size
    validation.unlink()
    with pytest.raises(
        StreamError,
        match=rf"(?s)2 of \d+ shards.*train-00000\.tar: truncated, 1000 bytes, expected {size}\n.*"
        rf"validation-00000\.tar: missing, expected {expected} bytes\n.*run `metaloom data make glyphs ",
    ):
        index.verify_sizes()


def test_the_digests_find_a_flipped_byte_that_the_sizes_do_not(sets: Path) -> None:
    index = Index.load(sets / "stdlib")
    shard = sets / "stdlib" / "test-00000.tar"
    content = bytearray(shard.read_bytes())
    content[3000] ^= 1
    shard.write_bytes(content)
    index.verify_sizes()
    with pytest.raises(StreamError, match=r"(?s)1 of 4 shards.*test-00000\.tar: sha256 .*, expected "):
        index.verify_digests()


def test_a_flipped_byte_names_shard_and_key(sets: Path) -> None:
    index = Index.load(sets / "glyphs")
    table = index.split("train")
    shard = sets / "glyphs" / index.shards[int(table.shard[7])].name
    content = bytearray(shard.read_bytes())
    content[int(table.members["png"].offset[7]) + 5] ^= 1
    shard.write_bytes(content)
    reader = ShardReader(index)
    reader.read("train", 6, "png")
    with pytest.raises(
        StreamError, match=rf"{shard.name}: sample '{table.keys[7]}' .* has crc32 .* the shard is damaged"
    ):
        reader.read("train", 7, "png")


def test_a_truncated_shard_names_shard_and_key(sets: Path) -> None:
    index = Index.load(sets / "stdlib")
    table = index.split("test")
    shard = sets / "stdlib" / "test-00000.tar"
    end = int(table.members["txt"].offset[-1]) + 10
    shard.write_bytes(shard.read_bytes()[:end])
    with pytest.raises(
        StreamError,
        match=rf"test-00000\.tar: sample '{table.keys[-1]}' .* has 10 bytes instead of \d+: the "
        r"shard is truncated",
    ):
        ShardReader(index).read("test", table.num_samples - 1, "txt")


def test_a_missing_shard_is_named_with_the_fix(sets: Path) -> None:
    index = Index.load(sets / "stdlib")
    (sets / "stdlib" / "test-00000.tar").unlink()
    with pytest.raises(StreamError, match=r"test-00000\.tar is missing; sample .*`metaloom data make stdlib"):
        ShardReader(index).read("test", 0, "txt")


def test_an_unknown_split_and_an_unknown_member_name_the_known_ones(originals: Path) -> None:
    index = Index.load(originals / "stdlib")
    with pytest.raises(StreamError, match=r"no split 'dev'; it has train, validation, test, rehearsal"):
        index.split("dev")
    with pytest.raises(StreamError, match=r"have no 'png'; they have json, txt"):
        ShardReader(index).read("test", 0, "png")


def test_a_transient_fault_is_retried_and_a_lasting_one_named(
    originals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metaloom.datasets.shards._RETRY_WAIT_S", 0.0)
    index = Index.load(originals / "stdlib")
    expected = ShardReader(index).read("test", 0, "txt")
    file, root = fsspec.core.url_to_fs(index.url)

    class Flaky:
        def __init__(self, faults: int) -> None:
            self.faults = faults

        def cat_file(self, path: str, start: int, end: int) -> bytes:
            self.faults -= 1
            if self.faults >= 0:
                raise TimeoutError("no answer")
            return bytes(file.cat_file(path, start=start, end=end))

    def reader(faults: int) -> ShardReader:
        monkeypatch.setattr("metaloom.datasets.shards.open_filesystem", lambda _: (Flaky(faults), root))
        return ShardReader(index)

    assert reader(2).read("test", 0, "txt") == expected
    with pytest.raises(StreamError, match=r"could not be read in 3 attempts: no answer"):
        reader(3).read("test", 0, "txt")


def test_the_cache_stays_within_its_limit_and_answers_the_same(originals: Path) -> None:
    index = Index.load(originals / "stdlib")
    largest = int(index.split("train").members["txt"].length.max())
    small, none = (
        ShardReader(index, cache_limit_bytes=largest + 1),
        ShardReader(index, cache_limit_bytes=0),
    )
    for number in (0, 1, 2, 0, 0, 1, 3):
        a = small.array("train", number, "txt", bytes_array)
        assert a is small.array("train", number, "txt", bytes_array)
        assert np.array_equal(a, none.array("train", number, "txt", bytes_array))
        assert small.cached_bytes <= largest + 1
        assert none.cached_bytes == 0
    with pytest.raises(ValueError, match="read-only"):
        a[0] = 0


def test_a_reader_is_pickled_without_cache_or_open_files(originals: Path) -> None:
    reader = ShardReader(Index.load(originals / "glyphs"), cache_limit_bytes=123)
    reader.read("train", 0, "png")
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.cache_limit_bytes == 123
    assert copy.read("test", 3, "png") == reader.read("test", 3, "png")


def _read_in_child(reader: ShardReader, answers: Any) -> None:
    answers.put(reader.read("train", 1, "png"))


def test_a_reader_works_after_a_fork(originals: Path) -> None:
    reader = ShardReader(Index.load(originals / "glyphs"))
    expected = reader.read("train", 1, "png")
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=_read_in_child, args=(reader, answers))
    child.start()
    assert answers.get() == expected
    child.join(timeout=30)
    assert child.exitcode == 0


def test_a_shard_may_hold_samples_larger_than_its_limit(tmp_path: Path) -> None:
    payloads = [b"a" * 10, b"b" * 5000, b"", b"c" * 512]
    samples = [Sample(f"s{n}", {"bin": payload}) for n, payload in enumerate(payloads)]
    index = write_shards(
        tmp_path,
        {"train": SplitSamples(samples)},
        dataset="mine",
        layout="documents",
        source={},
        shard_limit_bytes=2048,
    )
    assert [shard.num_samples for shard in index.shards] == [1, 1, 2]
    assert [ShardReader(index).read("train", n, "bin") for n in range(4)] == payloads
    (tmp_path / "train-00001.tar").unlink()
    with pytest.raises(StreamError, match=r"train-00001\.tar: missing.*\n.*Copy the shards to"):
        index.verify_sizes()


def test_a_key_with_a_dot_is_refused(tmp_path: Path) -> None:
    split = SplitSamples([Sample("a.b", {"bin": b"x"})])
    with pytest.raises(ValueError, match=r"a key without dots; this is 'a\.b'"):
        write_shards(tmp_path, {"train": split}, dataset="mine", layout="documents", source={})


def test_a_payload_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    split = SplitSamples([Sample("bad", {"png": b"no image"})])
    index = write_shards(tmp_path, {"train": split}, dataset="mine", layout="documents", source={})

    def decode(payload: bytes) -> Any:
        from PIL import Image

        return np.asarray(Image.open(io.BytesIO(payload)))

    with pytest.raises(StreamError, match=r"sample 'bad' has a bad png: cannot identify image"):
        ShardReader(index).array("train", 0, "png", decode)
