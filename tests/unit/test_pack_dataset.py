"""Packing as a whole: the same bytes for any number of processes, and a directory never half a set."""

import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metaloom.datasets.pack import Columns, ImageFolder, Records, pack_dataset
from metaloom.datasets.pack.duplicates import ContentDigests
from metaloom.datasets.pack.payloads import array_member, npy_bytes
from metaloom.datasets.pack.plan import BadSample, fit_for_key, parse_shares
from metaloom.errors import StreamError
from tests.packed import image_bytes, samples_of, write_tree

REVIEWS = Columns(inputs=("text",), targets=("label",))


def reviews(path: Path, num: int) -> Records:
    lines = [json.dumps({"text": f"text {n % 190}", "label": f"c{n % 7}"}) for n in range(num)]
    lines[50] = lines[120] = "broken"
    path.write_text("\n".join(lines))
    return Records((path,), REVIEWS)


def test_the_number_of_processes_changes_no_byte(tmp_path: Path) -> None:
    source = reviews(tmp_path / "reviews.jsonl", 200)
    # Images fail in the processes, records here: both kinds keep their order.
    images = {f"c{n % 3}/{n}.png": image_bytes(n) if n % 30 else b"" for n in range(120)}
    pictures = ImageFolder(write_tree(tmp_path / "images", images))
    digests, listed = [], []
    for num_processes in (1, 2, 3):
        for name, from_source in (("reviews", source), ("images", pictures)):
            out = tmp_path / f"{name}-{num_processes}"
            packed = pack_dataset(
                from_source,
                out,
                name=name,
                num_processes=num_processes,
                max_broken=4,
                shard_limit_bytes=40_000,
            )
            assert len(packed.index.shards) > 2
            files = {file.name: file.read_bytes() for file in out.iterdir()}
            digests.append((name, packed.index.digest, files))
            listed.append((name, packed.broken, packed.warnings))
    for found in (digests, listed):
        assert found[0] == found[2] == found[4]
        assert found[1] == found[3] == found[5]


def test_progress_counts_all_samples_broken_ones_too(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "in", {"a/1.png": b"", "a/2.png": image_bytes(1)})
    calls: list[tuple[int, int]] = []
    pack_dataset(ImageFolder(root), tmp_path / "out", max_broken=1, progress=lambda *call: calls.append(call))
    assert calls == [(1, 2), (2, 2)]


def test_a_finished_set_is_only_replaced_when_asked_and_an_unfinished_one_is_packed_anew(
    tmp_path: Path,
) -> None:
    root = write_tree(tmp_path / "in", {"a/1.png": image_bytes(1)})
    out = tmp_path / "out"
    first = pack_dataset(ImageFolder(root), out)
    with pytest.raises(
        StreamError, match=r"out holds a finished data set\. Choose another .* give --replace"
    ):
        pack_dataset(ImageFolder(root), out)
    with pytest.raises(StreamError, match=r"does not lie in|holds no images"):
        pack_dataset(ImageFolder(tmp_path / "in" / "a"), out, replace=True)
    assert (out / "index.json").exists()  # a source without images destroys nothing
    (root / "a" / "2.png").write_bytes(image_bytes(2))
    second = pack_dataset(ImageFolder(root), out, replace=True)
    assert second.splits["train"].num_samples == 2
    # What a kill may leave.
    (out / "index.json").unlink()
    (out / "train-00007.tar").write_bytes(b"left over")
    (out / "spool-00000.arrow").write_bytes(b"left over")
    (out / "train-00000.tar.4711.partial").write_bytes(b"left over")
    (root / "a" / "2.png").unlink()
    third = pack_dataset(ImageFolder(root), out)
    assert third.index.digest == first.index.digest
    assert {file.name for file in out.iterdir()} == {
        "index.json", *(shard.name for shard in third.index.shards), *(f.name for f in out.glob("*.columns")),
    }  # fmt: skip


