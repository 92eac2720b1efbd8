"""Regressions that have much in common and are of unequal size.

Shape letters: N examples, L numbers of an input, P numbers of a target, G tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaloom.datasets.draws import generator
from metaloom.datasets.synthetic.base import DATA_SEED, Floats, Task, TaskFamily

SHARED_VARIANCE = 10.0  # of an element of B
OWN_VARIANCE = 3.5  # of an element of e


@dataclass(frozen=True, eq=False)
class ScaledTanh(Task):
    """y = scale * tanh(W x), element by element, for x of `[N, L]` drawn from N(0, 1).

    Attributes:
        weights: W, `[P, L]`.
        scale: of the targets.
    """

    weights: Floats
    scale: float

    def inputs(self, rng: np.random.Generator, count: int) -> Floats:
        return rng.standard_normal((count, self.weights.shape[1]))

    def targets(self, inputs: NDArray[Any]) -> Floats:
        # Number by number and not as a matrix product, whose rounding differs with the number of threads.
        values = np.zeros((len(inputs), len(self.weights)))
        for position in range(self.weights.shape[1]):
            values += inputs[:, position, None] * self.weights[:, position]
        scaled: Floats = self.scale * np.tanh(values)
        return scaled


class UnequalScales(TaskFamily):
    """The toy problem of Chen et al. 2018, "GradNorm: Gradient Normalization for Adaptive Loss Balancing in
    Deep Multitask Networks", section 4: G regressions of the same inputs,

        f_g(x) = scale_g tanh((B + e_g) x / sqrt(L)),    elements of B from N(0, 10), of e_g from N(0, 3.5)

    (mean and variance), the same in all splits: what is new in validation and test are the inputs. So one
    network can share most of its work, and a loss is large where a scale is: by its square.

    Sizes are the paper's: L = 250, P = 100, G = 2 with scales 1 and 100. It has no square root
    of L and does not say how inputs are drawn; of inputs N(0, 1) tanh would be their sign without it.

    Args:
        scales: by the name of the group that a regression is.
        length: L.
        num_targets: P.
    """

    name = "unequal_scales"

    def __init__(self, *, scales: Mapping[str, float], length: int = 250, num_targets: int = 100) -> None:
        self._scales, self._shape = dict(scales), (num_targets, length)
        shared = np.sqrt(SHARED_VARIANCE) * self._draw("shared")
        own = [np.sqrt(OWN_VARIANCE) * self._draw("own", group) for group in range(len(self._scales))]
        self._weights = [(shared + each) / np.sqrt(length) for each in own]

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(self._scales)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self._shape[1],)

    @property
    def num_targets(self) -> int:
        return self._shape[0]

    def task(self, rng: np.random.Generator, *, split: str, group: int = 0) -> ScaledTanh:
        return ScaledTanh(self._weights[group], self._scales[self.groups[group]])

    def _draw(self, *what: str | int) -> Floats:
        return generator("unequal scales", DATA_SEED, *what).standard_normal(self._shape)
