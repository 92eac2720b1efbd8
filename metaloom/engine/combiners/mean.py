"""The mean of the tasks' meta-gradients."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from metaloom.engine.combiners.base import Combined, Combiner, MetricSums
from metaloom.engine.hypergradients.base import MetaGradient, OnGradient, Tensors, order_of_completion
from metaloom.engine.learner import TaskBatch
from metaloom.engine.sharding.base import Sharding


class Mean(Combiner):
    """Sums as it goes: no more memory than one gradient. The tasks are averaged once, at the end.

    Args:
        like: meta-parameters, for their names and shapes.
        metric_names: what the estimator reports beside the meta-loss: known before the first task, since
            ranks without tasks take part in the sum.
    """

    def __init__(self, like: Tensors, sharding: Sharding, *, metric_names: Sequence[str]) -> None:
        self._like = like
        self._order = order_of_completion(like)
        self._metric_names = tuple(metric_names)
        self._sharding = sharding
        self._start()

    def _start(self) -> None:
        self._sum = self._sharding.gradient_sum(self._like, self._order)
        self._final: set[str] = set()
        self._metrics = MetricSums(self._metric_names)

    @property
    def on_final(self) -> OnGradient | None:
        return self.take if self._sum.sends_early else None

    def take(self, name: str, gradient: Tensor) -> None:
        """Takes in the last that there is of one meta-parameter's gradient."""
        self._sum.add({name: gradient})
        self._sum.complete(name)
        self._final.add(name)

    def add(self, part: MetaGradient, batch: TaskBatch | None = None) -> None:
        """Takes in one micro-batch, but for what `take` has had of it."""
        self._sum.add({name: value for name, value in part.gradient.items() if name not in self._final})
        self._metrics.add(part)

    def combine(self, num_global: int, *, num_left_out: int = 0) -> Combined:
        gradient = self._sum.result()
        device = next(iter(gradient.values())).device
        num_tasks, metrics = self._metrics.means(num_global, num_left_out, self._sharding, device)
        for value in gradient.values():
            value /= num_tasks  # 0 / 0 is NaN: without a task there is no gradient
        self._start()
        return Combined(gradient, metrics, num_tasks)

    def discard(self) -> None:
        self._start()
