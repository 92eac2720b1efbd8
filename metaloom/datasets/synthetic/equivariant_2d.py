"""Convolutions of images with the symmetry of rotations, and of flips.

Shape letters: N examples, H height and width of an input, F of a filter, P = H - F + 1 of a channel of the
target; C filters, R turns to a full one, G orientations of each filter: R, or 2 R with flips.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from metaloom.datasets.synthetic.base import Floats, Task, TaskFamily

Turns = Literal[4, 8]
# Of the filters that are turned by 45 degrees, as e2cnn has them for F = 3: a ring of radius 1 around the
# middle, so wide (standard deviation), on which numbers go up and down at most so many times.
RING_WIDTH = 0.4
MAX_FREQUENCY = 2


@dataclass(frozen=True, eq=False)
class GroupConvolution(Task):
    """Each filter in each orientation, slid over images `[N, 1, H, H]` drawn from N(0, 1): no padding, no
    bias.

    Targets are `[N, C * G * P * P]`: the channel of filter c in orientation g is number c * G + g.
    Orientation g is the filter turned counter-clockwise g times by a full turn over R; orientation R + g is
    the one that was mirrored left to right before. So turning an image by 90 degrees turns each channel and
    moves it on by R / 4 orientations, and mirroring an image mirrors each channel and swaps g with
    R + (-g mod R).

    Attributes:
        filters: `[C, G, F, F]`.
        size: H.
    """

    filters: Floats
    size: int

    def inputs(self, rng: np.random.Generator, count: int) -> Floats:
        return rng.standard_normal((count, 1, self.size, self.size))

    def targets(self, inputs: NDArray[Any]) -> Floats:
        filter_size = self.filters.shape[-1]
        filters = self.filters.reshape(-1, filter_size, filter_size)
        side = self.size - filter_size + 1
        values = np.zeros((len(inputs), len(filters), side, side))
        # Place by place and not as a matrix product, whose rounding differs with the number of threads.
        for row in range(filter_size):
            for column in range(filter_size):
                part = inputs[:, :, row : row + side, column : column + side]
                values += part * filters[:, row, column, None, None]
        return values.reshape(len(inputs), -1)


def turned_by_90(filters: Floats, *, flips: bool) -> Floats:
    """Filters `[C, F, F]` in all orientations, `[C, G, F, F]`, R = 4: exact on a grid."""
    bases = (filters, filters[:, :, ::-1]) if flips else (filters,)
    return np.stack([np.rot90(base, turns, axes=(1, 2)) for base in bases for turns in range(4)], axis=1)


def turned_by_45(centres: Floats, waves: Floats, *, flips: bool) -> Floats:
    """Filters of 3 x 3 in all orientations, `[C, G, 3, 3]`, R = 8. Of polar coordinates (r, phi), and of one
    in the middle (r = 0), the filter is

        centre_0 [r = 0] + ring(r) (centre_1 + sum over m = 1, 2 of wave_m0 cos(m phi) + wave_m1 sin(m phi))

    with ring(r) = exp(-(r - 1)^2 / (2 * 0.4^2)) but at r = 0, scaled so that its squares sum to 1. Turning
    it is taking theta from phi, and mirroring it taking phi from a half turn (Weiler and Cesa 2019, "General
    E(2)-equivariant steerable CNNs", section 2.3).

    Args:
        centres: `[C, 2]`.
        waves: `[C, 2, 2]`, of m = 1 and 2.
    """
    rows, columns = np.mgrid[1:-2:-1, -1:2]  # upwards, to the right
    radii, angles = np.hypot(rows, columns), np.arctan2(rows, columns)
    middle = (radii == 0).astype(np.float64)
    ring = np.where(radii == 0, 0.0, np.exp(-((radii - 1.0) ** 2) / (2 * RING_WIDTH**2)))
    ring /= np.sqrt((ring**2).sum())
    thetas = np.arange(8) * (math.pi / 4)
    turned = [angles - theta for theta in thetas]
    if flips:
        turned += [math.pi - (angles - theta) for theta in thetas]
    phi = np.stack(turned)  # [G, 3, 3]
    orders = np.arange(1, MAX_FREQUENCY + 1)[:, None, None, None]
    basis = np.stack([np.cos(orders * phi), np.sin(orders * phi)], axis=1)  # [m, cos or sin, G, 3, 3]
    around = np.einsum("cmk,mkgyx->cgyx", waves, basis, optimize=False)
    centre, plain = centres[:, 0, None, None, None], centres[:, 1, None, None, None]
    filters: Floats = centre * middle + ring * (plain + around)
    return filters


class Equivariant2d(TaskFamily):
    """Problems of the kind of "rotations" and "rotations and flips" of Zhou et al. 2021, "Meta-Learning
    Symmetries by Reparameterization", section 5.2.

    A task is one layer of a group convolution from a plain image to the regular representation: C filters,
    new in every task, in all orientations.

    With 8 turns, by 45 degrees, as in the paper: F is 3 and a filter has six numbers (`turned_by_45`), with
    the standard deviations that e2cnn's `generalized_he_init` gives the weights of `R2Conv`, by which the
    authors' code makes its tasks: 1/2 of the waves; of the other two 1/4, with flips 1 / sqrt(32). A
    target's variance is 0.625 on average over orientations, with flips 0.5625. The turns between the axes
    hold in approximation on a grid of pixels.

    With 4 turns, by 90 degrees (p4, with flips p4m), exact to the last digit: F * F numbers of
    N(0, 1 / F^2), so that targets have variance 1, and half as many channels.

    Sizes are those of the authors' code: H = 32, F = 3, C = 3; tasks of 20 examples, 1 of them support; 8000
    tasks to train on and 2000 to test on, 1600 and 400 with flips.

    Raises:
        ValueError: `turns` is 8, and `filter_size` is not 3.
    """

    name = "equivariant_2d"

    def __init__(
        self,
        *,
        turns: Turns = 4,
        flips: bool = False,
        size: int = 32,
        num_filters: int = 3,
        filter_size: int = 3,
    ) -> None:
        if turns == 8 and filter_size != 3:
            raise ValueError(f"filters of {filter_size} x {filter_size}; turns by 45 degrees are of 3 x 3")
        self._turns, self._flips, self._size = turns, flips, size
        self._num_filters, self._filter_size = num_filters, filter_size

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (1, self._size, self._size)

    @property
    def num_targets(self) -> int:
        side = self._size - self._filter_size + 1
        return self._num_filters * self._turns * (2 if self._flips else 1) * side * side

    def task(self, rng: np.random.Generator, *, split: str, group: int = 0) -> GroupConvolution:
        if self._turns == 4:
            shape = (self._num_filters, self._filter_size, self._filter_size)
            filters = turned_by_90(rng.standard_normal(shape) / self._filter_size, flips=self._flips)
        else:
            centres = rng.standard_normal((self._num_filters, 2)) / math.sqrt(32 if self._flips else 16)
            waves = rng.standard_normal((self._num_filters, MAX_FREQUENCY, 2)) / 2
            filters = turned_by_45(centres, waves, flips=self._flips)
        return GroupConvolution(filters, self._size)
