"""Cosines between the gradients of tasks, or of groups of tasks.

Shape letters: T tasks of an outer step, G groups in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Cosines:
    """A symmetric matrix of cosines.

    Attributes:
        of: what its rows are: `groups`, or `tasks` where the step has fewer than two groups.
        labels: names of the groups, or episode numbers of the tasks.
        values: by rows.
    """

    of: str
    labels: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]


def cosines_of(gram: Tensor) -> Tensor:
    """`G_st / sqrt(G_ss G_tt)` of a matrix of inner products; 0 where a gradient is 0."""
    norms = gram.diagonal().clamp(min=0.0).sqrt()
    product = norms[:, None] * norms[None, :]
    return torch.where(product > 0.0, gram / torch.where(product > 0.0, product, 1.0), 0.0).clamp(-1.0, 1.0)


def conflict_metrics(gram: Tensor) -> dict[str, float]:
    """Over the pairs of tasks: `conflict_share`, of those whose cosine is negative (Yu et al. 2020, "Gradient
    Surgery for Multi-Task Learning", definition 1), and `mean_cosine`; nothing for a single task."""
    rows, columns = torch.triu_indices(len(gram), len(gram), offset=1)
    if len(rows) == 0:
        return {}
    pairs = cosines_of(gram)[rows, columns]
    return {"conflict_share": float((pairs < 0.0).double().mean()), "mean_cosine": float(pairs.mean())}


def step_cosines(gram: Tensor, numbers: Sequence[int], groups: Sequence[str | None]) -> Cosines:
    """The cosines between the mean gradients of the step's groups; between its tasks where a task has no
    group, or all have one and the same.

    Args:
        gram: `[T, T]`.
    """
    names = sorted({group for group in groups if group is not None})
    if None in groups or len(names) < 2:
        return Cosines("tasks", tuple(map(str, numbers)), _rows(cosines_of(gram)))
    means = group_averages(groups, names)
    return Cosines("groups", tuple(names), _rows(cosines_of(means @ gram @ means.T)))


def group_averages(groups: Sequence[str | None], names: Sequence[str]) -> Tensor:
    """`[G, T]`, float64: what takes T tasks to the means of their groups."""
    member = torch.tensor([[group == name for group in groups] for name in names], dtype=torch.float64)
    return member / member.sum(1, keepdim=True)


def _rows(matrix: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.tolist())
