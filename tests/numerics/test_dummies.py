"""A task of weight zero takes part in every pass and in no result."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from metaloom.engine.learner import TaskBatch
from tests.numerics.problems import assert_gradients_agree
from tests.numerics.ways import WAYS


def with_dummies(batch: TaskBatch, num_dummies: int) -> TaskBatch:
    """The first task repeated behind the others, with weight zero."""
    rows = [*range(batch.num_tasks), *(0,) * num_dummies]

    def repeated(part: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value[rows] for name, value in part.items()}

    return TaskBatch(
        tuple(batch.numbers[row] for row in rows),
        repeated(dict(batch.support)),
        repeated(dict(batch.query)),
        weights=torch.tensor([1.0] * batch.num_tasks + [0.0] * num_dummies, dtype=torch.float64),
    )


@pytest.mark.parametrize("way", WAYS)
def test_a_dummy_adds_nothing(way: str) -> None:
    estimator, make = WAYS[way]
    problem = make(2)
    expected = estimator.meta_gradient(problem.unroll, problem.meta, problem.batch)
    batch = with_dummies(problem.batch, 1)
    actual = estimator.meta_gradient(problem.unroll, problem.meta, batch)
    # Matrix products of other sizes add in another order; solvers and differences carry that on.
    rtol = 1e-9 if "difference" in way or "implicit" in way else 1e-11
    assert_gradients_agree(actual.gradient, expected.gradient, rtol=rtol)
    torch.testing.assert_close(actual.losses[:2], expected.losses, rtol=1e-12, atol=0)
    assert actual.losses[2] == 0.0
    for name, value in expected.metrics.items():
        torch.testing.assert_close(actual.metrics[name][:2], value, rtol=1e-6, atol=1e-12)
        assert actual.metrics[name][2] == 0.0, name


@pytest.mark.parametrize("way", ["rematerialized", "mixed_mode", "implicit", "reptile"])
def test_dummies_alone_give_exactly_nothing(way: str) -> None:
    # What a rank without tasks of its own computes: zero to the last bit, whatever the passes.
    estimator, make = WAYS[way]
    problem = make(2)
    batch = dataclasses.replace(problem.batch, weights=torch.zeros(2, dtype=torch.float64))
    result = estimator.meta_gradient(problem.unroll, problem.meta, batch)
    for value in (*result.gradient.values(), result.losses, *result.metrics.values()):
        assert float(value.abs().max()) == 0.0


def test_micro_batches_keep_the_weights_of_their_tasks() -> None:
    batch = with_dummies(WAYS["rematerialized"][1](2).batch, 3)
    weights = [part.weights for part in batch.split(2)]
    assert [[] if each is None else each.tolist() for each in weights] == [[1.0, 1.0], [0.0, 0.0], [0.0]]
    assert all(part.weights is None for part in dataclasses.replace(batch, weights=None).split(2))
