"""The mean of the tasks' meta-gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from metaloom.engine.hypergradients.base import MetaGradient, OnGradient, Tensors, order_of_completion
from metaloom.engine.sharding.base import Sharding


@dataclasses.dataclass(frozen=True)
class Combined:
    """One outer step's gradient and metrics, averaged over all tasks of all ranks."""

    gradient: dict[str, Tensor]
    metrics: dict[str, float]


class Mean:
    """Sums as it goes: no more memory than one gradient. The tasks are averaged once, at the end.

    Args:
        like: meta-parameters, for their names and shapes.
        metric_names: what the estimator reports beside the meta-loss: known before the first task, since
            ranks without tasks take part in the sum.
    """

    def __init__(self, like: Tensors, sharding: Sharding, *, metric_names: Sequence[str]) -> None:
        self._like = like
        self._order = order_of_completion(like)
        self._metric_names = ("meta_loss", *metric_names)
        self._sharding = sharding
        self._start()

    def _start(self) -> None:
        self._sum = self._sharding.gradient_sum(self._like, self._order)
        self._final: set[str] = set()
        self._metrics: dict[str, Tensor] = {
            name: torch.zeros((), dtype=torch.float64) for name in self._metric_names
        }

    @property
    def on_final(self) -> OnGradient | None:
        """What takes gradients of the last micro-batch that are final before the others are; None where that
        is of no use."""
        return self.take if self._sum.sends_early else None

    def take(self, name: str, gradient: Tensor) -> None:
        """Takes in the last that there is of one meta-parameter's gradient."""
        self._sum.add({name: gradient})
        self._sum.complete(name)
        self._final.add(name)

    def add(self, part: MetaGradient) -> None:
        """Takes in one micro-batch, but for what `take` has had of it."""
        self._sum.add({name: value for name, value in part.gradient.items() if name not in self._final})
        for name, value in {"meta_loss": part.losses, **part.metrics}.items():
            self._metrics[name] += value.double().sum().cpu()

    def combine(self, num_global: int) -> Combined:
        """The mean over `num_global` tasks. Every rank must call: out of lockstep the one place where ranks
        meet.

        Starts the next outer step's sums.
        """
        gradient = self._sum.result()
        device = next(iter(gradient.values())).device
        metrics = self._sharding.sum_over_ranks(
            {name: value.to(device) for name, value in self._metrics.items()}
        )
        for value in gradient.values():
            value /= num_global
        self._start()
        return Combined(gradient, {name: float(value) / num_global for name, value in metrics.items()})
