"""Tars of other tools, indexed where they lie; each sample that cannot be used is named by shard and key."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaloom.datasets import (
    BrokenSample,
    ClassEpisodes,
    DocumentEpisodes,
    ImageInputs,
    Index,
    SampleReader,
    Ways,
)
from metaloom.datasets.foreign import index_shards
from metaloom.datasets.members import Members
from metaloom.errors import StreamError
from tests.tars import END, TarFormat, plain, sample, special, tar_of, with_sum


def raw(members: Members) -> dict[str, Any]:
    return {name: np.frombuffer(payload, np.uint8) for name, payload in members.items()}


def read_all(index: Index, split: str = "train") -> dict[str, dict[str, bytes]]:
    reader = SampleReader(index, split, raw)
    found = {}
    for number, arrays in enumerate(reader.read(range(reader.table.num_samples))):
        assert isinstance(arrays, dict), arrays
        found[reader.table.key(number)] = {name: array.tobytes() for name, array in arrays.items()}
    return found


def class_of(index: Index, split: str = "train") -> dict[str, str]:
    table = index.split(split)
    return {table.key(n): table.classes[c] for n, c in enumerate(table.attributes["class"].tolist())}


def png(seed: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def npy(values: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def put(folder: Path, *parts: bytes, name: str = "train-0.tar") -> None:
    (folder / name).write_bytes(b"".join(parts))


def good(*keys: str) -> bytes:
    """Samples of a class, without the end of a tar."""
    return tar_of([entry for key in keys for entry in sample(key, {"cls": b"dog", "txt": key.encode()})])


def index_of(folder: Path, **options: Any) -> tuple[Index, list[BrokenSample]]:
    arguments: dict[str, Any] = {
        "dataset": "mine",
        "layout": "classes",
        "class_from": "cls",
        "max_broken": 10,
    } | options
    return index_shards(folder, **arguments)


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_of_any_tools_tar_come_back_and_the_tar_stays_as_it_is(
    tar_format: TarFormat, tmp_path: Path
) -> None:
    keys = ["n01/a", "./n01/ü", "n02/" + "long" * 22, "d.otted/c"]
    contents = {key: {"jpg": bytes([n]) * 700 * n, "cls": b"dog"} for n, key in enumerate(keys)}
    with tarfile.open(tmp_path / "train-0.tar", "w", format=tar_format) as tar:
        tar.addfile(special("n01", tarfile.DIRTYPE)[0])
        for key, members in contents.items():
            for entry, payload in sample(key, members):
                tar.addfile(entry, io.BytesIO(payload))
    before = (tmp_path / "train-0.tar").read_bytes()
    index, broken = index_of(tmp_path)
    assert broken == []
    assert read_all(index) == contents
    assert (tmp_path / "train-0.tar").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["index.json", "train-0.tar", "train.columns"]
    assert [(s.num_bytes, s.sha256, s.num_samples) for s in index.shards] == [
        (len(before), hashlib.sha256(before).hexdigest(), 4)
    ]
    assert index.split("train").members == ("cls", "jpg")


names = st.builds(
    "f/{}.{}".format, st.sampled_from(["a", "b", "é", "a/b"]), st.text("ab.", min_size=1, max_size=2)
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(names, st.binary(max_size=3)), max_size=8))
def test_what_is_indexed_is_what_webdataset_groups(files: list[tuple[str, bytes]]) -> None:
    from webdataset.tariterators import group_by_keys

    with tempfile.TemporaryDirectory() as folder:
        put(Path(folder), tar_of([plain(*file) for file in [("f/z.txt", b""), *files]]), END)
        index, broken = index_of(Path(folder), class_from="folder", max_broken=99)
        found = read_all(index)
        index.close()
    try:
        groups = list(
            group_by_keys({"fname": name, "data": payload, "__url__": ""} for name, payload in files)
        )
    except ValueError:  # webdataset stops at two entries of a name; here the sample is named
        assert broken
        return
    times = Counter(group["__key__"] for group in groups)
    assert {sample.key for sample in broken} == {key for key, count in times.items() if count > 1}
    del found["f/z"]
    assert found == {
        group["__key__"]: {name: data for name, data in group.items() if not name.startswith("__")}
        for group in groups
        if times[group["__key__"]] == 1
    }


def test_numbers_and_names_in_cls_are_numbered_in_their_order(tmp_path: Path) -> None:
    numbers = {"a": b"10", "b": b"9\n", "c": b"10", "d": b"700"}
    put(tmp_path, *(tar_of(sample(key, {"cls": cls})) for key, cls in numbers.items()), END)
    classes = {"a": b"wolf", "b": "löwe".encode(), "c": b"10", "d": b"wolf"}
    put(tmp_path, *(tar_of(sample(k, {"cls": c})) for k, c in classes.items()), END, name="test-0.tar")
    index, _ = index_of(tmp_path)
    train, test = index.split("train"), index.split("test")
    assert train.classes == ("9", "10", "700")
    assert train.attributes["class"].tolist() == [1, 0, 1, 2]
    assert test.classes == ("10", "löwe", "wolf")
    assert class_of(index, "test") == {"a": "wolf", "b": "löwe", "c": "10", "d": "wolf"}
    assert (train.cls_holds, test.cls_holds) == ("name", "name")
    assert len(read_all(index)) == 4


def test_readers_compare_names_with_the_index(tmp_path: Path) -> None:
    put(tmp_path, good("a", "b"), tar_of(sample("c", {"cls": b"cat"})), END)
    index_of(tmp_path)
    text = json.loads((tmp_path / "index.json").read_text())
    text["splits"]["train"]["classes"] = ["bird", "dog"]
    (tmp_path / "index.json").write_text(json.dumps(text))
    found = SampleReader(Index.load(tmp_path), "train", raw).read([0, 2])
    assert not isinstance(found[0], BrokenSample)
    assert str(found[1]) == (
        f"{tmp_path}/train-0.tar: sample 'c' cannot be decoded: its cls says class 'cat', the index 'bird'"
    )


def test_classes_come_from_folders_or_records_and_cls_is_then_not_compared(tmp_path: Path) -> None:
    records = [("x/cat/1", "b"), ("x/cat/2", 7), ("dog/1", "b")]
    put(
        tmp_path,
        *(
            tar_of(sample(key, {"cls": b"99", "json": json.dumps({"kind": kind, "user": key[-1]}).encode()}))
            for key, kind in records
        ),
        END,
    )
    index, _ = index_of(tmp_path, class_from="folder")
    assert class_of(index) == {"x/cat/1": "cat", "x/cat/2": "cat", "dog/1": "dog"}
    assert len(read_all(index)) == 3
    (tmp_path / "index.json").unlink()
    index, _ = index_of(tmp_path, class_from="json:kind", group_from="json:user")
    assert class_of(index) == {"x/cat/1": "b", "x/cat/2": "7", "dog/1": "b"}
    table = index.split("train")
    assert [table.groups[g] for g in table.attributes["group"]] == ["1", "2", "1"]
    assert table.cls_holds == "other"


def test_groups_come_from_records(tmp_path: Path) -> None:
    users = {"a": 12, "b": 3, "c": 12}
    put(tmp_path, *(tar_of(sample(k, {"json": b'{"user": %d}' % user})) for k, user in users.items()), END)
    index, _ = index_of(tmp_path, layout="groups", class_from=None, group_from="json:user")
    table = index.split("train")
    assert (table.groups, table.attributes["group"].tolist()) == (("3", "12"), [1, 0, 1])
    assert "class" not in table.attributes


def test_episodes_are_drawn_from_indexed_tars(tmp_path: Path) -> None:
    for shard in range(2):
        entries = [
            entry
            for n in range(6)
            for entry in sample(f"{shard}{n}", {"png": png(n), "cls": ["wolf", "cat", "dog"][n % 3].encode()})
        ]
        put(tmp_path, tar_of(entries), END, name=f"train-{shard}.tar")
    index, _ = index_of(tmp_path)
    source = ClassEpisodes(
        index, "train", ways=Ways(n_way=3, n_shot=2, n_query=2), inputs=ImageInputs(8), seed=0
    )
    episode = source.episode(0)
    assert episode.support["inputs"].shape == (6, 8, 8, 1)
    assert sorted(episode.support["targets"].tolist()) == [0, 0, 1, 1, 2, 2]
    assert episode.broken == ()


def test_documents_get_their_sizes(tmp_path: Path) -> None:
    put(
        tmp_path,
        tar_of(sample("a", {"txt": b"x" * 50})),
        tar_of(sample("b", {"tokens.npy": npy(np.arange(20)), "txt": b"not it"})),
        tar_of(sample("c", {"tokens.npy": npy(np.zeros((2, 2)))})),
        tar_of(sample("d", {"json": b"{}"})),
        END,
    )
    index, broken = index_of(tmp_path, layout="documents", class_from=None)
    assert index.split("train").attributes["size"].tolist() == [50, 20]
    assert [(b.key, b.reason) for b in broken] == [
        ("c", "cannot be indexed: tokens are integers in one row, not float64 [2, 2]"),
        ("d", "cannot be indexed: it has json, and neither tokens.npy nor txt"),
    ]
    source = DocumentEpisodes(index, "train", num_support=1, num_query=1, sequence_length=5, seed=0)
    assert source.episode(0).support["inputs"].shape == (1, 5)


def test_ready_episodes_have_both_parts(tmp_path: Path) -> None:
    put(
        tmp_path,
        tar_of(sample("a", {"support.0.png": b"", "query.inputs.npy": b""})),
        tar_of(sample("b", {"support.0.png": b""})),
        END,
    )
    index, broken = index_of(tmp_path, layout="episodes", class_from=None)
    assert list(read_all(index)) == ["a"]
    assert [(b.key, b.reason) for b in broken] == [
        ("b", "cannot be indexed: it has support.0.png, and no query")
    ]


LOST = ", and nothing behind it can be found"
FOLDER = special("d", tarfile.DIRTYPE)
LINK = special("b.cls", tarfile.SYMTYPE, "/etc/passwd")
BAD_SUM = b"z" + good("c")[1:]


@pytest.mark.parametrize(
    ("parts", "expected", "kept"),
    [
        (
            [good("a"), tar_of([plain("../b.txt", b"x")]), END],
            [("../b.txt", "has an entry '../b.txt', which points out of its folder")],
            ["a"],
        ),
        (
            [tar_of([plain("/etc/passwd.txt", b"x")]), good("a"), END],
            [("/etc/passwd.txt", "has an entry '/etc/passwd.txt', which points out of its folder")],
            ["a"],
        ),
        (
            [good("a"), tar_of([plain("README", b"x")]), good("b"), END],
            [("README", "has an entry 'README' without an extension")],
            ["a", "b"],
        ),
        (
            [good("a"), tar_of([LINK, plain("b.txt", b"")]), END],
            [("b", "has an entry 'b.cls' that is no plain file")],
            ["a"],
        ),
        (
            [tar_of([special("b.txt", tarfile.CHRTYPE)]), good("a"), END],
            [("b", "has an entry 'b.txt' that is no plain file")],
            ["a"],
        ),
        ([good("a", "b", "a"), END], [("a", "comes 2 times in this tar; keys are names")], ["b"]),
        ([good("a", "a", "b"), END], [("a", "has two entries 'a.cls'")], ["b"]),
        (
            [tar_of([plain("a.cls", b"dog")]), good("b"), tar_of([plain("a.txt", b"x")]), END],
            [("a", "has entries that are not next to each other")],
            ["b"],
        ),
        (
            [tar_of([plain("a.cls", b"x"), FOLDER, plain("a.txt", b"x")]), good("b"), END],
            [("a", "has entries that are not next to each other")],
            ["b"],
        ),
        (
            [good("a", "b")[:-600]],
            [("b", "is cut off: at byte 3072 the tar is cut short within a header" + LOST)],
            ["a"],
        ),
        (
            [good("a"), tar_of([plain("b.txt", bytes(2000))])[:1500]],
            [("b", "is cut off: at byte 2048 the tar has an entry 'b.txt' that is cut short" + LOST)],
            ["a"],
        ),
        (
            [good("a", "b")],
            [("b", "may be cut off: the tar stops at byte 4096, without the zeros that end one")],
            ["a"],
        ),
        (
            [good("a", "b"), BAD_SUM, good("d"), END],
            [("b", "is cut off: at byte 4096 the tar is no tar entry where it should be one" + LOST)],
            ["a"],
        ),
        (
            [good("a"), END, good("b"), END],
            [("(byte 2048)", "lies behind the end of the tar, where no reader looks")],
            ["a"],
        ),
        (
            [good("a"), tar_of(sample("b", {"txt": b"x"})), tar_of(sample("c", {"cls": b"\x1b[2J"})), END],
            [
                ("b", "cannot be indexed: it has txt, and no cls"),
                ("c", r"cannot be indexed: '\x1b[2J' is no class name"),
            ],
            ["a"],
        ),
        (
            [good("a"), tar_of(sample("b", {"cls": b"dog", "txt": bytes(9000)})), END],
            [("b", "has 10752 bytes, over the limit of 5000")],
            ["a"],
        ),
    ],
    ids=[
        "dotdot",
        "absolute",
        "no extension",
        "link",
        "device",
        "duplicate",
        "adjacent duplicate",
        "apart",
        "folder between",
        "cut in header",
        "cut in payload",
        "no end",
        "bad header",
        "behind end",
        "bad cls",
        "large",
    ],
)
def test_what_cannot_be_used_is_named_and_left_out(
    parts: list[bytes], expected: list[tuple[str, str]], kept: list[str], tmp_path: Path
) -> None:
    put(tmp_path, *parts)
    index, broken = index_of(tmp_path, sample_limit_bytes=5000)
    assert broken == [BrokenSample(str(tmp_path), "train-0.tar", key, reason) for key, reason in expected]
    assert list(read_all(index)) == kept
    assert index.source["num_left_out"] == len(expected)


@pytest.mark.parametrize(
    ("content", "key", "reason"),
    [
        (b"", "(byte 0)", "is lost: the file is empty, and not even an empty tar is"),
        (b"\x1f\x8b" + bytes(600), "(byte 0)", "is cut off: at byte 0 the tar is no tar entry"),
        (b"<html>", "(byte 0)", "is cut off: at byte 0 the tar is cut short within a header"),
        (good("b")[:512], "b", "is cut off: at byte 0 the tar has an entry 'b.cls' that is cut short"),
    ],
)
def test_a_file_that_is_no_tar_is_named(content: bytes, key: str, reason: str, tmp_path: Path) -> None:
    put(tmp_path, good("a"), END)
    put(tmp_path, content, name="train-1.tar")
    index, (broken,) = index_of(tmp_path)
    assert (broken.shard, broken.key) == ("train-1.tar", key)
    assert broken.reason.startswith(reason)
    assert [shard.num_samples for shard in index.shards] == [1, 0]


def test_a_tar_without_samples_is_in_order(tmp_path: Path) -> None:
    put(tmp_path, good("a"), END)
    put(tmp_path, END, name="train-1.tar")
    index, broken = index_of(tmp_path)
    assert (broken, [shard.num_samples for shard in index.shards]) == ([], [1, 0])


def test_a_key_of_an_earlier_tar_is_left_out_but_not_one_of_another_split(tmp_path: Path) -> None:
    put(tmp_path, good("a", "b"), END)
    put(tmp_path, good("c", "a"), END, name="train-1.tar")
    put(tmp_path, good("a"), END, name="test-0.tar")
    index, broken = index_of(tmp_path)
    assert [str(b) for b in broken] == [
        f"{tmp_path}/train-1.tar: sample 'a' comes already in an earlier tar; keys are names"
    ]
    assert (list(read_all(index)), list(read_all(index, "test"))) == (["a", "b", "c"], ["a"])


def test_deep_json_is_a_broken_sample(tmp_path: Path) -> None:
    records = {
        "a": b'{"k": "x"}',
        "b": b"[" * 100_000,
        "c": b'{"k": true}',
        "d": b"7",
        "e": b'{"k": "\\u001b"}',
    }
    put(tmp_path, *(tar_of(sample(key, {"json": record})) for key, record in records.items()), END)
    index, broken = index_of(tmp_path, class_from="json:k")
    assert class_of(index) == {"a": "x"}
    assert [b.key for b in broken] == ["b", "c", "d", "e"]
    assert broken[1].reason == (
        "cannot be indexed: its json has 'True' as 'k', and a text or whole number is expected"
    )


def test_more_broken_samples_than_allowed_stop_it_and_are_listed(tmp_path: Path) -> None:
    entries = [entry for n in range(25) for entry in sample(f"k{n}", {"txt": b""})]
    put(tmp_path, good("a"), tar_of(entries), END)
    with pytest.raises(
        StreamError,
        match=r"(?s)25 samples at .* cannot be used, and max_broken is 24:\n  .*train-0\.tar: sample 'k0' "
        r"cannot be indexed: it has txt, and no cls\n.*'k19' .*\n  and 5 more\nMend the tars, or raise",
    ):
        index_of(tmp_path, max_broken=24)
    assert [file.name for file in tmp_path.iterdir()] == ["train-0.tar"]
    assert len(index_of(tmp_path, max_broken=25)[1]) == 25


def test_splits_are_found_by_the_names_of_their_tars(tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "train-extra-0", "val-0"):
        put(tmp_path, good(name), END, name=f"{name}.tar")
    (tmp_path / "notes.txt").write_text("")
    calls: list[tuple[int, int]] = []
    index, _ = index_of(tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert {name: list(read_all(index, name)) for name in index.splits} == {
        "train": ["train-0", "train-1", "train-extra-0"],
        "validation": ["val-0"],
    }
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    (tmp_path / "index.json").unlink()
    index, _ = index_of(tmp_path, splits=["train-extra", "train"])
    assert {name: list(read_all(index, name)) for name in index.splits} == {
        "train-extra": ["train-extra-0"],
        "train": ["train-0", "train-1"],
    }


@pytest.mark.parametrize("word", ["val", "valid", "dev", "Validation"])
def test_what_others_call_validation_is_the_split_that_runs_ask_for(word: str, tmp_path: Path) -> None:
    put(tmp_path, good("a"), END)
    put(tmp_path, good("b"), END, name=f"{word}-0.tar")
    for splits in (None, ["train", word]):
        index, _ = index_of(tmp_path, splits=splits)
        assert sorted(index.splits) == ["train", "validation"]
        assert list(read_all(index, "validation")) == ["b"]
        (tmp_path / "index.json").unlink()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "zork"}, "layout 'zork' is none of classes, groups, documents, episodes"),
        (
            {"class_from": None},
            r"layout 'classes' needs to know where a sample's class stands; say it by class_from "
            r"\(--class-from\): cls, folder or json:KEY\.",
        ),
        (
            {"layout": "documents"},
            r"layout 'documents' has no classes; leave class_from \(--class-from\) out, or choose",
        ),
        ({"class_from": "zork"}, "class_from is 'zork'; it must be one of cls, folder, json:KEY"),
        ({"class_from": "json:"}, "class_from is 'json:'; it must be one of"),
        ({"group_from": "folder"}, "group_from is 'folder'; it must be one of json:KEY"),
        (
            {"layout": "groups", "class_from": None},
            r"layout 'groups' needs group_from \(--group-from\), json:KEY",
        ),
        ({"max_broken": -1}, "max_broken is -1; it must be at least 0"),
        ({"splits": ["dev"]}, r"has no dev-\*\.tar; it has train-0\.tar"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    put(tmp_path, good("a"), END)
    with pytest.raises(StreamError, match=message):
        index_of(tmp_path, **options)


def test_directories_that_cannot_be_indexed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match=r"s3://bucket/set: tars are indexed in a local directory"):
        index_shards("s3://bucket/set", dataset="mine", layout="classes", class_from="cls")
    with pytest.raises(StreamError, match=r"nowhere: its tars cannot be indexed: .*No such file"):
        index_of(tmp_path / "nowhere")
    (tmp_path / "train-0.tar.gz").write_bytes(b"")
    with pytest.raises(
        StreamError, match=r"has no files `<split>-\*\.tar`.*decompress tars that are compressed"
    ):
        index_of(tmp_path)
    put(tmp_path, END)
    with pytest.raises(StreamError, match=r"split 'train' at .* has no sample\. Delete its tars"):
        index_of(tmp_path)
    put(tmp_path, good("a"), END, name="all.tar")
    with pytest.raises(
        StreamError, match=r"all\.tar does not say its split; tars are called `<split>-\*\.tar`"
    ):
        index_of(tmp_path)
    put(tmp_path, good("a"), END)
    index_of(tmp_path, splits=["train"])
    with pytest.raises(StreamError, match=r"has an index\.json already\. Delete it to have"):
        index_of(tmp_path, splits=["train"])


def test_tars_of_webdatasets_own_writer_are_indexed(tmp_path: Path) -> None:
    code = (
        "import sys, webdataset as wds\n"
        "with wds.TarWriter(sys.argv[1]) as out:\n"
        "    for n in range(4):\n"
        "        out.write({'__key__': f's{n}', 'cls': n % 2, 'txt': 'text ' * n, 'json': {'user': n}})\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "train-0.tar")], check=True, timeout=60)
    index, broken = index_of(tmp_path, group_from="json:user")
    assert broken == []
    assert class_of(index) == {"s0": "0", "s1": "1", "s2": "0", "s3": "1"}
    assert read_all(index)["s3"]["txt"] == b"text " * 3
    assert index.split("train").groups == ("0", "1", "2", "3")


def test_nothing_of_a_tar_reaches_the_disk_or_is_run(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    pickled = b"cos\nmkdir\n(S'" + str(tmp_path / "made").encode() + b"'\ntR."
    hostile = tar_of([plain("../escaped.txt", b"x"), special("l.txt", tarfile.SYMTYPE, "../escaped.txt")])
    put(folder, tar_of(sample("a", {"cls": b"dog", "pkl": pickled, "pth": pickled})), hostile, END)
    index, broken = index_of(folder)
    assert len(broken) == 2
    assert read_all(index)["a"]["pkl"] == pickled
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]


def test_a_size_that_would_lead_backwards_ends_the_scan(tmp_path: Path) -> None:
    header = good("b")[:512]
    put(tmp_path, good("a"), with_sum(header[:124] + b"-0000002000\0" + header[136:]), good("c"), END)
    put(tmp_path, good("z"), END, name="train-1.tar")
    index, (broken,) = index_of(tmp_path)
    assert (broken.shard, broken.key) == ("train-0.tar", "a")
    assert list(read_all(index)) == ["z"]
