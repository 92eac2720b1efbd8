"""Image folders as shards: what webdataset reads there is what the folders hold."""

import hashlib
import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from metaloom.datasets.pack import ImageFolder, PackedDataset, pack_dataset
from metaloom.errors import StreamError
from tests.packed import image_bytes, samples_of, write_tree

FILES = {
    "wren/1.png": image_bytes(10),
    "wren/2.jpg": image_bytes((20, 0, 0), form="JPEG"),
    "jay/old/1.webp": image_bytes((0, 30, 0), form="WEBP"),
    "jay/b.c.PNG": image_bytes(40),
    "auk/1.jpeg": image_bytes((0, 0, 50), form="JPEG"),
}


def pack(root: Path, out: Path, **options: Any) -> PackedDataset:
    return pack_dataset(ImageFolder(root, **options), out)


def test_files_are_packed_as_they_are_with_classes_in_sorted_order(tmp_path: Path) -> None:
    packed = pack(write_tree(tmp_path / "birds", FILES), tmp_path / "out")
    assert samples_of(tmp_path / "out", "train") == {
        "auk/1": {"jpg": FILES["auk/1.jpeg"], "cls": b"0"},
        "jay/b%2Ec": {"png": FILES["jay/b.c.PNG"], "cls": b"1"},
        "jay/old/1": {"webp": FILES["jay/old/1.webp"], "cls": b"1"},
        "wren/1": {"png": FILES["wren/1.png"], "cls": b"2"},
        "wren/2": {"jpg": FILES["wren/2.jpg"], "cls": b"2"},
    }
    table = packed.index.split("train")
    assert table.attributes["class"].tolist() == [0, 1, 1, 2, 2]
    assert packed.splits["train"].num_classes == 3
    assert packed.smallest_class == ("train", "auk", 1)
    assert packed.largest_class == ("train", "jay", 2)


def test_an_extension_is_what_the_bytes_are_not_what_the_name_says(tmp_path: Path) -> None:
    write_tree(tmp_path / "in", {"a/1.png": FILES["wren/2.jpg"]})
    pack(tmp_path / "in", tmp_path / "out")
    assert samples_of(tmp_path / "out", "train") == {"a/1": {"jpg": FILES["wren/2.jpg"], "cls": b"0"}}


def test_folders_called_like_splits_are_splits_with_classes_of_their_own(tmp_path: Path) -> None:
    files = {
        f"{split}/{name}": FILES["wren/1.png"]
        for split in ("train", "val")
        for name in ("b/1.png", "a/1.png")
    }
    files |= {"test/z/1.png": FILES["jay/b.c.PNG"]}
    packed = pack(write_tree(tmp_path / "in", files), tmp_path / "out")
    assert list(packed.splits) == ["train", "validation", "test"]
    assert samples_of(tmp_path / "out", "test") == {"z/1": {"png": FILES["jay/b.c.PNG"], "cls": b"0"}}
    assert list(samples_of(tmp_path / "out", "validation")) == ["a/1", "b/1"]
    assert any("also in another split" in warning for warning in packed.warnings)


def test_words_for_folders_give_groups_and_classes_of_two_names(tmp_path: Path) -> None:
    files = {
        f"{g}/{s}/{a}/{c}/1.png": image_bytes(10 * n + 5 * m + k)
        for n, g in enumerate(("real", "clipart"))
        for m, s in enumerate(("train", "test"))
        for k, (a, c) in enumerate((("greek", "one"), ("latin", "one")))
    }
    packed = pack(write_tree(tmp_path / "in", files), tmp_path / "out", folders="group/split/class/class")
    table = packed.index.split("train")
    assert table.attributes["group"].tolist() == [0, 1, 0, 1]  # clipart, real
    assert table.attributes["class"].tolist() == [0, 0, 1, 1]  # greek/one, latin/one
    assert next(iter(samples_of(tmp_path / "out", "train"))) == "clipart/greek/one/1"


def test_shares_are_dealt_to_classes_by_the_digest_of_their_names(tmp_path: Path) -> None:
    names = [f"class-{n}" for n in range(30)]
    write_tree(tmp_path / "in", {f"{n}/{i}.png": image_bytes(i) for n in names for i in range(2)})
    shares = {"train": 0.6, "validation": 0.2, "test": 0.2}
    pack(tmp_path / "in", tmp_path / "out", shares=shares)

    def split_of(name: str) -> str:
        place = int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) / 16**16
        return "train" if place < 0.6 else "validation" if place < 0.8 else "test"

    found = {key.split("/")[0]: split for split in shares for key in samples_of(tmp_path / "out", split)}
    assert found == {name: split_of(name) for name in names}
    # A new class moves none.
    write_tree(tmp_path / "in", {"another/1.png": image_bytes(1)})
    pack(tmp_path / "in", tmp_path / "more", shares=shares)
    more = {key.split("/")[0]: split for split in shares for key in samples_of(tmp_path / "more", split)}
    assert {name: split for name, split in more.items() if name != "another"} == found


