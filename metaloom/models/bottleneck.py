"""A stochastic layer that says less of its inputs than it could.

Shape letters: N examples, D width, Z numbers of the code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class StochasticBottleneck(nn.Module):
    """z ~ N(mu(x), sigma(x)^2), both linear in the features x, sigma through a softplus: the end of the
    encoder of Yin et al. 2020, "Meta-Learning without Memorization", section 4.1.

    `torch.normal` is what a metaloom engine sees of it: draws are its business, and the price of what they
    say of x.

    Args:
        num_inputs: D.
        width: Z.
    """

    def __init__(self, num_inputs: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_inputs, 2 * width)

    def forward(self, features: Tensor) -> Tensor:
        """Codes `[N, Z]` of features `[N, D]`."""
        mean, spread = self.linear(features).chunk(2, dim=-1)
        return torch.normal(mean, F.softplus(spread))
