"""A loss without targets, learned: a network of what a model says.

Shape letters: T tasks, N examples, C outputs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from metaloom.engine.losses import LOSS
from metaloom.errors import CapabilityError

LEARNED = f"{LOSS}network."
# Under the root, whose derivative is infinite where all outputs are exactly 0.
EPS_ROOT = 1e-12


@dataclasses.dataclass(frozen=True)
class LearnedLoss:
    """The loss that ARM-LL adapts by (Zhang et al. 2021, "Adaptive Risk Minimization"):

        L(z_1 .. z_N) = sqrt(h(z_1)^2 + ... + h(z_N)^2)

    z_n what the model says of an example, h a network with one output. No target has a part in it. The norm
    over the examples is that of the authors' code, and grows with the root of their number.

    Its weights are meta-parameters, `loss.network.<layer>.<weight or bias>`, and act through the inner
    gradient alone.

    Attributes:
        num_outputs: C, numbers that a model says of an example.
        width: of h's hidden layers.
        num_layers: h's hidden layers, each with ReLU, at least 1.
        seed: of the initial weights, which are torch's: uniform within 1 / sqrt(inputs of the layer).
    """

    num_outputs: int
    width: int = 32
    num_layers: int = 3
    seed: int = 0

    def meta_parameters(self, like: Tensor) -> dict[str, Tensor]:
        """Initial weights by name, in the dtype and on the device of `like`."""
        generator = torch.Generator().manual_seed(self.seed)
        sizes = [self.num_outputs, *(self.width,) * self.num_layers, 1]
        parameters: dict[str, Tensor] = {}
        for layer, (num_inputs, num_outputs) in enumerate(itertools.pairwise(sizes)):
            for name, shape in (("weight", (num_outputs, num_inputs)), ("bias", (num_outputs,))):
                drawn = torch.rand(shape, generator=generator, dtype=torch.float64)
                values = (2.0 * drawn - 1.0) / math.sqrt(num_inputs)
                parameters[f"{LEARNED}{layer}.{name}"] = values.to(device=like.device, dtype=like.dtype)
        return parameters

    def of_outputs(self, meta: Mapping[str, Tensor], outputs: Tensor, weights: Tensor | None) -> Tensor:
        """The loss of each task, `[T]`, in at least float32.

        Args:
            meta: has the weights of h.
            outputs: `[T, N, C]`.
            weights: `[T, N]`, 0 for padding; None where there is none.

        Raises:
            CapabilityError: the outputs are not C numbers for each example.
        """
        if outputs.ndim != 3 or outputs.shape[-1] != self.num_outputs:
            raise CapabilityError(
                f"the learned loss reads {self.num_outputs} numbers of each example, and the model's outputs "
                f"have shape {list(outputs.shape)}: it needs [tasks, examples, {self.num_outputs}]."
            )
        hidden = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        for layer in range(self.num_layers + 1):
            weight, bias = (meta[f"{LEARNED}{layer}.{name}"].to(hidden.dtype) for name in ("weight", "bias"))
            hidden = F.linear(hidden, weight, bias)
            if layer < self.num_layers:
                hidden = hidden.relu()
        squares = hidden.squeeze(-1).square()  # [T, N]
        if weights is not None:
            squares = squares * weights.to(squares.dtype)
        return (squares.sum(1) + EPS_ROOT).sqrt()
