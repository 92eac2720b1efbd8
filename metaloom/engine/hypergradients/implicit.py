"""Implicit differentiation of the minimum that adaptation is taken to have reached.

Shape letters: T tasks, D elements of one task's fast weights, K inner steps.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

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
    refuse_float16,
    tell_of_initialisation,
    unflatten,
)
from metaloom.engine.hypergradients.solvers import ConjugateGradient, Solver
from metaloom.engine.inner_loops.base import Penalties
from metaloom.engine.learner import TaskBatch
from metaloom.engine.unroll import Unroll, leaves
from metaloom.errors import CapabilityError


@dataclasses.dataclass(frozen=True)
class Implicit(Hypergradient):
    """The hypergradient of a minimum: phi_K counts as the minimum over phi of the inner objective

        F(phi; theta) = L(phi; theta) + proximal / 2 |phi - phi_0|^2 + weight_decay / 2 |phi|^2

    so that `d phi / d theta = -A^-1 d2F / dphi dtheta`, and with x = A^-1 dLq/dphi

        A = H + (proximal + weight_decay + damping) I
        dtheta = dLq/dtheta - M x + (d phi_0 / d theta)^T (proximal * x)        all at phi_K

    H and M the derivatives of L by phi twice and by theta and phi (Rajeswaran et al. 2019, "Meta-Learning
    with Implicit Gradients", lemma 1; Lorraine et al. 2020, equation 2). Memory and time do not depend on K
    beyond adaptation itself: the graph of one inner gradient, and two backward passes' worth per product
    with A. Each task solves its own system.

    L is the inner loss of the last inner step: with rehearsal, its stretches alone. How adaptation got to
    phi_K has no part: learned rates are refused, clipping and momentum do not matter. The initialisation
    acts through the proximal term alone. An approximation as far as phi_K is no minimum and the solver has
    not converged, which the metrics tell: `stationarity` |dF/dphi| at phi_K, `solver_residual`
    |dLq/dphi - A x| / |dLq/dphi|, and `negative_curvature`, 1 where the solver met a direction p with
    `p A p <= 0`, so that phi_K is near no minimum.

    Attributes:
        solver: of A x = dLq/dphi.
        damping: at least 0; added to A alone. (The iMAML paper's code also puts it into the factor in front
            of x, which is `proximal` here and in the paper.)
    """

    name = "implicit"
    own_metrics = ("stationarity", "solver_residual", "negative_curvature")

    solver: Solver = dataclasses.field(default_factory=ConjugateGradient)
    damping: float = 0.0

    def estimate(
        self, unroll: Unroll, meta: Tensors, batch: TaskBatch, on_final: OnGradient | None
    ) -> MetaGradient:
        refuse_float16(self.name, unroll)
        penalties = unroll.rule.penalties
        if penalties.decoupled_decay != 0.0:
            raise CapabilityError(
                f"implicit takes the adapted weights for a minimum, and a decoupled weight decay of "
                f"{penalties.decoupled_decay} is no term of what is minimised; set it to 0, or take a rule "
                "whose weight decay is part of the gradient."
            )
        theta = leaves(meta)
        path = adapt_to_end(unroll, meta, batch)
        end = differentiate_end(unroll, theta, batch, path)
        fast = leaves(path.end)
        with torch.enable_grad():
            grads = unroll.support_gradient(theta, fast, batch, unroll.num_steps - 1, create_graph=True)
        unroll.look("support gradient", unroll.num_steps, grads.values())
        unroll.require_finite()
        diagonal = penalties.proximal + penalties.weight_decay + self.damping

        def multiply(vectors: Tensor) -> Tensor:
            products = _products(grads, unflatten(vectors, fast), fast)
            return flatten(products) + diagonal * vectors

        b = flatten(end.d_fast)
        solution = self.solver.solve(multiply, b)
        x = unflatten(solution.x, fast)
        gradient = dict(end.d_theta)
        scaled = {name: penalties.proximal * value for name, value in x.items()}
        add_(gradient, pull_back_start(unroll, theta, batch.num_tasks, scaled))

        tell_of_initialisation(gradient, on_final)
        products = _products(
            grads,
            x,
            prefixed("fast/", fast) | prefixed("theta/", theta),
            on_gradient=finishing(on_final, lambda name, product: gradient[name] - product),
        )
        residual = b - flatten(unprefixed("fast/", products)) - diagonal * solution.x
        add_(gradient, {name: -value for name, value in unprefixed("theta/", products).items()})
        own = {
            "stationarity": _norms(_objective_gradient(grads, path, penalties)),
            "solver_residual": _ratio(_norms(residual), _norms(b)),
            "negative_curvature": solution.negative_curvature.double(),
        }
        return MetaGradient(gradient, end.losses, end.metrics | own)


def _products(
    grads: Tensors, vectors: Tensors, inputs: Tensors, *, on_gradient: OnGradient | None = None
) -> dict[str, Tensor]:
    """The derivatives of the tasks' `g . v` by `inputs`: H v for the fast weights, M v for theta.

    The graph of g stays, for the next product.
    """
    return gradient_of(
        list(grads.values()),
        inputs,
        [vectors[name] for name in grads],
        retain_graph=True,
        on_gradient=on_gradient,
    )


def _objective_gradient(grads: Tensors, path: Path, penalties: Penalties) -> Tensor:
    """dF/dphi at phi_K, `[T, D]`."""
    end = flatten(path.end)
    to_start = end - flatten(path.start)
    gradient = flatten({name: value.detach() for name, value in grads.items()})
    return gradient + penalties.proximal * to_start + penalties.weight_decay * end


def _norms(vectors: Tensor) -> Tensor:
    """Each task's Euclidean norm, `[T]`, float64."""
    norms: Tensor = torch.linalg.vector_norm(vectors.double(), dim=1)
    return norms


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """`part / whole`, and 0 where both are zero."""
    return torch.where(whole == 0.0, part, part / torch.where(whole == 0.0, 1.0, whole))
