"""Soft prompts: vectors in front of a text's, one set per task, before a shared transformer.

Shape letters: T tasks, N sequences, L tokens, P vectors of the prompt, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metaloom.engine.adapters.base import INIT, Adapter, Learned, broadcast_init, learned_backbone
from metaloom.engine.adapters.model import Readout, Shards, Structure, Tensors
from metaloom.engine.adapters.together import backbone_parameters, run_together, whole_parameters
from metaloom.engine.forward_pass import ForwardPass
from metaloom.errors import CapabilityError

# Of GPT's embeddings.
STANDARD_DEVIATION = 0.02


class SoftPromptAdapter(Adapter):
    """P fast vectors per task, `[T, P, D]`, in front of what the embedding makes of the tokens.

    Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", section 2. The model is
    not changed: it is given P further tokens in front, for whose embeddings a forward hook puts the prompt.
    So the prompt has the first P positions (with learned positions, their vectors are added to it as to any
    token's), the text those after it, attention sees it as it sees tokens, and the outputs at its positions
    are dropped. All tasks are one pass over `[T * N, P + L]`.

    Args:
        model: takes tokens `[N, L]`, in which the value 0 stands for a token; has room for P more.
        num_tokens: P, at least 1.
        start: `tokens`, the embeddings of tokens that are drawn; `normal`, numbers of standard deviation
            0.02.
        generator: where the draws come from.
        structure: names the model's embedding.
        shards: as in `LoraAdapter`; every rank must make the adapter.

    Raises:
        CapabilityError: the model has no embedding of tokens that can be told from the rest.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_tokens: int,
        start: Literal["tokens", "normal"],
        generator: torch.Generator,
        structure: Structure,
        shards: Shards | None = None,
    ) -> None:
        if structure.embedding is None:
            raise CapabilityError(
                "adaptation.fast.kind: soft_prompt puts vectors in front of those of a text's tokens, and "
                "this model has no embedding of tokens: set it to another kind, name that of a model of your "
                "own (model.embedding), or set model.kind to gpt."
            )
        self._model = model
        self._structure = structure
        self._shards = shards
        self._num_tokens = num_tokens
        self._embedding = model.get_submodule(structure.embedding)
        self._name = f"{structure.embedding}.soft_prompt"
        weight_name = f"{structure.embedding}.weight"
        if start == "tokens":
            weight = whole_parameters(model, shards, [weight_name])[weight_name]  # [V, D]
            drawn = torch.randint(len(weight), (num_tokens,), generator=generator)
            self._initial = weight[drawn.to(weight.device)].clone()
        else:
            like = backbone_parameters(model, shards)[weight_name]
            noise = torch.empty(num_tokens, like.shape[1], dtype=like.dtype)
            noise.normal_(std=STANDARD_DEVIATION, generator=generator)
            self._initial = noise.to(like.device)

    def meta_parameters(self, *, init: bool, backbone: Learned) -> dict[str, Tensor]:
        meta = {INIT + self._name: self._initial.clone()} if init else {}
        if backbone:
            meta |= learned_backbone(backbone_parameters(self._model, self._shards), backbone)
        return meta

    def init(self, meta: Mapping[str, Tensor], num_tasks: int) -> dict[str, Tensor]:
        return broadcast_init({self._name: self._initial}, meta, num_tasks)

    def forward(
        self,
        meta: Mapping[str, Tensor],
        fast: Mapping[str, Tensor],
        inputs: Tensor,
        forward_pass: ForwardPass,
    ) -> Readout:
        length = inputs.shape[-1]
        readout = run_together(
            self._model,
            self._structure,
            meta,
            F.pad(inputs, (self._num_tokens, 0)),
            forward_pass,
            attachments=fast,
            attach=self._attached,
            shards=self._shards,
        )
        features = readout.features
        if features.ndim > 3 and features.shape[2] == self._num_tokens + length:
            # One output per token, and not one for the whole text.
            features = features[:, :, self._num_tokens :]
        return Readout(features, readout.head, readout.tensors)

    @contextlib.contextmanager
    def _attached(self, fast: Tensors) -> Iterator[None]:
        if self._name not in fast:  # those of a block alone
            yield
            return
        handle = self._embedding.register_forward_hook(_InFront(fast[self._name]))
        try:
            yield
        finally:
            handle.remove()


class _InFront:
    """A forward hook that puts prompts `[T, P, D]` for the first P vectors of `[T * N, P + L, D]`."""

    def __init__(self, prompts: Tensor) -> None:
        self._prompts = prompts

    def __call__(self, embedding: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        num_tasks, num_vectors, width = self._prompts.shape
        of_tasks = output.view(num_tasks, -1, *output.shape[1:])  # [T, N, P + L, D]
        prompts = self._prompts[:, None].expand(-1, of_tasks.shape[1], num_vectors, width)
        return torch.cat([prompts.to(output.dtype), of_tasks[:, :, num_vectors:]], dim=2).view(output.shape)
