"""What an algorithm that a recipe names by its import path is made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from metaloom.engine.algorithms.base import Algorithm
from metaloom.engine.backbone import Backbone
from metaloom.engine.unroll import Unroll


@dataclasses.dataclass(frozen=True)
class Parts:
    """What the recipe's other sections say, for a factory to build an `Algorithm` from.

    Attributes:
        backbone: the recipe's model before its head; its initial weights are the recipe's.
        unroll: the inner loop that the section adaptation describes, for algorithms that take inner steps.
        num_classes: of a task, at most; None where tasks do not classify.
        seed: the recipe's, from which every draw has to follow.
        options: the section's own, as the recipe gives them.
    """

    backbone: Backbone
    unroll: Unroll
    num_classes: int | None
    seed: int
    options: Mapping[str, Any]


Factory = Callable[[Parts], Algorithm]
