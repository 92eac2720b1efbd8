"""Records of CSV and JSONL as shards: what webdataset reads there is what the files say."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metaloom.datasets.pack import Columns, Limits, PackedDataset, Records, pack_dataset
from metaloom.errors import StreamError
from tests.packed import array_of, image_bytes, samples_of, write_tree

REVIEWS = [
    {"text": "good,\nreally", "label": "pos", "user": "u2"},
    {"text": 'so "so"', "label": "neg", "user": "u1"},
    {"text": "schön ☃", "label": "pos", "user": "u1"},
]


def write_csv(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pack(path: Path | tuple[Path, ...], out: Path, *, max_broken: int = 0, **columns: Any) -> PackedDataset:
    paths = path if isinstance(path, tuple) else (path,)
    return pack_dataset(Records(paths, Columns(**columns)), out, max_broken=max_broken)


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "bom"])
def test_texts_are_packed_by_class_with_their_groups(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"reviews.{form.replace('bom', 'csv')}"
    if form == "jsonl":
        write_jsonl(path, REVIEWS)
    else:
        write_csv(path, REVIEWS, delimiter="\t" if form == "tsv" else ",")
    if form == "bom":
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    packed = pack(path, tmp_path / "out", inputs=("text",), targets=("label",), group="user", keep=("user",))
    assert samples_of(tmp_path / "out", "train") == {
        "reviews/00000001": {"txt": b'so "so"', "cls": b"0", "json": b'{"user": "u1"}'},
        "reviews/00000000": {"txt": b"good,\nreally", "cls": b"1", "json": b'{"user": "u2"}'},
        "reviews/00000002": {"txt": "schön ☃".encode(), "cls": b"1", "json": b'{"user": "u1"}'},
    }
    table = packed.index.split("train")
    assert table.attributes["group"].tolist() == [0, 1, 0]
    assert packed.index.layout == "classes"
    assert packed.splits["train"].num_groups == 2


def test_numbers_become_arrays_and_regression_targets(tmp_path: Path) -> None:
    rows = [{"t": 0.5 * n, "p": n, "y": n**2, "z": -1, "site": "ab"[n % 2]} for n in range(4)]
    packed = pack(
        write_csv(tmp_path / "plant.csv", rows),
        tmp_path / "out",
        task="regression",
        inputs=("t", "p"),
        targets=("y", "z"),
        group="site",
    )
    found = samples_of(tmp_path / "out", "train")
    assert list(found) == [f"plant/{n:08d}" for n in (0, 2, 1, 3)]  # by group: a task is one stretch
    for key, members in found.items():
        n = int(key[-1])
        assert members.keys() == {"npy", "target.npy"}
        assert array_of(members["npy"]).tolist() == [0.5 * n, n]
        assert array_of(members["target.npy"]).tolist() == [n**2, -1]
        assert {array_of(payload).dtype for payload in members.values()} == {np.dtype("<f4")}
    table = packed.index.split("train")
    assert packed.index.layout == "groups"
    assert table.attributes["group"].tolist() == [0, 0, 1, 1]
    alone = tmp_path / "alone"
    packed = pack(
        tmp_path / "plant.csv", alone, task="regression", inputs=("t",), targets=("y",), kind="numbers"
    )
    assert packed.index.split("train").attributes["group"].tolist() == [0, 0, 0, 0]


def test_files_that_records_name_are_packed_from_below_the_root_only(tmp_path: Path) -> None:
    write_tree(tmp_path, {"scans/1.png": image_bytes(1), "secret.png": image_bytes(9)})
    np.save(tmp_path / "scans" / "2.npy", np.arange(6, dtype=">f8").reshape(2, 3).T)
    rows = [{"file": "scans/1.png", "label": "a"}, {"file": "../secret.png", "label": "a"}]
    path = write_csv(tmp_path / "scans" / "list.csv", [{"file": "1.png", "label": "a"}, rows[1]])
    packed = pack(path, tmp_path / "out", inputs=("file",), targets=("label",), kind="image", max_broken=1)
    assert samples_of(tmp_path / "out", "train") == {"list/00000000": {"png": image_bytes(1), "cls": b"0"}}
    (broken,) = packed.broken
    assert str(broken) == (
        "list.csv, line 3: names the file '../secret.png', which does not lie below scans (--root)"
    )
    arrays = write_csv(tmp_path / "arrays.csv", [{"file": "scans/2.npy", "label": "a"}])
    pack(arrays, tmp_path / "arrays", inputs=("file",), targets=("label",), kind="array")
    (members,) = samples_of(tmp_path / "arrays", "train").values()
    assert array_of(members["npy"]).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert array_of(members["npy"]).dtype == np.dtype("<f8")
    assert array_of(members["npy"]).flags.c_contiguous


def test_documents_keep_their_order_and_know_their_size(tmp_path: Path) -> None:
    rows = [{"text": "x" * n, "title": f"b{9 - n}/é.1"} for n in range(1, 5)]
    path = write_jsonl(tmp_path / "books.jsonl", rows)
    packed = pack(path, tmp_path / "out", task="language-modelling", inputs=("text",), key="title")
    found = samples_of(tmp_path / "out", "train")
    assert list(found) == [f"b{9 - n}/é%2E1" for n in range(1, 5)]
    assert packed.index.layout == "documents"
    assert packed.index.split("train").attributes["size"].tolist() == [1, 2, 3, 4]
    assert packed.smallest_class is None


def test_token_lists_and_tokenized_texts_are_one_dimensional_integers(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "ids.jsonl", [{"ids": [5, 2**31 - 1, 0]}, {"ids": [7]}])
    packed = pack(path, tmp_path / "out", task="language-modelling", inputs=("ids",))
    found = [array_of(members["tokens.npy"]) for members in samples_of(tmp_path / "out", "train").values()]
    assert [array.tolist() for array in found] == [[5, 2**31 - 1, 0], [7]]
    assert {array.dtype for array in found} == {np.dtype("<i4")}
    assert packed.index.split("train").attributes["size"].tolist() == [3, 1]


def word_tokenizer(path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"good": 3, "film": 4, "?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(1)  # of another program's batches: not followed
    tokenizer.save(str(path))
    return path


def test_a_tokenizer_of_the_library_makes_the_tokens(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", [{"text": "good bad film", "label": "pos"}])
    tokenizer = str(word_tokenizer(tmp_path / "tokenizer.json"))
    packed = pack(path, tmp_path / "out", inputs=("text",), targets=("label",), tokenizer=tokenizer)
    (members,) = samples_of(tmp_path / "out", "train").values()
    assert array_of(members["tokens.npy"]).tolist() == [3, 0, 4]
    assert packed.index.source["tokenizer"] == "tokenizer.json"


def test_a_missing_or_broken_tokenizer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", [{"text": "good", "label": "pos"}])
    (tmp_path / "bad.json").write_text("{}")
    options: dict[str, Any] = {"inputs": ("text",), "targets": ("label",)}
    with pytest.raises(StreamError, match=r"bad\.json is no tokenizer of the library tokenizers"):
        pack(path, tmp_path / "out", tokenizer=str(tmp_path / "bad.json"), **options)
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(StreamError, match=r"needs the package tokenizers: pip install tokenizers, or leave"):
        pack(path, tmp_path / "out", tokenizer=str(tmp_path / "other.json"), **options)


def test_a_record_may_be_kept_as_json(tmp_path: Path) -> None:
    rows = [{"a": 1, "b": [True, None], "label": 7}]
    path = write_jsonl(tmp_path / "r.jsonl", rows)
    pack(path, tmp_path / "out", inputs=("a", "b"), targets=("label",), kind="record")
    (members,) = samples_of(tmp_path / "out", "train").values()
    assert json.loads(members["json"]) == {"a": 1, "b": [True, None]}
    assert members["cls"] == b"0"


EPISODE = {
    "support": [{"input": "ab", "target": "yes"}, {"input": "a", "target": "no"}],
    "query": [{"input": "☃", "target": "yes"}],
    "task": "t1",
    "user": "u",
}


def test_ready_episodes_hold_padded_support_and_query_and_the_rest_of_the_record(tmp_path: Path) -> None:
    numbers = {
        "support": [{"input": [1.5, 2], "target": 0.25}],
        "query": [{"input": [0, 0], "target": 1}],
        "user": "v",
    }
    path = write_jsonl(tmp_path / "e.jsonl", [EPISODE, EPISODE | {"task": "t2", "user": "v"}])
    options: dict[str, Any] = {"task": "episodes", "inputs": ("input",), "targets": ("target",)}
    packed = pack(path, tmp_path / "out", group="user", **options)
    first, second = samples_of(tmp_path / "out", "train").values()
    assert array_of(first["support.inputs.npy"]).tolist() == [[97, 98], [97, -1]]
    assert array_of(first["query.inputs.npy"]).tolist() == [list("☃".encode())]
    assert array_of(first["support.targets.npy"]).tolist() == [1, 0]
    assert array_of(first["query.targets.npy"]).tolist() == [1]
    assert json.loads(first["json"]) == {"task": "t1", "user": "u", "classes": ["no", "yes"], "num_ways": 2}
    assert json.loads(second["json"])["task"] == "t2"
    assert packed.index.layout == "episodes"
    assert packed.index.split("train").attributes["group"].tolist() == [0, 1]
    pack(write_jsonl(tmp_path / "n.jsonl", [numbers]), tmp_path / "numbers", **options)
    (members,) = samples_of(tmp_path / "numbers", "train").values()
    assert array_of(members["support.inputs.npy"]).tolist() == [[1.5, 2]]
    assert array_of(members["query.targets.npy"]).tolist() == [[1]]  # a number like those of support
    assert array_of(members["query.targets.npy"]).dtype == np.dtype("<f4")


def test_splits_follow_file_names_a_column_or_shares(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "dev.jsonl"):
        write_jsonl(
            tmp_path / name, [{"x": name, "y": "c", "part": "held-out", "who": f"w{n}"} for n in range(40)]
        )
    (tmp_path / "out").mkdir()
    options: dict[str, Any] = {"inputs": ("x",), "targets": ("y",)}
    files = (tmp_path / "train-0.jsonl", tmp_path / "dev.jsonl")
    assert {s: n.num_samples for s, n in pack(files, tmp_path / "a", **options).splits.items()} == {
        "train": 40,
        "validation": 40,
    }
    assert list(pack(files, tmp_path / "b", split="part", **options).splits) == ["held-out"]
    shares = {"train": 0.5, "test": 0.5}
    packed = pack(files, tmp_path / "c", shares=shares, group="who", divided_by="group", **options)
    groups = {split: set(packed.index.split(split).attributes["group"].tolist()) for split in shares}
    assert sum(map(len, groups.values())) == 40  # each user in one split
    assert min(packed.splits[split].num_samples for split in shares) > 20
    write_jsonl(tmp_path / "more.jsonl", [{"x": "1", "y": "c"}])
    with pytest.raises(StreamError, match=r"some files are called like a split and others are not \(more"):
        pack((*files, tmp_path / "more.jsonl"), tmp_path / "d", **options)


def test_ready_episodes_of_texts_may_have_no_targets(tmp_path: Path) -> None:
    episode = {"support": [{"input": "ab"}, {"input": "c"}], "query": [{"input": "d"}]}
    options: dict[str, Any] = {"task": "episodes", "inputs": ("input",), "targets": ("target",)}
    pack(write_jsonl(tmp_path / "e.jsonl", [episode]), tmp_path / "out", **options)
    (members,) = samples_of(tmp_path / "out", "train").values()
    assert members.keys() == {"support.inputs.npy", "query.inputs.npy", "json"}
    assert array_of(members["support.inputs.npy"]).tolist() == [[97, 98], [99, -1]]


BAD_LINES = [
    (b'{"text": "x"}', "has nothing in column 'label', which needs a name"),
    (b'{"text": "x", "label": ""}', "has nothing in column 'label', which needs a name"),
    (b'{"text": "x", "label": ["a"]}', "has list in column 'label', which needs a name"),
    (b'{"label": "a"}', "has no 'text'; it has label"),
    (b'{"text": 5, "label": "a"}', "5 is no text"),
    (b'{"text": "", "label": "a"}', "its text is empty"),
    (b'{"text": "\\ud800", "label": "a"}', "its text is not UTF-8"),
    (b'{"text": "x", "label": "\\ud800"}', "its 'label' is not UTF-8"),
    (b"[1, 2]", "is a JSON list, not an object"),
    (b'{"text": "cut', "is no JSON: "),
    (b'\xff{"text": "x"}', "is no JSON: "),
    (b"[" * 100_000, "is no JSON: "),
    (b'{"n": ' + b"1" * 5000 + b"}", "is no JSON: Exceeds the limit"),
    (b'{"text": "' + b"x" * 200_000 + b'", "label": "a"}', "has 200027 bytes; the limit is 150000"),
]


def test_every_kind_of_bad_line_is_named_and_left_out(tmp_path: Path) -> None:
    good = b'{"text": "good", "label": "a"}\n'
    path = tmp_path / "r.jsonl"
    path.write_bytes(good + b"\n".join(line for line, _ in BAD_LINES) + b"\n\n" + good)
    options: dict[str, Any] = {"inputs": ("text",), "targets": ("label",)}
    limits = Limits(max_sample_bytes=150_000)
    packed = pack(path, tmp_path / "out", max_broken=len(BAD_LINES), limits=limits, **options)
    told = {entry.place: entry.reason for entry in packed.broken}
    for number, (_, reason) in enumerate(BAD_LINES):
        assert told[f"r.jsonl, line {number + 2}"].startswith(reason)
    assert list(samples_of(tmp_path / "out", "train")) == ["r/00000000", f"r/{len(BAD_LINES) + 1:08d}"]
    with pytest.raises(StreamError, match=r"14 broken, and --max-broken allows 13") as caught:
        pack(path, tmp_path / "again", max_broken=len(BAD_LINES) - 1, limits=limits, **options)
    assert "r.jsonl, line 2: has nothing in column 'label'" in str(caught.value)
    assert "leave up to N out by --max-broken N" in str(caught.value)


def test_every_kind_of_bad_csv_row_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_bytes(
        b'text,label\r\n"two\nlines",a\r\nonly one\r\n\r\nx,a,b\r\n\xff,a\r\n"a"b,c\r\n'
        + b"y" * 2000 + b",a\r\nlast,a\r\n"
    )  # fmt: skip
    limits = Limits(max_sample_bytes=1000)
    packed = pack(path, tmp_path / "out", inputs=("text",), targets=("label",), max_broken=9, limits=limits)
    assert {entry.place: entry.reason for entry in packed.broken} == {
        "r.csv, line 4": "has 1 fields; the first line names 2",
        "r.csv, line 6": "has 3 fields; the first line names 2",
        "r.csv, line 7": "is not UTF-8",
        "r.csv, line 8": "is no CSV: ',' expected after '\"'",
        "r.csv, line 9": "has 2004 bytes; the limit is 1000 (--max-sample-bytes)",
    }
    assert [members["txt"] for members in samples_of(tmp_path / "out", "train").values()] == [
        b"two\nlines",
        b"last",
    ]


def test_a_text_that_was_taken_for_a_number_is_told_with_the_fix(tmp_path: Path) -> None:
    rows = [{"text": "42", "label": "a"}, {"text": "world", "label": "b"}]
    path = write_csv(tmp_path / "r.csv", rows)
    with pytest.raises(
        StreamError,
        match=r"line 3: column 'text': 'world' is no number; if it holds text, say so by --input-kind text",
    ):
        pack(path, tmp_path / "out", inputs=("text",), targets=("label",))
    pack(path, tmp_path / "out", inputs=("text",), targets=("label",), kind="text")
    assert samples_of(tmp_path / "out", "train")["r/00000001"] == {"txt": b"world", "cls": b"1"}


def test_fields_longer_than_the_csv_module_s_own_limit_are_packed(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = write_csv(tmp_path / "r.csv", [{"text": "x" * (before + 1), "label": "a"}])
    pack(path, tmp_path / "out", inputs=("text",), targets=("label",))
    (members,) = samples_of(tmp_path / "out", "train").values()
    assert len(members["txt"]) == before + 1
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("record", "columns", "reason"),
    [
        ({"x": "1", "y": "two"}, {"task": "regression"}, r"column 'y': 'two' is no number"),
        (
            {"x": "1", "y": "nan"},
            {"task": "regression"},
            r"column 'y': nan is not finite in 32 bits",
        ),
        ({"x": 1, "y": [1, 2]}, {"task": "regression"}, r"column 'y': is a list of 2, not one number"),
        ({"x": [[1], [2, 3]], "y": 1}, {"task": "regression"}, r"its lists of numbers differ in length"),
        ({"x": 1e300, "y": 1}, {"task": "regression"}, r"1e\+300 is not finite in 32 bits"),
        ({"x": True, "y": 1}, {"task": "regression", "kind": "numbers"}, r"True is no number"),
        ({"x": [1, -1], "y": "a"}, {"kind": "tokens"}, r"\[1, -1\] is no list of tokens"),
        ({"x": [True], "y": "a"}, {"kind": "tokens"}, r"\[True\] is no list of tokens"),
        ({"x": "no.png", "y": "a"}, {"kind": "image"}, r"'no.png' there is no file"),
        (
            {"x": "a\0b", "y": "a"},
            {"kind": "image"},
            r"names the file 'a\\x00b', which is no path",
        ),
        ({"x": 5, "y": "a"}, {"kind": "image"}, r"holds int where the name of a file should be"),
        ({"x": "1", "y": "a", "k": "/etc/x"}, {"key": "k"}, r"'/etc/x' cannot be its key"),
        ({"x": "1", "y": "a", "k": "a//b"}, {"key": "k"}, r"'a//b' cannot be its key"),
        ({"x": "1", "y": "a", "k": "-x"}, {"split": "k"}, r"its split: '-x' cannot name a split"),
    ],
)
def test_what_a_column_must_not_hold_is_told(
    tmp_path: Path, record: dict[str, Any], columns: dict[str, Any], reason: str
) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", [record])
    with pytest.raises(StreamError, match=rf"(?s)1 broken.*r\.jsonl, line 1: ({reason})"):
        pack(path, tmp_path / "out", **{"inputs": ("x",), "targets": ("y",)} | columns)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"support": []}, r"its 'support' is no list of examples"),
        ({"query": [{"input": "x"}]}, r"an example of its 'query' has no 'input' and 'target' \(--input"),
        (
            {"query": [{"input": "x", "target": "maybe"}]},
            r"its query has labels that its support lacks: maybe",
        ),
        (
            {"query": [{"input": "x", "target": 2**63}], "support": [{"input": "y", "target": 1}]},
            r"not fit 64",
        ),
        ({"query": [{"input": "x", "target": "yes"}, {"input": 5, "target": "yes"}]}, r"5 is no text"),
        (
            {"query": [{"input": "long", "target": "yes"}, {"input": "a", "target": "yes"}]},
            r"example 1 of its query has the inputs of example 1 of its support, and they must share none",
        ),
    ],
)
def test_what_a_ready_episode_must_not_hold_is_told(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    path = write_jsonl(tmp_path / "e.jsonl", [EPISODE, EPISODE | change])
    with pytest.raises(StreamError, match=rf"(?s)1 broken.*e\.jsonl, line 2: .*{reason}"):
        pack(path, tmp_path / "out", task="episodes", inputs=("input",), targets=("target",))


def test_a_key_that_comes_twice_is_named_with_both_places(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", [{"x": "1", "y": "a", "k": "one"}] * 2)
    with pytest.raises(StreamError, match=r"line 2: its key 'one' is also that of r\.jsonl, line 1"):
        pack(path, tmp_path / "out", inputs=("x",), targets=("y",), key="k")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"inputs": ("txet",)}, r"r\.csv has no column 'txet'; it has text, label\. Did you mean 'text'\?"),
        ({"inputs": ()}, r"--input names no column"),
        ({"targets": ()}, r"classification needs one --target"),
        ({"task": "regression", "targets": ()}, r"regression needs --target"),
        ({"task": "language-modelling"}, r"language modelling has no --target"),
        (
            {"task": "language-modelling", "targets": (), "kind": "image"},
            r"--input-kind image is nothing for",
        ),
        ({"task": "episodes"}, r"ready episodes are lists, which CSV has no form for; write them as JSONL"),
        ({"task": "episodes", "keep": ("a",)}, r"ready episodes have one --input and one --target"),
        ({"task": "translation"}, r"--task translation is none of classification, regression"),
        ({"kind": "sound"}, r"--input-kind sound is none of text"),
        ({"inputs": ("text", "label"), "kind": "text"}, r"several --input are numbers or a record, not text"),
        ({"kind": "image", "tokenizer": "t.json"}, r"--tokenizer is for text, and the input is image"),
        ({"image_size": 8}, r"--image-size is for images, and the input is text"),
        ({"image_size": 0}, r"--image-size is 0; it must be at least 1"),
        ({"divided_by": "group"}, r"--split-by says what shares are dealt to; give shares"),
        (
            {"divided_by": "user", "shares": {"train": 1.0}},
            r"--split-by user is none of class, group, sample",
        ),
        ({"divided_by": "group", "shares": {"train": 1.0}}, r"--split-by group needs --group"),
        (
            {"task": "language-modelling", "targets": (), "divided_by": "class", "shares": {"train": 1.0}},
            r"--split-by class is for classification",
        ),
    ],
)
def test_mistakes_in_the_options_are_refused_with_the_fix(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    path = write_csv(tmp_path / "r.csv", [{"text": "x", "label": "a"}])
    with pytest.raises(StreamError, match=message):
        pack(path, tmp_path / "out", **{"inputs": ("text",), "targets": ("label",)} | columns)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.txt", "x", r"r\.txt is none of \.csv, \.tsv, \.jsonl, \.ndjson; its name has to say"),
        ("r.csv", "", r"r\.csv: its first line must have the names of the columns, .*; it has nothing"),
        ("r.csv", "text,text\n", r"each once, in UTF-8; it has 'text', 'text'"),
        ("r.csv", "text,label\n", r"r\.csv: there is no record that can be read"),
        ("r.jsonl", "\n", r"r\.jsonl: there is no record that can be read\.$"),
        ("r.jsonl", "{\n[\n", r"no record that can be read; the first one, r\.jsonl, line 1: is no JSON"),
        (
            "r.jsonl",
            '{"text": null, "label": 1}',
            r"line 1: column 'text' holds NoneType, .*say it by --input-kind",
        ),
    ],
)
def test_files_that_are_no_records_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(StreamError, match=message):
        pack(tmp_path / name, tmp_path / "out", inputs=("text",), targets=("label",))


def test_missing_files_and_folders_without_records_are_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"inputs": ("text",), "targets": ("label",)}
    with pytest.raises(StreamError, match=r"there is no file .*none\.csv"):
        pack(tmp_path / "none.csv", tmp_path / "out", **options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StreamError, match=r"empty: there are no files \.csv, \.tsv, \.jsonl, \.ndjson"):
        pack(tmp_path / "empty", tmp_path / "out", **options)
