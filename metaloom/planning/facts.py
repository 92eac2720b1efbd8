"""What is counted of a recipe, before any hardware is chosen.

Shape letters: T tasks side by side, K inner steps, B blocks of the model, W ranks of a shard group.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Literal

AXES = ("tasks", "steps", "blocks", "shards")
Tasks = Literal["loop", "vmap"]


@dataclasses.dataclass(frozen=True)
class Amounts:
    """What the hypergradient of one micro-batch takes.

    Attributes:
        peak_bytes: of tensors that live at a time, above what is there before and after.
        flops: of matrix products, convolutions and attention.
        moved_bytes: read and written by all other operations.
        num_operations: that compute something (views do not).
        gathered_bytes: whole weights that are gathered from shards.
        scattered_bytes: whole gradients that are summed into shards.
        num_collectives: both.
    """

    peak_bytes: float = 0.0
    flops: float = 0.0
    moved_bytes: float = 0.0
    num_operations: float = 0.0
    gathered_bytes: float = 0.0
    scattered_bytes: float = 0.0
    num_collectives: float = 0.0

    def plus(self, other: Amounts, times: float = 1.0) -> Amounts:
        """`self + times * other`, each number for itself."""
        return Amounts(
            *(
                mine + times * others
                for mine, others in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
            )
        )


@dataclasses.dataclass(frozen=True)
class Point:
    """Of what problem amounts are. `shards` is W, 1 where weights are whole."""

    tasks: int
    steps: int
    blocks: int
    shards: int = 1

    def coordinates(self) -> tuple[float, ...]:
        """T, K, B and 1/W: what amounts are linear in."""
        return self.tasks, self.steps, self.blocks, 1.0 / self.shards


@dataclasses.dataclass(frozen=True)
class Samples:
    """Amounts counted at the corners of a box of problems; between and beyond them linear in each of T, K, B
    and 1/W (so with all their products).

    Attributes:
        corners: the amounts by point: all points of a product of one or two values along each axis.
    """

    corners: Mapping[Point, Amounts]

    def at(self, point: Point) -> Amounts:
        """The amounts of a problem; what is linear in nothing along an axis with one value."""
        axes = [sorted({corner.coordinates()[axis] for corner in self.corners}) for axis in range(len(AXES))]
        by_coordinates = {corner.coordinates(): amounts for corner, amounts in self.corners.items()}
        weights = [_weights(values, at) for values, at in zip(axes, point.coordinates(), strict=True)]
        total = Amounts()
        for choice in itertools.product(*(list(each.items()) for each in weights)):
            coordinates = tuple(value for value, _ in choice)
            total = total.plus(by_coordinates[coordinates], math.prod(weight for _, weight in choice))
        return Amounts(*(max(0.0, value) for value in dataclasses.astuple(total)))


def sampled(axes: tuple[tuple[int, ...], ...], count: Callable[[Point], Amounts]) -> Samples:
    """Counts at every corner of the box with these values of T, K, B and W."""
    return Samples({Point(*corner): count(Point(*corner)) for corner in itertools.product(*axes)})


def _weights(values: list[float], at: float) -> dict[float, float]:
    """By how much the values along one axis count."""
    if len(values) == 1:
        return {values[0]: 1.0}
    low, high = values
    share = (at - low) / (high - low)
    return {low: 1.0 - share, high: share}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes that a rank holds between hypergradients, of one kind of meta-parameters.

    Attributes:
        weights: the model's own values.
        learned: the meta-parameters.
        optimizer: states of the outer optimizer.
        average: the moving average.
        gradients: the sum over the tasks of an outer step, from the first micro-batch to the update.
    """

    weights: float = 0.0
    learned: float = 0.0
    optimizer: float = 0.0
    average: float = 0.0
    gradients: float = 0.0

    @property
    def total(self) -> float:
        """All together."""
        return self.weights + self.learned + self.optimizer + self.average + self.gradients

    def plus(self, other: Sizes) -> Sizes:
        """Part by part."""
        return Sizes(
            *(
                mine + others
                for mine, others in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
            )
        )

    def divided(self, num_ranks: int) -> Sizes:
        """A rank's share, where each has as much."""
        return Sizes(*(part / num_ranks for part in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to compute the hypergradient.

    Attributes:
        tasks: how tasks are put side by side, where every weight is fast; None where they share weights.
        estimator: its kind.
        keeps_states: whether (phi_k, s_k) of the inner steps are kept.
        amounts: with every state kept.
    """

    tasks: Tasks | None
    estimator: str
    keeps_states: bool
    amounts: Samples

    @property
    def name(self) -> str:
        """As in a message."""
        return name_of_way(self.estimator, self.tasks)


def name_of_way(estimator: str, tasks: Tasks | None) -> str:
    """As in a message."""
    return estimator if tasks is None else f"{estimator}, {tasks}"


@dataclasses.dataclass(frozen=True)
class Facts:
    """A recipe, counted.

    Attributes:
        tasks_per_step: over all ranks.
        micro_batch: most tasks that a rank computes side by side; None for all of its tasks.
        num_steps: K.
        num_swept: of them, those that the adjoint sweep visits.
        num_blocks: B.
        num_parameters: of the model.
        snapshots: which states are kept; with `binomial`, `num_slots` of them.
        compute: the number format.
        backbone: the model's weights, and what is learned of them.
        own: where fast weights start, rates, loss parameters: on every rank.
        update: an outer update; its peak above what is held, the sum of gradients among it.
        state_bytes: (phi_k, s_k) of one task.
        data_bytes: of one task.
        ways: what a run may compute its hypergradient by: of several it takes the fastest.
        trials: what a run tries when it starts, where it chooses how tasks are put side by side: it keeps to
            the fastest.
        advance: one inner step without a graph; None where none is computed again.
        graph_limit_bytes: for graphs that `auto` keeps; None for a share of what is free.
        graph_share: that share.
        pretrain: a step of ordinary training by samples of a rank (as T), what it holds included; None where
            there is none.
        pretrain_batch: samples of such a step over all ranks.
        ways_in_shards: as `ways` with the backbone in shards and blocks recomputed; none where not counted.
        advance_in_shards: as `advance`, likewise.
        stored_bytes: of one task's gradient, whole, where the combiner keeps those of single tasks; else 0.
        takes_turns: whether the backbone is among it, so that ranks of a shard group take turns.
    """

    tasks_per_step: int
    micro_batch: int | None
    num_steps: int
    num_swept: int
    num_blocks: int
    num_parameters: int
    snapshots: Literal["all", "binomial", "host"]
    num_slots: int
    compute: str
    backbone: Sizes
    own: Sizes
    update: Amounts
    state_bytes: float
    data_bytes: float
    ways: tuple[Way, ...]
    trials: tuple[Way, ...]
    advance: Samples | None
    graph_limit_bytes: float | None
    graph_share: float
    pretrain: Samples | None
    pretrain_batch: int
    ways_in_shards: tuple[Way, ...]
    advance_in_shards: Samples | None
    stored_bytes: float = 0.0
    takes_turns: bool = False
