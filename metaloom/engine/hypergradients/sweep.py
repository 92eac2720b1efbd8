"""The adjoint sweep over inner steps, which all but the whole-graph estimator share.

    v = c_K dLq/dphi,  w = 0,  dtheta = c_K dLq/dtheta,  all at phi_K
    for k = K-1 ... 0:
        (v, w), dtheta += pull-back of inner step k, applied to (v, w)
        v += c_k dLq/dphi,  dtheta += c_k dLq/dtheta,  at phi_k
    dtheta += (d phi_0 / d theta)^T v

An estimator says how one inner step is pulled back, and nothing else.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from metaloom.engine.hypergradients.base import (
    Hypergradient,
    MetaGradient,
    Tensors,
    add_,
    added,
    gradient_of,
    prefixed,
    query_losses,
    unprefixed,
)
from metaloom.engine.learner import TaskBatch
from metaloom.engine.unroll import Snapshot, Unroll, adapt, leaves


@dataclasses.dataclass
class Adjoint:
    """v and w: the derivatives of the meta-loss with respect to phi_k and s_k; with `grads`,
    where an estimator asks for it, that with respect to the inner gradient g_k."""

    fast: dict[str, Tensor]
    state: dict[str, Tensor]
    grads: dict[str, Tensor] = dataclasses.field(default_factory=dict)


class AdjointSweep(Hypergradient):
    """Runs the K inner steps without a graph, keeping (phi_k, s_k), then sweeps back over them."""

    @abc.abstractmethod
    def pull_back(
        self, unroll: Unroll, theta: Tensors, batch: TaskBatch, step: int, at: Snapshot, adjoint: Adjoint
    ) -> tuple[Adjoint, dict[str, Tensor]]:
        """The adjoint before inner step `step` from the one after it.

        Args:
            theta: meta-parameters, leaves that require gradients.
            at: (phi_k, s_k), where the step starts.
            adjoint: (v, w) at (phi_{k+1}, s_{k+1}).

        Returns:
            (v, w) at (phi_k, s_k), and the step's share of dtheta.
        """

    def estimate(self, unroll: Unroll, meta: Tensors, batch: TaskBatch) -> MetaGradient:
        theta = leaves(meta)
        snapshots = adapt(unroll, meta, batch, num_steps=unroll.num_steps)
        losses = torch.zeros(batch.num_tasks, dtype=torch.float64, device=next(iter(meta.values())).device)
        d_theta = {name: torch.zeros_like(value) for name, value in theta.items()}
        adjoint = Adjoint(_zeros_like(snapshots[-1].fast), _zeros_like(snapshots[-1].state))
        metrics: dict[str, Tensor] = {}
        for step in range(unroll.num_steps, -1, -1):
            at = snapshots.pop()
            if step < unroll.num_steps:
                adjoint, share = self.pull_back(unroll, theta, batch, step, at, adjoint)
                add_(d_theta, share)
            weight = unroll.step_weights[step]
            if weight != 0.0:
                query = _query_gradient(unroll, theta, batch, step, at.fast)
                adjoint = Adjoint(added(adjoint.fast, query.d_fast), adjoint.state)
                add_(d_theta, query.d_theta)
                losses += weight * query.losses
                metrics |= query.metrics
            elif step == 0:
                with torch.no_grad():
                    metrics |= query_losses(unroll, meta, at.fast, batch, step)[1]
        with torch.enable_grad():
            start = unroll.learner.init(theta, batch.num_tasks)
            add_(d_theta, gradient_of(list(start.values()), theta, [adjoint.fast[name] for name in start]))
        return MetaGradient(d_theta, losses, metrics)


@dataclasses.dataclass(frozen=True)
class _Query:
    losses: Tensor
    metrics: dict[str, Tensor]
    d_fast: dict[str, Tensor]
    d_theta: dict[str, Tensor]


def _query_gradient(
    unroll: Unroll, theta: Tensors, batch: TaskBatch, step: int, fast_values: Tensors
) -> _Query:
    """Lq at phi_k, `c_k dLq/dphi` and `c_k dLq/dtheta`."""
    fast = leaves(fast_values)
    with torch.enable_grad():
        losses, metrics = query_losses(unroll, theta, fast, batch, step)
        grads = gradient_of(
            [unroll.step_weights[step] * losses.sum()], prefixed("fast/", fast) | prefixed("theta/", theta)
        )
    return _Query(losses.detach().double(), metrics, unprefixed("fast/", grads), unprefixed("theta/", grads))


def step_vjp(
    after: tuple[Tensors, Tensors],
    adjoint: Adjoint,
    fast: Tensors,
    state: Tensors,
    theta: Tensors,
    grads: Tensors | None = None,
) -> tuple[Adjoint, dict[str, Tensor]]:
    """(v, w) applied to the Jacobian of (phi', s') = `after` by (phi, s, theta), and g if given.

    Args:
        after: (phi', s'), a graph over the leaves that follow.
        adjoint: (v, w) at `after`.
        fast, state, theta, grads: the leaves to differentiate by.
    """
    after_fast, after_state = after
    outputs = [*after_fast.values(), *after_state.values()]
    cotangents = [
        *(adjoint.fast[name] for name in after_fast),
        *(adjoint.state[name] for name in after_state),
    ]
    inputs = (
        prefixed("fast/", fast)
        | prefixed("state/", state)
        | prefixed("theta/", theta)
        | prefixed("grads/", grads or {})
    )
    bars = gradient_of(outputs, inputs, cotangents)
    before = Adjoint(unprefixed("fast/", bars), unprefixed("state/", bars), unprefixed("grads/", bars))
    return before, unprefixed("theta/", bars)


def _zeros_like(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) for name, value in tensors.items()}
