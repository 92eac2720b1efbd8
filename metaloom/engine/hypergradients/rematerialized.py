"""Reverse over reverse, one inner step at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from metaloom.engine.hypergradients.base import Tensors
from metaloom.engine.hypergradients.sweep import Adjoint, AdjointSweep, step_vjp
from metaloom.engine.learner import TaskBatch
from metaloom.engine.unroll import Snapshot, Unroll, leaves


class Rematerialized(AdjointSweep):
    """Exact, and flat in memory: each inner step's graph is built again, differentiated and freed.

    Keeps (phi_k, s_k) per step and the graph of one step. Time: one more forward and backward
    pass per inner step than `unrolled`. Franceschi et al. 2017, "Forward and Reverse
    Gradient-Based Hyperparameter Optimization", algorithm 1, with checkpoints at every step.
    """

    name = "rematerialized"

    def pull_back(
        self, unroll: Unroll, theta: Tensors, batch: TaskBatch, step: int, at: Snapshot, adjoint: Adjoint
    ) -> tuple[Adjoint, dict[str, Tensor]]:
        fast, state = leaves(at.fast), leaves(at.state)
        with torch.enable_grad():
            after = unroll.inner_step(theta, fast, state, batch, step, create_graph=True)
            return step_vjp(after, adjoint, fast, state, theta)
