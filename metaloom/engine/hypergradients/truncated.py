"""The hypergradient through the last inner steps alone."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from metaloom.engine.hypergradients.base import OnGradient, Tensors
from metaloom.engine.hypergradients.sweep import Adjoint, AdjointSweep
from metaloom.engine.learner import TaskBatch
from metaloom.engine.unroll import Snapshot, Unroll
from metaloom.errors import CapabilityError


@dataclasses.dataclass(frozen=True)
class Truncated(AdjointSweep):
    """Truncated back-propagation (Shaban et al. 2019, section 2.3): only the last `num_steps` inner steps are
    differentiated.

    An approximation: each step before those counts as the identity, `phi_{k+1} = phi_k` and `s_{k+1} = s_k`,
    so the adjoint at the first differentiated step goes to the initialisation as it is, and what the earlier
    steps depend on (rates, backbone, loss parameters) gets nothing of them.

    Attributes:
        num_steps: how many of the last inner steps are differentiated.
        exact: how each of those is pulled back.
    """

    name = "truncated"

    num_steps: int = dataclasses.field(kw_only=True)
    exact: AdjointSweep = dataclasses.field(kw_only=True)

    def __post_init__(self) -> None:
        if self.num_graph_steps > self.num_steps:
            raise CapabilityError(
                f"the graph of {self.num_graph_steps} inner steps is kept and {self.num_steps} are "
                "differentiated: keep no more graphs than steps are differentiated."
            )

    def num_passed_over(self, unroll: Unroll) -> int:
        count = max(0, unroll.num_steps - self.num_steps)
        # A query loss at an earlier step is differentiated there.
        return 0 if any(map(unroll.has_loss_at, range(count))) else count

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
        if step < unroll.num_steps - self.num_steps:
            return adjoint, {}
        return self.exact.pull_back(unroll, theta, batch, step, at, adjoint, on_complete)
