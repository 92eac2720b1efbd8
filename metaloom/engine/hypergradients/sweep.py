"""The adjoint sweep over inner steps, which all but the whole-graph estimator share.

    v = c_K dLq/dphi,  w = 0,  dtheta = c_K dLq/dtheta,  all at phi_K
    for k = K-1 ... 0:
        (v, w), dtheta += pull-back of inner step k, applied to (v, w)
        v += c_k dLq/dphi,  dtheta += c_k dLq/dtheta,  at phi_k
    dtheta += (d phi_0 / d theta)^T v + (d s_0 / d theta)^T w

An estimator says how one inner step is pulled back, and nothing else. In half precision the meta-loss is
multiplied by the tangent scale, so that v, w and dtheta are, until the end.
"""

from __future__ import annotations

import abc
import dataclasses

import torch
from torch import Tensor

from metaloom.engine.hypergradients.base import (
    Hypergradient,
    MetaGradient,
    Tensors,
    add_,
    added,
    filled,
    gradient_if_any,
    meta_losses,
    not_finite,
    prefixed,
    query_losses,
    unprefixed,
)
from metaloom.engine.learner import TaskBatch
from metaloom.engine.snapshots import KeepAll, SnapshotPlan
from metaloom.engine.unroll import Snapshot, Unroll, advance, first_snapshot, leaves, unscaled


@dataclasses.dataclass
class Adjoint:
    """v and w: the derivatives of the meta-loss with respect to phi_k and s_k; with `grads`,
    where an estimator asks for it, that with respect to the inner gradient g_k."""

    fast: dict[str, Tensor]
    state: dict[str, Tensor]
    grads: dict[str, Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class AdjointSweep(Hypergradient):
    """Runs the inner steps without a graph, keeping what the plan says of (phi_k, s_k), then sweeps back over
    them.

    Attributes:
        snapshots: which (phi_k, s_k) are kept, and where.
        num_graph_steps: the last so many inner steps keep their graph instead: nothing of them is computed
            twice, and memory grows by one step's graph each.
    """

    snapshots: SnapshotPlan = dataclasses.field(default_factory=KeepAll)
    num_graph_steps: int = 0

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
            (v, w) at (phi_k, s_k), and the step's share of dtheta, of what the step depends on alone.
        """

    def num_passed_over(self, unroll: Unroll) -> int:
        """How many of the first inner steps have no part in the sweep, and need not be kept."""
        return 0

    def estimate(self, unroll: Unroll, meta: Tensors, batch: TaskBatch) -> MetaGradient:
        theta = leaves(meta)
        top = max(0, unroll.num_steps - self.num_graph_steps)
        first = self.num_passed_over(unroll)
        start = first_snapshot(unroll, meta, batch.num_tasks)
        for step in range(first):
            start = advance(unroll, meta, batch, start, step)
        states = self.snapshots.backwards(
            start, top - first, lambda at, step: advance(unroll, meta, batch, at, first + step)
        )
        del start
        losses, metrics, adjoint, d_theta = self._top(unroll, theta, batch, next(states), top)
        for step in range(top - 1, first - 1, -1):
            at = next(states)
            adjoint, share = self.pull_back(unroll, theta, batch, step, at, adjoint)
            add_(d_theta, share)
            query = _query_gradient(unroll, theta, batch, step, at.fast)
            metrics |= query.metrics
            if query.losses is not None:
                adjoint = Adjoint(added(adjoint.fast, query.d_fast), adjoint.state)
                add_(d_theta, query.d_theta)
                losses = losses + query.losses
            del at  # before the plan makes the next one
        with torch.enable_grad():
            fast, state = unroll.start(theta, batch.num_tasks)
            cotangents = [adjoint.fast[name] for name in fast] + [adjoint.state[name] for name in state]
            add_(d_theta, gradient_if_any([*fast.values(), *state.values()], theta, cotangents))
        metrics["not_finite"] = not_finite(losses, adjoint.fast.values())
        gradient = unscaled(filled(d_theta, theta), unroll.scales.tangent)
        return MetaGradient(gradient, losses, metrics)

    def _top(
        self, unroll: Unroll, theta: Tensors, batch: TaskBatch, at: Snapshot, first_step: int
    ) -> tuple[Tensor, dict[str, Tensor], Adjoint, dict[str, Tensor]]:
        """Losses, metrics, (v, w) and dtheta of everything from state `first_step` on, through its graph."""
        fast, state = leaves(at.fast), leaves(at.state)
        with torch.enable_grad():
            losses, metrics = meta_losses(unroll, theta, (fast, state), batch, first_step)
            inputs = prefixed("fast/", fast) | prefixed("state/", state) | prefixed("theta/", theta)
            bars = gradient_if_any([unroll.scales.tangent * losses.sum()], inputs)
        adjoint = Adjoint(filled(unprefixed("fast/", bars), fast), filled(unprefixed("state/", bars), state))
        d_theta: dict[str, Tensor] = {}
        add_(d_theta, unprefixed("theta/", bars))
        return losses.detach(), metrics, adjoint, d_theta


@dataclasses.dataclass(frozen=True)
class _Query:
    losses: Tensor | None
    metrics: dict[str, Tensor]
    d_fast: dict[str, Tensor]
    d_theta: dict[str, Tensor]


def _query_gradient(
    unroll: Unroll, theta: Tensors, batch: TaskBatch, step: int, fast_values: Tensors
) -> _Query:
    """`c_k Lq` at phi_k, and its derivatives by phi and theta; no losses where c_k is 0."""
    fast = leaves(fast_values)
    with torch.enable_grad():
        losses, metrics = query_losses(unroll, theta, fast, batch, step)
        if losses is None:
            return _Query(None, metrics, {}, {})
        weighted = unroll.step_weights[step] * losses.double()
        grads = gradient_if_any(
            [unroll.scales.tangent * weighted.sum()], prefixed("fast/", fast) | prefixed("theta/", theta)
        )
    return _Query(weighted.detach(), metrics, unprefixed("fast/", grads), unprefixed("theta/", grads))


def rule_vjp(
    unroll: Unroll,
    theta: Tensors,
    at: Snapshot,
    grads: Tensors,
    step: int,
    adjoint: Adjoint,
) -> tuple[Adjoint, dict[str, Tensor]]:
    """(v, w) applied to the Jacobian of the update alone, by phi, s, g and the rates in theta.

    Args:
        at: (phi_k, s_k).
        grads: g_k.
        adjoint: (v, w) at (phi_{k+1}, s_{k+1}).

    Returns:
        (phi_bar, w) with `grads` g_bar; and the rates' share of dtheta.
    """
    fast, state, inner = leaves(at.fast), leaves(at.state), leaves(grads)
    with torch.enable_grad():
        after_fast, after_state = unroll.rule.update(fast, state, inner, unroll.rates.at(theta, fast, step))
    outputs = [*after_fast.values(), *after_state.values()]
    cotangents = [
        *(adjoint.fast[name] for name in after_fast),
        *(adjoint.state[name] for name in after_state),
    ]
    inputs = (
        prefixed("fast/", fast)
        | prefixed("state/", state)
        | prefixed("theta/", theta)
        | prefixed("grads/", inner)
    )
    bars = gradient_if_any(outputs, inputs, cotangents)
    before = Adjoint(
        filled(unprefixed("fast/", bars), fast),
        filled(unprefixed("state/", bars), state),
        filled(unprefixed("grads/", bars), inner),
    )
    return before, unprefixed("theta/", bars)