def test_a_directory_with_other_files_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "in", {"a/1.png": image_bytes(1)})
    with pytest.raises(StreamError, match=r"in holds other files \(a\); mine needs a directory of its own"):
        pack_dataset(ImageFolder(root), root, name="mine")
    assert [file.name for file in root.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_processes": 0}, r"--processes is 0; it must be at least 1"),
        ({"max_broken": -1}, r"--max-broken is -1; it must be at least 0"),
        ({"shard_limit_bytes": 0}, r"--shard-mib gives shards of 0 bytes"),
        ({"name": "glyphs"}, r"would be called glyphs, as one that metaloom makes itself; .* by --name"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    root = write_tree(tmp_path / "in", {"a/1.png": image_bytes(1)})
    with pytest.raises(StreamError, match=message):
        pack_dataset(ImageFolder(root), tmp_path / "out", **options)
    with pytest.raises(
        StreamError, match=r"data sets are packed in a local directory; pack it there and copy"
    ):
        pack_dataset(ImageFolder(root), "s3://bucket/birds")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train", r"--split train: 'train' is no share; write shares as in train=0\.7"),
        ("train=x", r"'train=x' is no share"),
        ("train=0,test=1", r"the share of 'train' is 0; it must be above 0"),
        ("train=nan", r"the share of 'train' is nan; it must be above 0"),
        ("train=0.5,train=0.5", r"'train' is there twice"),
        ("train=0.5,test=0.4", r"the shares add up to 0\.9; they must to 1"),
        ("tr ain=1", r"'tr ain' cannot name a split"),
    ],
)
def test_shares_that_are_none_are_refused(text: str, message: str) -> None:
    with pytest.raises(StreamError, match=message):
        parse_shares(text)


def test_shares_add_up_in_floating_point() -> None:
    assert parse_shares("train=0.7, validation=0.2, test=0.1") == {
        "train": 0.7,
        "validation": 0.2,
        "test": 0.1,
    }


def test_keys_have_no_dots_and_stay_different() -> None:
    assert fit_for_key("a.b%2E\\c\n/é") == "a%2Eb%252E%5Cc%0A/é"
    for bad in ("", "/a", "a/", "a//b", "\udcff"):
        with pytest.raises(BadSample):
            fit_for_key(bad)


class Trap:
    """Unpickling it would be seen."""

    def __reduce__(self) -> Any:
        return exec, ("raise AssertionError('something was unpickled')",)


def npy(header: str, data: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (pickle.dumps(Trap()), r"is no \.npy array"),
        (
            npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", pickle.dumps([Trap()])),
            r"holds object",
        ),
        (npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}", bytes(4)), r"not numbers"),
        (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (10**15,)}", bytes(8)), r"is no \.npy array"),
        (
            npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000,)}", bytes(8)),
            r"has 8 bytes",
        ),
        (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}", bytes(8)), r"its shape is \(-1,\)"),
        (npy("__import__('os').abort()", b""), r"is no \.npy array"),
        (npy("(" * 9000, b""), r"is no \.npy array"),
        (b"\x93NUMPY\x02\x00" + b"\xff" * 4, r"its header has 4294967295 bytes"),
        (b"", r"is no \.npy array"),
        (npy_bytes(np.zeros(3))[:-1], r"it is cut short or damaged"),
    ],
)
def test_arrays_that_mean_harm_are_refused_and_nothing_is_executed(payload: bytes, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        array_member(payload)


def test_duplicates_are_counted_as_brute_force_counts_them() -> None:
    random.seed(0)
    for _ in range(30):
        samples = [(random.randrange(12), random.randrange(2), random.randrange(3)) for _ in range(20)]
        digests = ContentDigests()
        for content, split, number in samples:
            digests.add(content.to_bytes(16, "big"), split=split, class_number=number)
        found = digests.duplicates()
        counts = [0, 0, 0]
        for row, (content, _, _) in enumerate(samples):
            alike = [sample for sample in samples if sample[0] == content]
            if any(sample[0] == content for sample in samples[:row]):
                several_splits = len({split for _, split, _ in alike}) > 1
                several_classes = len({number for _, _, number in alike}) > 1
                counts[0 if several_splits else 1 if several_classes else 2] += 1
        assert [found.across_splits, found.across_classes, found.within_class] == counts
        if found.example is not None:
            first, second = (samples[row] for row in found.example)
            assert first[0] == second[0]
            assert found.example[0] < found.example[1]
            if counts[0]:
                assert first[1] != second[1]


def test_the_same_text_twice_is_told_of(tmp_path: Path) -> None:
    packed = pack_dataset(reviews(tmp_path / "r.jsonl", 200), tmp_path / "out", max_broken=2)
    texts = [members["txt"] for members in samples_of(tmp_path / "out", "train").values()]
    assert len(texts) - len({*texts}) == 10
    assert "10 samples have content that is also in another class" in packed.warnings[-1]
