"""An unmodified Llama of transformers, its weights in shards, meta-trained on real ranks."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from metaloom.engine.adapters.base import BACKBONE
from metaloom.engine.adapters.lora import LoraAdapter
from metaloom.engine.adapters.model import Structure
from metaloom.engine.hypergradients.base import Hypergradient
from metaloom.engine.inner_loops.rates import Rates
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import Learner, TaskBatch
from metaloom.engine.outer import OuterOptimizer, OuterSettings
from metaloom.engine.precision import ComputeFormat, Precision
from metaloom.engine.sharding.sharded import Event, Sharded
from metaloom.engine.unroll import Unroll
from metaloom.weights import parameters_on_meta

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a Llama with tied embeddings, and of the tasks: one sequence to adapt to, one to be judged on."""

    num_layers: int
    width: int
    mlp_width: int
    num_heads: int
    vocabulary: int
    num_tokens: int = 6

    def model(self) -> nn.Module:
        """On the meta device."""
        config = LlamaConfig(
            num_hidden_layers=self.num_layers,
            hidden_size=self.width,
            intermediate_size=self.mlp_width,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            vocab_size=self.vocabulary,
            tie_word_embeddings=True,
        )
        with parameters_on_meta():
            return Logits(LlamaForCausalLM(config)).requires_grad_(False)

    def structure(self) -> Structure:
        """Its layers and its head."""
        layers = tuple(f"llama.model.layers.{layer}" for layer in range(self.num_layers))
        return Structure(layers, "llama.lm_head")


class Logits(nn.Module):
    """A model as a function of tokens."""

    def __init__(self, llama: LlamaForCausalLM) -> None:
        super().__init__()
        self.llama = llama

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.llama(tokens, use_cache=False).logits
        return logits


SMALL = Size(num_layers=3, width=16, mlp_width=40, num_heads=2, vocabulary=37)
LARGE = Size(num_layers=16, width=1024, mlp_width=4096, num_heads=16, vocabulary=32000)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What one rank has seen.

    Attributes:
        losses: the mean meta-loss of all ranks' tasks, of each outer step.
        events: of its shard group.
        num_parameters: of the model.
    """

    losses: list[float]
    events: list[Event]
    num_parameters: int


def train(
    size: Size, estimator: Hypergradient, num_outer_steps: int, *, backbone: bool, compute: ComputeFormat
) -> Trained:
    """Meta-trains on one task per rank, one inner step; always the same tasks."""
    events: list[Event] = []
    sharding = Sharded(CPU, on_event=events.append)
    precision = Precision(compute)
    model = size.model()
    shapes = {name: value.shape for name, value in model.named_parameters()}

    def drawn(name: str, rows: range) -> Tensor:
        """Each row follows from its number, whatever the number of ranks."""
        if len(shapes[name]) == 1:
            return torch.ones(len(rows), dtype=precision.storage_dtype)
        seed = sum(name.encode())
        whole = torch.empty(len(rows), *shapes[name][1:], dtype=precision.storage_dtype)
        for position, row in enumerate(rows):
            whole[position].normal_(0.0, 0.05, generator=torch.Generator().manual_seed(100_000 * seed + row))
        return whole

    adapter = LoraAdapter(
        model,
        targets=["q_proj", "v_proj"],
        rank=4,
        alpha=8.0,
        generator=torch.Generator().manual_seed(3),
        structure=size.structure(),
        shards=sharding.divide(model, drawn),
    )
    unroll = Unroll(
        Learner(adapter, precision, recompute_blocks=True), Sgd(), Rates(0.5, "none", 1), (0.0, 1.0)
    )
    meta = adapter.meta_parameters(init=True, backbone=backbone)
    settings = OuterSettings(
        optimizer="adam",
        lr=1e-3,
        lr_rates=1e-3,
        lr_loss=1e-3,
        betas=(0.9, 0.99),
        eps=1e-8,
        weight_decay=0.0,
        num_steps=num_outer_steps,
        warmup_steps=0,
        decay="constant",
        final_ratio=1.0,
        clip_norm=None,
        ema=None,
    )
    outer = OuterOptimizer(meta, settings, sharding)
    batch = TaskBatch((sharding.rank,), _part(size, sharding.rank, 0), _part(size, sharding.rank, 1))
    losses = []
    for _ in range(num_outer_steps):
        found = estimator.meta_gradient(unroll, outer.meta, batch)
        total = sharding.sum_over_ranks({"loss": found.losses.sum()})["loss"]
        losses.append(float(total) / sharding.world_size)
        gradient = sharding.sum_gradients(found.gradient)
        outer.update({name: value / sharding.world_size for name, value in gradient.items()})
    assert backbone == any(name.startswith(BACKBONE) for name in outer.meta)
    return Trained(losses, events, sum(shape.numel() for shape in shapes.values()))


def _part(size: Size, number: int, kind: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2 * number + kind)
    tokens = torch.randint(size.vocabulary, (1, 1, size.num_tokens + 1), generator=generator)
    return {"inputs": tokens[..., :-1], "targets": tokens[..., 1:]}
