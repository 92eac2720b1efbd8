"""One episode as a picture: support over query, a block of columns for each class."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_MARGIN_PX = 12
_GAP_PX = 4  # between images
_BLOCK_GAP_PX = 18  # between classes
_FONT_PX = 13
_TITLE_PX = 16
_LINE_PX = 18
_CELL_PX = (56, 112)  # the least and the most of an image's side
_WIDTH_PX = 1400  # that a sheet has at most, where its cells can be made small enough
_TITLE_WIDTH_PX = 640  # that a sheet has at least if its title needs it
_MAX_COLUMNS = 5  # of images in a block
_INK, _PALE, _PAPER, _RULE = "#1f2328", "#57606a", "#ffffff", "#d0d7de"


@dataclass(frozen=True, eq=False)
class ClassImages:
    """The images of one class of an episode; each is uint8 [H, W] or [H, W, 3]."""

    label: str
    support: Sequence[NDArray[Any]]
    query: Sequence[NDArray[Any]]


def class_images(
    support: dict[str, NDArray[Any]], query: dict[str, NDArray[Any]], names: Sequence[str] = ()
) -> list[ClassImages]:
    """The classes of an episode's arrays.

    Args:
        support: `inputs` uint8 [S, H, W, C] with C 1 or 3, and `targets` [S], integers from 0.
        query: likewise.
        names: of the targets, in order; where there are none, their numbers are shown.
    """
    targets = sorted({*support["targets"].tolist(), *query["targets"].tolist()})
    return [
        ClassImages(
            names[target] if names else f"class {target}",
            [_without_grey_axis(image) for image in support["inputs"][support["targets"] == target]],
            [_without_grey_axis(image) for image in query["inputs"][query["targets"] == target]],
        )
        for target in targets
    ]


def contact_sheet(classes: Sequence[ClassImages], *, title: str) -> Image.Image:
    """The sheet, RGB: the title, labels, rows of support, a rule, rows of query.

    Images keep their aspect; small ones are enlarged by a whole factor, so that pixels stay squares.

    Raises:
        ValueError: there are no classes, or an image has another form.
    """
    if not classes:
        raise ValueError("a sheet needs at least one class")
    columns = [max(1, min(_MAX_COLUMNS, max(len(c.support), len(c.query)))) for c in classes]
    num_support = max(_rows(len(c.support), k) for c, k in zip(classes, columns, strict=True))
    num_query = max(_rows(len(c.query), k) for c, k in zip(classes, columns, strict=True))
    sides = [max(image.shape[:2]) for c in classes for image in (*c.support, *c.query)]
    cell = _cell_px(sum(columns), len(classes), max(sides, default=1))
    title_font, font = _font(_TITLE_PX), _font(_FONT_PX)
    side = max(int(font.getlength(word)) for word in ("support", "query")) + _MARGIN_PX
    widths = [count * (cell + _GAP_PX) - _GAP_PX for count in columns]
    width = 2 * _MARGIN_PX + side + sum(widths) + _BLOCK_GAP_PX * (len(classes) - 1)
    title_px = min(_TITLE_WIDTH_PX, math.ceil(title_font.getlength(title)))
    width = max(width, 2 * _MARGIN_PX + title_px)
    top = _MARGIN_PX + _LINE_PX + 10
    support_y = top + _LINE_PX + 4
    query_y = support_y + num_support * (cell + _GAP_PX) + _BLOCK_GAP_PX
    height = query_y + num_query * (cell + _GAP_PX) + _MARGIN_PX
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    shown_title = _shortened(title, title_font, width - 2 * _MARGIN_PX)
    draw.text((_MARGIN_PX, _MARGIN_PX), shown_title, _INK, title_font)
    draw.text((_MARGIN_PX, support_y + cell // 2), "support", _PALE, font, anchor="lm")
    draw.text((_MARGIN_PX, query_y + cell // 2), "query", _PALE, font, anchor="lm")
    rule_y = query_y - _BLOCK_GAP_PX // 2 - _GAP_PX // 2
    draw.line((_MARGIN_PX, rule_y, width - _MARGIN_PX, rule_y), _RULE, 1)
    left = _MARGIN_PX + side
    for of_class, count, block in zip(classes, columns, widths, strict=True):
        draw.text((left, top), _shortened(of_class.label, font, block), _INK, font)
        for images, above in ((of_class.support, support_y), (of_class.query, query_y)):
            for number, image in enumerate(images):
                row, column = divmod(number, count)
                place = (left + column * (cell + _GAP_PX), above + row * (cell + _GAP_PX))
                _paste(sheet, image, place, cell)
        left += block + _BLOCK_GAP_PX
    return sheet


def _rows(count: int, columns: int) -> int:
    return math.ceil(count / columns)


def _cell_px(num_columns: int, num_classes: int, side: int) -> int:
    """The side of a cell: no larger than the largest image's side, enlarged by a whole factor, needs."""
    room = _WIDTH_PX - 2 * _MARGIN_PX - _BLOCK_GAP_PX * num_classes - _GAP_PX * num_columns
    cell = max(_CELL_PX[0], min(_CELL_PX[1], room // num_columns))
    return cell // side * side if side <= cell else cell


def _without_grey_axis(image: NDArray[Any]) -> NDArray[Any]:
    return image[:, :, 0] if image.shape[2] == 1 else image


def _paste(sheet: Image.Image, image: NDArray[Any], place: tuple[int, int], cell: int) -> None:
    if image.dtype != np.uint8 or image.ndim < 2 or image.shape[2:] not in ((), (3,)) or not image.size:
        raise ValueError(
            f"an image of a sheet is uint8 [H, W] or [H, W, 3], not {image.dtype} {list(image.shape)}"
        )
    picture = Image.fromarray(image)
    scale = cell / max(picture.size)
    if scale >= 1:
        factor = max(1, int(scale))
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    else:
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    x = place[0] + (cell - picture.width) // 2
    y = place[1] + (cell - picture.height) // 2
    sheet.paste(picture, (x, y))
    frame = (x - 1, y - 1, x + picture.width, y + picture.height)
    ImageDraw.Draw(sheet).rectangle(frame, outline=_RULE)


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """As much of the text as is not wider, cut in its end."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: Latin, Greek, Cyrillic and more."""
    found = importlib.util.find_spec("matplotlib")
    assert found is not None
    assert found.origin is not None
    path = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
