"""What fits a linear head to the support examples of a task.

Shape letters: T tasks, S support examples, D width, C outputs (classes, or numbers of a target).
"""

from __future__ import annotations

import abc
import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Support:
    """The support examples of T tasks, as a head is fitted to them.

    Attributes:
        features: X, `[T, S, D]`, at least float32.
        targets: Y, `[T, S, C]`, of the same dtype: class indices as rows of 0 and a 1, or numbers.
        is_counted: `[T, S]`, bool: not padding.
        is_class: `[T, C]`, bool: an output that the task has; all of them in a regression.
    """

    features: Tensor
    targets: Tensor
    is_counted: Tensor
    is_class: Tensor


class HeadSolver(abc.ABC):
    """Fits the weights of a linear head: `outputs = X W`."""

    @abc.abstractmethod
    def weights(self, support: Support, regulariser: Tensor | float) -> Tensor:
        """W, `[T, D, C]`, differentiable once in the features and in the regulariser.

        NaN where a task cannot be solved, since its features are not finite, say: its loss is then not finite
        either, and the outer step is skipped.

        Args:
            regulariser: lambda, above 0.
        """


def counted_rows(support: Support) -> tuple[Tensor, Tensor]:
    """X and Y with zeros in the rows of padding."""
    counts = support.is_counted[..., None]
    return support.features * counts, support.targets * counts


def identity_like(matrices: Tensor) -> Tensor:
    """The identity of the size, dtype and device of square matrices `[..., N, N]`."""
    return torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)


def solved(matrices: Tensor, right: Tensor) -> Tensor:
    """`matrices^-1 right` for positive definite `[..., N, N]` and `[..., N, M]`, by Cholesky; NaN where a
    matrix is not positive definite."""
    factor, info = torch.linalg.cholesky_ex(matrices)
    return torch.cholesky_solve(right, factor.masked_fill((info != 0)[..., None, None], torch.nan))
