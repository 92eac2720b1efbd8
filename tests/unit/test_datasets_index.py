"""The index: its columns stay on disk, what is wrong with it is named, and nothing in it is believed."""

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from safetensors.numpy import load, save

from metaloom.datasets import Index, Sample, SampleReader, SplitSamples, StorageSettings, write_shards
from metaloom.errors import StreamError

CLASSES = ("cat", "dog", "löwe")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    splits = {
        split: SplitSamples(
            [
                Sample(
                    f"{split}/ö{n}",
                    {"cls": b"%d" % (n // 2), "txt": b"x" * n},
                    {"class": n // 2, "group": n % 2},
                )
                for n in range(6)
            ],
            classes=CLASSES,
            groups=("anna", "bert"),
        )
        for split in ("train", "test")
    }
    write_shards(folder, splits, dataset="mine", layout="classes", source={}, shard_limit_bytes=4000)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(original, tmp_path / "set"))


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the index; its digest is made right."""
    file = folder / "index.json"
    raw = json.loads(file.read_text())
    change(raw)
    lists = [*raw["shards"], *(split["columns"] for split in raw["splits"].values())]
    raw["digest"] = hashlib.sha256(
        b"".join(f"{f['name']} {f['sha256']}\n".encode() for f in lists)
    ).hexdigest()
    file.write_text(json.dumps(raw))


def edit_columns(folder: Path, change: Callable[[dict[str, Any]], None], split: str = "train") -> None:
    """Changes the columns of a split; the index is made to agree."""
    file = folder / f"{split}.columns"
    columns = load(file.read_bytes())
    change(columns)
    content = save(columns)
    file.write_bytes(content)
    place = {"name": file.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit(folder, lambda raw: raw["splits"][split].update(columns=place))


def test_what_was_written_is_read(original: Path) -> None:
    index = Index.load(original)
    assert (index.dataset, index.layout, list(index.splits)) == ("mine", "classes", ["train", "test"])
    table = index.split("train")
    assert [table.key(n) for n in range(6)] == [f"train/ö{n}" for n in range(6)]
    assert (table.classes, table.groups, table.members) == (CLASSES, ("anna", "bert"), ("cls", "txt"))
    assert table.attributes["class"].tolist() == [0, 0, 1, 1, 2, 2]
    assert table.attributes["group"].tolist() == [0, 1] * 3
    assert sum(shard.num_samples for shard in index.shards) == 12
    index.close()


def test_a_cache_folder_that_cannot_be_written_is_done_without_and_told_of(
    original: Path, caplog: pytest.LogCaptureFixture
) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(original), "/columns-set", recursive=True)
    try:
        index = Index.load("memory://columns-set", StorageSettings(cache_folder="/proc/no-cache"))
        assert index.digest == Index.load(original).digest
    finally:
        memory.rm("/columns-set", recursive=True)
    assert "so train.columns is held in memory: choose another loading.cache_folder" in caplog.text


def test_the_digest_is_that_of_all_files(original: Path) -> None:
    index = Index.load(original)
    names = [shard.name for shard in index.shards] + ["train.columns", "test.columns"]
    lines = [f"{name} {hashlib.sha256((original / name).read_bytes()).hexdigest()}\n" for name in names]
    assert index.digest == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_columns_are_mapped_into_memory_and_read_only(original: Path) -> None:
    table = Index.load(original).split("train")
    for column in (table.shard, table.offset, table.keys, table.attributes["class"]):
        owner: Any = column
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        assert isinstance(owner, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 1


def test_remote_columns_are_mapped_from_the_cache_folder(original: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(original), "/columns-set", recursive=True)
    settings = StorageSettings(cache_folder=str(tmp_path))
    try:
        table = Index.load("memory://columns-set", settings).split("train")
        assert isinstance(table.shard.base, np.ndarray)
        kept = {file.name for file in (tmp_path / "columns").iterdir()}
        raw = json.loads((original / "index.json").read_text())
        assert kept == {split["columns"]["sha256"] for split in raw["splits"].values()}
        # A kept file that is not what it was is read anew.
        kept_file = tmp_path / "columns" / raw["splits"]["test"]["columns"]["sha256"]
        for junk in (b"junk", b""):
            kept_file.write_bytes(junk)
            assert Index.load("memory://columns-set", settings).split("test").num_samples
            assert kept_file.read_bytes() == (original / "test.columns").read_bytes()
    finally:
        memory.rm("/columns-set", recursive=True)


def test_a_pickled_index_is_small_and_reads_itself_again(original: Path) -> None:
    index = Index.load(original, StorageSettings(num_attempts=2))
    sent = pickle.dumps(index)
    assert len(sent) < 1000
    copy = pickle.loads(sent)
    assert (copy.digest, copy.url, copy.storage.settings) == (index.digest, index.url, index.storage.settings)
    assert np.array_equal(copy.split("test").offset, index.split("test").offset)


def test_a_data_set_that_was_replaced_while_in_use_is_refused(folder: Path) -> None:
    index = Index.load(folder)
    sent = pickle.dumps(index)
    before = index.split("train").offset.copy()
    new = {"train": SplitSamples([Sample("other", {"txt": b"x"})])}
    write_shards(folder, new, dataset="mine", layout="documents", source={})
    assert np.array_equal(index.split("train").offset, before)  # what was mapped stays
    with pytest.raises(
        StreamError, match=r"was replaced by other data while it was in use \(digest .* before"
    ):
        pickle.loads(sent)


def test_a_missing_index_names_the_directory_and_the_commands(tmp_path: Path) -> None:
    with pytest.raises(
        StreamError,
        match=r"nothing holds no index\.json.*`metaloom data make glyphs\|stdlib .*nothing` or "
        r"`metaloom data pack`",
    ):
        Index.load(tmp_path / "nothing")


@pytest.mark.parametrize("url", ["zork://bucket/set", "simplecache::zork://bucket/set"])
def test_an_unknown_scheme_is_named(url: str) -> None:
    with pytest.raises(
        StreamError, match=r"this URL cannot be opened \(Protocol not known: zork\)\. Give a path"
    ):
        Index.load(url)


def test_an_unknown_split_names_the_known_ones(original: Path) -> None:
    with pytest.raises(
        StreamError,
        match=r"mine at .* has no split 'dev'; it has train, test\. Name one of these\. Runs need train, "
        r"validation and test: pack again with --split train=0\.7,.* `metaloom data index`\.",
    ):
        Index.load(original).split("dev")
    with pytest.raises(StreamError, match=r"has no split 'dev'"):
        SampleReader(Index.load(original), "dev", lambda _: {})


@pytest.mark.parametrize("version", [1, 3, "2", None])
def test_an_index_of_another_version_is_refused_with_advice(version: Any, folder: Path) -> None:
    edit(folder, lambda raw: raw.update(version=version))
    with pytest.raises(
        StreamError,
        match=rf"has version {version!r}; this metaloom reads version 2\. Use the metaloom that wrote it, or "
        "make the data set again in another directory",
    ):
        Index.load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"index\.json is not JSON .*the file is damaged\. Make the data set at .* again"),
        ("[" * 100_000, r"index\.json is not JSON"),
        ("[]", r"its format is 'list', not 'metaloom-shards'"),
        ('{"format": "safetensors"}', r"its format is 'safetensors', not 'metaloom-shards'"),
        ('{"format": "metaloom-shards", "version": 2}', r"is damaged: KeyError: 'shards'"),
        ("\xff\xfe", r"index\.json is not JSON"),
    ],
)
def test_a_file_that_is_no_index_is_refused(content: str, message: str, folder: Path) -> None:
    (folder / "index.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(StreamError, match=message):
        Index.load(folder)


def set_value(*path: Any) -> Callable[[dict[str, Any]], None]:
    *places, name, value = path

    def change(raw: dict[str, Any]) -> None:
        target: Any = raw
        for place in places:
            target = target[place]
        target[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_value("layout", "zork"), "layout 'zork' is none of classes, groups, documents, episodes"),
        (
            set_value("shards", []),
            "split 'train': samples in shards that are not listed; split 'test': samples in",
        ),
        (set_value("shards", 0, "bytes", 100), "split 'train': samples beyond the end of their shards"),
        (set_value("shards", 0, "bytes", "many"), "ValueError: invalid literal"),
        (set_value("shards", 0, "bytes", 1e400), "OverflowError"),
        (
            set_value("splits", "train", "classes", ["cat"]),
            "split 'train': samples of a class that is not listed",
        ),
        (set_value("splits", "train", "groups", []), "split 'train': samples of a group that is not listed"),
        (
            set_value("splits", "test", "cls_holds", "zork"),
            "split 'test': cls_holds is 'zork', none of row, name",
        ),
        (set_value("splits", "test", "columns", "name", "../train.columns"), "is no name of a columns file"),
        (set_value("splits", "test", "columns", "name", "/etc/passwd"), "is no name of a columns file"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(
    change: Callable[[dict[str, Any]], None], message: str, folder: Path
) -> None:
    edit(folder, change)
    with pytest.raises(StreamError, match=message):
        Index.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_value("digest", "0" * 64), "its digest is not that of its lists of files"),
        (set_value("splits", 7), "TypeError: 'int' object is not iterable"),
        (set_value("splits", ["train"]), "ValueError: dictionary update sequence"),
        (set_value("splits", "train", 7), "TypeError: 'int' object is not subscriptable"),
        (set_value("source", None), "TypeError: 'NoneType' object is not iterable"),
    ],
)
def test_an_index_of_another_form_is_refused(
    change: Callable[[dict[str, Any]], None], message: str, folder: Path
) -> None:
    raw = json.loads((folder / "index.json").read_text())
    change(raw)
    (folder / "index.json").write_text(json.dumps(raw))
    with pytest.raises(StreamError, match=f"is damaged: {message}"):
        Index.load(folder)


def put(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda columns: columns.update({name: change(columns[name].copy())})


def first(value: int) -> Callable[[Any], Any]:
    def change(column: Any) -> Any:
        column[0] = value
        return column

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("shard", first(-1)), "samples in shards that are not listed"),
        (put("shard", first(99)), "samples in shards that are not listed"),
        (put("offset", first(-512)), "negative offsets or lengths"),
        (put("length", first(0)), "negative offsets or lengths"),
        (put("offset", first(10**9)), "samples beyond the end of their shards"),
        (put("length", first(2**63 - 1)), "samples beyond the end of their shards"),
        (put("offset", first(2**63 - 1)), "samples beyond the end of their shards"),
        (put("crc32", lambda column: column[:-1]), "columns of different length"),
        (put("attribute.class", lambda column: column[:-1]), "columns of different length"),
        (put("attribute.class", first(-1)), "samples of a class that is not listed"),
        (put("attribute.class", first(3)), "samples of a class that is not listed"),
        (put("keys", lambda column: column[:-1]), "keys that do not fit their bytes"),
        (put("key_end", lambda column: column[::-1].copy()), "keys that do not fit their bytes"),
        (put("key_end", first(-4)), "keys that do not fit their bytes"),
        (lambda columns: columns.pop("attribute.class"), "no column 'class'"),
        (lambda columns: columns.pop("crc32"), "KeyError: 'crc32'"),
        (put("offset", lambda column: column.astype(np.int32)), "column 'offset' of 'train' holds I32"),
        (put("attribute.class", lambda column: column.astype(np.float32)), "KeyError: 'F32'"),
        (lambda columns: columns.update(zork=np.zeros(1, np.int32)), "KeyError: 'zork'"),
    ],
)
def test_columns_that_lie_are_refused(
    change: Callable[[dict[str, Any]], None], message: str, folder: Path
) -> None:
    edit_columns(folder, change)
    with pytest.raises(StreamError, match=rf"index\.json is damaged: .*{message}"):
        Index.load(folder)


def test_all_contradictions_are_listed(folder: Path) -> None:
    edit_columns(folder, put("crc32", lambda column: column[:-1]))
    edit_columns(folder, put("shard", first(99)), split="test")
    edit(folder, set_value("layout", "zork"))
    with pytest.raises(
        StreamError,
        match=r"layout 'zork' .*; split 'train': columns of different length; split 'test': samples in",
    ):
        Index.load(folder)


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff" * 100])
def test_a_columns_file_that_is_another_is_refused(content: bytes, folder: Path) -> None:
    (folder / "train.columns").write_bytes(content)
    with pytest.raises(
        StreamError,
        match=r"train\.columns (is damaged: it is not what|cannot be read: .*empty).*Make the data set",
    ):
        Index.load(folder)
    sha256 = hashlib.sha256(content).hexdigest()
    edit(folder, set_value("splits", "train", "columns", "sha256", sha256))
    with pytest.raises(StreamError, match=r"index\.json is damaged|cannot be read"):
        Index.load(folder)


def test_a_key_that_is_no_text_can_be_named(folder: Path) -> None:
    edit_columns(folder, put("keys", first(0xFF)))
    assert Index.load(folder).split("train").key(0) == "\\xffrain/ö0"


def test_a_missing_columns_file_is_named(folder: Path) -> None:
    (folder / "train.columns").unlink()
    with pytest.raises(StreamError, match=r"train\.columns cannot be read: .*No such file"):
        Index.load(folder)


def test_a_shard_that_lies_outside_is_not_read(folder: Path) -> None:
    shutil.copy(folder / "train-00000.tar", folder.parent / "outside.tar")
    edit(folder, set_value("shards", 0, "name", "../outside.tar"))
    with pytest.raises(StreamError, match=r"'\.\./outside\.tar' is not the name of a file in this folder"):
        SampleReader(Index.load(folder), "train", lambda _: {}).read([0])
