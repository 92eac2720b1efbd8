"""Forward over reverse, one inner step at a time."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.autograd import forward_ad

from metaloom.engine.hypergradients.base import (
    OnGradient,
    Tensors,
    added,
    filled,
    gradient_if_any,
    prefixed,
    unprefixed,
)
from metaloom.engine.hypergradients.sweep import Adjoint, AdjointSweep, completed, rule_vjp
from metaloom.engine.learner import TaskBatch
from metaloom.engine.unroll import Snapshot, Unroll, leaves, unscaled


@dataclasses.dataclass(frozen=True)
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
        self,
        unroll: Unroll,
        theta: Tensors,
        batch: TaskBatch,
        step: int,
        at: Snapshot,
        adjoint: Adjoint,
        on_complete: OnGradient | None,
    ) -> tuple[Adjoint, dict[str, Tensor]]:
        if unroll.rule.is_affine_in_gradient:
            # No adjoint but that of the rates depends on g, which comes out of the same pass as the products.
            anything = {name: torch.zeros_like(value) for name, value in at.fast.items()}
            before, _ = rule_vjp(unroll, theta, at, anything, step, adjoint)
            grads, products = _gradient_and_products(unroll, theta, at.fast, before, batch, step, on_complete)
            _, share = rule_vjp(unroll, theta, at, grads, step, adjoint)
        else:
            with torch.enable_grad():
                fast = leaves(at.fast)
                grads = unroll.support_gradient(theta, fast, batch, step, create_graph=False)
            before, share = rule_vjp(unroll, theta, at, grads, step, adjoint)
            _, products = _gradient_and_products(unroll, theta, at.fast, before, batch, step, on_complete)
        d_fast = added(before.fast, unprefixed("fast/", products))
        return Adjoint(d_fast, before.state), added(share, unprefixed("theta/", products))


def _gradient_and_products(
    unroll: Unroll,
    theta: Tensors,
    fast: Tensors,
    before: Adjoint,
    batch: TaskBatch,
    step: int,
    on_complete: OnGradient | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """g by the fast weights' names; `H t` under `fast/<name>` and `M t` under `theta/<name>`, t the adjoint
    of g as tangents of phi.

    Args:
        before: the update's adjoints, to which the products add.
        on_complete: as in `pull_back`.
    """
    scale = unroll.scales.loss
    tell = completed(on_complete, prefixed("fast/", before.fast), scale)
    if on_complete is not None:
        for name, value in before.state.items():
            on_complete(f"state/{name}", value)

    def on_dual(key: str, dual: Tensor) -> None:
        _, tangent = _unpacked(dual)
        if tell is not None and tangent is not None:
            tell(key, tangent)

    with forward_ad.dual_level(), torch.enable_grad():
        duals = {name: _dual(value, before.grads[name]) for name, value in fast.items()}
        parameters = leaves(theta)
        losses, _ = unroll.learner.losses("support", parameters, duals, batch, step, derivative="forward")
        results = gradient_if_any(
            [scale * losses.sum()],
            prefixed("fast/", duals) | prefixed("theta/", parameters),
            on_gradient=None if tell is None else on_dual,
        )
        pairs = {name: _unpacked(result) for name, result in results.items()}
    grads = unprefixed("fast/", {name: primal for name, (primal, _) in pairs.items()})
    products = {name: tangent for name, (_, tangent) in pairs.items() if tangent is not None}
    return unscaled(filled(grads, fast), scale), unscaled(products, scale)


def _dual(primal: Tensor, tangent: Tensor) -> Tensor:
    """A differentiable dual number. A copy, since primals must not be expanded, as phi_0 is."""
    dual: Tensor = forward_ad.make_dual(  # type: ignore[no-untyped-call]
        primal.detach().clone().requires_grad_(), tangent.detach()
    )
    return dual


def _unpacked(dual: Tensor) -> tuple[Tensor, Tensor | None]:
    """Primal and tangent of a dual number; no tangent where nothing dual reached it."""
    primal, tangent = forward_ad.unpack_dual(dual)  # type: ignore[no-untyped-call]
    return primal.detach(), None if tangent is None else tangent.detach()