def test_resized_images_are_squares_of_the_middle(tmp_path: Path) -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200  # the square in the middle is all 200
    file = io.BytesIO()
    Image.fromarray(wide).save(file, "PNG")
    clear = image_bytes((9, 9, 9, 0))
    deep = io.BytesIO()
    Image.fromarray(np.full((9, 9), 0x1234, np.uint16)).save(deep, "PNG")
    turned = Image.fromarray(np.concatenate([np.zeros((8, 4)), np.full((8, 4), 255)], 1).astype(np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 3  # upside down
    upside = io.BytesIO()
    turned.save(upside, "JPEG", exif=exif, quality=100)
    files = {
        "a/1.png": file.getvalue(),
        "b/1.png": clear,
        "c/1.png": deep.getvalue(),
        "d/1.jpg": upside.getvalue(),
    }
    pack(write_tree(tmp_path / "in", files), tmp_path / "out", image_size=8)
    images = {
        key: np.asarray(Image.open(io.BytesIO(members["png"])))
        for key, members in samples_of(tmp_path / "out", "train").items()
    }
    assert images["a/1"].shape == (8, 8, 3)
    assert (images["a/1"] == 200).all()
    assert (images["b/1"] == 255).all()  # transparent is white, whatever colour hides there
    assert (images["c/1"] == 0x12).all()
    assert images["d/1"][0, 0] > 250
    assert images["d/1"][0, 7] < 5


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_broken_images_are_named_with_the_reason_and_left_out_up_to_a_limit(
    tmp_path: Path, form: str
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, form)
    suffix = form.lower()
    root = write_tree(
        tmp_path / "in",
        {
            f"a/cut.{suffix}": file.getvalue()[: len(file.getvalue()) // 2],
            f"a/whole.{suffix}": file.getvalue(),
            f"b/empty.{suffix}": b"",
            f"b/text.{suffix}": b"no image at all",
            "c/gif.png": image_bytes(1, form="GIF"),
        },
    )
    with pytest.raises(
        StreamError, match=rf"broken, and --max-broken allows 0.*\n  a/cut\.{suffix}: is a? ?"
    ):
        pack(root, tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()
    packed = pack_dataset(ImageFolder(root), tmp_path / "out", max_broken=4)
    assert [entry.place for entry in packed.broken] == [
        f"a/cut.{suffix}", f"b/empty.{suffix}", f"b/text.{suffix}", "c/gif.png",
    ]  # fmt: skip
    assert {entry.reason for entry in packed.broken[1:]} == {"is no PNG, JPEG or WebP image"}
    recorded = packed.index.source["broken"]
    assert recorded == [{"place": entry.place, "reason": entry.reason} for entry in packed.broken]
    assert list(samples_of(tmp_path / "out", "train")) == ["a/whole"]
    assert "no sample is left of classes of train: b, c" in packed.warnings


def test_too_many_pixels_and_too_many_bytes_are_refused_before_anything_is_decoded(tmp_path: Path) -> None:
    from metaloom.datasets.pack import Limits

    bomb = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(bomb, "PNG")  # 200 million pixels in a few KB
    large = io.BytesIO()
    Image.new("1", (2_000, 1_000)).save(large, "PNG")
    root = write_tree(
        tmp_path / "in",
        {"a/bomb.png": bomb.getvalue(), "a/large.png": large.getvalue(), "a/ok.png": image_bytes(1)},
    )
    limits = Limits(max_pixels=1_000_000, max_sample_bytes=len(bomb.getvalue()))
    (root / "a" / "much.png").write_bytes(bytes(len(bomb.getvalue()) + 1))
    packed = pack_dataset(ImageFolder(root, limits=limits), tmp_path / "out", max_broken=3)
    told = {entry.place: entry.reason for entry in packed.broken}
    assert "has too many pixels" in told["a/bomb.png"]
    assert told["a/large.png"] == "has 2000 x 1000 pixels; the limit is 1000000 (--max-pixels)"
    assert told["a/much.png"].endswith(f"the limit is {len(bomb.getvalue())} (--max-sample-bytes)")
    with pytest.raises(StreamError, match=r"--max-pixels is 0; it must be at least 1"):
        Limits(max_pixels=0)


def test_nothing_is_packed_that_readers_would_pass_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from metaloom.datasets import decoders
    from metaloom.datasets.pack import Limits, parallel
    from metaloom.datasets.reader import SAMPLE_LIMIT_BYTES

    assert Limits().max_pixels == Limits(max_pixels=decoders.MAX_PIXELS).max_pixels
    with pytest.raises(StreamError, match=r"--max-pixels is 50000001; it must be at most 50000000: readers"):
        Limits(max_pixels=decoders.MAX_PIXELS + 1)
    with pytest.raises(
        StreamError, match=r"--max-sample-bytes is 268435457; it must be at most 268435456: readers"
    ):
        Limits(max_sample_bytes=SAMPLE_LIMIT_BYTES + 1)
    # A payload within the limit may be over it with the tar's headers.
    monkeypatch.setattr(parallel, "SAMPLE_LIMIT_BYTES", 8000)
    noise = np.random.default_rng(0).integers(0, 256, (86, 86), np.uint8)
    large = io.BytesIO()
    Image.fromarray(noise).save(large, "PNG", compress_level=0)
    assert len(large.getvalue()) < 8000
    files = {"a/large.png": large.getvalue(), "a/ok.png": image_bytes(1)}
    packed = pack_dataset(ImageFolder(write_tree(tmp_path / "in", files)), tmp_path / "out", max_broken=1)
    (broken,) = packed.broken
    assert broken.place == "a/large.png"
    assert re.fullmatch(r"takes up to \d+ bytes in a shard; readers take 8000 at most", broken.reason)


def test_files_that_cannot_be_samples_are_told_of(tmp_path: Path) -> None:
    root = write_tree(
        tmp_path / "in",
        {
            "a/1.png": image_bytes(1),
            "a/1.jpg": image_bytes((1, 2, 3), form="JPEG"),
            "top.png": b"",
            "a/x.txt": b"",
        },
    )
    os.mkfifo(root / "a" / "pipe.png")
    (root / "a" / "gone.png").symlink_to("nowhere.png")
    (root / "a" / os.fsdecode(b"\xff.png")).write_bytes(image_bytes(3))
    packed = pack_dataset(ImageFolder(root), tmp_path / "out", max_broken=5)
    told = {entry.place: entry.reason for entry in packed.broken}
    assert told["a/1.png"] == "its key 'a/1' is also that of a/1.jpg"
    assert told["top.png"] == "does not lie in folders class"
    assert told["a/pipe.png"] == "is no plain file"
    assert told["a/gone.png"].startswith("there is no file")
    assert told["a/\\udcff.png"].endswith("is not UTF-8")
    assert "files that are no PNG, JPEG or WebP were left out: 1 .txt" in packed.warnings
    assert list(samples_of(tmp_path / "out", "train")) == ["a/1"]


def test_folders_without_an_image_are_told_of(tmp_path: Path) -> None:
    root = write_tree(
        tmp_path / "in",
        {"train/a/1.png": image_bytes(1), "train/a/x/note.txt": b"", "train/b/note.txt": b"", ".git/x": b""},
    )
    (root / "test" / "a").mkdir(parents=True)
    packed = pack(root, tmp_path / "out")
    assert "folders without an image were left out: test, train/b" in packed.warnings
    for n in range(6):
        (root / "train" / f"c{n}").mkdir()
    packed = pack(root, tmp_path / "more")
    assert (
        "folders without an image were left out: test, train/b, train/c0, train/c1, train/c2 and 3 more"
        in packed.warnings
    )


def test_equal_images_of_two_classes_are_told_of(tmp_path: Path) -> None:
    same, other = image_bytes(1), image_bytes(2)
    root = write_tree(tmp_path / "in", {"a/1.png": same, "a/2.png": same, "b/1.png": same, "b/2.png": other})
    packed = pack(root, tmp_path / "out")
    assert "2 samples have content that is also in another class (b/1.png is a/1.png)" in packed.warnings
    (root / "b" / "1.png").write_bytes(image_bytes(3))
    packed = pack(root, tmp_path / "again")
    expected = (
        "1 sample has the content of another sample, so support and query may share it (a/2.png is a/1.png)"
    )
    assert expected in packed.warnings


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        (
            {"a/1.txt": b""},
            {},
            r"holds no images \(.png, .jpg, .jpeg, .webp\) in folders class; name the folder",
        ),
        (
            {"train/a/1.png": b"", "a/1.png": b""},
            {},
            r"called like splits \(train\) and others \(a\); say what",
        ),
        (
            {"train/a/1.png": b""},
            {"shares": {"train": 1.0}},
            r"already say the split \(split/class\); leave --split",
        ),
        (
            {"a/1.png": b""},
            {"folders": "split/sort"},
            r"--folders split/sort says nothing that can be followed",
        ),
        ({"a/1.png": b""}, {"folders": "split"}, r"class at least once"),
        ({"a b/c/1.png": b""}, {"folders": "split/class"}, r"'a b' cannot name a split"),
        ({"a/1.png": b""}, {"image_size": 0}, r"--image-size is 0; it must be at least 1"),
        (
            {"a/1.png": b""},
            {"shares": {"train": 0.5, "test": 0.5}},
            r"no class fell to (train|test): a class goes where the sha256",
        ),
    ],
)
def test_mistakes_are_refused_with_the_fix(
    tmp_path: Path, files: dict[str, bytes], options: dict[str, Any], message: str
) -> None:
    root = write_tree(tmp_path / "in", files)
    with pytest.raises(StreamError, match=message):
        pack(root, tmp_path / "out", **options)


def test_a_missing_tree_and_a_link_in_a_circle_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match=r"nothing cannot be read as a folder of images: No such file"):
        pack(tmp_path / "nothing", tmp_path / "out")
    root = write_tree(tmp_path / "in", {"a/1.png": image_bytes(1)})
    (root / "a" / "up").symlink_to(root)
    with pytest.raises(StreamError, match=r"up is a link to a folder around it; remove the link"):
        pack(root, tmp_path / "out")
