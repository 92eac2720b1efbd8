"""The mean of the tasks' meta-gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from metaloom.engine.hypergradients.base import MetaGradient, Tensors, add_
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
        self._metric_names = ("meta_loss", *metric_names)
        self._sharding = sharding
        self._reset()

    def _reset(self) -> None:
        self._sum = {name: torch.zeros_like(value) for name, value in self._like.items()}
        self._metrics: dict[str, Tensor] = {
            name: torch.zeros((), dtype=torch.float64) for name in self._metric_names
        }

    def add(self, part: MetaGradient) -> None:
        """Takes in one micro-batch."""
        add_(self._sum, part.gradient)
        for name, value in {"meta_loss": part.losses, **part.metrics}.items():
            self._metrics[name] += value.double().sum().cpu()

    def combine(self, num_global: int) -> Combined:
        """The mean over `num_global` tasks. Every rank must call: the one place where ranks meet.

        Starts the next outer step's sums.
        """
        device = next(iter(self._sum.values())).device
        metrics = self._sharding.sum_over_ranks(
            {name: value.to(device) for name, value in self._metrics.items()}
        )
        gradient = self._sharding.sum_gradients(self._sum)
        self._reset()
        return Combined(
            gradient={name: value / num_global for name, value in gradient.items()},
            metrics={name: float(value) / num_global for name, value in metrics.items()},
        )
