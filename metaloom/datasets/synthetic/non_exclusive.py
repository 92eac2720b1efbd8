"""Sinusoids whose input tells the amplitude.

Shape letters: N examples, C amplitudes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaloom.datasets.synthetic.base import Floats, Task, TaskFamily

AMPLITUDES = (0.1, 4.0)
RANGE = (-5.0, 5.0)  # of u


@dataclass(frozen=True)
class NonExclusiveSinusoid(Task):
    """y = amplitude * sin(u), for inputs `[N, 1 + C]`: u, drawn from U[-5, 5], and a one-hot vector.

    Attributes:
        amplitude: of the sinusoid.
        code: which of the C numbers behind u is 1.
        num_codes: C.
    """

    amplitude: float
    code: int
    num_codes: int

    def inputs(self, rng: np.random.Generator, count: int) -> Floats:
        inputs = np.zeros((count, 1 + self.num_codes))
        inputs[:, 0] = rng.uniform(*RANGE, size=count)
        inputs[:, 1 + self.code] = 1.0
        return inputs

    def targets(self, inputs: NDArray[Any]) -> Floats:
        values: Floats = self.amplitude * np.sin(inputs[:, :1])
        return values


class NonExclusiveSinusoids(TaskFamily):
    """The regression of Yin et al. 2020, "Meta-Learning without Memorization", section 6.1, whose training
    tasks are not mutually exclusive: one function of the input solves all of them.

    Training: the amplitude is one of C = 20 equally spaced numbers from 0.1 to 4, and the one-hot vector says
    which. Validation and test: the amplitude is U[0.1, 4], and the one-hot vector is random, so that it tells
    nothing. Targets have noise N(0, 0.1^2), those of query examples too.

    As the paper says. The authors' code differs: of its 20 codes it draws 16, in training and in tests, adds
    the noise twice in tests, and takes 200 equally spaced points there as query.
    """

    name = "sinusoid_non_exclusive"

    def __init__(self, *, num_amplitudes: int = 20, noise_std: float = 0.1) -> None:
        self.noise_std = noise_std
        self._amplitudes = np.linspace(*AMPLITUDES, num_amplitudes)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (1 + len(self._amplitudes),)

    @property
    def num_targets(self) -> int:
        return 1

    def task(self, rng: np.random.Generator, *, split: str, group: int = 0) -> NonExclusiveSinusoid:
        code = int(rng.integers(len(self._amplitudes)))
        amplitude = float(self._amplitudes[code]) if split == "train" else rng.uniform(*AMPLITUDES)
        return NonExclusiveSinusoid(amplitude, code, len(self._amplitudes))
