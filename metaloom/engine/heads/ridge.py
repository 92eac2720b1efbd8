"""Ridge regression in closed form.

Shape letters: T tasks, S support examples, D width, C outputs.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from metaloom.engine.heads.base import HeadSolver, Support, counted_rows, identity_like, solved


@dataclasses.dataclass(frozen=True)
class RidgeSolver(HeadSolver):
    """The minimum of `|X W - Y|^2 + lambda |W|^2` (R2-D2: Bertinetto et al. 2019, "Meta-learning with
    differentiable closed-form solvers", section 3.2, equations 4 and 5):

        W = (X^T X + lambda I)^-1 X^T Y = X^T (X X^T + lambda I)^-1 Y

    The second form (Woodbury), a system of S equations, where S < D; the first, of D, otherwise.
    """

    def weights(self, support: Support, regulariser: Tensor | float) -> Tensor:
        X, Y = counted_rows(support)
        S, D = X.shape[1:]
        if S < D:
            gram = X @ X.mT
            return X.mT @ solved(gram + regulariser * identity_like(gram), Y)
        covariance = X.mT @ X
        return solved(covariance + regulariser * identity_like(covariance), X.mT @ Y)
