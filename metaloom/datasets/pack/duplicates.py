"""Samples of equal content, found in a few bytes of memory each."""

from __future__ import annotations

import array
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Duplicates:
    """How many samples have the content of one before them, and where that one is.

    A sample counts once: as `across_splits` if any with its content lies in another split, else as
    `across_classes` if any has another class, else as `within_class`.
    """

    across_splits: int
    across_classes: int
    within_class: int
    example: tuple[int, int] | None  # two samples of the worst kind, by their numbers


class ContentDigests:
    """The contents of samples, by 128 bits of their sha256; 24 bytes a sample."""

    def __init__(self) -> None:
        self._digests = bytearray()
        self._splits, self._classes = array.array("i"), array.array("i")

    def add(self, digest: bytes, *, split: int, class_number: int) -> None:
        """One more sample.

        Args:
            digest: 16 bytes.
            split: its number.
            class_number: of the data set, not of the split; -1 where there are no classes.
        """
        self._digests += digest
        self._splits.append(split)
        self._classes.append(class_number)

    def duplicates(self) -> Duplicates:
        """What is there more than once."""
        digests = np.frombuffer(bytes(self._digests), "<u8").reshape(-1, 2)
        if len(digests) < 2:
            return Duplicates(0, 0, 0, None)
        order = np.lexsort((digests[:, 1], digests[:, 0]))
        is_first = np.ones(len(order), bool)
        is_first[1:] = (digests[order][1:] != digests[order][:-1]).any(axis=1)
        run = np.cumsum(is_first) - 1  # of equal contents, each in the order in which they were added
        splits, classes = np.array(self._splits)[order], np.array(self._classes)[order]
        starts = np.flatnonzero(is_first)
        kinds = np.where(_differs(splits, starts, run), 0, np.where(_differs(classes, starts, run), 1, 2))
        repeats = ~is_first
        counts = [int((repeats & (kinds == kind)).sum()) for kind in range(3)]
        example = None
        for kind in range(3):
            found = np.flatnonzero(repeats & (kinds == kind))
            if len(found):
                member = _unlike(found[0], starts, run, (splits, classes, np.zeros_like(splits))[kind], kind)
                example = (int(order[starts[run[member]]]), int(order[member]))
                break
        return Duplicates(counts[0], counts[1], counts[2], example)


def _differs(values: np.ndarray, starts: np.ndarray, run: np.ndarray) -> np.ndarray:
    """Whether the values of each one's run are not all the same."""
    low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
    return np.asarray((low != high)[run])


def _unlike(member: int, starts: np.ndarray, run: np.ndarray, values: np.ndarray, kind: int) -> int:
    """The first of a member's run that is unlike the run's first; of kind 2 the member itself."""
    if kind == 2:
        return member
    start = starts[run[member]]
    end = starts[run[member] + 1] if run[member] + 1 < len(starts) else len(values)
    return int(start + np.flatnonzero(values[start:end] != values[start])[0])
