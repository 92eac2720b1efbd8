"""Norms, errors and random directions of lists of tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


def away_from_symmetry(meta: Tensors, *, seed: int) -> dict[str, Tensor]:
    """The meta-parameters with noise: a tenth of a tensor's root mean square, 0.05 where it is zero.

    At initial values much vanishes or coincides: LoRA's B is zero, and with it the gradient of A; rates are
    equal; norms are one. What is zero on both sides of a comparison says nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + (0.1 * root_mean_square(value) or 0.05) * normal_like(value, generator)
        for name, value in meta.items()
    }


def norm(tensors: Iterable[Tensor]) -> float:
    """The Euclidean norm over all of them."""
    return math.sqrt(sum(float(value.square().sum()) for value in tensors))


def relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor], smallest: float) -> float:
    """|actual - expected| / max(|expected|, smallest); 0 where they are equal."""
    distance = norm([left - right for left, right in zip(actual, expected, strict=True)])
    scale = max(norm(expected), smallest)
    return distance / scale if scale > 0.0 else (0.0 if distance == 0.0 else math.inf)


def cosine(left: Sequence[Tensor], right: Sequence[Tensor]) -> float | None:
    """Of the angle between the two; None where one of them is zero."""
    product = norm(left) * norm(right)
    inner = sum(float((one * other).sum()) for one, other in zip(left, right, strict=True))
    return inner / product if product > 0.0 else None


def root_mean_square(tensor: Tensor) -> float:
    """Of a tensor's numbers."""
    return float(tensor.square().mean().sqrt())


def normal_like(like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers of a tensor's shape, the same on every device."""
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)


def or_infinite(value: float) -> float:
    """Infinity in place of NaN, which has no place in an order."""
    return math.inf if math.isnan(value) else value
