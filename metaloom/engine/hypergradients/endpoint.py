"""What the estimators share that look at the end of adaptation alone: no graph of the inner steps, and no
memory that grows with their number.

Shape letters: T tasks, D elements of one task's fast weights, K inner steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from metaloom.engine.capabilities import kind_of
from metaloom.engine.hypergradients.base import (
    OnGradient,
    Tensors,
    gradient_of,
    meta_losses,
    not_finite,
    prefixed,
    unprefixed,
)
from metaloom.engine.learner import TaskBatch
from metaloom.engine.unroll import Snapshot, Unroll, advance, constants, first_snapshot, leaves
from metaloom.errors import CapabilityError


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
    at = first_snapshot(unroll, meta, batch.num_tasks)
    start, last = at.fast, unroll.num_steps - 1
    for step in range(last):
        at = advance(unroll, meta, batch, at, step)
    fixed = constants(meta)
    with torch.enable_grad():
        grads = unroll.support_gradient(fixed, leaves(at.fast), batch, last, create_graph=False)
    with torch.no_grad():
        end, _ = unroll.update(fixed, at.fast, at.state, grads, last)
    return Path(start, at, grads, end)


@dataclasses.dataclass(frozen=True)
class End:
    """The meta-loss where adaptation ends, and its derivatives there.

    Attributes:
        losses: c_K Lq, `[T]`, float64.
        metrics: after adaptation.
        d_fast: c_K dLq/dphi at phi_K.
        d_theta: c_K dLq/dtheta at phi_K, summed over tasks.
    """

    losses: Tensor
    metrics: dict[str, Tensor]
    d_fast: dict[str, Tensor]
    d_theta: dict[str, Tensor]


def differentiate_end(unroll: Unroll, theta: Tensors, batch: TaskBatch, path: Path) -> End:
    """The meta-loss at phi_K with its derivatives by phi and by theta, leaves that require gradients."""
    fast = leaves(path.end)
    with torch.enable_grad():
        losses, metrics = meta_losses(unroll, theta, (fast, {}), batch, unroll.num_steps)
        unroll.require_finite()
        grads = gradient_of([losses.sum()], prefixed("fast/", fast) | prefixed("theta/", theta))
    d_fast = unprefixed("fast/", grads)
    metrics["not_finite"] = not_finite(losses, d_fast.values())
    return End(losses.detach(), metrics, d_fast, unprefixed("theta/", grads))


def pull_back_start(unroll: Unroll, theta: Tensors, num_tasks: int, cotangents: Tensors) -> dict[str, Tensor]:
    """`(d phi_0 / d theta)^T v` for v = `cotangents`, summed over tasks."""
    with torch.enable_grad():
        start = unroll.learner.init(theta, num_tasks)
        return gradient_of(list(start.values()), theta, [cotangents[name] for name in start])


def tell_of_initialisation(gradient: Tensors, on_final: OnGradient | None) -> None:
    """Tells of what is final once the start is pulled back: the initialisation acts in no other way."""
    for name, value in gradient.items():
        if on_final is not None and kind_of(name) == "init":
            on_final(name, value)


def refuse_float16(name: str, unroll: Unroll) -> None:
    """Passes where an estimator without scales of its own can compute.

    Raises:
        CapabilityError: the precision is float16.
    """
    if unroll.learner.precision.compute == "float16":
        raise CapabilityError(
            f"{name} has no scaling of what vanishes or overflows in float16: set precision.compute to "
            "bfloat16 or float32, or take another estimator."
        )


def flatten(tensors: Mapping[str, Tensor]) -> Tensor:
    """Fast weights, or what is shaped like them, as one vector per task: `[T, D]`."""
    return torch.cat([value.flatten(1) for value in tensors.values()], dim=1)


def unflatten(vectors: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `flatten`, in the names and shapes of `like`."""
    parts = torch.split(vectors, [value[0].numel() for value in like.values()], dim=1)
    return {name: part.view_as(value) for (name, value), part in zip(like.items(), parts, strict=True)}
