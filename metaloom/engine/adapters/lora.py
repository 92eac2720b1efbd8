"""Task-batched LoRA: one forward pass of the backbone serves all tasks.

Shape letters: T tasks, N examples, D input width, D' output width, R rank.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from metaloom.engine.adapters.base import BACKBONE, INIT, Adapter, broadcast_init
from metaloom.engine.adapters.model import Readout, Shards, Structure, Tensors
from metaloom.engine.adapters.together import backbone_parameters, run_together
from metaloom.engine.forward_pass import ForwardPass
from metaloom.engine.kernels import low_rank_update
from metaloom.errors import CapabilityError


class LoraAdapter(Adapter):
    """Low-rank fast weights beside the linear layers of a shared backbone.

    `y = W x + (alpha / R) B A x` (Hu et al. 2021, "LoRA", section 4.1), W shared by the tasks,
    A `[T, R, D]` and B `[T, D', R]` per task. Activations stay `[T * N, ...]`, so W runs its
    ordinary kernels once; only the two thin products are per task. The model is not changed:
    the products are added by forward hooks that live as long as one forward pass.

    Args:
        model: the backbone.
        targets: ends of module names ("qkv" matches "blocks.0.attention.qkv"), or "all-linear".
        rank: R, at least 1.
        alpha: scale; the product is multiplied by alpha / R.
        generator: where the initial A (uniform, Kaiming with gain sqrt(5) as in the paper's code)
            comes from; B starts at zero.
        structure: where the backbone can be taken apart.
        shards: the backbone's weights, where this rank holds shards of them; those of `model` are not read
            then, and may be on the meta device.

    Raises:
        CapabilityError: a target matches no linear layer; names those that there are.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        targets: Sequence[str] | Literal["all-linear"],
        rank: int,
        alpha: float,
        generator: torch.Generator,
        structure: Structure | None = None,
        shards: Shards | None = None,
    ) -> None:
        self._model = model
        self._shards = shards
        self._structure = structure or Structure()
        self._scale = alpha / rank
        self._targets = _matching_linear_layers(model, targets)
        self._initial: dict[str, Tensor] = {}
        for name, layer in self._targets.items():
            weight = layer.weight if shards is None else shards.values[f"{name}.weight"]
            bound = 1.0 / math.sqrt(layer.in_features)
            lora_a = torch.empty(rank, layer.in_features, dtype=weight.dtype)
            lora_a.uniform_(-bound, bound, generator=generator)
            self._initial[f"{name}.lora_a"] = lora_a.to(weight.device)
            self._initial[f"{name}.lora_b"] = weight.new_zeros(layer.out_features, rank)

    def meta_parameters(self, *, init: bool, backbone: bool) -> dict[str, Tensor]:
        meta = {INIT + name: value.clone() for name, value in self._initial.items()} if init else {}
        if backbone:
            values = backbone_parameters(self._model, self._shards)
            meta |= {BACKBONE + name: value.clone() for name, value in values.items()}
        return meta

    def init(self, meta: Mapping[str, Tensor], num_tasks: int) -> dict[str, Tensor]:
        return broadcast_init(self._initial, meta, num_tasks)

    def forward(
        self,
        meta: Mapping[str, Tensor],
        fast: Mapping[str, Tensor],
        inputs: Tensor,
        forward_pass: ForwardPass,
    ) -> Readout:
        return run_together(
            self._model,
            self._structure,
            meta,
            inputs,
            forward_pass,
            attachments=fast,
            attach=self._attached,
            shards=self._shards,
        )

    @contextlib.contextmanager
    def _attached(self, fast: Tensors) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, layer in self._targets.items():
                if f"{name}.lora_a" in fast:
                    product = _LoraProduct(fast[f"{name}.lora_a"], fast[f"{name}.lora_b"], self._scale)
                    stack.callback(layer.register_forward_hook(product).remove)
            yield


class _LoraProduct:
    """A forward hook that adds `scale * B A x`, task by task."""

    def __init__(self, lora_a: Tensor, lora_b: Tensor, scale: float) -> None:
        self._lora_a, self._lora_b, self._scale = lora_a, lora_b, scale

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        num_tasks = self._lora_a.shape[0]
        inputs = args[0].reshape(num_tasks, -1, args[0].shape[-1])  # [T, N * ..., D]
        flat = output.reshape(num_tasks, -1, output.shape[-1])  # [T, N * ..., D']
        return low_rank_update(flat, inputs, self._lora_a, self._lora_b, self._scale).view(output.shape)


def _matching_linear_layers(
    model: nn.Module, targets: Sequence[str] | Literal["all-linear"]
) -> dict[str, nn.Linear]:
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    if targets == "all-linear":
        # The output head is as wide as the vocabulary: an adapter there costs more than all others.
        return {name: layer for name, layer in linear.items() if name.rpartition(".")[2] != "head"}
    found: dict[str, nn.Linear] = {}
    for target in targets:
        matches = {
            name: layer for name, layer in linear.items() if name == target or name.endswith(f".{target}")
        }
        if not matches:
            endings = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise CapabilityError(
                f"adaptation.fast.targets: {target!r} matches no linear layer; this model has {endings}."
            )
        found |= matches
    return {name: layer for name, layer in linear.items() if name in found}
