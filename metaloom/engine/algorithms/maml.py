"""Model-agnostic meta-learning: an unroll and an estimator of its hypergradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from metaloom.engine.algorithms.base import Algorithm
from metaloom.engine.evaluation import adaptation_curve
from metaloom.engine.hypergradients.base import Hypergradient, MetaGradient, OnGradient
from metaloom.engine.learner import TaskBatch
from metaloom.engine.precision import Scales
from metaloom.engine.unroll import Unroll


@dataclasses.dataclass(frozen=True)
class Maml(Algorithm):
    """MAML (Finn et al. 2017, algorithm 1): adapt on support data, learn from the query loss.

    What is meta-learned - initialisation, rates, backbone - is whatever `meta` holds; what is
    adapted is the adapter's choice; how it is differentiated is the estimator's.

    Attributes:
        unroll: the inner problem.
        hypergradient: the estimator of its gradient.
        init: whether the initialisation is learned.
        backbone: whether the weights that tasks share are learned.
    """

    unroll: Unroll
    hypergradient: Hypergradient
    init: bool = True
    backbone: bool = False

    @property
    def metric_names(self) -> tuple[str, ...]:
        return self.hypergradient.metric_names(self.unroll.learner)

    @property
    def scores(self) -> tuple[str, ...]:
        return self.unroll.learner.scores

    def meta_parameters(self) -> dict[str, Tensor]:
        return self.unroll.meta_parameters(init=self.init, backbone=self.backbone)

    def meta_gradient(
        self,
        meta: Mapping[str, Tensor],
        batch: TaskBatch,
        scales: Scales | None = None,
        *,
        outer_step: int = 0,
        on_final: OnGradient | None = None,
    ) -> MetaGradient:
        unroll = self.unroll if scales is None else dataclasses.replace(self.unroll, scales=scales)
        return self.hypergradient.meta_gradient(unroll, meta, batch, on_final=on_final)

    def curve(self, meta: Mapping[str, Tensor], batch: TaskBatch, *, num_steps: int) -> dict[str, Tensor]:
        return adaptation_curve(self.unroll, meta, batch, num_steps=num_steps)


def step_weights(kind: Literal["last", "uniform"], num_steps: int) -> tuple[float, ...]:
    """c_0 .. c_K: `last` is plain MAML; `uniform` the multi-step loss over steps 1 .. K, each 1/K
    (MAML++: Antoniou et al. 2019, section 4, before annealing)."""
    if kind == "last":
        return (*(0.0,) * num_steps, 1.0)
    return (0.0, *(1.0 / num_steps,) * num_steps)
