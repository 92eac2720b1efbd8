"""The two tasks by which gradient surgery was introduced: a steep, curved valley that no sum can follow."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from metaloom.engine.combiners.base import TaskRecord, TaskRule
from metaloom.engine.combiners.even import Even
from metaloom.engine.combiners.pcgrad import PCGrad

START, FLOOR = (0.5, -3.0), 5e-6


def losses(point: Tensor) -> tuple[Tensor, Tensor]:
    """Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", appendix D.

    Each has a singular valley, `x / 2 = -tanh y` and `x / 2 = tanh y - 2`, and these meet at x = -2 as y goes
    to infinity.
    """
    x, y = point
    first = 20.0 * torch.log(torch.clamp((0.5 * x + torch.tanh(y)).abs(), min=FLOOR))
    second = 25.0 * torch.log(torch.clamp((0.5 * x - torch.tanh(y) + 2.0).abs(), min=FLOOR))
    return first, second


def differentiated(x: float, y: float) -> tuple[list[float], list[list[float]]]:
    """The losses and their gradients, in a tenth of the time that autograd takes."""
    tanh = math.tanh(y)
    values, gradients = [], []
    for factor, inside, sign in ((20.0, 0.5 * x + tanh, 1.0), (25.0, 0.5 * x - tanh + 2.0, -1.0)):
        slope = factor / inside if abs(inside) > FLOOR else 0.0
        values.append(factor * math.log(max(abs(inside), FLOOR)))
        gradients.append([0.5 * slope, sign * slope * (1.0 - tanh * tanh)])
    return values, gradients


def end_of_training(rule: TaskRule, *, num_steps: int, lr: float) -> tuple[Tensor, Tensor]:
    """The mean point over the last fifth of the steps, for Adam does not come to rest in a valley without a
    floor; and there the losses' medians."""
    point = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([point], lr=lr)
    tail: list[Tensor] = []
    for step in range(num_steps):
        values, by_task = differentiated(*point.tolist())
        gradients = torch.tensor(by_task, dtype=torch.float64)
        tasks = [TaskRecord(2 * step + task, None, value) for task, value in enumerate(values)]
        weights = rule.coefficients(tasks, gradients @ gradients.T)
        point.grad = torch.tensor(weights, dtype=torch.float64) @ gradients
        adam.step()
        if step >= num_steps * 4 // 5:
            tail.append(torch.tensor([*point.tolist(), *values]))
    ends = torch.stack(tail).double()
    return ends[:, :2].mean(0), ends[:, 2:].median(0).values


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
