"""Networks that describe an input to those beside it: what adaptive risk minimisation averages over a task.

Shape letters: N examples, P numbers of an example, D width, E channels or numbers of a context.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from metaloom.models.conv4 import norm_layer


class ConvContext(nn.Module):
    """Three convolutions that keep an image's size, the first two with norm and ReLU: the context network of
    the code of Zhang et al. 2021, "Adaptive Risk Minimization", whose kernels are 5 x 5.

    Args:
        num_channels: of the images.
        num_context: E, channels of the context.
        width: D, channels in between.
        norm: as of `Conv4`.
    """

    def __init__(self, *, num_channels: int, num_context: int, width: int, norm: str) -> None:
        super().__init__()
        has_bias = norm == "none"
        self.first = nn.Conv2d(num_channels, width, 5, padding=2, bias=has_bias)
        self.first_norm = norm_layer(norm, width)
        self.second = nn.Conv2d(width, width, 5, padding=2, bias=has_bias)
        self.second_norm = norm_layer(norm, width)
        self.last = nn.Conv2d(width, num_context, 5, padding=2)

    def forward(self, images: Tensor) -> Tensor:
        """`[N, E, height, width]` of images `[N, channels, height, width]`."""
        hidden = F.relu(self.first_norm(self.first(images)))
        context: Tensor = self.last(F.relu(self.second_norm(self.second(hidden))))
        return context


class MlpContext(nn.Module):
    """Two hidden layers with ReLU, for arrays of numbers.

    Args:
        num_inputs: P.
        num_context: E, numbers of the context.
        width: D, of the hidden layers.
    """

    def __init__(self, *, num_inputs: int, num_context: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(num_inputs, width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, num_context)

    def forward(self, inputs: Tensor) -> Tensor:
        """`[N, E]` of inputs `[N, ...]` of P numbers each."""
        hidden = F.relu(self.first(inputs.flatten(1)))
        context: Tensor = self.last(F.relu(self.second(hidden)))
        return context
