"""Meta-parameters that are Gaussian: drawn at training, their means at evaluation.

Shape letters: T tasks, K inner steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from metaloom.engine.algorithms.base import Algorithm
from metaloom.engine.draws import standard_normal
from metaloom.engine.hypergradients.base import MetaGradient, OnGradient, add_, added
from metaloom.engine.inspection import Inspect
from metaloom.engine.learner import TaskBatch
from metaloom.engine.precision import Scales
from metaloom.errors import CapabilityError

Tensors = Mapping[str, Tensor]
POSTERIOR = "posterior."


@dataclasses.dataclass(frozen=True)
class Posterior(Algorithm):
    """Another algorithm whose meta-parameters of some kinds are drawn from a learned Gaussian:

        theta = mu + exp(rho) * eps,  eps ~ N(0, I)                       anew in each outer step
        meta-loss = that of the other algorithm at theta + beta * KL(N(mu, exp(2 rho)) || N(0, s^2 I))

    Over weights that tasks share it is meta-regularisation on weights (Yin et al. 2020, "Meta-Learning
    without Memorization", section 4.2, equation 5: MR-MAML (W), MR-CNP (W)): what is learned of a task
    distribution in weights that are not adapted has its price in nats, so that what a task's data can tell is
    taken from them. Over the initialisation it is Bayes by backprop of where adaptation starts (Blundell et
    al. 2015, "Weight Uncertainty in Neural Networks", equations 1 and 2, with the KL in closed form and the
    logarithm of the standard deviation in place of their softplus).

    mu is kept under the meta-parameter's own name, rho under `posterior.<name>`. The gradient by both is the
    vector-Jacobian product of the draw with the other algorithm's gradient at theta, and so as exact as that
    is. Not for one whose result is no gradient (`reptile`). Adaptation for its own sake (`curve`) starts at
    mu: the paper averages the predictions of several draws there. Memory: two more copies of what is drawn.

    Attributes:
        inner: the other algorithm.
        kinds: of the meta-parameters that are drawn: what their names begin with, such as `backbone.`.
        beta: price of a nat.
        initial_std: where the standard deviations start, above 0.
        prior_std: s, above 0.
        samples: `per_step`, one draw for all tasks of an outer step, on all ranks (algorithm 2 of the
            paper); `per_task`, one for each, whose gradient varies less: tasks are then differentiated one
            after the other.
        seed: what the draws follow from, with the outer step and, per task, the episode's number.

    """

    inner: Algorithm
    kinds: tuple[str, ...]
    beta: float
    initial_std: float = 0.01
    prior_std: float = 1.0
    samples: Literal["per_step", "per_task"] = "per_step"
    seed: int = 0

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (*self.inner.metric_names, "kl")

    @property
    def scores(self) -> tuple[str, ...]:
        return self.inner.scores

    def meta_parameters(self) -> dict[str, Tensor]:
        """Those of the other algorithm, and `posterior.<name>` for what is drawn.

        Raises:
            CapabilityError: nothing of some kind is learned.
        """
        means = self.inner.meta_parameters()
        for kind in self.kinds:
            if not any(name.startswith(kind) for name in means):
                learned = ", ".join(dict.fromkeys(name.partition(".")[0] for name in means))
                raise CapabilityError(
                    f"regularisation.kinds: {kind.rstrip('.')}; nothing of that kind is learned, so that "
                    f"nothing can be drawn: take some of {learned}."
                )
        return means | {
            POSTERIOR + name: torch.full_like(value, math.log(self.initial_std))
            for name, value in means.items()
            if name.startswith(self.kinds)
        }

    def tracked(self) -> dict[str, Tensor]:
        return self.inner.tracked()

    @property
    def couples_tasks(self) -> bool:
        return self.inner.couples_tasks

    def at_step(
        self, meta: Tensors, batches: Sequence[TaskBatch], gather: Callable[[list[Any]], list[Any]]
    ) -> Posterior:
        """With what the other algorithm learns of all tasks, at the means: draws come after it."""
        return dataclasses.replace(self, inner=self.inner.at_step(_means(meta), batches, gather))

    def meta_gradient(
        self,
        meta: Tensors,
        batch: TaskBatch,
        scales: Scales | None = None,
        *,
        outer_step: int = 0,
        on_final: OnGradient | None = None,
        inspect: Inspect | None = None,
    ) -> MetaGradient:
        counts = _counts(batch)
        divergence, gradient = self._priced(meta, counts.sum())
        parts = [batch] if self.samples == "per_step" else batch.split(1)
        found: list[MetaGradient] = []
        for part in parts:
            key = () if self.samples == "per_step" else part.numbers
            deviations = self._deviations(meta, (outer_step, *key))
            told = None
            if on_final is not None and len(found) == len(parts) - 1:
                told = _telling(on_final, deviations, gradient)
            one = self.inner.meta_gradient(
                _moved(meta, deviations),
                part,
                scales,
                outer_step=outer_step,
                on_final=told,
                inspect=inspect,
            )
            add_(gradient, _pulled_back(one.gradient, deviations))
            found.append(one)
        prices = divergence * counts
        losses = torch.cat([one.losses for one in found])
        metrics = {name: torch.cat([one.metrics[name] for one in found]) for name in found[0].metrics}
        tracked: dict[str, Tensor] = {}
        for one in found:
            add_(tracked, one.tracked)
        return MetaGradient(
            gradient, losses + self.beta * prices.to(losses), metrics | {"kl": prices}, tracked
        )

    def curve(self, meta: Tensors, batch: TaskBatch, *, num_steps: int) -> dict[str, Tensor]:
        return self.inner.curve(_means(meta), batch, num_steps=num_steps)

    def _deviations(self, meta: Tensors, key: Iterable[int]) -> dict[str, Tensor]:
        """`exp(rho) * eps` of what is drawn, by its name."""
        return {
            name: rho.exp() * standard_normal(rho, self.seed, *key, name)
            for name, rho in ((name, meta[POSTERIOR + name]) for name in _drawn(meta))
        }

    def _priced(self, meta: Tensors, num_tasks: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The KL, [], float64; and `num_tasks` times the gradient of `beta` times it.

        KL = sum over numbers of (mu^2 + exp(2 rho)) / 2 s^2 - 1/2 - rho + log s
        """
        variance = self.prior_std**2
        total = torch.zeros((), dtype=torch.float64, device=num_tasks.device)
        gradient: dict[str, Tensor] = {}
        for name in _drawn(meta):
            mu, rho = meta[name], meta[POSTERIOR + name]
            share = (self.beta * num_tasks).to(mu.dtype)
            spread = (2.0 * rho).exp() / variance
            each = (mu.square() / variance + spread - 1.0) / 2.0 - rho + math.log(self.prior_std)
            total = total + each.sum(dtype=torch.float64)
            gradient[name] = share * mu / variance
            gradient[POSTERIOR + name] = share * (spread - 1.0)
        return total, gradient


def _counts(batch: TaskBatch) -> Tensor:
    """1 for each task, and 0 for a dummy; `[T]`, float64."""
    if batch.weights is not None:
        return batch.weights.double()
    device = batch.query["inputs"].device
    return torch.ones(batch.num_tasks, dtype=torch.float64, device=device)


def _drawn(meta: Tensors) -> list[str]:
    """The names of what is drawn."""
    return [name.removeprefix(POSTERIOR) for name in meta if name.startswith(POSTERIOR)]


def _means(meta: Tensors) -> dict[str, Tensor]:
    """What the other algorithm knows of, at its mean."""
    return {name: value for name, value in meta.items() if not name.startswith(POSTERIOR)}


def _moved(meta: Tensors, deviations: Tensors) -> dict[str, Tensor]:
    """The same, with the draws in place of their means."""
    return added(_means(meta), deviations)


def _pulled_back(gradient: Tensors, deviations: Tensors) -> dict[str, Tensor]:
    """The gradient by mu and rho from that by theta: `g` and `g * exp(rho) * eps`."""
    return dict(gradient) | {
        POSTERIOR + name: gradient[name] * deviation
        for name, deviation in deviations.items()
        if name in gradient
    }


def _telling(on_final: OnGradient, deviations: Tensors, before: Tensors) -> OnGradient:
    """What tells of both, where the last draw's gradient by theta is final.

    Args:
        before: what there is already of the gradient by mu and rho.
    """

    def tell(name: str, gradient: Tensor) -> None:
        for each, share in _pulled_back({name: gradient}, deviations).items():
            on_final(each, share + before[each] if each in before else share)

    return tell
