"""The glyphs data set: what is drawn, what is kept, how it is split."""

import io
import unicodedata
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metaloom.datasets import glyph_faces, glyphs, make_dataset


@pytest.fixture(scope="module")
def full() -> glyphs.Glyphs:
    return glyphs.make_glyphs()


def test_there_are_twelve_faces_and_enough_classes_in_every_split(full: glyphs.Glyphs) -> None:
    assert full.images.shape == (len(full.characters), 12, 28, 28)
    assert full.images.dtype == np.uint8
    counts = {split: len(full.of_split(split)) for split in glyphs.SPLITS}
    assert counts["train"] > 800
    assert counts["validation"] >= 40
    assert counts["test"] > 120


def test_splits_go_by_script(full: glyphs.Glyphs) -> None:
    scripts = {s: {glyphs.script_of(full.characters[r]) for r in full.of_split(s)} for s in glyphs.SPLITS}
    assert scripts["validation"] == {"CYRILLIC"}
    assert scripts["test"] == {"GREEK", "ARMENIAN", "GEORGIAN"}
    assert {"LATIN", "DIGIT"} < scripts["train"]
    assert not scripts["train"] & {"CYRILLIC", "GREEK", "ARMENIAN", "GEORGIAN"}


def test_no_image_belongs_to_two_classes(full: glyphs.Glyphs) -> None:
    owners = defaultdict(set)
    for character, images in zip(full.characters, full.images, strict=True):
        for image in images:
            owners[image.tobytes()].add(character)
    assert [chars for chars in owners.values() if len(chars) > 1] == []


def test_the_latin_one_of_each_pair_of_twins_stays(full: glyphs.Glyphs) -> None:
    assert set("ABCEHKMOPTXaceopxy") <= set(full.characters)
    cyrillic_and_greek_twins = "АВСЕНКМОРТХасеорху" + "ΑΒΕΗΙΚΜΝΟΡΤΥΧο"
    assert not set(cyrillic_and_greek_twins) & set(full.characters)


def test_no_held_out_class_looks_like_a_training_class_recomputed_pixel_by_pixel(full: glyphs.Glyphs) -> None:
    train = full.images[full.of_split("train")].astype(np.float32) / 2  # [C, faces, H, W]
    held_out = [*full.of_split("validation"), *full.of_split("test")]
    rows = np.random.default_rng(0).permutation(held_out)[:5]
    for row in rows:
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                other = np.zeros((12, 30, 30), np.float32)
                other[:, 1 + dy : 29 + dy, 1 + dx : 29 + dx] = full.images[row].astype(np.float32) / 2
                framed = np.pad(train, ((0, 0), (0, 0), (1, 1), (1, 1)))
                difference = np.sqrt(((framed - other) ** 2).sum((2, 3)))
                size = np.minimum(np.sqrt((train**2).sum((2, 3))), np.sqrt((other**2).sum((1, 2))))
                # 0.01 below the limit, because the limit is applied to pixels rounded down to 7 bits.
                assert (difference / size).min() > glyphs.TWIN_LIMIT_ACROSS_SPLITS - 0.01


def test_distances_equal_the_pairwise_definition() -> None:
    images = np.random.default_rng(1).integers(0, 256, size=(5, 2, 6, 6), dtype=np.uint8) // 2 * 2
    found = glyphs.distances(images)
    framed = np.pad(images.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    for i in range(5):
        for j in range(5):
            least = min(
                np.linalg.norm(framed[i, f] - np.roll(framed[j, f], (dy, dx), (0, 1)))
                / min(np.linalg.norm(framed[i, f]), np.linalg.norm(framed[j, f]))
                for f in range(2)
                for dy in (-1, 0, 1)
                for dx in (-1, 0, 1)
            )
            assert found[i, j] == pytest.approx(least, abs=2e-3)  # a difference of large float32 squares


def test_images_that_differ_by_one_pixel_of_offset_are_at_no_distance() -> None:
    drawing = np.random.default_rng(2).integers(0, 256, size=(6, 6), dtype=np.uint8)
    offsets = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    images = np.zeros((9, 1, 10, 10), np.uint8)
    for row, (dy, dx) in enumerate(offsets):
        images[row, 0, 2 + dy : 8 + dy, 2 + dx : 8 + dx] = drawing
    assert (glyphs.distances(images)[4] == 0).all()


def test_the_earlier_row_of_twins_is_kept_and_the_limit_is_wider_across_splits() -> None:
    distance = np.full((4, 4), 1.0, np.float32)
    np.fill_diagonal(distance, 0)
    distance[0, 1] = distance[1, 0] = 0.35  # twins only across splits
    distance[2, 3] = distance[3, 2] = 0.25  # twins
    assert glyphs.without_twins(distance, ["train"] * 4) == [0, 1, 2]
    assert glyphs.without_twins(distance, ["train", "test", "train", "train"]) == [0, 2]


def test_glyphs_are_centred_never_clipped_and_keep_their_relative_size(full: glyphs.Glyphs) -> None:
    heights = {}
    for row, character in enumerate(full.characters):
        for image in full.images[row]:
            rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
            assert abs(rows[0] - (27 - rows[-1])) <= 1
            assert abs(columns[0] - (27 - columns[-1])) <= 1
            heights[character] = rows[-1] - rows[0] + 1
    assert heights["c"] < heights["C"]
    assert heights["o"] < heights["O"]


def test_what_does_not_fit_is_dropped_not_clipped() -> None:
    from PIL import ImageFont

    font = ImageFont.truetype(str(glyphs.face_files()[0]), 60)
    assert glyphs.render(font, "W") is None
    assert glyphs.render(font, " ") is None


def test_compatibility_characters_and_punctuation_are_no_candidates() -> None:
    candidates = glyphs.candidates()
    assert len(candidates) > 1500
    assert not set("²ﬁ\u2126½.,!") & set(candidates)  # U+2126 is the ohm sign
    assert {unicodedata.category(c)[0] for c in candidates} <= {"L", "N", "S"}


def test_groups_of_faces_have_the_same_classes_and_share_no_face_between_splits(tmp_path: Path) -> None:
    made = make_dataset("glyph-faces", tmp_path, max_per_split=3)
    assert made.num_classes == {"train": 3, "validation": 3, "test": 3}
    assert made.num_samples == {"train": 8 * 12 * 3, "validation": 2 * 12 * 3, "test": 2 * 12 * 3}
    faces = {
        split: {name.partition(" at ")[0] for name in table.groups}
        for split, table in made.index.splits.items()
    }
    assert [len(names) for names in faces.values()] == [8, 2, 2]
    assert len(set().union(*faces.values())) == 12


def test_an_image_of_a_group_is_turned_by_its_angle() -> None:
    made = glyph_faces.make_glyph_faces(max_classes=2)
    samples = list(glyph_faces.split_samples(made)["test"].samples)
    row = made.faces.index("DejaVuSans-BoldOblique")
    for sample in samples:
        face, angle, code = sample.key.split("/")
        if face != "dejavusans-boldoblique" or int(angle) % 90:
            continue
        upright = made.images[made.characters.index(chr(int(code, 16))), row]
        shown = np.asarray(Image.open(io.BytesIO(sample.members["png"])))
        np.testing.assert_array_equal(shown, np.rot90(upright, int(angle) // 90))
