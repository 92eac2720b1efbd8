"""Model-agnostic meta-learning: an unroll and an estimator of its hypergradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from metaloom.engine.adapters.base import Learned
from metaloom.engine.adapters.norms import MetStatistics
from metaloom.engine.algorithms.base import Algorithm
from metaloom.engine.evaluation import adaptation_curve
from metaloom.engine.hypergradients.base import Hypergradient, MetaGradient, OnGradient
from metaloom.engine.inspection import Inspect
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
        backbone: which of the weights that tasks share are learned.
        annealing: how the weights of the query losses change in the course of training; None where they
            stay those of the unroll.
        first_order: the estimator of the first outer steps; None where it is the same throughout.
        num_first_order: how many outer steps those are (derivative-order annealing of MAML++: Antoniou et al.
            2019, section 4).
    """

    unroll: Unroll
    hypergradient: Hypergradient
    init: bool = True
    backbone: Learned = False
    annealing: MultiStepAnnealing | None = None
    first_order: Hypergradient | None = None
    num_first_order: int = 0

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
        inspect: Inspect | None = None,
    ) -> MetaGradient:
        unroll = self.unroll if scales is None else dataclasses.replace(self.unroll, scales=scales)
        if inspect is not None:
            unroll = dataclasses.replace(unroll, inspection=inspect(batch.numbers))
        if self.annealing is not None:
            weights = self.annealing.step_weights(unroll.num_steps, outer_step)
            unroll = dataclasses.replace(unroll, step_weights=weights)
        estimator, tracked = self.estimator_at(outer_step), self.tracked()
        if not tracked:
            return estimator.meta_gradient(unroll, meta, batch, on_final=on_final)
        met = MetStatistics()
        unroll = dataclasses.replace(unroll, learner=dataclasses.replace(unroll.learner, met=met))
        found = estimator.meta_gradient(unroll, meta, batch, on_final=on_final)
        return dataclasses.replace(found, tracked=met.sums(tracked, batch.weights))

    def tracked(self) -> dict[str, Tensor]:
        return self.unroll.learner.adapter.tracked()

    def estimator_at(self, outer_step: int) -> Hypergradient:
        """The estimator that an outer step takes."""
        is_early = self.first_order is not None and outer_step < self.num_first_order
        return self.first_order if is_early and self.first_order is not None else self.hypergradient

    def curve(self, meta: Mapping[str, Tensor], batch: TaskBatch, *, num_steps: int) -> dict[str, Tensor]:
        return adaptation_curve(self.unroll, meta, batch, num_steps=num_steps)


@dataclasses.dataclass(frozen=True)
class MultiStepAnnealing:
    """The multi-step loss of MAML++, from all inner steps alike to the last alone (Antoniou et al. 2019, "How
    to Train Your MAML", section 4): with s outer steps done of N,

        c_k = max(1/K - s / (N K), 0.03 / K)    for k = 1 .. K-1
        c_K = 1 - sum of the others

    and from s = N on c_K = 1 and nothing else. The floor, and the step at N, are those of the authors' code,
    which anneals once an epoch, here every outer step.

    Attributes:
        num_outer_steps: N, at least 1.
    """

    num_outer_steps: int

    def step_weights(self, num_steps: int, outer_step: int) -> tuple[float, ...]:
        """c_0 .. c_K after `outer_step` outer steps."""
        if outer_step >= self.num_outer_steps:
            return step_weights("last", num_steps)
        done = outer_step / self.num_outer_steps
        early = max(1.0 - done, _FLOOR) / num_steps
        return (0.0, *(early,) * (num_steps - 1), 1.0 - early * (num_steps - 1))


_FLOOR = 0.03


def step_weights(kind: Literal["last", "uniform"], num_steps: int) -> tuple[float, ...]:
    """c_0 .. c_K: `last` is plain MAML; `uniform` the multi-step loss over steps 1 .. K, each 1/K
    (MAML++: Antoniou et al. 2019, section 4, before annealing)."""
    if kind == "last":
        return (*(0.0,) * num_steps, 1.0)
    return (0.0, *(1.0 / num_steps,) * num_steps)
