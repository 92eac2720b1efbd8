"""Reverse over reverse, one inner step at a time."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from metaloom.engine.hypergradients.base import (
    OnGradient,
    Tensors,
    added,
    gradient_if_any,
    prefixed,
    unprefixed,
)
from metaloom.engine.hypergradients.sweep import Adjoint, AdjointSweep, completed, rule_vjp
from metaloom.engine.learner import TaskBatch
from metaloom.engine.unroll import Snapshot, Unroll, leaves, unscaled


@dataclasses.dataclass(frozen=True)
class Rematerialized(AdjointSweep):
    """Exact, and flat in memory: each inner gradient's graph is built again, differentiated and freed.

    `H_k g_bar` and `M_k g_bar` are the vector-Jacobian products of the inner gradient g_k. Keeps
    (phi_k, s_k) per step and the graph of one gradient. Time: one more forward and backward
    pass per inner step than `unrolled`. Franceschi et al. 2017, "Forward and Reverse
    Gradient-Based Hyperparameter Optimization", algorithm 1, with checkpoints at every step.
    """

    name = "rematerialized"

    def pull_back(
        self,
        unroll: Unroll,
        theta: Tensors,
        batch: TaskBatch,
        step: int,
        at: Snapshot,
        adjoint: Adjoint,
        on_complete: OnGradient | None,
    ) -> tuple[Adjoint, dict[str, Tensor]]:
        fast = leaves(at.fast)
        with torch.enable_grad():
            grads = unroll.scaled_support_gradient(theta, fast, batch, step, derivative="reverse")
        before, share = rule_vjp(unroll, theta, at, unscaled(grads, unroll.scales.loss), step, adjoint)
        known = prefixed("fast/", before.fast) | prefixed("theta/", share)
        if on_complete is not None:
            for name, value in before.state.items():
                on_complete(f"state/{name}", value)
        # The products of the scaled gradient with g_bar itself: g_bar / S would vanish in half precision.
        scaled = gradient_if_any(
            list(grads.values()),
            prefixed("fast/", fast) | prefixed("theta/", theta),
            [before.grads[name] for name in grads],
            on_gradient=completed(on_complete, known, unroll.scales.loss),
        )
        products = unscaled(scaled, unroll.scales.loss)
        d_fast = added(before.fast, unprefixed("fast/", products))
        return Adjoint(d_fast, before.state), added(share, unprefixed("theta/", products))
