"""The hypergradient without second derivatives."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from metaloom.engine.hypergradients.base import OnGradient, Tensors
from metaloom.engine.hypergradients.sweep import Adjoint, AdjointSweep, rule_vjp
from metaloom.engine.inner_loops.rates import RATES
from metaloom.engine.learner import TaskBatch
from metaloom.engine.unroll import Snapshot, Unroll, constants, leaves


@dataclasses.dataclass(frozen=True)
class FirstOrder(AdjointSweep):
    """First-order MAML (Finn et al. 2017, section 5.2): the inner gradients count as constants.

    An approximation: the Hessian terms are left out, so a backbone is moved by the query losses
    alone. Learned rates keep their first-order part, `-(g_k * v)`. About a third of the exact
    estimators' time.
    """

    name = "first_order"

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
        if unroll.rule.is_affine_in_gradient and not any(name.startswith(RATES) for name in theta):
            # The update's Jacobians then are the same at any g.
            grads = {name: torch.zeros_like(value) for name, value in at.fast.items()}
        else:
            fixed, fast = constants(theta), leaves(at.fast)
            with torch.enable_grad():
                grads = unroll.support_gradient(fixed, fast, batch, step, create_graph=False)
        return rule_vjp(unroll, theta, at, grads, step, adjoint)
