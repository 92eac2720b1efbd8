"""What the estimators share that look at the end of adaptation alone: no graph of the inner steps, and no
memory that grows with their number.

Shape letters: T tasks, D elements of one task's fast weights, K inner steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from metaloom.engine.hypergradients.base import (
    Tensors,
    gradient_of,
    prefixed,
    query_losses,
    unprefixed,
)
from metaloom.engine.learner import TaskBatch
from metaloom.engine.unroll import Snapshot, Unroll, leaves


@dataclasses.dataclass(frozen=True)
class Path:
    """Both ends of an adaptation, without a graph.

    Attributes:
        start: phi_0.
        before: (phi_{K-1}, s_{K-1}), where the last inner step starts.
        grads: g_{K-1}, the inner gradient there.
        end: phi_K.
    """

    start: dict[str, Tensor]
    before: Snapshot
    grads: dict[str, Tensor]
    end: dict[str, Tensor]


def adapt_to_end(unroll: Unroll, meta: Tensors, batch: TaskBatch) -> Path:
    """Runs the K >= 1 inner steps and keeps only their ends.

    Memory: three copies of the fast weights, two of the rule's state, one step's activations.
    """
    assert unroll.num_steps > 0, "there is no last inner step where there is none"
    constants = {name: value.detach() for name, value in meta.items()}
    with torch.no_grad():
        start, state = unroll.start(constants, batch.num_tasks)
    fast = start
    for step in range(unroll.num_steps):
        before = Snapshot(fast, state)
        with torch.enable_grad():
            grads = unroll.support_gradient(constants, leaves(fast), batch, step, create_graph=False)
        with torch.no_grad():
            fast, state = unroll.rule.update(fast, state, grads, unroll.rates.at(constants, fast, step))
    return Path(start, before, grads, fast)


@dataclasses.dataclass(frozen=True)
class End:
    """The meta-loss where adaptation ends, and its derivatives there.

    Attributes:
        losses: c_K Lq, `[T]`, float64.
        metrics: before and after adaptation.
        d_fast: c_K dLq/dphi at phi_K.
        d_theta: c_K dLq/dtheta at phi_K, summed over tasks.
    """

    losses: Tensor
    metrics: dict[str, Tensor]
    d_fast: dict[str, Tensor]
    d_theta: dict[str, Tensor]


def differentiate_end(unroll: Unroll, theta: Tensors, batch: TaskBatch, path: Path) -> End:
    """The meta-loss at phi_K with its derivatives by phi and by theta, leaves that require gradients."""
    weight, fast = unroll.step_weights[-1], leaves(path.end)
    with torch.no_grad():
        metrics = query_losses(unroll, theta, path.start, batch, 0)[1]
    with torch.enable_grad():
        losses, after = query_losses(unroll, theta, fast, batch, unroll.num_steps)
        grads = gradient_of([weight * losses.sum()], prefixed("fast/", fast) | prefixed("theta/", theta))
    return End(
        weight * losses.detach().double(),
        metrics | after,
        unprefixed("fast/", grads),
        unprefixed("theta/", grads),
    )


def pull_back_start(unroll: Unroll, theta: Tensors, num_tasks: int, cotangents: Tensors) -> dict[str, Tensor]:
    """`(d phi_0 / d theta)^T v` for v = `cotangents`, summed over tasks."""
    with torch.enable_grad():
        start = unroll.learner.init(theta, num_tasks)
        return gradient_of(list(start.values()), theta, [cotangents[name] for name in start])


def flatten(tensors: Mapping[str, Tensor]) -> Tensor:
    """Fast weights, or what is shaped like them, as one vector per task: `[T, D]`."""
    return torch.cat([value.flatten(1) for value in tensors.values()], dim=1)


def unflatten(vectors: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `flatten`, in the names and shapes of `like`."""
    parts = torch.split(vectors, [value[0].numel() for value in like.values()], dim=1)
    return {name: part.view_as(value) for (name, value), part in zip(like.items(), parts, strict=True)}
