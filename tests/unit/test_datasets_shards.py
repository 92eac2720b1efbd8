"""Writing shards: the same bytes each time, read by any tool, and nothing that a reader would refuse."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaloom.datasets import (
    Index,
    Sample,
    SampleReader,
    SplitSamples,
    make_dataset,
    verify_sizes,
    write_shards,
)
from metaloom.datasets.members import Members
from metaloom.errors import StreamError


def raw(members: Members) -> dict[str, Any]:
    """Every member as its bytes."""
    return {name: np.frombuffer(payload, np.uint8) for name, payload in members.items()}


def read_all(index: Index) -> dict[tuple[str, str, str], bytes]:
    found = {}
    for split in index.splits.values():
        reader = SampleReader(index, split.name, raw)
        for number, arrays in enumerate(reader.read(range(split.num_samples))):
            assert isinstance(arrays, dict), arrays
            for extension, payload in arrays.items():
                found[split.name, split.key(number), extension] = payload.tobytes()
    return found


def samples_of(index: Index) -> dict[tuple[str, str, str], bytes]:
    """What tarfile finds in the shards of a local data set."""
    found = {}
    for shard in index.shards:
        with tarfile.open(Path(index.url) / shard.name) as tar:
            for entry in tar:
                folder, _, base = entry.name.rpartition("/")
                stem, extension = base.split(".", 1)
                content = tar.extractfile(entry)
                assert content is not None
                key = f"{folder}/{stem}" if folder else stem
                found[shard.name.rsplit("-", 1)[0], key, extension] = content.read()
    return found


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("glyphs")
    return make_dataset("glyphs", folder, max_per_split=5, shard_limit_bytes=100_000).index


def write(folder: Path, samples: list[Sample], *, limit: int = 1 << 20) -> Index:
    return write_shards(
        folder,
        {"train": SplitSamples(samples)},
        dataset="mine",
        layout="documents",
        source={},
        shard_limit_bytes=limit,
    )


def test_two_makings_give_the_same_bytes(glyphs: Index, tmp_path: Path) -> None:
    make_dataset("glyphs", tmp_path, max_per_split=5, shard_limit_bytes=100_000)
    files = sorted(file.name for file in Path(glyphs.url).iterdir())
    assert files == sorted(file.name for file in tmp_path.iterdir())
    for file in files:
        assert (Path(glyphs.url) / file).read_bytes() == (tmp_path / file).read_bytes()


def test_byte_ranges_equal_what_tarfile_reads(glyphs: Index) -> None:
    assert read_all(glyphs) == samples_of(glyphs)


def test_a_sample_is_one_stretch_and_the_stretches_fill_their_shards(glyphs: Index) -> None:
    for number, shard in enumerate(glyphs.shards):
        (table,) = (t for t in glyphs.splits.values() if (t.shard == number).any())
        rows = np.flatnonzero(table.shard == number)
        assert len(rows) == shard.num_samples
        ends = table.offset[rows] + table.length[rows]
        assert [0, *ends[:-1]] == table.offset[rows].tolist()
        tail = (Path(glyphs.url) / shard.name).read_bytes()[int(ends[-1]) :]
        assert not any(tail)


keys = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="/\0.\\"), min_size=1, max_size=150),
    min_size=1,
    max_size=3,
).map("/".join)
members = st.dictionaries(
    st.sampled_from(["txt", "json", "target.npy", "support.0.jpg"]), st.binary(max_size=1300), min_size=1
)


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(keys, members, min_size=1, max_size=6), st.integers(1, 8000))
def test_any_samples_come_back(contents: dict[str, dict[str, bytes]], limit: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        index = write(Path(folder), [Sample(key, members) for key, members in contents.items()], limit=limit)
        expected = {("train", k, e): payload for k, m in contents.items() for e, payload in m.items()}
        assert read_all(index) == samples_of(index) == expected
        index.close()


def test_shards_are_read_by_plain_webdataset(glyphs: Index) -> None:
    # In a process of its own: webdataset imports torch, whose warnings are not ours.
    shards = sorted(str(file) for file in Path(glyphs.url).glob("train-*.tar"))
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
        "import sys, metaloom.datasets, metaloom.datasets.foreign\n"
        "print(sorted({'torch', 'webdataset', 'matplotlib', 'boto3'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("chain", ["memory:/", "filecache::memory:/", "simplecache::memory:/"])
def test_a_data_set_is_read_from_any_fsspec_url(chain: str, glyphs: Index) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(glyphs.url, "/remote-glyphs", recursive=True)
    try:
        index = Index.load(f"{chain}/remote-glyphs")
        verify_sizes(index)
        assert read_all(index) == read_all(glyphs)
    finally:
        memory.rm("/remote-glyphs", recursive=True)


def test_a_shard_may_hold_samples_larger_than_its_limit(tmp_path: Path) -> None:
    payloads = [b"a" * 10, b"b" * 5000, b"", b"c" * 512]
    index = write(tmp_path, [Sample(f"s{n}", {"bin": p}) for n, p in enumerate(payloads)], limit=2048)
    assert [shard.num_samples for shard in index.shards] == [1, 1, 2]
    assert list(read_all(index).values()) == payloads


def test_attributes_are_columns_and_wide_ones_are_kept(tmp_path: Path) -> None:
    sizes = [3, -1, 2**40]
    index = write(
        tmp_path, [Sample(f"s{n}", {"txt": b"x"}, {"size": s, "variant": n}) for n, s in enumerate(sizes)]
    )
    attributes = index.split("train").attributes
    assert attributes["size"].tolist() == sizes
    assert attributes["variant"].dtype == np.int32
    with pytest.raises(ValueError, match=r"sample 'b' has the attributes \['size'\], those before it \[\]"):
        write(tmp_path, [Sample("a", {"txt": b""}), Sample("b", {"txt": b""}, {"size": 1})])


def test_a_key_that_comes_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match=r"split 'train': the key 'a/b' comes twice; keys are names"):
        write(tmp_path, [Sample(key, {"txt": b"x"}) for key in ("a/b", "b", "a/b")])
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize(
    ("key", "members", "message"),
    [
        ("a.b", {"bin": b"x"}, r"a key without dots; this is 'a\.b'"),
        ("a", {}, r"needs members and a key without dots; this is 'a'"),
        (
            "/a",
            {"bin": b"x"},
            r"sample '/a' has an entry '/a\.bin', which points out of its folder; keys are",
        ),
        ("a\\b", {"bin": b"x"}, r"which points out of its folder; keys are relative names"),
        ("", {"bin": b"x"}, r"sample '' has an entry '\.bin' without an extension"),
        ("a", {"": b"x"}, r"sample 'a' has an entry 'a\.' without an extension"),
        ("a", {"JPG": b"x"}, r"sample 'a' has a member 'JPG'; extensions are of small letters"),
        (
            "a",
            {"_meta": b"x"},
            r"has a member '_meta'; extensions are of small letters, no '_' first",
        ),
    ],
)
def test_a_sample_that_no_reader_would_take_is_not_written(
    key: str, members: dict[str, bytes], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path, [Sample(key, members)])


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match=r"nowhere: the data set cannot be written: .*has room"):
        write(tmp_path / "nowhere", [Sample("a", {"txt": b"x"})])


def test_all_missing_and_truncated_shards_are_listed_with_their_sizes(tmp_path: Path) -> None:
    index = write(tmp_path, [Sample(f"s{n}", {"txt": b"x" * 600}) for n in range(4)], limit=1)
    verify_sizes(index)
    first, second, third = (tmp_path / f"train-0000{n}.tar" for n in range(3))
    size = first.stat().st_size
    first.write_bytes(first.read_bytes()[:1000])
    second.unlink()
    third.write_bytes(third.read_bytes() + b"x")
    with pytest.raises(
        StreamError,
        match=rf"(?s)3 of 4 shards of mine.*train-00000\.tar: truncated, 1000 bytes, expected {size}\n.*"
        rf"train-00001\.tar: missing, expected {size} bytes\n.*train-00002\.tar: too long.*Copy the shards",
    ):
        verify_sizes(index)


def test_the_index_describes_every_split(glyphs: Index) -> None:
    text = json.loads((Path(glyphs.url) / "index.json").read_text())
    assert (text["format"], text["version"], text["layout"]) == ("metaloom-shards", 2, "classes")
    for name, split in text["splits"].items():
        assert split["num_samples"] == glyphs.split(name).num_samples == 60
        assert (split["members"], split["cls_holds"]) == (["cls", "png"], "row")
        assert len(split["classes"]) == 5
    buffer = io.BytesIO((Path(glyphs.url) / "train.columns").read_bytes())
    from safetensors.numpy import load

    assert np.array_equal(load(buffer.getvalue())["attribute.class"], np.repeat(np.arange(5), 12))
