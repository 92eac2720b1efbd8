"""Meta-parameters on every rank; gradients cross ranks once per outer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from metaloom.engine.sharding.base import Sharding
from metaloom.engine.sharding.gradient_sum import BucketedSum, GradientSum

BUCKET_BYTES = 25 * 2**20


class Replicated(Sharding):
    """Every rank holds all meta-parameters.

    Args:
        bucket_bytes: gradients of so many bytes cross ranks together, as soon as all of them are complete.
    """

    def __init__(self, *, bucket_bytes: int = BUCKET_BYTES) -> None:
        super().__init__()
        self._bucket_bytes = bucket_bytes

    def gradient_sum(self, like: Mapping[str, Tensor], order: Sequence[str]) -> GradientSum:
        return BucketedSum(like, order, bucket_bytes=self._bucket_bytes)

    def sum_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        total = self.gradient_sum(gradients, list(gradients))
        for name, value in gradients.items():
            total.add({name: value})
            total.complete(name)
        return total.result()

    def norm(self, gradients: Mapping[str, Tensor]) -> float:
        # The same numbers on every rank, bit for bit: nothing to agree on.
        return float(
            torch.linalg.vector_norm(
                torch.stack([torch.linalg.vector_norm(value) for value in gradients.values()])
            )
        )
