"""Logistic regression by Newton's method.

Shape letters: T tasks, S support examples, D width, C classes.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor
from torch.nn import functional as F

from metaloom.engine.heads.base import HeadSolver, Support, counted_rows, identity_like, solved


@dataclasses.dataclass(frozen=True)
class LogisticSolver(HeadSolver):
    """Newton steps, from W = 0, towards the minimum of one logistic regression per class, that class against
    all others (LR-D2: Bertinetto et al. 2019, "Meta-learning with differentiable closed-form solvers",
    section 3.3, iteratively reweighted least squares):

        sum_n log(1 + exp(-y_n w^T x_n)) + lambda / 2 |w|^2,    y_n = 1 or -1

    With f = X w, m = sigmoid(f), s = m (1 - m) and t = (y + 1) / 2 a step is

        w' = (X^T diag(s) X + lambda I)^-1 X^T b,    b = s f + t - m

    by a system of D equations, or where S < D of S, on w = X^T a / lambda with K = X X^T / lambda (as in
    Rasmussen & Williams 2006, "Gaussian Processes for Machine Learning", algorithm 3.1: no division by s,
    which vanishes where a class is certain, and no eigenvalue below 1):

        a' = b - s^1/2 (I + s^1/2 K s^1/2)^-1 s^1/2 K b

    The steps themselves are differentiated, so the gradient is exact after any number of them. There is no
    line search: with a small lambda a step can be too long.

    Attributes:
        num_steps: Newton steps, at least 1.
    """

    num_steps: int

    def weights(self, support: Support, regulariser: Tensor | float) -> Tensor:
        X, Y = counted_rows(support)
        by_class = Y.mT  # t, [T, C, S]
        counts = support.is_counted[:, None].to(X.dtype)  # [T, 1, S]
        if X.shape[1] < X.shape[2]:
            return X.mT @ self._dual(X, by_class, counts, regulariser).mT / regulariser
        return self._primal(X, by_class, counts, regulariser).mT

    def _dual(self, X: Tensor, targets: Tensor, counts: Tensor, regulariser: Tensor | float) -> Tensor:
        """a, `[T, C, S]`."""
        K = X @ X.mT / regulariser
        a = targets.new_zeros(targets.shape)
        for _ in range(self.num_steps):
            root, b = _linearised(a @ K, targets, counts)
            scaled = root[..., None] * K[:, None] * root[..., None, :]  # [T, C, S, S]
            right = (root * (b @ K))[..., None]
            a = b - root * solved(scaled + identity_like(scaled), right)[..., 0]
        return a

    def _primal(self, X: Tensor, targets: Tensor, counts: Tensor, regulariser: Tensor | float) -> Tensor:
        """w, `[T, C, D]`."""
        w = X.new_zeros(*targets.shape[:2], X.shape[2])
        for _ in range(self.num_steps):
            root, b = _linearised(w @ X.mT, targets, counts)
            weighted = root[..., None] * X[:, None]  # [T, C, S, D]
            hessian = weighted.mT @ weighted
            w = solved(hessian + regulariser * identity_like(hessian), (b @ X)[..., None])[..., 0]
        return w


def _linearised(f: Tensor, targets: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """s^1/2 and b at f, `[T, C, S]` each; 0 for padding."""
    # The root of a product that can vanish has no derivative there; the exponential of its logarithm has.
    root = (0.5 * (F.logsigmoid(f) + F.logsigmoid(-f))).exp() * counts
    return root, root.square() * f + (targets - f.sigmoid()) * counts
