"""Inner problems on a small transformer whose vocabulary can be told from every other size.

Shape letters: T tasks, L tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from metaloom.engine.adapters.base import Adapter
from metaloom.engine.adapters.full import FullAdapter
from metaloom.engine.adapters.lora import LoraAdapter
from metaloom.engine.adapters.model import Structure
from metaloom.engine.hypergradients.base import Hypergradient
from metaloom.engine.hypergradients.mixed_mode import MixedMode
from metaloom.engine.hypergradients.rematerialized import Rematerialized
from metaloom.engine.hypergradients.unrolled import Unrolled
from metaloom.engine.inner_loops.base import InnerRule
from metaloom.engine.inner_loops.rates import Grain, Rates
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import Learner, TaskBatch
from metaloom.engine.losses import SupportLoss
from metaloom.engine.precision import ComputeFormat, Precision
from metaloom.engine.unroll import Unroll
from metaloom.models.gpt import Gpt
from tests.numerics.problems import Problem, perturbed

Fast = Literal["lora", "lora and head", "full", "full under vmap"]
EXACT: dict[str, Hypergradient] = {
    "unrolled": Unrolled(),
    "rematerialized": Rematerialized(),
    "mixed_mode": MixedMode(),
}
# A prime that no other size of the model is, or has as a factor.
VOCABULARY = 37
TOKENS, NUM_LAYERS, WIDTH, RANK = 6, 2, 8, 2


def transformer_problem(
    fast: Fast = "lora",
    *,
    step_weights: tuple[float, ...] = (0.0, 0.4, 0.0, 1.1),
    rule: InnerRule | None = None,
    grain: Grain = "per_tensor",
    backbone: bool = False,
    tied_embeddings: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
    numbers: tuple[int, ...] = (3, 8),
    compute: ComputeFormat = "float64",
    support_loss: SupportLoss | None = None,
    recompute_blocks: bool = False,
    head_chunk: int | None = None,
    num_sequences: int = 2,
) -> Problem:
    """Sequences of tokens, two layers."""
    precision = Precision(compute)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Gpt(
            num_layers=NUM_LAYERS,
            width=WIDTH,
            num_heads=2,
            context_length=TOKENS,
            tied_embeddings=tied_embeddings,
            dropout=dropout,
            vocabulary=VOCABULARY,
        ).to(precision.storage_dtype)
    structure = Structure(tuple(f"blocks.{block}" for block in range(NUM_LAYERS)), "head")
    adapter = _adapter(fast, model, structure)
    support_loss = support_loss or SupportLoss()
    learner = Learner(
        adapter,
        precision,
        support_loss=support_loss,
        seed=seed,
        recompute_blocks=recompute_blocks,
        head_chunk=head_chunk,
    )
    rates = Rates(0.2, grain, len(step_weights) - 1)
    unroll = Unroll(learner, rule or Sgd(momentum=0.6), rates, step_weights)
    meta = adapter.meta_parameters(init=True, backbone=backbone)
    meta |= rates.meta_parameters(adapter.init({}, 1))
    meta |= support_loss.meta_parameters(torch.empty(0, dtype=precision.storage_dtype))
    batch = TaskBatch(numbers, _part(numbers, num_sequences, 0), _part(numbers, num_sequences + 1, 1))
    return Problem(unroll, perturbed(meta, scale=0.1), batch, model)


def with_learner(problem: Problem, learner: Learner) -> Problem:
    """The same problem, its losses computed another way."""
    return dataclasses.replace(problem, unroll=dataclasses.replace(problem.unroll, learner=learner))


def recomputing(problem: Problem, *, blocks: bool, head_chunk: int | None) -> Problem:
    """The same problem with blocks and head computed again."""
    learner = dataclasses.replace(problem.unroll.learner, recompute_blocks=blocks, head_chunk=head_chunk)
    return with_learner(problem, learner)


def hypergradient(problem: Problem, estimator: Hypergradient | None = None) -> dict[str, Tensor]:
    """d (sum of meta-losses) / d theta, by the whole graph where no estimator is given."""
    result = (estimator or Unrolled()).meta_gradient(problem.unroll, problem.meta, problem.batch)
    return result.gradient


def distance(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Of whole gradients, relative."""
    one, other = (torch.cat([t.double().flatten() for t in g.values()]) for g in (actual, expected))
    return float(torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(other))


def _adapter(fast: Fast, model: Gpt, structure: Structure) -> Adapter:
    if fast == "full":
        return FullAdapter(model, structure=structure)
    if fast == "full under vmap":
        return FullAdapter(model, structure=structure, tasks="vmap")
    targets = ["qkv", "proj", "fc_in", "fc_out", *(["head"] if fast == "lora and head" else [])]
    generator = torch.Generator().manual_seed(3)
    return LoraAdapter(model, targets=targets, rank=RANK, alpha=6.0, generator=generator, structure=structure)


def _part(numbers: tuple[int, ...], num_sequences: int, kind: int) -> dict[str, Tensor]:
    """Each task's data follows from its number, so that a task is the same alone and among others."""
    tokens = torch.stack(
        [
            torch.randint(
                VOCABULARY,
                (num_sequences, TOKENS + 1),
                generator=torch.Generator().manual_seed(10 * number + kind),
            )
            for number in numbers
        ]
    )
    return {"inputs": tokens[..., :-1], "targets": tokens[..., 1:]}
