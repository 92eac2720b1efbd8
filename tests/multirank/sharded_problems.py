"""Inner problems whose weights are in shards, and their hypergradients put together again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from metaloom.engine.adapters.base import BACKBONE, Adapter
from metaloom.engine.adapters.lora import LoraAdapter
from metaloom.engine.adapters.model import Shards, Structure
from metaloom.engine.hypergradients.base import Hypergradient
from metaloom.engine.sharding.sharded import Sharded, rows_in
from metaloom.weights import drop_parameters
from tests.numerics.problems import Problem
from tests.numerics.token_problems import NUM_LAYERS, RANK, transformer_problem, with_learner

NUMBERS = (3, 8, 1, 6)
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem and one estimator.

    Attributes:
        settings: of `transformer_problem`.
        frozen: ends of the names of weights that are not learned, where the backbone is.
        shard_size: ranks that share one copy of the weights; None for all.
    """

    estimator: Hypergradient
    settings: dict[str, Any]
    frozen: tuple[str, ...] = ()
    shard_size: int | None = None

    def problem(self, numbers: tuple[int, ...]) -> Problem:
        """With whole weights, on the tasks of these numbers."""
        problem = transformer_problem(numbers=numbers, **self.settings)
        learned = {name: value for name, value in problem.meta.items() if not name.endswith(self.frozen)}
        return dataclasses.replace(problem, meta=learned)


def in_shards(
    problem: Problem,
    sharding: Sharded,
    *,
    targets: Sequence[str] | Literal["all-linear"] = ("qkv", "proj", "fc_in", "fc_out"),
    structure: Structure | None = None,
    adapt: Callable[[Structure, Shards], Adapter] | None = None,
) -> Problem:
    """The same problem, the backbone in shards.

    Args:
        targets: what LoRA adapts.
        structure: of the model; of a transformer with one output where None.
        adapt: makes the adapter; LoRA where None.
    """
    problem.model.requires_grad_(False)
    shards = sharding.divide(problem.model, rows_in(problem.model))
    drop_parameters(problem.model)
    structure = structure or Structure(tuple(f"blocks.{block}" for block in range(NUM_LAYERS)), "head")
    adapter: Adapter
    if adapt is not None:
        adapter = adapt(structure, shards)
    else:
        adapter = LoraAdapter(
            problem.model,
            targets=targets,
            rank=RANK,
            alpha=6.0,
            generator=torch.Generator().manual_seed(3),
            structure=structure,
            shards=shards,
        )
    meta = {}
    for name, value in problem.meta.items():
        if name.startswith(BACKBONE):
            rows = shards.rows(name.removeprefix(BACKBONE))
            value = value[rows.start : rows.stop].clone()
        meta[name] = value
    learner = dataclasses.replace(problem.unroll.learner, adapter=adapter)
    return dataclasses.replace(with_learner(problem, learner), meta=meta)


def hypergradients_in_shards(cases: list[Case]) -> list[tuple[dict[str, Tensor], float]]:
    """For each case the hypergradient of all ranks' tasks, whole, and its norm. On every rank."""
    results = []
    for case in cases:
        sharding = Sharded(CPU, shard_size=case.shard_size)
        share = len(NUMBERS) // sharding.world_size
        numbers = NUMBERS[sharding.rank * share : (sharding.rank + 1) * share]
        problem = in_shards(case.problem(numbers), sharding)
        found = case.estimator.meta_gradient(problem.unroll, problem.meta, problem.batch)
        gradient = sharding.sum_gradients(found.gradient)
        norm = sharding.norm(gradient)
        whole = {name: full(sharding, name, value) for name, value in gradient.items()}
        results.append((whole, norm))
    return results


def full(sharding: Sharded, name: str, value: Tensor) -> Tensor:
    """What the ranks hold of a tensor, put together by torch's own means."""
    stored = sharding.stored(name, value)
    return stored if stored is value else stored.full_tensor()  # type: ignore[attr-defined]
