"""A fully connected network.

Shape letters: N examples, P numbers of an example, D width, C outputs.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

Activation = Literal["relu", "tanh"]


class Mlp(nn.Module):
    """Hidden layers of one width, then a linear head.

    The sine regression of Finn et al. 2017, section 5.1, has width 40, two layers and ReLU.

    Args:
        num_inputs: P.
        width: D, of each hidden layer.
        num_layers: hidden layers, at least 1.
        num_outputs: C: numbers of a regression's target, or classes.
        activation: `relu` or `tanh`.
        num_rehearsal_outputs: those of a second head, `rehearsal`; None for none.

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
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            _Layer(num_inputs if index == 0 else width, width, activation) for index in range(num_layers)
        )
        self.head = nn.Linear(width, num_outputs)
        self.heads = {"tasks": "head"}
        if num_rehearsal_outputs is not None:
            self.rehearsal_head = nn.Linear(width, num_rehearsal_outputs)
            self.heads["rehearsal"] = "rehearsal_head"

    def forward(self, inputs: Tensor, head: str = "tasks") -> Tensor:
        """Outputs `[N, C]` of inputs `[N, ...]` of P numbers each.

        Args:
            head: `tasks` or `rehearsal`.
        """
        features = inputs.flatten(1)
        for block in self.blocks:
            features = block(features)
        outputs: Tensor = self.get_submodule(self.heads[head])(features)
        return outputs


class _Layer(nn.Module):
    def __init__(self, num_inputs: int, num_outputs: int, activation: Activation) -> None:
        super().__init__()
        self.linear = nn.Linear(num_inputs, num_outputs)
        self.activation = {"relu": F.relu, "tanh": F.tanh}[activation]

    def forward(self, inputs: Tensor) -> Tensor:
        activated: Tensor = self.activation(self.linear(inputs))
        return activated
