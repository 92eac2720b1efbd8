"""The losses of examples, read from what a forward pass has come to.

Shape letters: T tasks, N examples, L tokens, D width, C classes (or vocabulary).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from metaloom.engine.adapters.model import Readout
from metaloom.engine.draws import Draws
from metaloom.engine.forward_pass import Derivative
from metaloom.engine.losses import PLAIN, Criterion, LossTensors, example_means, task_means
from metaloom.engine.recomputation import recomputed
from metaloom.errors import CapabilityError


@dataclasses.dataclass(frozen=True)
class Reading:
    """How examples are read, and what they cost.

    Attributes:
        criterion: the loss of a target.
        head: which output of a model that has several.
        how: temperature, label smoothing and weights of classes.
        num_ways: `[T]`, how many classes each task has; None for all that there are.
        draws: what dropout draws; None: dropout does nothing.
        noise: what a stochastic layer draws; None: it gives its means.
        step: how many inner steps the fast weights have gone.
        objective: the loss that they are read for.
    """

    criterion: Criterion
    head: str | None
    how: LossTensors = PLAIN
    num_ways: Tensor | None = None
    draws: Draws | None = None
    noise: Draws | None = None
    step: int = 0
    objective: str = ""


@dataclasses.dataclass(frozen=True)
class Examples:
    """What examples cost.

    Attributes:
        losses: `[T, N]`, means over their targets that count; 0 where none does.
        scores: by name, `[T, N]`, likewise, float64.
        is_scored: `[T, N]`, whether a target counts.
        weights: `[T, N]`, 0 for padding; None where there is none.
        divergences: `[T, N]`, what a stochastic layer tells of each; None where nobody asks.
    """

    losses: Tensor
    scores: dict[str, Tensor]
    is_scored: Tensor
    weights: Tensor | None
    divergences: Tensor | None = None

    def rows(self, start: int, stop: int | None) -> Examples:
        """Some examples of each task."""
        return Examples(
            self.losses[:, start:stop],
            {name: value[:, start:stop] for name, value in self.scores.items()},
            self.is_scored[:, start:stop],
            None if self.weights is None else self.weights[:, start:stop],
        )

    def loss(self) -> Tensor:
        """The mean loss of each task, `[T]`."""
        return task_means(self.losses, self.weights)

    def divergence(self) -> Tensor:
        """The mean divergence of each task, `[T]`."""
        assert self.divergences is not None, "it is asked for before the pass"
        return task_means(self.divergences, self.weights)

    def mean_scores(self) -> dict[str, Tensor]:
        """The mean scores of each task by name, `[T]`, over the examples with a target that counts."""
        weights = self.is_scored if self.weights is None else self.is_scored * self.weights
        return {name: task_means(value, weights) for name, value in self.scores.items()}


def read(
    readout: Readout,
    targets: Tensor,
    weights: Tensor | None,
    reading: Reading,
    *,
    head_chunk: int | None,
    derivative: Derivative,
) -> Examples:
    """What the examples of T tasks cost.

    Args:
        targets: `[T, N, ...]`.
        weights: `[T, N]`, 0 for padding; None where there is none.
        head_chunk: tokens for which a head that was held back is computed at a time, and computed again when
            differentiated; None where it was not held back.
        derivative: how the losses will be differentiated.

    Raises:
        CapabilityError: outputs and targets do not belong together; or the model has no head to hold back.
    """
    criterion = reading.criterion
    if head_chunk is None:
        of_targets = criterion.of_targets(readout.features, targets, reading.how, reading.num_ways)
    else:
        of_targets = _in_chunks(readout, targets, reading, head_chunk, derivative)
    is_counted = criterion.is_counted(targets)
    losses, *scores = of_targets
    return Examples(
        losses=example_means(reading.how.weighted(losses, targets), is_counted),
        scores={
            name: example_means(value.double(), is_counted)
            for name, value in zip(criterion.scores, scores, strict=True)
        },
        is_scored=is_counted.flatten(2).any(2) if is_counted.ndim > 2 else is_counted,
        weights=weights,
    )


def _in_chunks(
    readout: Readout, targets: Tensor, reading: Reading, head_chunk: int, derivative: Derivative
) -> tuple[Tensor, ...]:
    """Loss and scores of each target, head and loss computed for so many tokens of a task at a time."""
    if readout.head is None:
        raise CapabilityError(
            f"memory.head_chunk is {head_chunk}, and this model has no head that can be told from "
            "the rest: set it to null."
        )
    head, criterion, how = readout.head, reading.criterion, reading.how
    features = readout.features.flatten(1, -2)  # [T, N * L, D]
    wanted = targets.flatten(1, targets.ndim - 1 - criterion.num_target_dims)
    learned = [value for value in (how.temperature, how.label_smoothing) if isinstance(value, Tensor)]

    def compute(chunk: Tensor, wanted: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors[: len(learned)])
        temperature, smoothing = (
            next(rest) if isinstance(value, Tensor) else value
            for value in (how.temperature, how.label_smoothing)
        )
        outputs = head(chunk, *tensors[len(learned) :])
        return criterion.of_targets(outputs, wanted, LossTensors(temperature, smoothing), reading.num_ways)

    pieces = [
        recomputed(
            compute,
            (
                features[:, start : start + head_chunk],
                wanted[:, start : start + head_chunk],
                *learned,
                *readout.tensors,
            ),
            derivative=derivative,
        )
        for start in range(0, features.shape[1], head_chunk)
    ]
    return tuple(torch.cat(parts, dim=1).view(targets.shape) for parts in zip(*pieces, strict=True))
