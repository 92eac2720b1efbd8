"""Random affine distortion of images, many at a time, in plain numpy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaloom.datasets.pixels import as_numbers


@dataclass(frozen=True)
class Affine:
    """How far a random distortion may go; each is drawn evenly between minus and plus its bound.

    Args:
        rotate_deg: rotation in degrees.
        shear_deg: horizontal slant in degrees.
        scale: relative size; 0.1 means from 1/1.1 to 1.1, evenly in the logarithm, per axis.
        shift_px: shift in pixels, per axis. What is moved over the edge is lost.
    """

    rotate_deg: float = 0.0
    shear_deg: float = 0.0
    scale: float = 0.0
    shift_px: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rotate_deg", "shear_deg", "scale", "shift_px"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"Affine.{name} is {getattr(self, name)}; it must be 0 or more")
        if self.shear_deg >= 80:
            raise ValueError(f"Affine.shear_deg is {self.shear_deg}; it must be below 80")

    def distort(self, images: NDArray[Any], rng: np.random.Generator) -> NDArray[np.float32]:
        """Each image under its own random distortion about its centre, resampled bilinearly.

        Args:
            images: float32 [N, H, W] or [N, C, H, W], or pixels [N, H, W, C]; channels are distorted alike.
                Outside of an image is 0.

        Returns:
            float32 [N, H, W] or [N, C, H, W]; exactly the images if all bounds are 0.
        """
        if images.dtype == np.uint8 and images.ndim != 4:
            raise ValueError(f"pixels are [N, H, W, C], not {list(images.shape)}")
        images = as_numbers(images)
        draws = rng.uniform(-1.0, 1.0, size=(6, len(images))).astype(np.float32)
        angle = draws[0] * np.float32(math.radians(self.rotate_deg))
        slant = np.tan(draws[1] * np.float32(math.radians(self.shear_deg)))
        scale_y, scale_x = np.exp(draws[2:4] * np.float32(math.log1p(self.scale)))
        shift_y, shift_x = draws[4:6] * np.float32(self.shift_px)
        matrix = output_to_input(angle, slant, scale_y, scale_x)
        shift = np.stack([shift_y, shift_x], -1)
        if images.ndim == 3:
            return resample(images, matrix, shift)
        N, C, H, W = images.shape
        planes = resample(images.reshape(N * C, H, W), matrix.repeat(C, axis=0), shift.repeat(C, axis=0))
        return planes.reshape(N, C, H, W)


def output_to_input(
    angle: NDArray[np.float32],
    slant: NDArray[np.float32],
    scale_y: NDArray[np.float32],
    scale_x: NDArray[np.float32],
) -> NDArray[np.float32]:
    """The inverse of: scale, then slant (x -= slant * y), then rotate by [[cos, sin], [-sin, cos]] on (y, x).

    Args:
        angle: radians, [N]; the others likewise [N].

    Returns:
        float32 [N, 2, 2], acts on (y, x).
    """
    cos, sin = np.cos(angle), np.sin(angle)
    to_y = np.stack([cos / scale_y, -sin / scale_y], -1)
    to_x = np.stack([(sin + slant * cos) / scale_x, (cos - slant * sin) / scale_x], -1)
    return np.stack([to_y, to_x], -2)


def resample(
    images: NDArray[np.float32], matrix: NDArray[np.float32], shift: NDArray[np.float32]
) -> NDArray[np.float32]:
    """out[n, p] = image[n] at `matrix[n] @ (p - centre - shift[n]) + centre`, bilinear, 0 outside.

    Args:
        images: float32 [N, H, W].
        matrix: float32 [N, 2, 2], acts on (y, x).
        shift: float32 [N, 2], pixels (y, x).

    Returns:
        float32 [N, H, W].
    """
    N, H, W = images.shape
    centre_y, centre_x = np.float32((H - 1) / 2), np.float32((W - 1) / 2)
    from_y = (np.arange(H, dtype=np.float32) - centre_y)[None, :, None] - shift[:, 0, None, None]
    from_x = (np.arange(W, dtype=np.float32) - centre_x)[None, None, :] - shift[:, 1, None, None]
    y = matrix[:, 0, 0, None, None] * from_y + matrix[:, 0, 1, None, None] * from_x + centre_y
    x = matrix[:, 1, 0, None, None] * from_y + matrix[:, 1, 1, None, None] * from_x + centre_x
    # One pixel of zeros before and two after: every neighbour of a clipped coordinate exists.
    padded = np.zeros((N, H + 3, W + 3), np.float32)
    padded[:, 1 : H + 1, 1 : W + 1] = images
    np.clip(y + 1, 0, H + 1, out=y)
    np.clip(x + 1, 0, W + 1, out=x)
    row, column = y.astype(np.int32), x.astype(np.int32)
    y -= row
    x -= column
    base = (np.arange(N, dtype=np.int32) * ((H + 3) * (W + 3)))[:, None, None] + row * (W + 3) + column
    flat = padded.reshape(-1)
    above: NDArray[np.float32] = flat[base]
    above += x * (flat[base + 1] - above)
    base += W + 3
    below = flat[base]
    below += x * (flat[base + 1] - below)
    below -= above
    below *= y
    above += below
    return above
