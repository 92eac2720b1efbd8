"""The two tasks by which gradient surgery was introduced: a steep, curved valley that no sum can follow."""

from __future__ import annotations

import pytest
import torch

from benchmarks.reproduce.landscape import START, differentiated, end_of_training, losses
from metaloom.engine.combiners.even import Even
from metaloom.engine.combiners.pcgrad import PCGrad


def test_the_gradients_are_those_of_the_losses() -> None:
    point = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    values, gradients = differentiated(*START)
    for loss, value, gradient in zip(losses(point), values, gradients, strict=True):
        (expected,) = torch.autograd.grad(loss, point, retain_graph=True)
        assert value == pytest.approx(float(loss.detach()))
        assert gradient == pytest.approx(expected.tolist())


def test_adam_with_surgery_reaches_the_minimum_that_adam_with_the_mean_does_not() -> None:
    # The paper takes 500 000 steps of 0.001; a rate of 0.02 gets as far in a fiftieth of them.
    plain_point, plain = end_of_training(Even(), num_steps=5000, lr=0.02)
    surgical_point, surgical = end_of_training(PCGrad(0), num_steps=10_000, lr=0.02)
    # The mean stays on the far side of the first task's valley, and the second's loss does not fall at all:
    # it starts at 29.4.
    assert float(plain_point[0]) > 0.5
    assert float(plain_point[1]) < -1.0
    assert float(plain[1]) > 29.4
    # Surgery follows the valley to where both losses fall without end: x near -2, y far up. Which steps it
    # takes there depends on rounding, so the bounds are wide.
    assert -3.0 < float(surgical_point[0]) < -0.5
    assert float(surgical_point[1]) > 0.5
    assert float(surgical.max()) < -5.0
