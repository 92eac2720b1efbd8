"""Meta-parameters on every rank; gradients cross ranks once per outer step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metaloom.engine.sharding.base import Sharding


class Replicated(Sharding):
    """Every rank holds all meta-parameters."""

    def sum_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.sum_over_ranks(gradients)

    def norm(self, gradients: Mapping[str, Tensor]) -> float:
        # The same numbers on every rank, bit for bit: nothing to agree on.
        return float(
            torch.linalg.vector_norm(
                torch.stack([torch.linalg.vector_norm(value) for value in gradients.values()])
            )
        )
