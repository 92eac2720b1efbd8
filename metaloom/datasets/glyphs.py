"""The data set `glyphs`: letters, digits and symbols of many scripts, each in twelve faces, made offline.

Classes are the characters that all twelve DejaVu faces of matplotlib contain. Characters that look alike are
reduced to one before the classes are split, so that no test class resembles a training class.
"""

from __future__ import annotations

import hashlib
import io
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFont, features

from metaloom.datasets.shards import Sample, SplitSamples
from metaloom.errors import StreamError

RULES = 1  # of this module; raise it when the same fonts would give other data
SIZE_PX = 28
FONT_SIZE_PX = 20  # capitals are 15 px high; of about 1950 characters, eight are wider than the image

# Two characters are twins if in any one face, at the best of nine offsets (-1, 0, 1 px on each axis),
# |a - b| < limit * min(|a|, |b|), Euclidean over the pixels. Up to 0.3, pairs differ by a small accent or a
# serif; from there on by a stroke. Across splits the limit is wider, so that a Cyrillic or Greek letter which
# a reader would take for a slightly odd Latin one is gone too.
TWIN_LIMIT = 0.3
TWIN_LIMIT_ACROSS_SPLITS = 0.4

SPLIT_OF_SCRIPT = {"CYRILLIC": "validation", "GREEK": "test", "ARMENIAN": "test", "GEORGIAN": "test"}
SPLITS = ("train", "validation", "test")
# Of twins the one of the earlier script stays; all other scripts come last, so that a symbol made after a
# Greek letter gives way to the letter.
_PRIORITY = ("LATIN", "DIGIT", "CYRILLIC", "GREEK", "ARMENIAN", "GEORGIAN")


@dataclass(frozen=True, eq=False)
class Glyphs:
    """Renderings that passed: uint8 [C, faces, 28, 28], ink 255, with the characters and their splits."""

    faces: tuple[str, ...]
    characters: tuple[str, ...]
    images: NDArray[np.uint8]

    def rows(self, rows: Sequence[int]) -> Glyphs:
        """Some of the characters, in the order given."""
        return Glyphs(self.faces, tuple(self.characters[row] for row in rows), self.images[list(rows)])

    def of_split(self, split: str) -> list[int]:
        """Rows of the characters of that split, in order of priority, then of code point."""
        return [row for row, c in enumerate(self.characters) if split_of(c) == split]


def script_of(character: str) -> str:
    """The script, or for digits and symbols the kind: the first word of the Unicode name."""
    return unicodedata.name(character).split()[0]


def split_of(character: str) -> str:
    """Which split a character's class belongs to, if it is kept: by script."""
    return SPLIT_OF_SCRIPT.get(script_of(character), "train")


def face_files() -> list[Path]:
    """The twelve font files, sorted by name.

    Raises:
        StreamError: this matplotlib comes without them.
    """
    import matplotlib  # heavy, and needed only where the set is made

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    families = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif")
    styles = {"": ("", "-Bold", "-Oblique", "-BoldOblique"), "Serif": ("", "-Bold", "-Italic", "-BoldItalic")}
    names = [f + s for f in families for s in styles["Serif" if f.endswith("Serif") else ""]]
    files = sorted(folder / f"{name}.ttf" for name in names)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise StreamError(
            f"glyphs cannot be made: {folder} lacks {', '.join(missing)}. Install matplotlib from PyPI, "
            f"whose wheels bring these fonts."
        )
    return files


def candidates() -> list[str]:
    """The characters that every face has, best first: letters, decimal digits and symbols.

    Compatibility characters (their NFKC form is another string: superscripts, ligatures, the ohm sign)
    are left out, being other characters in another dress.
    """
    from matplotlib.ft2font import FT2Font

    common: set[int] | None = None
    for file in face_files():
        codes = {int(code) for code, glyph in FT2Font(str(file)).get_charmap().items() if int(glyph) != 0}
        common = codes if common is None else common & codes
    characters = [
        c
        for c in map(chr, sorted(common or ()))
        if (unicodedata.category(c)[0] in "LS" or unicodedata.category(c) == "Nd")
        and unicodedata.normalize("NFKC", c) == c
    ]
    return sorted(characters, key=_priority)


def make_glyphs(*, max_classes_per_split: int | None = None) -> Glyphs:
    """The classes of the data set, rendered; the same for the same matplotlib and Pillow.

    A character is dropped if in any face it is blank, is drawn as the face's box for unknown characters,
    or does not fit into the image; and if it is the twin of one that is kept before it. So no two kept
    characters, of whatever splits, are twins.

    Args:
        max_classes_per_split: keeps the first so many classes of each split, and does not look at many more,
            to be quick; None keeps all.
    """
    pool = candidates()
    if max_classes_per_split is not None:
        pool = _shortlist(pool, 4 * max_classes_per_split)
    drawn = render_all(pool)
    kept = without_twins(distances(drawn.images), [split_of(c) for c in drawn.characters])
    if max_classes_per_split is not None:
        first = set(_shortlist([drawn.characters[row] for row in kept], max_classes_per_split))
        kept = [row for row in kept if drawn.characters[row] in first]
    return drawn.rows(kept)


