"""How unequal positive numbers are.

Shape letters: M numbers l_1 .. l_M, whose mean is m. Each measure is 0 where all are equal, and the same for
any multiple of them. Jamal and Qi 2019, "Task Agnostic Meta-Learning for Few-Shot Learning", section 3.2.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

MeasureName = Literal["theil", "generalized_entropy", "atkinson", "gini", "variance_of_logarithms"]


@dataclasses.dataclass(frozen=True)
class Measure:
    """One of

        theil                     1/M sum_i (l_i / m) log(l_i / m)
        generalized_entropy       1/(M a (a - 1)) sum_i ((l_i / m)^a - 1); for a = 1 theil, for a = 0
                                  -1/M sum_i log(l_i / m)
        atkinson                  1 - (1/M sum_i l_i^(1 - a))^(1 / (1 - a)) / m; for a = 1 1 - g / m
        gini                      1/(2 M^2 m) sum_ij |l_i - l_j|
        variance_of_logarithms    1/M sum_i (log l_i - log g)^2

    with g the geometric mean.

    Attributes:
        name: which.
        alpha: a, of the two that have it.
    """

    name: MeasureName
    alpha: float = 1.0

    def of(self, numbers: Tensor) -> Tensor:
        """The measure, [], of numbers `[M]`, not negative, differentiable in them. What is
        smaller than rounding of their mean counts as that: a logarithm of 0 has no derivative."""
        limits = torch.finfo(numbers.dtype)
        numbers = numbers.clamp(min=max(float(numbers.detach().mean()) * limits.eps, limits.tiny))
        if self.name == "gini":
            differences = (numbers[:, None] - numbers).abs()
            return differences.mean() / (2.0 * numbers.mean())
        if self.name == "variance_of_logarithms":
            return numbers.log().var(correction=0)
        if self.name == "atkinson":
            return self._atkinson(numbers)
        ratios, alpha = numbers / numbers.mean(), 1.0 if self.name == "theil" else self.alpha
        if alpha == 1.0:
            return torch.xlogy(ratios, ratios).mean()
        if alpha == 0.0:
            return -ratios.log().mean()
        return (ratios.pow(alpha) - 1.0).mean() / (alpha * (alpha - 1.0))

    def _atkinson(self, numbers: Tensor) -> Tensor:
        if self.alpha == 1.0:
            typical = numbers.log().mean().exp()
        else:
            power = 1.0 - self.alpha
            typical = numbers.pow(power).mean().pow(1.0 / power)
        return 1.0 - typical / numbers.mean()

    def slopes(self, numbers: Tensor) -> tuple[float, Tensor]:
        """The measure of numbers `[M]`, and its derivative by each, `[M]`, float64; both computed in that."""
        leaf = numbers.detach().double().requires_grad_()
        with torch.enable_grad():
            value = self.of(leaf)
            (slopes,) = torch.autograd.grad(value, leaf)
        return float(value.detach()), slopes
