"""Model-agnostic meta-learning: an unroll and an estimator of its hypergradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from metaloom.engine.hypergradients.base import Hypergradient, MetaGradient, OnGradient
from metaloom.engine.learner import TaskBatch
from metaloom.engine.precision import Scales
from metaloom.engine.unroll import Unroll


@dataclasses.dataclass(frozen=True)
class Maml:
    """MAML (Finn et al. 2017, algorithm 1): adapt on support data, learn from the query loss.

    What is meta-learned - initialisation, rates, backbone - is whatever `meta` holds; what is
    adapted is the adapter's choice; how it is differentiated is the estimator's.
    """

    unroll: Unroll
    hypergradient: Hypergradient

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The names of the metrics that `meta_gradient` returns."""
        return self.hypergradient.metric_names(self.unroll.learner)

    def meta_gradient(
        self,
        meta: Mapping[str, Tensor],
        batch: TaskBatch,
        scales: Scales | None = None,
        *,
        on_final: OnGradient | None = None,
    ) -> MetaGradient:
        """The hypergradient of a batch, summed over its tasks.

        Args:
            scales: of this outer step, in half precision.
            on_final: told of gradients that are final before the others are.
        """
        unroll = self.unroll if scales is None else dataclasses.replace(self.unroll, scales=scales)
        return self.hypergradient.meta_gradient(unroll, meta, batch, on_final=on_final)


def step_weights(kind: Literal["last", "uniform"], num_steps: int) -> tuple[float, ...]:
    """c_0 .. c_K: `last` is plain MAML; `uniform` the multi-step loss over steps 1 .. K, each 1/K
    (MAML++: Antoniou et al. 2019, section 4, before annealing)."""
    if kind == "last":
        return (*(0.0,) * num_steps, 1.0)
    return (0.0, *(1.0 / num_steps,) * num_steps)
