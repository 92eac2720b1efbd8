"""Slopes of the meta-loss by differences, which need no second derivative."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from metaloom.engine.checking.vectors import norm, normal_like, or_infinite, root_mean_square
from metaloom.engine.hypergradients.base import query_losses
from metaloom.engine.learner import TaskBatch
from metaloom.engine.unroll import Unroll, adapt

Tensors = Mapping[str, Tensor]

# What differences resolve over a kinked (ReLU) network, where distances have to be short.
DIFFERENCE_TOLERANCE = 1e-5
# Rounding errors of a meta-loss, in units of its last place.
LOSS_ROUNDING = 8.0 * torch.finfo(torch.float64).eps
# Pairs of distances, relative to the parameters, in the order in which they are tried.
DISTANCES = ((1e-4, 1e-5), (1e-5, 1e-6), (1e-6, 1e-7), (1e-7, 1e-8), (1e-3, 1e-4))
# Spread over this share of the error leaves open whose error it is.
CONCLUSIVE_SHARE = 1.0 / 3.0


class MetaLoss:
    """theta -> the summed meta-loss of a batch: K inner steps, no graph kept, first derivatives alone."""

    def __init__(self, unroll: Unroll, batch: TaskBatch) -> None:
        self._unroll, self._batch = unroll, batch

    def __call__(self, meta: Tensors) -> float:
        total = 0.0
        states = adapt(self._unroll, meta, self._batch, num_steps=self._unroll.num_steps)
        for step, at in enumerate(states):
            with torch.no_grad():
                losses, _ = query_losses(self._unroll, meta, at.fast, self._batch, step)
            if losses is not None:
                total += float(losses.sum())
        return total


@dataclasses.dataclass(frozen=True)
class Slope:
    """A slope by differences.

    Attributes:
        value: the slope.
        spread: how far those at the two distances are apart.
        rounding: what rounding of the loss can make of it.
    """

    value: float
    spread: float
    rounding: float


def slope_by_differences(
    loss: Callable[[float], float],
    at_center: float,
    *,
    enough: float,
    distances: Sequence[tuple[float, float]],
) -> Slope:
    """The slope of `loss` at 0, by Richardson's extrapolation of central differences.

    For a pair of distances h > h', with r = h / h' and D(h) = (loss(h) - loss(-h)) / 2h:

        (r^2 D(h') - D(h)) / (r^2 - 1)          error O(h^4); spread |D(h) - D(h')|

    Curvature shows at long distances, rounding at short ones, a kink or a jump at those that reach it: in
    each case the two differences part. Pairs are tried until they are no further apart than is enough,
    or than rounding makes them; if none is, the pair that is closest counts.

    Args:
        loss: along a line.
        at_center: loss(0), for the size of its rounding.
        enough: the spread at which to stop.
        distances: pairs, the longer first.
    """
    known: dict[float, float] = {}

    def central(distance: float) -> float:
        if distance not in known:
            known[distance] = (loss(distance) - loss(-distance)) / (2.0 * distance)
        return known[distance]

    found: list[Slope] = []
    for wide, narrow in distances:
        ratio = (wide / narrow) ** 2
        spread = abs(central(wide) - central(narrow))
        value = (ratio * central(narrow) - central(wide)) / (ratio - 1.0)
        found.append(Slope(value, spread, LOSS_ROUNDING * abs(at_center) / narrow))
        if spread <= max(enough, found[-1].rounding):
            return found[-1]
    return min(found, key=lambda slope: or_infinite(slope.spread))


def median_difference(
    loss: MetaLoss,
    at_center: float,
    meta: Tensors,
    gradient: Tensors,
    num_directions: int,
    generator: torch.Generator,
) -> tuple[float, float]:
    """Error of a group's slopes from differences, the median over directions or its bound on the tolerance's
    side, and the spread there.

    Few directions suffice: that a lost term of 1e-3 is missed by two takes a chance of 1e-4. More than
    half of `num_directions` have to be on one side of the tolerance; those in which kinks leave the
    differences undecided do not count, up to as many again.

    A direction is uniform on a sphere, scaled by each tensor's root mean square s: the slope's root
    mean square over directions is then |s * gradient|, against which errors are measured.
    """
    scales = {name: root_mean_square(meta[name]) or 1.0 for name in gradient}
    num_numbers = sum(value.numel() for value in gradient.values())
    typical = norm([scales[name] * value for name, value in gradient.items()])
    # One number has one direction.
    num_needed, limit = (num_directions // 2 + 1, 2 * num_directions) if num_numbers > 1 else (1, 1)
    within: list[tuple[float, float]] = []
    beyond: list[tuple[float, float]] = []
    vague: list[tuple[float, float]] = []
    for _ in range(limit):
        normal = {name: normal_like(value, generator) for name, value in gradient.items()}
        length = math.sqrt(num_numbers) / norm(normal.values())
        direction = {name: length * scales[name] * value for name, value in normal.items()}
        expected = sum(float((gradient[name] * value).sum()) for name, value in direction.items())

        def along(distance: float, direction: Tensors = direction) -> float:
            moved = {name: meta[name] + distance * value for name, value in direction.items()}
            return loss({**meta, **moved})

        slope = slope_by_differences(
            along, at_center, enough=0.1 * DIFFERENCE_TOLERANCE * typical, distances=DISTANCES
        )
        scale = max(typical, abs(slope.value), slope.rounding / DIFFERENCE_TOLERANCE)
        error, spread = (or_infinite(value / scale) for value in (abs(slope.value - expected), slope.spread))
        if error <= DIFFERENCE_TOLERANCE:
            within.append((error, spread))
        else:
            (beyond if is_conclusive(error, spread) else vague).append((error, spread))
        if len(within) == num_needed:
            return max(within)
        if len(beyond) == num_needed:
            return min(beyond)
    return min(vague)


def is_conclusive(difference_error: float, difference_spread: float) -> bool:
    """Whether an error beyond the tolerance is the gradient's, and not that of the differences."""
    return math.isinf(difference_error) or difference_spread <= CONCLUSIVE_SHARE * difference_error
