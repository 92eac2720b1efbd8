"""The hypergradient without second derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from metaloom.engine.hypergradients.base import Tensors
from metaloom.engine.hypergradients.sweep import Adjoint, AdjointSweep, step_vjp
from metaloom.engine.learner import TaskBatch
from metaloom.engine.unroll import Snapshot, Unroll, leaves


class FirstOrder(AdjointSweep):
    """First-order MAML (Finn et al. 2017, section 5.2): the inner gradients count as constants.

    An approximation: the Hessian terms are left out, so a backbone is moved by the query losses
    alone. Learned rates keep their first-order part, `-(g_k * v)`. About a third of the exact
    estimators' time.
    """

    name = "first_order"

    def pull_back(
        self, unroll: Unroll, theta: Tensors, batch: TaskBatch, step: int, at: Snapshot, adjoint: Adjoint
    ) -> tuple[Adjoint, dict[str, Tensor]]:
        fast, state = leaves(at.fast), leaves(at.state)
        with torch.enable_grad():
            grads = unroll.support_gradient(theta, fast, batch, step, create_graph=False)
            after = unroll.rule.update(fast, state, grads, unroll.rates.at(theta, fast, step))
            return step_vjp(after, adjoint, fast, state, theta)
