"""What episodes of groups say of each group."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from metaloom.confidence import confidence_95
from metaloom.tracking.results import GroupResult


def group_results(values: Sequence[float], groups: Sequence[str | None]) -> tuple[GroupResult, ...]:
    """The mean over the episodes of each group, in the order of the groups' names.

    Args:
        values: of each episode.
        groups: of each episode; those of none are left out.
    """
    by_group = _by_group(values, groups)
    return tuple(
        GroupResult(
            name, statistics.fmean(own), confidence_95(own, [f"{row}" for row in range(len(own))]), len(own)
        )
        for name, own in sorted(by_group.items())
    )


def worst_of_groups(
    measures: Mapping[str, Sequence[float]], groups: Sequence[str | None]
) -> dict[str, float]:
    """By measure the mean of the group where it is worst, as `worst_group_<measure>`: the largest loss, the
    smallest score. Empty where no episode has a group.

    Args:
        measures: by name, the value of each episode.
        groups: of each episode.
    """
    worst = {}
    for name, values in measures.items():
        means = [statistics.fmean(own) for own in _by_group(values, groups).values()]
        if means:
            worst[f"worst_group_{name}"] = max(means) if name == "loss" else min(means)
    return worst


def _by_group(values: Sequence[float], groups: Sequence[str | None]) -> dict[str, list[float]]:
    by_group: dict[str, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        if group is not None:
            by_group.setdefault(group, []).append(value)
    return by_group
