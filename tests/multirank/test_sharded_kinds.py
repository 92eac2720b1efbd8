"""Tasks of other kinds through sharded weights: exact, by the same collectives on all ranks."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from metaloom.engine.adapters.base import BACKBONE
from metaloom.engine.hypergradients.base import Hypergradient
from metaloom.engine.hypergradients.mixed_mode import MixedMode
from metaloom.engine.hypergradients.rematerialized import Rematerialized
from metaloom.engine.sharding.sharded import Event, Sharded
from tests.multirank.processes import run_ranks
from tests.multirank.sharded_problems import full, in_shards
from tests.numerics.kinds_of_tasks import (
    ALIKE,
    LEARNED_LOSS,
    MODELLING,
    Setting,
    adapter_of,
    model_of,
    problem_of,
)
from tests.numerics.problems import relative_error

NUMBERS = (3, 8)
SEQUENCES = Setting("sequences", "lora", MODELLING, has_ways=True, dropout=0.2, support_loss=LEARNED_LOSS)
CASES: tuple[tuple[Hypergradient, Setting], ...] = (
    (Rematerialized(), SEQUENCES),
    (MixedMode(), dataclasses.replace(SEQUENCES, head_chunk=3)),
    (MixedMode(), Setting("tokens", "lora", ALIKE, dropout=0.2)),
    (MixedMode(), Setting("sequences", "norm_bias", MODELLING, has_ways=True)),
    (Rematerialized(), Setting("tokens", "head", ALIKE, head_chunk=3)),
    (MixedMode(), Setting("tokens", "soft_prompt", ALIKE)),
)


def some(meta: dict[str, Tensor]) -> dict[str, Tensor]:
    """All but the backbone's second block and embeddings, which stay as they are."""
    return {
        name: value
        for name, value in meta.items()
        if not name.startswith((f"{BACKBONE}blocks.1.", f"{BACKBONE}token_embedding"))
    }


def of_a_part() -> list[dict[str, Tensor]]:
    """Hypergradients of all ranks' tasks, of some of the meta-parameters."""
    results = []
    for estimator in (Rematerialized(), MixedMode()):
        sharding = Sharded(torch.device("cpu"))
        whole = problem_of(SEQUENCES, (NUMBERS[sharding.rank],), is_padded=False)
        adapt = functools.partial(adapter_of, SEQUENCES, whole.model)
        problem = in_shards(whole, sharding, structure=model_of(SEQUENCES)[1], adapt=adapt)
        found = estimator.meta_gradient(problem.unroll, some(problem.meta), problem.batch)
        gradient = sharding.sum_gradients(found.gradient)
        results.append({name: full(sharding, name, value) for name, value in gradient.items()})
    return results


def test_a_part_of_a_backbone_in_shards_is_learned_as_of_one_process() -> None:
    problem = problem_of(SEQUENCES, NUMBERS, is_padded=True)
    expected = MixedMode().meta_gradient(problem.unroll, some(problem.meta), problem.batch).gradient
    assert len(expected) < len(problem.meta)
    for rank in run_ranks(2, of_a_part):
        for gradient in rank:
            assert gradient.keys() == expected.keys()
            found, wanted = (
                torch.cat([values[name].flatten() for name in expected]) for values in (gradient, expected)
            )
            assert relative_error(found, wanted) < 1e-10


def differentiated() -> list[tuple[dict[str, Tensor], list[Event]]]:
    """For each case the whole hypergradient of all ranks' tasks, and this rank's
    collectives."""
    results = []
    for estimator, setting in CASES:
        events: list[Event] = []
        sharding = Sharded(torch.device("cpu"), on_event=events.append)
        # Each rank's task has another number of examples, and no padding.
        whole = problem_of(setting, (NUMBERS[sharding.rank],), is_padded=False)
        structure = model_of(setting)[1]
        adapt = functools.partial(adapter_of, setting, whole.model)
        problem = in_shards(whole, sharding, structure=structure, adapt=adapt)
        found = estimator.meta_gradient(problem.unroll, problem.meta, problem.batch)
        collectives = [event for event in events if event.kind != "release"]
        gradient = sharding.sum_gradients(found.gradient)
        results.append(({name: full(sharding, name, value) for name, value in gradient.items()}, collectives))
    return results


def test_ragged_tasks_of_two_heads_through_shards_equal_those_of_one_process() -> None:
    on_ranks = run_ranks(2, differentiated)
    for position, (estimator, setting) in enumerate(CASES):
        problem = problem_of(setting, NUMBERS, is_padded=True)
        expected = estimator.meta_gradient(problem.unroll, problem.meta, problem.batch).gradient
        whole = torch.cat([value.flatten() for value in expected.values()])
        events = on_ranks[0][position][1]
        assert len(events) > 0
        for rank in on_ranks:
            gradient, own_events = rank[position]
            actual = torch.cat([gradient[key].flatten() for key in expected])
            # Sums over tasks in another order.
            assert relative_error(actual, whole) < 1e-10
            assert own_events == events
