"""Which checkpoints are kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from metaloom.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Retention:
    """The rules by which checkpoints are kept: one that any of them keeps stays.

    Attributes:
        last: how many of the newest, at least 1.
        every: checkpoints of steps that are a multiple of it; None for none.
        best: how many of the best.
        metric: what they are the best by; None where nothing is measured.
        is_higher_better: of that metric.
    """

    last: int = 2
    every: int | None = None
    best: int = 0
    metric: str | None = None
    is_higher_better: bool = False

    def kept(self, metrics: Mapping[int, Mapping[str, float]]) -> set[int]:
        """The steps whose checkpoints stay; of equally good ones the earlier.

        Args:
            metrics: of every checkpoint that there is, by step.
        """
        steps = sorted(metrics)
        kept = set(steps[-self.last :])
        if self.every is not None:
            kept |= {step for step in steps if step % self.every == 0}
        if self.metric is not None and self.best > 0:
            sign = -1.0 if self.is_higher_better else 1.0
            # NaN is not the best of anything.
            values = {
                step: sign * metrics[step][self.metric]
                for step in steps
                if metrics[step].get(self.metric, float("nan")) == metrics[step].get(self.metric)
            }
            kept |= set(sorted(values, key=lambda step: (values[step], step))[: self.best])
        return kept


def retention_of(recipe: Recipe) -> Retention:
    """Which checkpoints of a recipe's meta-training are kept."""
    settings, best_by = recipe.checkpoint, recipe.validation.best_by
    return Retention(
        last=settings.keep_last,
        every=settings.keep_every,
        best=settings.keep_best,
        metric=f"validation_{best_by}",
        is_higher_better=best_by.endswith("accuracy"),
    )
