"""A multi-class support vector machine.

Shape letters: T tasks, S support examples, D width, C classes.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from metaloom.engine.heads.base import HeadSolver, Support, counted_rows
from metaloom.engine.heads.quadratic_program import minimum


@dataclasses.dataclass(frozen=True)
class SvmSolver(HeadSolver):
    """The support vector machine of Crammer & Singer, by its dual (MetaOptNet: Lee et al. 2019,
    "Meta-Learning with Differentiable Convex Optimization", equations 4 to 6):

        min over W, xi of 1/2 sum_k |w_k|^2 + P sum_n xi_n
            with w_y(n)^T x_n - w_k^T x_n >= 1 - [k = y(n)] - xi_n

        max over a of -1/2 sum_k |w_k|^2 + sum_n a_n,y(n),    w_k = sum_n a_nk x_n
            with a_nk <= P [k = y(n)], sum_k a_nk = 0

    P is `1 / lambda`, and a is computed as a multiple of it. In float64, whatever the features are;
    derivatives by the conditions of the optimum. The program has S C variables, and a dense matrix for each
    class: see `minimum`. The kernel has no multiple of the identity added, so that this is the problem as
    stated.
    """

    def weights(self, support: Support, regulariser: Tensor | float) -> Tensor:
        X, Y = (rows.double() for rows in counted_rows(support))
        kernel = X @ X.mT / (regulariser.double() if isinstance(regulariser, Tensor) else regulariser)
        classes = support.is_class[..., None].expand_as(Y.mT)  # [T, C, S]
        # What padding and further classes have is taken out: variables of their own, whose minimum is 0.
        is_free = classes & support.is_counted[:, None]
        quadratic = torch.where(is_free[..., :, None] & is_free[..., None, :], kernel[:, None], 0.0)
        quadratic = quadratic + torch.diag_embed((~is_free).double())
        own = torch.where(is_free, Y.mT, 0.0)
        upper = torch.where(is_free, own, 1.0)
        dual = minimum(quadratic, -own, classes.double(), upper) * is_free  # [T, C, S]
        weights = X.mT @ dual.mT / regulariser
        return weights.to(support.features.dtype)
