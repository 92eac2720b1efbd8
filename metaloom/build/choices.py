"""What a run has measured and keeps to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from metaloom.engine.choice import EstimatorChoice

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

    def scalars(self) -> dict[str, Any]:
        """As JSON values, for checkpoints."""
        return dataclasses.asdict(self)

    @classmethod
    def load(cls, scalars: Mapping[str, Any]) -> Choices:
        """What `scalars` returned."""
        estimator = scalars["estimator"]
        return cls(scalars["tasks"], None if estimator is None else EstimatorChoice(**estimator))
