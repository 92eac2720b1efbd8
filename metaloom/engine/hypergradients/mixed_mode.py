"""Forward over reverse, one inner step at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from metaloom.engine.hypergradients.base import Tensors, added, unprefixed
from metaloom.engine.hypergradients.sweep import Adjoint, AdjointSweep, step_vjp
from metaloom.engine.learner import TaskBatch
from metaloom.engine.unroll import Snapshot, Unroll, leaves


class MixedMode(AdjointSweep):
    """Exact, and flat in memory: Hessian products come from dual numbers through the inner gradient.

    With g_bar the adjoint of the inner gradient g_k, the products `H_k g_bar` and `M_k g_bar` are
    the tangents of `d L / d (phi, theta)` at phi_k with tangent (g_bar, 0): Kemaev et al. 2025,
    "Scalable Meta-Learning via Mixed-Mode Differentiation", section 4. No graph of a gradient is
    ever built. Whether this or `rematerialized` is faster depends on model and machine. Needs a
    model whose backward pass has forward-mode rules.
    """

    name = "mixed_mode"

    def pull_back(
        self, unroll: Unroll, theta: Tensors, batch: TaskBatch, step: int, at: Snapshot, adjoint: Adjoint
    ) -> tuple[Adjoint, dict[str, Tensor]]:
        fast, state = leaves(at.fast), leaves(at.state)
        with torch.enable_grad():
            grads = leaves(unroll.support_gradient(theta, fast, batch, step, create_graph=False))
            after = unroll.rule.update(fast, state, grads, unroll.rates.at(theta, fast, step))
            before, d_theta = step_vjp(after, adjoint, fast, state, theta, grads)
        products = _tangents_of_gradient(unroll, theta, at.fast, before.grads, batch, step)
        d_fast = added(before.fast, {name: products[name] for name in fast})
        return Adjoint(d_fast, before.state), added(d_theta, unprefixed("theta/", products))


def _tangents_of_gradient(
    unroll: Unroll, theta: Tensors, fast: Tensors, tangents: Tensors, batch: TaskBatch, step: int
) -> dict[str, Tensor]:
    """`H t` under the fast weights' names and `M t` under `theta/<name>`, for tangents t of phi."""
    with forward_ad.dual_level(), torch.enable_grad():
        duals = {name: _dual(value, tangents[name]) for name, value in fast.items()}
        parameters = leaves(theta)
        losses, _ = unroll.learner.losses("support", parameters, duals, batch, step)
        grads = torch.autograd.grad(
            losses.sum(), [*duals.values(), *parameters.values()], allow_unused=True, materialize_grads=True
        )
        names = [*duals, *("theta/" + name for name in parameters)]
        return {name: _tangent(grad) for name, grad in zip(names, grads, strict=True)}


def _dual(primal: Tensor, tangent: Tensor) -> Tensor:
    """A differentiable dual number. A copy, since primals must not be expanded, as phi_0 is."""
    dual: Tensor = forward_ad.make_dual(  # type: ignore[no-untyped-call]
        primal.detach().clone().requires_grad_(), tangent.detach()
    )
    return dual


def _tangent(dual: Tensor) -> Tensor:
    """The tangent of a dual number, zero where nothing dual reached it."""
    tangent: Tensor | None = forward_ad.unpack_dual(dual).tangent  # type: ignore[no-untyped-call]
    return torch.zeros_like(dual) if tangent is None else tangent
