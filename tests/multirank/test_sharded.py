"""Hypergradients through sharded weights, on real ranks, equal those of one process."""

from __future__ import annotations

import math
from typing import Any

import pytest

from metaloom.engine.hypergradients.first_order import FirstOrder
from metaloom.engine.hypergradients.mixed_mode import MixedMode
from metaloom.engine.hypergradients.rematerialized import Rematerialized
from metaloom.engine.hypergradients.unrolled import Unrolled
from tests.multirank.processes import run_ranks
from tests.multirank.sharded_problems import NUMBERS, Case, hypergradients_in_shards
from tests.numerics.problems import assert_gradients_agree

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
}


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_hypergradients_through_shards_equal_those_of_one_process(num_ranks: int) -> None:
    cases = list(CASES.values())
    on_ranks = run_ranks(num_ranks, hypergradients_in_shards, cases, timeout_s=200.0)
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
