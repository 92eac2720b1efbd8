"""What a run has measured and keeps to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from metaloom.engine.choice import EstimatorChoice
from metaloom.recipe import AutoHypergradient, Recipe

Tasks = Literal["loop", "vmap"]


@dataclasses.dataclass(frozen=True)
class Choices:
    """What a run has measured and keeps to, where its recipe leaves the choice.

    Attributes:
        tasks: how tasks are put side by side where every weight is fast.
        estimator: of the hypergradient; None where the recipe names one.
    """

    tasks: Tasks = "loop"
    estimator: EstimatorChoice | None = None

    def fit(self, recipe: Recipe) -> bool:
        """Whether they hold all that a recipe leaves to be chosen: one that was changed may leave more."""
        maml = recipe.maml
        leaves_estimator = maml is not None and isinstance(maml.hypergradient, AutoHypergradient)
        return self.tasks in recipe.task_ways and not (leaves_estimator and self.estimator is None)

    def filled(self, recipe: Recipe) -> Choices:
        """What fits the recipe: in place of what does not, the first way that there is, to build what is not
        differentiated."""
        if self.fit(recipe):
            return self
        return Choices(recipe.task_ways[0], self.estimator or EstimatorChoice("rematerialized", 0))

    def scalars(self) -> dict[str, Any]:
        """As JSON values, for checkpoints."""
        return dataclasses.asdict(self)

    @classmethod
    def load(cls, scalars: Mapping[str, Any]) -> Choices:
        """What `scalars` returned."""
        estimator = scalars["estimator"]
        return cls(scalars["tasks"], None if estimator is None else EstimatorChoice(**estimator))
