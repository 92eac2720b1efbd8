"""The samples of each class, or of each user or domain, of a split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaloom.datasets.index import SplitTable

MAX_PERMUTED = 1 << 12  # larger groups are not put in order as a whole
NUM_SPARE = 256  # samples that are ready to take the place of broken ones


class Grouped:
    """Which samples belong to which group.

    Attributes:
        names: of the groups.
        sizes: samples of each, int64 `[groups]`.
        num_bytes: of each, int64 `[groups]`.

    Args:
        rows: the group of each sample, a row of `names`.
    """

    def __init__(self, table: SplitTable, rows: NDArray[np.integer[Any]], names: Sequence[str]) -> None:
        self.names = tuple(names)
        # Samples of a group usually lie together; where they do not, an order is made that has them so.
        self._order = None if bool((rows[1:] >= rows[:-1]).all()) else np.argsort(rows, kind="stable")
        self.sizes: NDArray[np.int64] = np.bincount(rows, minlength=len(names)).astype(np.int64)
        weights = np.bincount(rows, weights=table.length, minlength=len(names))
        self.num_bytes: NDArray[np.int64] = weights.astype(np.int64)
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.sizes)])

    def sample(self, group: int, place: int) -> int:
        """The `place`-th sample of a group."""
        return self._numbers(group, np.array([place]))[0]

    def behind(self, group: int, sample: int) -> list[int]:
        """Other samples of a group, which may take this one's place: a few."""
        others = self._numbers(group, np.arange(min(int(self.sizes[group]), NUM_SPARE)))
        return [other for other in others if other != sample]

    def shuffled(self, rng: np.random.Generator, group: int, num_samples: int) -> list[int]:
        """Samples of a group in random order: all, or of a large group so many and some to spare."""
        size = int(self.sizes[group])
        if size <= MAX_PERMUTED:
            return self._numbers(group, rng.permutation(size))
        return self._numbers(group, rng.choice(size, num_samples + NUM_SPARE, replace=False))

    def _numbers(self, group: int, places: NDArray[np.int64]) -> list[int]:
        positions = places + self._starts[group]
        numbers: list[int] = (positions if self._order is None else self._order[positions]).tolist()
        return numbers
