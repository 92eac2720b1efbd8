"""The contact sheet shows every image of an episode in its place."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from metaloom.datasets.contact_sheet import ClassImages, class_images, contact_sheet


def plain(color: tuple[int, int, int], height: int, width: int) -> NDArray[np.uint8]:
    return np.full((height, width, 3), color, np.uint8)


def box_of(sheet: NDArray[Any], color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a colour on the sheet, which fills it."""
    y, x = np.nonzero((sheet == color).all(axis=-1))
    box = (y.min(), x.min(), y.max() - y.min() + 1, x.max() - x.min() + 1)
    assert len(y) == box[2] * box[3]
    return int(box[0]), int(box[1]), int(box[2]), int(box[3])


def test_images_lie_support_over_query_class_beside_class_and_keep_their_aspect() -> None:
    places = [(c, part, n) for c in (0, 1) for part in (0, 1) for n in (0, 1)]
    colors = {(c, part, n): (40 + 60 * c, 30 + 60 * part, 20 + 50 * n) for c, part, n in places}
    classes = [
        ClassImages(f"c{c}", *([plain(colors[c, part, n], 20, 40) for n in (0, 1)] for part in (0, 1)))
        for c in (0, 1)
    ]
    sheet = np.asarray(contact_sheet(classes, title="two classes"))
    boxes = {place: box_of(sheet, color) for place, color in colors.items()}
    assert all(box[3] == 2 * box[2] and box[3] % 40 == 0 for box in boxes.values())
    for c in (0, 1):
        for n in (0, 1):
            assert boxes[c, 0, n][0] + boxes[c, 0, n][2] < boxes[c, 1, n][0]  # support above query
        assert boxes[c, 0, 0][1] < boxes[c, 0, 1][1]
    assert boxes[0, 1, 1][1] + boxes[0, 1, 1][3] < boxes[1, 1, 0][1]


def test_large_images_are_made_small_and_may_be_grey() -> None:
    large = np.full((300, 600), 128, np.uint8)
    sheet = np.asarray(contact_sheet([ClassImages("a", [large], [])], title="t"))
    _, _, height, width = box_of(sheet, (128, 128, 128))
    assert width == 2 * height == 112


def test_long_titles_and_labels_are_cut_and_many_examples_take_rows() -> None:
    images = [plain((n, 0, 255), 8, 8) for n in range(12)]
    sheet = contact_sheet([ClassImages("label " * 100, images[:1], images[1:])], title="title " * 100)
    assert sheet.width < 1400
    boxes = [box_of(np.asarray(sheet), (n, 0, 255)) for n in range(1, 12)]
    assert [len({box[0] for box in boxes}), len({box[1] for box in boxes})] == [3, 5]


def test_an_episode_s_arrays_are_put_by_class() -> None:
    inputs = np.arange(4 * 3 * 2 * 2, dtype=np.uint8).reshape(4, 2, 2, 3)
    support = {"inputs": inputs, "targets": np.array([1, 0, 1, 0])}
    query = {"inputs": inputs[..., :1], "targets": np.array([0, 0, 1, 1])}
    first, second = class_images(support, query, ("a", "b"))
    assert (first.label, second.label) == ("a", "b")
    assert [image[0, 1, 2] for image in first.support] == [inputs[1, 0, 1, 2], inputs[3, 0, 1, 2]]
    assert [image.tolist() for image in second.query] == inputs[2:, :, :, 0].tolist()


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a sheet needs at least one class"):
        contact_sheet([], title="t")
    with pytest.raises(ValueError, match=r"is uint8 \[H, W\] or \[H, W, 3\], not uint8 \[2, 2, 4\]"):
        contact_sheet([ClassImages("a", [np.zeros((2, 2, 4), np.uint8)], [])], title="t")
