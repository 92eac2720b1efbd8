"""Images in two forms. Until a model is shown them they are pixels, as files have them: uint8, channels last.
Models, and what distorts images, have numbers: float32 from 0 to 1, channels first, four times the bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def as_numbers(images: NDArray[Any]) -> NDArray[Any]:
    """Pixels `[..., H, W, C]` as float32 `[..., C, H, W]`; what is not uint8 as it is."""
    if images.dtype != np.uint8:
        return images
    numbers: NDArray[np.float32] = np.divide(np.moveaxis(images, -1, -3), np.float32(255), order="C")
    return numbers


def of_one_form(arrays: Sequence[NDArray[Any]]) -> Sequence[NDArray[Any]]:
    """Arrays to be put side by side: numbers all, if some are. Of images that are drawn from two data sets,
    those of one may be distorted."""
    if len({array.dtype for array in arrays}) == 1:
        return arrays
    return [as_numbers(array) for array in arrays]
