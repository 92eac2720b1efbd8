"""Iterative solvers of `A x = b`, one system per task, for operators that are only known by their products.

Shape letters: T tasks, D unknowns of one task.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

Multiply = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Solution:
    """An approximate solution for each task.

    Attributes:
        x: `[T, D]`.
        negative_curvature: `[T]`, bool: whether a direction p with `p A p <= 0` was met.
    """

    x: Tensor
    negative_curvature: Tensor


class Solver(abc.ABC):
    """Solves T symmetric systems side by side; no task's iterates depend on another's."""

    @abc.abstractmethod
    def solve(self, multiply: Multiply, b: Tensor) -> Solution:
        """x with `A x` near `b`, from x = 0.

        Args:
            multiply: each task's A times its row: `[T, D]` -> `[T, D]`.
            b: `[T, D]`.
        """


@dataclasses.dataclass(frozen=True)
class ConjugateGradient(Solver):
    """Conjugate gradients (Hestenes and Stiefel 1952), for positive definite A.

    The n-th iterate is the best one, in the norm of A, of the span of b, A b, ..., A^(n-1) b; D iterations
    suffice in exact arithmetic. A task stops where its residual is small enough, or where it meets a
    direction of no or negative curvature, along which a step would lead away or to infinity: it keeps
    its last iterate, which is 0 if the first direction is one.

    Attributes:
        num_iterations: at most so many products; at least 1.
        tolerance: a task stops at `|b - A x| <= tolerance * |b|`; at least 0.
        any_rank: whether a flag is set on any of the ranks that multiply together: none stops before the
            last, and what its own tasks have come to stays. By default a rank's own flag.
    """

    num_iterations: int = 10
    tolerance: float = 1e-6
    any_rank: Callable[[bool], bool] = bool

    def solve(self, multiply: Multiply, b: Tensor) -> Solution:
        x = torch.zeros_like(b)
        residual = direction = b
        square = _dots(b, b)
        enough = self.tolerance**2 * square
        # A task with NaN or infinity goes on: its result is NaN rather than 0, which would pass for one.
        moving = ~((square <= enough) & square.isfinite())
        negative = torch.zeros_like(moving)
        for _ in range(self.num_iterations):
            if not self.any_rank(bool(moving.any())):
                break
            product = multiply(direction)
            curvature = _dots(direction, product)
            negative = negative | (moving & (curvature <= 0.0))
            moving = moving & ~negative
            step = torch.where(moving, square / torch.where(moving, curvature, 1.0), 0.0)
            x = x + step[:, None] * direction
            residual = residual - step[:, None] * product
            before, square = square, _dots(residual, residual)
            ratio = torch.where(moving, square / torch.where(moving, before, 1.0), 0.0)
            direction = torch.where(moving[:, None], residual + ratio[:, None] * direction, direction)
            moving = moving & ~(square <= enough)
        return Solution(x, negative)


@dataclasses.dataclass(frozen=True)
class Neumann(Solver):
    """The first terms of `A^-1 b = alpha * sum_j (I - alpha A)^j b` (Lorraine et al. 2020, "Optimizing
    Millions of Hyperparameters by Implicit Differentiation", algorithm 3).

    Converges where all eigenvalues of A lie between 0 and 2 / alpha, slowly where some are near these
    ends; diverges elsewhere.

    Attributes:
        num_terms: terms of the sum, at least 1; so many products, but one.
        step_size: alpha, above 0.
    """

    num_terms: int = 10
    step_size: float = 0.1

    def solve(self, multiply: Multiply, b: Tensor) -> Solution:
        term = total = b
        negative = torch.zeros(len(b), dtype=torch.bool, device=b.device)
        for _ in range(self.num_terms - 1):
            product = multiply(term)
            negative = negative | ((_dots(term, product) <= 0.0) & (_dots(term, term) > 0.0))
            term = term - self.step_size * product
            total = total + term
        return Solution(self.step_size * total, negative)


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """Each task's scalar product, `[T]`."""
    return (left * right).sum(1)
