"""The two tasks by which gradient surgery was introduced: a steep, curved valley that no sum can follow.

python -m benchmarks.reproduce.landscape --seed 0     # ten seconds; prints JSON
"""

from __future__ import annotations

import argparse
import json
import math

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


def main() -> None:
    """Prints what `run` of the reproductions reads: the loss of the second task where each rule ends."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce.landscape")
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    torch.set_num_threads(1)
    ends = {
        "Adam": end_of_training(Even(), num_steps=10_000, lr=0.02),
        "Adam with PCGrad": end_of_training(PCGrad(seed), num_steps=10_000, lr=0.02),
    }
    methods = [
        {"name": name, "mean": [float(values[1])], "ci95": [None], "end": point.tolist()}
        for name, (point, values) in ends.items()
    ]
    print(json.dumps(methods))


if __name__ == "__main__":
    main()
