"""Sinusoids of random amplitude and phase.

Shape letter: N examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaloom.datasets.synthetic.base import Floats, Task, TaskFamily

AMPLITUDES = (0.1, 5.0)
PHASES = (0.0, np.pi)
RANGE = (-5.0, 5.0)  # of x


@dataclass(frozen=True)
class Sinusoid(Task):
    """y = amplitude * sin(x - phase), for x of `[N, 1]` drawn from U[-5, 5]."""

    amplitude: float
    phase: float

    def inputs(self, rng: np.random.Generator, count: int) -> Floats:
        return rng.uniform(*RANGE, size=(count, 1))

    def targets(self, inputs: NDArray[Any]) -> Floats:
        values: Floats = self.amplitude * np.sin(inputs - self.phase)
        return values


class Sinusoids(TaskFamily):
    """The regression of Finn et al. 2017, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep
    Networks", section 5.1: amplitudes U[0.1, 5], phases U[0, pi], no noise; validation and test tasks are
    drawn as training tasks are.

    The paper leaves the phase's sign open, and the authors' code subtracts it: so do we. Theirs has as many
    query examples as support examples in training.
    """

    name = "sinusoid"

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (1,)

    @property
    def num_targets(self) -> int:
        return 1

    def task(self, rng: np.random.Generator, *, split: str, group: int = 0) -> Sinusoid:
        return Sinusoid(amplitude=rng.uniform(*AMPLITUDES), phase=rng.uniform(*PHASES))
