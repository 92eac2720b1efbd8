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
from torch.nn import functional as F

from metaloom.engine.adapters.base import INIT, Adapter, Learned, broadcast_init, learned_backbone
from metaloom.engine.adapters.model import Readout, Shards, Structure, Tensors
from metaloom.engine.adapters.selection import fast_head, linear_layers, matching_layers, parameters_of
from metaloom.engine.adapters.together import (
    backbone_parameters,
    require_layers_that_run_together,
    run_together,
    whole_parameters,
)
from metaloom.engine.forward_pass import ForwardPass
from metaloom.engine.kernels import low_rank_update


def lora_scale(alpha: float, rank: int, *, rank_stabilized: bool) -> float:
    """What the product B A is multiplied by."""
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)


class LoraAdapter(Adapter):
    """Low-rank fast weights beside the linear layers of a shared backbone.

    `y = W x + s B A x` with s = alpha / R (Hu et al. 2021, "LoRA", section 4.1), or alpha / sqrt(R)
    (Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", section 4.1); W
    shared by the tasks, A `[T, R, D]` and B `[T, D', R]` per task. Activations stay `[T * N, ...]`, so W runs
    its ordinary kernels once; only the two thin products are per task. The model is not changed: the products
    are added by forward hooks that live as long as one forward pass. Layers may be linear ones, or `Conv1D`
    of transformers, which are such with the weight transposed.

    Args:
        model: the backbone.
        targets: ends of module names ("qkv" matches "blocks.0.attention.qkv"), patterns of whole names
            ("*.0.*.qkv"), or "all-linear", for all but the output head.
        rank: R, at least 1.
        alpha: of the scale.
        generator: where the initial A (uniform, Kaiming with gain sqrt(5) as in the paper's code)
            comes from; B starts at zero.
        rank_stabilized: the scale is alpha / sqrt(R).
        dropout: probability with which a number that A is shown is 0, in adaptation steps.
        whole_modules: ends of the names of modules whose parameters are fast as they are, each task with its
            own: linear layers and norms.
        structure: where the backbone can be taken apart.
        shards: the backbone's weights, where this rank holds shards of them; those of `model` are not read
            then, and may be on the meta device. Every rank must make the adapter.

    Raises:
        CapabilityError: a target matches no linear layer; names those that there are. Or a whole module is
            also a target, or has parameters that one pass of all tasks cannot hold a copy per task of.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        targets: Sequence[str] | Literal["all-linear"],
        rank: int,
        alpha: float,
        generator: torch.Generator,
        rank_stabilized: bool = False,
        dropout: float = 0.0,
        whole_modules: Sequence[str] = (),
        structure: Structure | None = None,
        shards: Shards | None = None,
    ) -> None:
        self._model = model
        self._shards = shards
        self._structure = structure or Structure()
        self._scale = lora_scale(alpha, rank, rank_stabilized=rank_stabilized)
        self._dropout = dropout
        self._targets = matching_layers(model, targets, self._structure)
        self._whole = parameters_of(model, whole_modules, besides=self._targets)
        require_layers_that_run_together(model, self._whole)
        layers = linear_layers(model)
        self._initial: dict[str, Tensor] = {}
        for name, layer in self._targets.items():
            weight = layer.get_parameter("weight") if shards is None else shards.values[f"{name}.weight"]
            num_inputs, num_outputs = layers[name]
            bound = 1.0 / math.sqrt(num_inputs)
            lora_a = torch.empty(rank, num_inputs, dtype=weight.dtype)
            lora_a.uniform_(-bound, bound, generator=generator)
            self._initial[f"{name}.lora_a"] = lora_a.to(weight.device)
            self._initial[f"{name}.lora_b"] = weight.new_zeros(num_outputs, rank)
        self._initial |= whole_parameters(model, shards, self._whole)

    def meta_parameters(self, *, init: bool, backbone: Learned) -> dict[str, Tensor]:
        meta = {INIT + name: value.clone() for name, value in self._initial.items()} if init else {}
        if backbone:
            values = backbone_parameters(self._model, self._shards)
            shared = {name: value for name, value in values.items() if name not in self._initial}
            meta |= learned_backbone(shared, backbone)
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
            attachments={name: value for name, value in fast.items() if name not in self._whole},
            attach=self._attached,
            shards=self._shards,
            own_weights={name: fast[name] for name in self._whole},
        )

    def head_weights(self, output: str | None) -> tuple[str, ...]:
        if not self._whole:
            return super().head_weights(output)
        return fast_head(self._model, self._structure, output, self._whole)

    @contextlib.contextmanager
    def _attached(self, fast: Tensors) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, layer in self._targets.items():
                if f"{name}.lora_a" in fast:
                    lora_a, lora_b = fast[f"{name}.lora_a"], fast[f"{name}.lora_b"]
                    product = _LoraProduct(lora_a, lora_b, self._scale, self._dropout)
                    stack.callback(layer.register_forward_hook(product).remove)
            yield


class _LoraProduct:
    """A forward hook that adds `scale * B A dropout(x)`, task by task."""

    def __init__(self, lora_a: Tensor, lora_b: Tensor, scale: float, dropout: float) -> None:
        self._lora_a, self._lora_b, self._scale, self._dropout = lora_a, lora_b, scale, dropout

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        num_tasks = self._lora_a.shape[0]
        given = F.dropout(args[0], self._dropout) if self._dropout else args[0]
        inputs = given.reshape(num_tasks, -1, given.shape[-1])  # [T, N * ..., D]
        flat = output.reshape(num_tasks, -1, output.shape[-1])  # [T, N * ..., D']
        return low_rank_update(flat, inputs, self._lora_a, self._lora_b, self._scale).view(output.shape)
