"""Finite differences of first-order gradients where adaptation ends.

Shape letters: T tasks, D elements of one task's fast weights, K inner steps.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from metaloom.engine.capabilities import kind_of
from metaloom.engine.hypergradients.base import (
    Hypergradient,
    MetaGradient,
    OnGradient,
    Tensors,
    add_,
    finishing,
    gradient_of,
    prefixed,
    unprefixed,
)
from metaloom.engine.hypergradients.endpoint import (
    Path,
    adapt_to_end,
    differentiate_end,
    flatten,
    pull_back_start,
    tell_of_initialisation,
    unflatten,
)
from metaloom.engine.learner import TaskBatch
from metaloom.engine.precision import HALF
from metaloom.engine.unroll import Unroll, constants, leaves
from metaloom.errors import CapabilityError


@dataclasses.dataclass(frozen=True)
class FiniteDifference(Hypergradient):
    """SAMA: Choe et al. 2023, "Making Scalable Meta Learning Practical", sections 3.1 and 3.2.

    With `v = dLq/dphi` at phi_K, and the last inner step's `phi_K = update(phi_{K-1}, s_{K-1}, g_{K-1})`

        g_bar  = (d update / d g)^T v                      at that step's phi, s and g
        dtheta = dLq/dtheta + M g_bar + (d phi_0 / d theta)^T v
        M g_bar = (dL/dtheta(phi_K + e g_bar) - dL/dtheta(phi_K - e g_bar)) / 2e,   e = epsilon / |g_bar|

    g_bar carries the rule's own scaling (`-rate * v` for gradient descent; Adam's by its moments): the
    paper's adaptation to adaptive optimizers, here the exact derivative of the rule that ran. Each task
    has its own e, and moves by `epsilon` in the norm over all its fast weights, as in DARTS (Liu et al.
    2018, equation 8). M is taken at phi_K as in the paper, and L is the inner loss of the last inner step.

    An approximation: the effect of theta on earlier inner gradients is left out, and the Jacobian of
    every inner step by phi counts as the identity (the paper approximates the inverse Hessian by it), so
    the initialisation gets v itself. Rates are refused: the derivation takes the last step to have come to
    rest, where a rate has no effect. Nothing is differentiated twice: four gradients beside adaptation,
    and memory that does not depend on K. Half precision is refused: it would round the moved weights back.

    Attributes:
        epsilon: how far phi_K is moved either way, above 0. The error falls with its square until rounding
            takes over.
    """

    name = "finite_difference"

    epsilon: float = 0.01

    def estimate(
        self, unroll: Unroll, meta: Tensors, batch: TaskBatch, on_final: OnGradient | None
    ) -> MetaGradient:
        precision = unroll.learner.precision.compute
        if precision in HALF:
            raise CapabilityError(
                f"finite_difference compares gradients at weights a little apart, which {precision} rounds "
                "to the same; compute in float32, or take another estimator."
            )
        theta = leaves(meta)
        path = adapt_to_end(unroll, meta, batch)
        end = differentiate_end(unroll, theta, batch, path)
        gradient = dict(end.d_theta)
        add_(gradient, pull_back_start(unroll, theta, batch.num_tasks, end.d_fast))
        if any(kind_of(name) != "init" for name in theta):  # where adaptation starts, L does not see
            grads_bar = _gradient_adjoint(unroll, theta, path, end.d_fast)
            tell_of_initialisation(gradient, on_final)
            self._add_mixed_product(gradient, unroll, theta, batch, path, grads_bar, on_final)
        return MetaGradient(gradient, end.losses, end.metrics)

    def _add_mixed_product(
        self,
        gradient: dict[str, Tensor],
        unroll: Unroll,
        theta: Tensors,
        batch: TaskBatch,
        path: Path,
        vectors: Tensors,
        on_final: OnGradient | None,
    ) -> None:
        """Adds `M t` by central differences, for one vector t per task; summed over tasks. With it the
        gradient is final."""
        at, towards = flatten(path.end), flatten(vectors)
        norms = torch.linalg.vector_norm(towards, dim=1)  # [T]
        # A task whose vector is zero is not moved, and its weight is zero.
        moves = towards * (self.epsilon / torch.where(norms == 0.0, 1.0, norms))[:, None]
        weights = norms / (2.0 * self.epsilon)
        product = {name: torch.zeros_like(value) for name, value in theta.items()}

        def finish(name: str, value: Tensor) -> Tensor:
            return gradient[name] + (product[name] + value)

        for sign in (1.0, -1.0):
            on_gradient = finishing(on_final if sign < 0.0 else None, finish)
            fast = unflatten(at + sign * moves, path.end)
            with torch.enable_grad():
                losses, _ = unroll.learner.losses("support", theta, fast, batch, unroll.num_steps - 1)
                grads = gradient_of(
                    [losses @ (sign * weights)], prefixed("theta/", theta), on_gradient=on_gradient
                )
            add_(product, unprefixed("theta/", grads))
        add_(gradient, product)


def _gradient_adjoint(unroll: Unroll, theta: Tensors, path: Path, adjoint: Tensors) -> dict[str, Tensor]:
    """g_bar: v applied to the derivative of the last inner step's update by its gradient."""
    fast, state = path.before.fast, path.before.state
    grads = leaves(path.grads)
    with torch.enable_grad():
        after, _ = unroll.update(constants(theta), fast, state, grads, unroll.num_steps - 1)
        return gradient_of(list(after.values()), grads, [adjoint[name] for name in after])
