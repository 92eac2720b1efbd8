"""The data set `glyph-faces`: letters and digits in groups of one face at one angle, made offline.

The classes are the same in all groups, and some are told apart by the angle alone: `p` upside down is `d`,
`u` is `n`, `Z` on its side is `N`. An image by itself does not say at what angle it is; several of one group
do. So what a group's unlabelled images tell is worth having. The faces of validation and test are none of
training's.
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from metaloom.datasets import glyphs
from metaloom.datasets.glyphs import Glyphs
from metaloom.datasets.shards import Sample, SplitSamples

RULES = 1  # of this module; raise it when the same fonts would give other data
ANGLES_DEG = tuple(range(0, 360, 30))  # counterclockwise
SPLIT_OF_FACE = {
    "DejaVuSansMono-Bold": "validation",
    "DejaVuSerif-BoldItalic": "validation",
    "DejaVuSans-BoldOblique": "test",
    "DejaVuSerif-Italic": "test",
}
SPLITS = ("train", "validation", "test")


def make_glyph_faces(*, max_classes: int | None = None) -> Glyphs:
    """The letters A to Z, a to z and the digits, without twins, in every face, upright.

    Args:
        max_classes: the first so many alone; None for all.
    """
    pool = [c for c in glyphs.candidates() if c in string.ascii_letters + string.digits]
    drawn = glyphs.render_all(pool)
    kept = glyphs.without_twins(glyphs.distances(drawn.images), ["train"] * len(drawn.characters))
    return drawn.rows(kept[:max_classes])


def split_samples(made: Glyphs) -> dict[str, SplitSamples]:
    """What to write: per split, every class in each of its faces at each angle."""
    classes = [unicodedata.name(character) for character in made.characters]
    return {
        split: SplitSamples(_samples(made, split), classes, [_group(*each) for each in _groups(made, split)])
        for split in SPLITS
    }


def num_samples(made: Glyphs) -> int:
    """Of all splits together."""
    return len(made.characters) * len(made.faces) * len(ANGLES_DEG)


def source(*, max_classes: int | None = None) -> dict[str, Any]:
    """What decides the data: rules, versions and options."""
    return {"rules": RULES, **glyphs.fonts_and_versions(), "max_classes": max_classes}


def _samples(made: Glyphs, split: str) -> Iterator[Sample]:
    for group, (face, angle_deg) in enumerate(_groups(made, split)):
        row = made.faces.index(face)
        for number, character in enumerate(made.characters):
            upright = Image.fromarray(made.images[number, row])
            turned = upright.rotate(angle_deg, resample=Image.Resampling.BICUBIC)
            yield Sample(
                key=f"{face.lower()}/{angle_deg:03}/{ord(character):04x}",
                members={"cls": str(number).encode(), "png": glyphs.encoded(np.asarray(turned))},
                attributes={"class": number, "group": group},
            )


def _groups(made: Glyphs, split: str) -> list[tuple[str, int]]:
    faces = [face for face in made.faces if SPLIT_OF_FACE.get(face, "train") == split]
    return [(face, angle_deg) for face in faces for angle_deg in ANGLES_DEG]


def _group(face: str, angle_deg: int) -> str:
    return f"{face.removeprefix('DejaVu')} at {angle_deg} degrees"
