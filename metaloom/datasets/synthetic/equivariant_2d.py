"""Convolutions of images with the symmetry of rotations, and of flips.

Shape letters: N examples, H height and width of an input, F of a filter, P = H - F + 1 of a channel of the
target; C filters, G orientations of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaloom.datasets.synthetic.base import Floats, Task, TaskFamily


@dataclass(frozen=True, eq=False)
class GroupConvolution(Task):
    """Each filter in each orientation, slid over images `[N, 1, H, H]` drawn from N(0, 1): no padding, no
    bias.

    Targets are `[N, C * G * P * P]`: the channel of filter c in orientation g is number c * G + g.
    Orientation g is the filter turned by 90 degrees g times, counter-clockwise; orientation 4 + g is the one
    that was mirrored left to right before. So turning an image turns each channel and moves it to the next
    orientation, and mirroring an image mirrors each channel and swaps g with 4 + (-g mod 4).

    Attributes:
        filters: `[C, F, F]`.
        size: H.
        flips: whether G is 8, with the mirrored filters, or 4.
    """

    filters: Floats
    size: int
    flips: bool

    def inputs(self, rng: np.random.Generator, count: int) -> Floats:
        return rng.standard_normal((count, 1, self.size, self.size))

    def targets(self, inputs: NDArray[Any]) -> Floats:
        filters = oriented(self.filters, flips=self.flips)
        filter_size = filters.shape[-1]
        side = self.size - filter_size + 1
        values = np.zeros((len(inputs), len(filters), side, side))
        # Place by place and not as a matrix product, whose rounding differs with the number of threads.
        for row in range(filter_size):
            for column in range(filter_size):
                part = inputs[:, :, row : row + side, column : column + side]
                values += part * filters[:, row, column, None, None]
        return values.reshape(len(inputs), -1)


def oriented(filters: Floats, *, flips: bool) -> Floats:
    """Filters `[C, F, F]` in all orientations, `[C * G, F, F]`."""
    bases = (filters, filters[:, :, ::-1]) if flips else (filters,)
    turned = [np.rot90(base, turns, axes=(1, 2)) for base in bases for turns in range(4)]
    return np.stack(turned, axis=1).reshape(-1, *filters.shape[1:])


class Equivariant2d(TaskFamily):
    """Problems of the kind of "rotations" and "rotations and flips" of Zhou et al. 2021, "Meta-Learning
    Symmetries by Reparameterization", section 5.2.

    A task is one layer of a group convolution from a plain image to the regular representation: C filters
    N(0, 1 / F^2), new in every task, in all orientations, so that targets have variance 1.

    The paper's group has rotations by 45 degrees, of which those between the axes hold in approximation on a
    grid of pixels (the authors' code makes its filters by e2cnn). Ours are the rotations by 90 degrees (p4),
    with `flips` p4m: exact to the last digit, and half as many channels as theirs. Sizes are those of the
    authors' code: H = 32, F = 3, C = 3; tasks of 20 examples, 1 of them support; 8000 tasks to train on and
    2000 to test on, 1600 and 400 with flips.
    """

    name = "equivariant_2d"

    def __init__(
        self, *, flips: bool = False, size: int = 32, num_filters: int = 3, filter_size: int = 3
    ) -> None:
        self._flips, self._size = flips, size
        self._num_filters, self._filter_size = num_filters, filter_size

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (1, self._size, self._size)

    @property
    def num_targets(self) -> int:
        side = self._size - self._filter_size + 1
        return self._num_filters * (8 if self._flips else 4) * side * side

    def task(self, rng: np.random.Generator, *, split: str, group: int = 0) -> GroupConvolution:
        shape = (self._num_filters, self._filter_size, self._filter_size)
        return GroupConvolution(rng.standard_normal(shape) / self._filter_size, self._size, self._flips)
