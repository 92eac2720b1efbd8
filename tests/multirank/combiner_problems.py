"""Outer steps with every combiner, on any number of ranks and under any backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from metaloom.datasets import share_of_rank
from metaloom.engine.combiners.base import Combiner
from metaloom.engine.combiners.dwa import DWA
from metaloom.engine.combiners.even import Even
from metaloom.engine.combiners.gradnorm import GradNorm
from metaloom.engine.combiners.group_dro import GroupDRO
from metaloom.engine.combiners.mean import Mean
from metaloom.engine.combiners.mgda import MGDA
from metaloom.engine.combiners.pcgrad import PCGrad
from metaloom.engine.combiners.per_task import PerTask
from metaloom.engine.combiners.q_ffl import QFFL
from metaloom.engine.combiners.uncertainty import Uncertainty
from metaloom.engine.combiners.upweighting import Upweighting
from metaloom.engine.combiners.weighted import Weighted
from metaloom.engine.hypergradients.first_order import FirstOrder
from metaloom.engine.learner import TaskBatch
from metaloom.engine.sharding.base import Sharding
from metaloom.engine.sharding.replicated import Replicated
from metaloom.engine.sharding.sharded import Sharded
from tests.multirank.sharded_problems import full, in_shards
from tests.numerics.problems import Problem
from tests.numerics.token_problems import transformer_problem

CPU = torch.device("cpu")
STEPS = 3
GROUPS = ("fog", "rain", "snow")
ESTIMATOR = FirstOrder()  # the quickest: how a gradient was found is nothing to its combination
Outcome = list[tuple[dict[str, Tensor], dict[str, float]]]


class Lockstep(Replicated):
    """Ranks that could do without each other, and fill up with dummies all the same."""

    is_lockstep = True


def problem(numbers: tuple[int, ...]) -> Problem:
    return transformer_problem(
        numbers=numbers, step_weights=(0.0, 1.0), grain="shared", backbone=True, tied_embeddings=True
    )


def numbers_of(step: int, num_tasks: int) -> tuple[int, ...]:
    return tuple(range(step * num_tasks, (step + 1) * num_tasks))


def group_of(number: int) -> str:
    """Unevenly: a group may be missing in a step."""
    return GROUPS[(number * number + number // 3) % 3]


def combiners(
    like: Mapping[str, Tensor], sharding: Sharding, names: tuple[str, ...]
) -> dict[str, Callable[[], Combiner]]:
    options: dict[str, Any] = {"metric_names": names}

    def per_task(rule: Any, **more: Any) -> Callable[[], Combiner]:
        return lambda: PerTask(rule, like, sharding, **options, **more)

    def weighted(weights: Any) -> Callable[[], Combiner]:
        return lambda: Weighted(weights, like, sharding, **options)

    return {
        "mean": lambda: Mean(like, sharding, **options),
        "mean with cosines": per_task(Even(), log_cosines=True),
        "pcgrad": per_task(PCGrad(3)),
        "pcgrad of the initialisation": per_task(PCGrad(3), of=["init"]),
        "pcgrad of some of the backbone": per_task(PCGrad(3), of=["backbone.*qkv*", "rates"]),
        "mgda": per_task(MGDA()),
        "gradnorm": per_task(GradNorm(1.5, 0.2)),
        "gradnorm by the initialisation": per_task(GradNorm(1.5, 0.2), of=["init"]),
        "group_dro": per_task(GroupDRO(0.5), log_cosines=True),
        "q_ffl": per_task(QFFL(2.0)),
        "uncertainty": weighted(Uncertainty(0.3)),
        "dwa": weighted(DWA(0.5, 1)),
        "upweighting": weighted(Upweighting()),
    }


def own_batch(made: Problem, numbers: tuple[int, ...], num_dummies: int) -> TaskBatch:
    weights = None
    if num_dummies:
        weights = torch.ones(len(numbers), dtype=torch.float64)
        weights[len(numbers) - num_dummies :] = 0.0
    groups = tuple(group_of(number) for number in numbers)
    return dataclasses.replace(made.batch, weights=weights, groups=groups)


def outcomes(
    kind: str, num_tasks: int, micro_batch: int, shard_size: int | None, only: tuple[str, ...], num_steps: int
) -> dict[str, Outcome]:
    """What some outer steps combine to by each combiner, the gradients whole. On every rank.

    Args:
        only: of the combiners; empty for all.
    """
    makers: dict[str, Callable[[], Sharding]] = {
        "replicated": Replicated,
        "lockstep": Lockstep,
        "sharded": lambda: Sharded(CPU, shard_size=shard_size),
    }
    sharding = makers[kind]()
    learner = problem((0,)).unroll.learner
    names = ESTIMATOR.metric_names(learner)
    share = share_of_rank(num_tasks, sharding.rank, sharding.world_size, is_lockstep=sharding.is_lockstep)
    made = []
    for step in range(num_steps):
        numbers = tuple(numbers_of(step, num_tasks)[position] for position in share.positions)
        one = problem(numbers or (0,))
        made.append((in_shards(one, sharding) if isinstance(sharding, Sharded) else one, numbers))
    found: dict[str, Outcome] = {}
    for name, make in combiners(made[0][0].meta, sharding, names).items():
        if only and name not in only:
            continue
        combiner, outcome = make(), []
        for one, numbers in made:
            batch = own_batch(one, numbers, share.num_dummies) if numbers else None
            for micro in [] if batch is None else batch.split(micro_batch):
                for part in combiner.parts(micro):
                    combiner.add(ESTIMATOR.meta_gradient(one.unroll, one.meta, part), part)
            combined = combiner.combine(num_tasks)
            if isinstance(sharding, Sharded):
                whole = {key: full(sharding, key, value) for key, value in combined.gradient.items()}
            else:
                whole = combined.gradient
            cosines = [] if combiner.cosines is None else [x for row in combiner.cosines.values for x in row]
            shown = {f"cosine {place}": value for place, value in enumerate(cosines)}
            outcome.append((whole, combined.metrics | shown))
        found[name] = outcome
    return found
