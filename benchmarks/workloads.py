"""The inner problems that contenders are measured on: model, initial weights and data, the same for all.

Shape letters: T tasks, S support and Q query examples, L tokens, D width, R LoRA rank, K inner steps.

Every workload is plain MAML: K steps of gradient descent on a task's support loss, then the query loss
at the adapted weights, summed over tasks. Losses are mean cross-entropies.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from metaloom.models.conv4 import Conv4
from metaloom.models.gpt import VOCABULARY, Gpt

Array = npt.NDArray[Any]
DType = Literal["float32", "float64"]


@dataclasses.dataclass(frozen=True)
class Images:
    """Few-shot images for `Conv4` with batch norm: `n_way` classes of `n_shot` and `n_query` examples."""

    width: int
    image: int
    n_way: int
    n_shot: int
    n_query: int


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Next-token prediction for `Gpt` with untied embeddings: S support and Q query sequences of L tokens."""

    num_layers: int
    width: int
    num_heads: int
    length: int
    num_support: int
    num_query: int


@dataclasses.dataclass(frozen=True)
class Workload:
    """One inner problem.

    Attributes:
        title: what it is, for people.
        model: the model and the sizes of its data.
        lora_rank: R of the LoRA matrices beside all linear layers but the head, which are then what is
            fast; None where every weight is fast.
        learn_backbone: whether the meta-parameters include the weights beside the LoRA matrices.
        num_tasks: T.
        rate: of the inner steps.
        steps: the K that are measured unless others are asked for.
    """

    title: str
    model: Images | Tokens
    lora_rank: int | None
    learn_backbone: bool
    num_tasks: int
    rate: float
    steps: tuple[int, ...]


_OMNIGLOT = Images(width=64, image=28, n_way=5, n_shot=1, n_query=15)
_GPT = Tokens(num_layers=4, width=256, num_heads=4, length=128, num_support=4, num_query=4)
_SMALL = dataclasses.replace(_GPT, length=32, num_support=1, num_query=1)
_TINY_IMAGES = Images(width=4, image=12, n_way=3, n_shot=2, n_query=2)
_TINY_TOKENS = Tokens(num_layers=2, width=16, num_heads=2, length=6, num_support=2, num_query=2)

WORKLOADS: dict[str, Workload] = {
    "W1": Workload(
        "conv4, width 64, 28x28x1, 5-way 1-shot, 15 queries a class, 4 tasks; all weights fast",
        _OMNIGLOT,
        lora_rank=None,
        learn_backbone=False,
        num_tasks=4,
        # At 0.1 rounding to float32 pushes some activation across the kink of a ReLU within five steps,
        # and libraries differ by 1e-3 that agree to 1e-14 in float64.
        rate=0.05,
        steps=(1, 5, 10),
    ),
    "W2": Workload(
        "gpt, 4 layers of width 256, 4 + 4 sequences of 128 tokens, 1 task; all weights fast",
        _GPT,
        lora_rank=None,
        learn_backbone=False,
        num_tasks=1,
        rate=0.1,
        steps=(1, 4, 16, 64),
    ),
    "W3": Workload(
        "gpt as in W2, 8 tasks; rank-8 LoRA fast, its initialisation learned",
        _GPT,
        lora_rank=8,
        learn_backbone=False,
        num_tasks=8,
        rate=0.1,
        steps=(1, 4, 16),
    ),
    "W3-backbone": Workload(
        "as W3, the backbone learned too",
        _GPT,
        lora_rank=8,
        learn_backbone=True,
        num_tasks=8,
        rate=0.1,
        steps=(1, 4, 16),
    ),
    "W3-one-task": Workload(
        "as W3, 1 task", _GPT, lora_rank=8, learn_backbone=False, num_tasks=1, rate=0.1, steps=(64,)
    ),
    "W3-small": Workload(
        "as W3, each task 1 + 1 sequences of 32 tokens",
        _SMALL,
        lora_rank=8,
        learn_backbone=False,
        num_tasks=8,
        rate=0.1,
        steps=(4,),
    ),
    "tiny-conv4": Workload(
        "conv4, width 4, 2 tasks; all weights fast",
        _TINY_IMAGES,
        lora_rank=None,
        learn_backbone=False,
        num_tasks=2,
        rate=0.1,
        steps=(3,),
    ),
    "tiny-gpt": Workload(
        "gpt, 2 layers of width 16, 2 tasks; all weights fast",
        _TINY_TOKENS,
        lora_rank=None,
        learn_backbone=False,
        num_tasks=2,
        rate=0.1,
        steps=(3,),
    ),
    "tiny-lora": Workload(
        "gpt, 2 layers of width 16, 2 tasks; rank-2 LoRA fast, backbone learned too",
        _TINY_TOKENS,
        lora_rank=2,
        learn_backbone=True,
        num_tasks=2,
        rate=0.1,
        steps=(3,),
    ),
}


