"""A fully connected network.

Shape letters: N examples, P numbers of an example, D width, C outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from metaloom.models.bottleneck import StochasticBottleneck

Activation = Literal["relu", "tanh"]


class Mlp(nn.Module):
    """Hidden layers, then a linear head.

    The sine regression of Finn et al. 2017, section 5.1, has width 40, two layers and ReLU.

    Args:
        num_inputs: P.
        width: D, of each hidden layer.
        num_layers: hidden layers, at least 1.
        widths: of each hidden layer where they differ, as many as there are; None for `width` throughout.
        num_outputs: C: numbers of a regression's target, or classes.
        activation: `relu` or `tanh`.
        num_rehearsal_outputs: those of a second head, `rehearsal`; None for none.
        bottleneck: behind how many hidden layers there is a stochastic one, and its width; None for none.

    Attributes:
        heads: the module that gives each output, by the output's name.
    """

    def __init__(
        self,
        *,
        num_inputs: int,
        width: int,
        num_layers: int,
        num_outputs: int,
        activation: Activation = "relu",
        num_rehearsal_outputs: int | None = None,
        widths: Sequence[int] | None = None,
        bottleneck: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        after, code = bottleneck or (0, 0)
        of_layers = [width] * num_layers if widths is None else list(widths)
        sizes = [num_inputs, *(code if row == after else own for row, own in enumerate(of_layers, start=1))]
        self.blocks = nn.ModuleList(
            _Layer(size, own, activation) for size, own in zip(sizes[:-1], of_layers, strict=True)
        )
        self._after = after
        self.bottleneck = StochasticBottleneck(of_layers[after - 1], code) if after else None
        self.head = nn.Linear(sizes[-1], num_outputs)
        self.heads = {"tasks": "head"}
        if num_rehearsal_outputs is not None:
            self.rehearsal_head = nn.Linear(sizes[-1], num_rehearsal_outputs)
            self.heads["rehearsal"] = "rehearsal_head"

    def forward(self, inputs: Tensor, head: str = "tasks") -> Tensor:
        """Outputs `[N, C]` of inputs `[N, ...]` of P numbers each.

        Args:
            head: `tasks` or `rehearsal`.
        """
        features = self.entering(inputs)
        for index, block in enumerate(self.blocks, start=1):
            features = block(features)
            if self.bottleneck is not None and index == self._after:
                features = self.bottleneck(features)
        outputs: Tensor = self.get_submodule(self.heads[head])(self.leaving(features))
        return outputs

    def entering(self, inputs: Tensor) -> Tensor:
        """What the first block is given, `[N, P]`."""
        return inputs.flatten(1)

    def leaving(self, features: Tensor) -> Tensor:
        """What the head is given of what the last block has made, `[N, D]`."""
        return features


class _Layer(nn.Module):
    def __init__(self, num_inputs: int, num_outputs: int, activation: Activation) -> None:
        super().__init__()
        self.linear = nn.Linear(num_inputs, num_outputs)
        self.width = num_outputs
        self.activation = {"relu": F.relu, "tanh": F.tanh}[activation]

    def forward(self, inputs: Tensor) -> Tensor:
        activated: Tensor = self.activation(self.linear(inputs))
        return activated
