"""Weights made of a symmetry, which tasks share, and of few numbers, which each task adapts.

Shape letters: T tasks, M numbers of a weight, O its outputs, I its inputs, F places of its filters, R numbers
that are fast.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from metaloom.engine.adapters.base import BACKBONE, INIT, Adapter, Learned, broadcast_init, learned_backbone
from metaloom.engine.adapters.full import FullAdapter
from metaloom.engine.adapters.model import Readout, Structure
from metaloom.engine.forward_pass import ForwardPass
from metaloom.errors import CapabilityError

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


class Symmetry(abc.ABC):
    """How a weight is made of U, which tasks share, and v, which each task has: `vec(W) = U v`, with the
    numbers of W in the order in which they lie.

    Zhou, Knowles and Finn 2021, "Meta-Learning Symmetries by Reparameterization", section 4: any sharing of
    parameters, so any equivariance to a finite group, is some U.
    """

    @abc.abstractmethod
    def initial(self, weight: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """v of one task, and the parts of U by name, from which training starts.

        Args:
            weight: the layer's own, `[O, I, ...]`.
            generator: where random ones come from.
        """

    @abc.abstractmethod
    def weights(self, v: Tensor, parts: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        """The weights of T tasks, `[T, *shape]`, of v `[T, ...]`."""


@dataclasses.dataclass(frozen=True)
class Dense(Symmetry):
    """U is any matrix, `u` `[M, R]`, and v has R numbers: it takes R times the memory of the weight.

    The layer's own weight has no effect. As in the authors' code (`ShareLinearFull`), U starts as
    N(0, `std`^2), theirs is 0.01, and v as N(0, 1 / O^2). U = 0 with v = 0 is a saddle, so with small numbers
    the first outer steps move little.

    Attributes:
        rank: R, at least 1.
        std: above 0.
    """

    rank: int
    std: float = 0.01

    def initial(self, weight: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        u = torch.empty(weight.numel(), self.rank, dtype=weight.dtype)
        v = torch.empty(self.rank, dtype=weight.dtype)
        u.normal_(0.0, self.std, generator=generator)
        v.normal_(0.0, 1.0 / weight.shape[0], generator=generator)
        return v.to(weight.device), {"u": u.to(weight.device)}

    def weights(self, v: Tensor, parts: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        return (v @ parts["u"].T).view(-1, *shape)


@dataclasses.dataclass(frozen=True)
class Kronecker(Symmetry):
    """U is the Kronecker product of square matrices over outputs, inputs and, in convolutions, the places of
    the filters: for layers of which a dense U would be too large.

    `U = u_out (x) u_in (x) u_filter`, `[O, O]`, `[I, I]` and `[F, F]`, so v is as large as the weight:
    `W_oif = sum u_out[o, a] u_in[i, b] u_filter[f, c] v_abc`. As in the authors' code (`ShareLinear`,
    `ShareConv2d`), U starts as the identity, and v as the layer's own weight: before training this is the
    adaptation of every weight. U is invertible then, and ties no numbers of W together for good; what it
    changes is along which directions a step of gradient descent moves W: by `U U^T`.
    """

    def initial(self, weight: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return weight.clone(), {
            name: torch.eye(size, dtype=weight.dtype, device=weight.device)
            for name, size in _sides(weight.shape).items()
        }

    def weights(self, v: Tensor, parts: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        numbers = v.reshape(-1, *_sides(shape).values())  # [T, O, I] or [T, O, I, F]
        for dim, name in enumerate(_sides(shape), start=1):
            numbers = (numbers.movedim(dim, -1) @ parts[name].T).movedim(-1, dim)
        return numbers.reshape(-1, *shape)


def _sides(shape: torch.Size) -> dict[str, int]:
    """The sizes over which U is a product."""
    sides = {"u_out": shape[0], "u_in": shape[1]}
    return sides if len(shape) == 2 else sides | {"u_filter": math.prod(shape[2:])}


class MsrAdapter(Adapter):
    """Meta-learned symmetries by reparametrisation (MSR): the weights of chosen layers are `vec(W) = U v`.

    Zhou, Knowles and Finn 2021, "Meta-Learning Symmetries by Reparameterization", algorithm 1. v is fast, as
    `<weight>.v`; U is shared by the tasks, and learned as `backbone.<weight>.<part>`. All other parameters,
    biases among them, are fast themselves, as in the authors' code.

    Args:
        model: any module.
        symmetry: how U is kept.
        layers: ends of the names of linear and convolutional layers, or "all".
        generator: where random parts of the start come from.
        structure: where the model can be taken apart.
        tasks: how tasks are put side by side: see `FullAdapter`.

    Raises:
        CapabilityError: an end matches no such layer; names those that there are.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        symmetry: Symmetry,
        layers: Sequence[str] | Literal["all"],
        generator: torch.Generator,
        structure: Structure | None = None,
        tasks: Literal["loop", "vmap"] = "loop",
    ) -> None:
        self._full = FullAdapter(model, structure=structure, tasks=tasks)
        self._symmetry = symmetry
        parameters = {name: value.detach() for name, value in model.named_parameters()}
        self._shapes: dict[str, torch.Size] = {}
        self._fast: dict[str, Tensor] = dict(parameters)
        self._parts: dict[str, dict[str, Tensor]] = {}
        for name in _weights_of(model, layers):
            v, parts = symmetry.initial(self._fast.pop(name), generator)
            self._shapes[name], self._fast[f"{name}.v"], self._parts[name] = parameters[name].shape, v, parts

    def meta_parameters(self, *, init: bool, backbone: Learned) -> dict[str, Tensor]:
        meta = {INIT + name: value.clone() for name, value in self._fast.items()} if init else {}
        if backbone:
            shared = {
                f"{name}.{part}": value
                for name, parts in self._parts.items()
                for part, value in parts.items()
            }
            meta |= learned_backbone(shared, backbone)
        return meta

    def init(self, meta: Mapping[str, Tensor], num_tasks: int) -> dict[str, Tensor]:
        return broadcast_init(self._fast, meta, num_tasks)

    def weights(self, meta: Mapping[str, Tensor], fast: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's parameters by name, each `[T, ...]`, at fast weights."""
        of_symmetries = {f"{name}.v" for name in self._shapes}
        weights = {name: value for name, value in fast.items() if name not in of_symmetries}
        for name, shape in self._shapes.items():
            parts = {
                part: meta.get(f"{BACKBONE}{name}.{part}", value) for part, value in self._parts[name].items()
            }
            weights[name] = self._symmetry.weights(fast[f"{name}.v"], parts, shape)
        return weights

    def forward(
        self,
        meta: Mapping[str, Tensor],
        fast: Mapping[str, Tensor],
        inputs: Tensor,
        forward_pass: ForwardPass,
    ) -> Readout:
        return self._full.forward({}, self.weights(meta, fast), inputs, forward_pass)


def _weights_of(model: nn.Module, layers: Sequence[str] | Literal["all"]) -> list[str]:
    """The names of the weights of layers, as the model's parameters are named: of tied ones the first."""
    names = {id(value): name for name, value in model.named_parameters()}
    known = {name: names[id(m.weight)] for name, m in model.named_modules() if isinstance(m, LAYERS)}
    if layers == "all":
        if not known:
            raise CapabilityError(
                "adaptation.fast.layers: all; this model has no linear or convolutional layer."
            )
        return list(dict.fromkeys(known.values()))
    found: dict[str, None] = {}
    for end in layers:
        matches = [weight for name, weight in known.items() if name == end or name.endswith(f".{end}")]
        if not matches:
            raise CapabilityError(
                f"adaptation.fast.layers: {end!r} matches no linear or convolutional layer; this model has "
                f"{', '.join(known)}."
            )
        found |= dict.fromkeys(matches)
    return list(found)