def tiny_one_like(workload: Workload) -> Workload:
    """A problem of the same kind that takes next to no time and memory."""
    if isinstance(workload.model, Images):
        return WORKLOADS["tiny-conv4"]
    return WORKLOADS["tiny-gpt" if workload.lora_rank is None else "tiny-lora"]


@dataclasses.dataclass(frozen=True)
class Examples:
    """`inputs` `[T, N, ...]` and `targets` `[T, N]` or `[T, N, L]`."""

    inputs: Array
    targets: Array


@dataclasses.dataclass(frozen=True)
class Problem:
    """A workload with its weights and data drawn.

    Attributes:
        model: initial weights; none requires gradients.
        lora: initial LoRA matrices, `<layer>.lora_a` `[R, D]` and `<layer>.lora_b` `[D', R]` by name, in
            the order of the model's layers; empty where every weight is fast. B is not zero, as in the
            middle of a meta-training, so that no part of the gradient is zero for the lack of steps.
        lora_scale: what the low-rank product is multiplied by.
        support, query: the tasks' data.
    """

    workload: Workload
    num_steps: int
    model: nn.Module
    lora: dict[str, Array]
    lora_scale: float
    support: Examples
    query: Examples

    @property
    def lora_layers(self) -> tuple[str, ...]:
        """Names of the linear layers that have LoRA matrices."""
        return tuple(name.removesuffix(".lora_a") for name in self.lora if name.endswith(".lora_a"))


def draw(workload: Workload, num_steps: int, dtype: DType) -> Problem:
    """The workload's problem with K = `num_steps`: the same for every contender and process."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    sizes = workload.model
    model: nn.Module
    if isinstance(sizes, Images):
        model = Conv4(num_classes=sizes.n_way, width=sizes.width, num_blocks=4, norm="batch")
        support = _images(rng, workload.num_tasks, sizes, sizes.n_shot, dtype)
        query = _images(rng, workload.num_tasks, sizes, sizes.n_query, dtype)
    else:
        model = Gpt(
            num_layers=sizes.num_layers,
            width=sizes.width,
            num_heads=sizes.num_heads,
            context_length=sizes.length,
            tied_embeddings=False,
        )
        support = _tokens(rng, workload.num_tasks, sizes.num_support, sizes.length)
        query = _tokens(rng, workload.num_tasks, sizes.num_query, sizes.length)
    model = model.to(getattr(torch, dtype)).requires_grad_(False)
    lora: dict[str, Array] = {}
    if workload.lora_rank is not None:
        lora = _lora(rng, model, workload.lora_rank, dtype)
    return Problem(workload, num_steps, model, lora, lora_scale=1.0, support=support, query=query)


def _images(rng: np.random.Generator, num_tasks: int, sizes: Images, each: int, dtype: DType) -> Examples:
    targets = np.tile(np.repeat(np.arange(sizes.n_way), each), (num_tasks, 1))
    shape = (*targets.shape, 1, sizes.image, sizes.image)
    return Examples(rng.standard_normal(shape).astype(dtype), targets)


def _tokens(rng: np.random.Generator, num_tasks: int, num_sequences: int, length: int) -> Examples:
    tokens = rng.integers(VOCABULARY, size=(num_tasks, num_sequences, length + 1))
    return Examples(tokens[..., :-1].copy(), tokens[..., 1:].copy())


def _lora(rng: np.random.Generator, model: nn.Module, rank: int, dtype: DType) -> dict[str, Array]:
    lora: dict[str, Array] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "head":
            bound = layer.in_features**-0.5
            lora[f"{name}.lora_a"] = rng.uniform(-bound, bound, (rank, layer.in_features)).astype(dtype)
            lora[f"{name}.lora_b"] = rng.normal(0.0, 0.02, (layer.out_features, rank)).astype(dtype)
    return lora
