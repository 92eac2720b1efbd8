"""A task that is not finite is left out of an outer step before it is differentiated.

Shape letters: T tasks, K inner steps.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from metaloom.engine.algorithms.base import Algorithm
from metaloom.engine.algorithms.maml import Maml
from metaloom.engine.hypergradients.base import Hypergradient
from metaloom.engine.learner import TaskBatch
from metaloom.engine.left_out import Differentiated, differentiated
from metaloom.engine.sharding.replicated import Replicated
from tests.numerics.poisoned import Poison, poisoned
from tests.numerics.problems import Problem, assert_gradients_agree
from tests.numerics.ways import WAYS

BAD = 1  # of the tasks 0, 1, 2
KINDS = {
    "support loss before adaptation": Poison((BAD,)),
    "support loss after 1 inner step": Poison((BAD,), step=1, factor=math.inf),
    "query loss after K inner steps": Poison((BAD,), "outer", None),
}


def finite(algorithm: Algorithm, problem: Problem, batch: TaskBatch) -> Differentiated:
    return differentiated(
        algorithm,
        problem.meta,
        batch,
        problem.unroll.scales,
        Replicated(),
        outer_step=0,
        on_final=None,
    )


def poisoned_maml(problem: Problem, estimator: Hypergradient, poison: Poison) -> Maml:
    return Maml(poisoned(problem.unroll, poison), estimator)


def rtol_of(way: str) -> float:
    # Matrix products of other sizes add in another order; solvers and differences carry that on.
    return 1e-9 if "difference" in way or "implicit" in way else 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_is_that_of_the_other_tasks(way: str, kind: str) -> None:
    estimator, make = WAYS[way]
    problem = make(3)
    expected = estimator.meta_gradient(problem.unroll, problem.meta, problem.batch.picked([0, 2]))
    found = finite(poisoned_maml(problem, estimator, KINDS[kind]), problem, problem.batch)
    assert_gradients_agree(found.part.gradient, expected.gradient, rtol=rtol_of(way))
    reason = kind.replace("K", str(problem.unroll.num_steps))
    if "earlier losses" in way or "fast" in way or "symmetries" in way:  # the meta-loss has a part before
        reason = reason.replace(f"query loss after {problem.unroll.num_steps} inner steps", "query loss")
    assert [left.number for left in found.left_out] == [BAD]
    assert found.left_out[0].reason.startswith(reason)
    # What the combiner sees of it is a dummy.
    assert found.batch.numbers == (0, 0, 2)
    assert found.batch.weights is not None
    assert found.batch.weights.tolist() == [1.0, 0.0, 1.0]
    torch.testing.assert_close(found.part.losses[[0, 2]], expected.losses, rtol=1e-12, atol=0)
    for name, values in found.part.metrics.items():
        torch.testing.assert_close(values[[0, 2]], expected.metrics[name], rtol=1e-6, atol=1e-12)
        assert values[1] == 0.0, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["unrolled", "rematerialized", "mixed_mode", "first_order", "implicit"])
def test_a_weight_of_zero_alone_would_poison_the_gradient(way: str, kind: str) -> None:
    estimator, make = WAYS[way]
    problem = make(3)
    weights = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    batch = dataclasses.replace(problem.batch, weights=weights)
    found = poisoned_maml(problem, estimator, KINDS[kind]).meta_gradient(problem.meta, batch)
    assert any(not value.isfinite().all() for value in found.gradient.values())


@pytest.mark.parametrize("way", WAYS)
def test_tasks_that_are_all_finite_are_computed_once_and_bit_for_bit_as_ever(way: str) -> None:
    estimator, make = WAYS[way]
    problem = make(2)
    plain = estimator.meta_gradient(problem.unroll, problem.meta, problem.batch)
    found = finite(Maml(problem.unroll, estimator), problem, problem.batch)
    assert found.left_out == ()
    assert found.batch is problem.batch
    for name, value in plain.gradient.items():
        assert torch.equal(found.part.gradient[name], value), name