def render_all(pool: Sequence[str]) -> Glyphs:
    """Those of the characters that every face draws: not blank, not as the box for unknown ones, and not
    larger than the image."""
    files = face_files()
    fonts = [
        ImageFont.truetype(str(file), FONT_SIZE_PX, layout_engine=ImageFont.Layout.BASIC) for file in files
    ]
    unknown = [render(font, "\U0010fffd") for font in fonts]  # a private-use code that no face has
    characters, images = [], []
    for character in pool:
        drawn = [render(font, character) for font in fonts]
        if any(
            image is None or (box is not None and np.array_equal(image, box))
            for image, box in zip(drawn, unknown, strict=True)
        ):
            continue
        characters.append(character)
        images.append(np.stack([image for image in drawn if image is not None]))
    return Glyphs(tuple(file.stem for file in files), tuple(characters), np.stack(images))


def render(font: ImageFont.FreeTypeFont, character: str) -> NDArray[np.uint8] | None:
    """uint8 [28, 28], antialiased, ink 255, its bounding box centred; None if it is blank or does not fit."""
    mask = font.getmask(character, mode="L")
    if 0 in mask.size:
        return None
    ink = np.frombuffer(bytes(mask), np.uint8).reshape(mask.size[1], mask.size[0])
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    if not len(rows):
        return None
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = ink.shape
    if height > SIZE_PX or width > SIZE_PX:
        return None
    image = np.zeros((SIZE_PX, SIZE_PX), np.uint8)
    top, left = (SIZE_PX - height) // 2, (SIZE_PX - width) // 2
    image[top : top + height, left : left + width] = ink
    return image


def without_twins(distance: NDArray[np.float32], splits: Sequence[str]) -> list[int]:
    """Rows to keep, in order: each row that is not the twin of a row kept before it.

    Args:
        distance: float32 [C, C], as `distances` gives it.
        splits: the split of each row.
    """
    names = np.array(splits)
    same = names[:, None] == names[None, :]
    alike = distance < np.where(same, np.float32(TWIN_LIMIT), np.float32(TWIN_LIMIT_ACROSS_SPLITS))
    kept: list[int] = []
    for row in range(len(distance)):
        if not alike[row, kept].any():
            kept.append(row)
    return kept


def distances(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """How unlike each pair is in the face where it is most alike (see TWIN_LIMIT), float32 [C, C].

    Pixels are halved to 0..127, so that every sum of products is an integer below 2**24 and exact in
    float32: the answer does not depend on the machine's order of summation.

    Args:
        images: uint8 [C, faces, H, W].
    """
    C, num_faces, H, W = images.shape
    least = np.full((C, C), np.inf, np.float32)
    # The offset (-dy, -dx) is the transpose of (dy, dx), so five of the nine are enough.
    offsets = [(0, 0), (0, 1), (1, -1), (1, 0), (1, 1)]
    for face in range(num_faces):
        framed = np.zeros((C, H + 2, W + 2), np.float32)
        framed[:, 1:-1, 1:-1] = images[:, face] >> 1
        flat = framed.reshape(C, -1)
        squares = np.einsum("cp,cp->c", flat, flat)
        best = np.full((C, C), -np.inf, np.float32)  # the largest product of the two images over the offsets
        for dy, dx in offsets:
            product = flat @ np.roll(framed, (dy, dx), axis=(1, 2)).reshape(C, -1).T
            np.maximum(best, product, out=best)
            np.maximum(best, product.T, out=best)
        apart = squares[:, None] + squares[None, :] - 2 * best
        apart /= np.minimum(squares[:, None], squares[None, :])
        np.minimum(least, apart, out=least)
    return np.sqrt(np.maximum(least, 0))


def split_samples(glyphs: Glyphs) -> dict[str, SplitSamples]:
    """What to write: per split, every class in every face."""
    return {
        split: SplitSamples(
            _samples(glyphs, split),
            [unicodedata.name(glyphs.characters[row]) for row in glyphs.of_split(split)],
        )
        for split in SPLITS
    }


def source(*, max_classes_per_split: int | None = None) -> dict[str, Any]:
    """What decides the data: rules, versions and options."""
    return {"rules": RULES, **fonts_and_versions(), "max_classes_per_split": max_classes_per_split}


def fonts_and_versions() -> dict[str, Any]:
    """What decides how a character is drawn."""
    files = face_files()
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return {
        "faces": [file.stem for file in files],
        "fonts_sha256": digest,
        "freetype": features.version("freetype2"),
        "pillow": version("pillow"),
        "unicode": unicodedata.unidata_version,
    }


def _samples(glyphs: Glyphs, split: str) -> Iterator[Sample]:
    for number, row in enumerate(glyphs.of_split(split)):
        code = f"{ord(glyphs.characters[row]):04x}"
        for variant, face in enumerate(glyphs.faces):
            yield Sample(
                key=f"{code}/{face.lower()}",
                members={"cls": str(number).encode(), "png": encoded(glyphs.images[row, variant])},
                attributes={"class": number, "variant": variant},
            )


def encoded(image: NDArray[np.uint8]) -> bytes:
    """The image as png."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _priority(character: str) -> tuple[int, int]:
    script = script_of(character)
    return (_PRIORITY.index(script) if script in _PRIORITY else len(_PRIORITY)), ord(character)


def _shortlist(characters: list[str], num_per_split: int) -> list[str]:
    """The first so many characters of each split, in the given order."""
    room: dict[str, int] = dict.fromkeys(SPLITS, num_per_split)
    chosen = []
    for character in characters:
        if room[split_of(character)] > 0:
            room[split_of(character)] -= 1
            chosen.append(character)
    return chosen
