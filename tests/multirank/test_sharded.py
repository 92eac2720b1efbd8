"""Hypergradients through sharded weights, on real ranks, equal those of one process."""

from __future__ import annotations

import math
from typing import Any

import pytest

from metaloom.engine.hypergradients.base import Hypergradient
from metaloom.engine.hypergradients.finite_difference import FiniteDifference
from metaloom.engine.hypergradients.first_order import FirstOrder
from metaloom.engine.hypergradients.mixed_mode import MixedMode
from metaloom.engine.hypergradients.rematerialized import Rematerialized
from metaloom.engine.hypergradients.truncated import Truncated
from metaloom.engine.hypergradients.unrolled import Unrolled
from tests.multirank.processes import run_ranks
from tests.multirank.sharded_problems import NUMBERS, Case, hypergradients_in_shards
from tests.numerics.problems import assert_gradients_agree
from tests.numerics.token_problems import distance

# Rows that 2 and 4 ranks do not share evenly (37 of the vocabulary), and fewer than 4 hold (6 positions).
LEARNED: dict[str, Any] = {"backbone": True, "tied_embeddings": True}
VARIANTS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("tied weights", LEARNED, ()),
    ("frozen", {}, ()),
    ("partly frozen", {"backbone": True}, ("qkv.weight", "norm.bias", "token_embedding.weight")),
    ("blocks and head in chunks", LEARNED | {"recompute_blocks": True, "head_chunk": 4}, ()),
    ("dropout", LEARNED | {"dropout": 0.3, "seed": 5}, ()),
]
CASES = {
    f"{estimator.name}, {what}": Case(estimator, settings, frozen)
    for estimator in (FirstOrder(), Unrolled(), Rematerialized(), MixedMode())
    for what, settings, frozen in VARIANTS
} | {
    "truncated": Case(Truncated(num_steps=2, exact=MixedMode()), LEARNED),
    "finite_difference": Case(
        FiniteDifference(0.01), LEARNED | {"step_weights": (0.0, 0.0, 1.0), "grain": "none"}
    ),
    "two copies": Case(Rematerialized(), LEARNED, shard_size=2),
}


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_hypergradients_through_shards_equal_those_of_one_process(num_ranks: int) -> None:
    cases = list(CASES.values())
    on_ranks = run_ranks(num_ranks, hypergradients_in_shards, cases, timeout_s=600.0)
    for position, (name, case) in enumerate(CASES.items()):
        problem = case.problem(NUMBERS)
        expected = case.estimator.meta_gradient(problem.unroll, problem.meta, problem.batch).gradient
        norm = math.sqrt(sum(float(value.square().sum()) for value in expected.values()))
        for results in on_ranks:
            gradient, norm_there = results[position]
            # Sums over tasks in another order.
            assert_gradients_agree(gradient, expected, rtol=1e-10)
            assert norm_there == pytest.approx(norm, rel=1e-12), name
            assert norm_there == on_ranks[0][position][1]


@pytest.mark.parametrize("estimator", [Rematerialized(), MixedMode()])
def test_in_bfloat16_shards_change_nothing_but_the_order_of_sums(estimator: Hypergradient) -> None:
    case = Case(estimator, LEARNED | {"compute": "bfloat16", "recompute_blocks": True})
    on_ranks = run_ranks(2, hypergradients_in_shards, [case], timeout_s=600.0)
    # Products of two tasks side by side, as on each rank: those of four are rounded otherwise, and are 2e-2
    # away (bfloat16 has 8 bits).
    parts = []
    for numbers in (NUMBERS[:2], NUMBERS[2:]):
        problem = case.problem(numbers)
        parts.append(estimator.meta_gradient(problem.unroll, problem.meta, problem.batch).gradient)
    expected = {name: value + parts[1][name] for name, value in parts[0].items()}
    for ((gradient, _),) in on_ranks:
        # Weights are gathered, and gradients summed, in float32. But embedding, norm and head are regions of
        # their own here, and where a region ends the adjoints of bfloat16 activations are added in another
        # order: a rounding of 2^-9 in a few of many terms.
        assert distance(gradient, expected) < 2e-3
