"""A model seen as the losses of T tasks: the one primitive that the engine stands on.

Shape letters: T tasks, S support examples, Q query examples, N examples of either kind,
L tokens, C classes (or vocabulary).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from metaloom.engine.adapters.base import Adapter
from metaloom.engine.precision import Precision

Tensors = Mapping[str, Tensor]
Objective = Literal["support", "query", "retention"]


@dataclasses.dataclass(frozen=True)
class TaskBatch:
    """T tasks side by side.

    Attributes:
        numbers: the global episode number of each task, length T.
        support: `inputs` `[T, S, ...]` and `targets` `[T, S]` or `[T, S, L]`.
        query: the same with Q in place of S.
        rehearsal: the same with the stretches that the inner steps rehearse, or None.
        retention: the same with stretches of that kind that are not rehearsed: what forgetting
            is measured on, or None.
    """

    numbers: tuple[int, ...]
    support: Tensors
    query: Tensors
    rehearsal: Tensors | None = None
    retention: Tensors | None = None

    @property
    def num_tasks(self) -> int:
        return len(self.numbers)

    def split(self, size: int) -> list[TaskBatch]:
        """The same tasks as micro-batches of at most `size` tasks, in order."""
        return [self._slice(start, start + size) for start in range(0, self.num_tasks, size)]

    def _slice(self, start: int, stop: int) -> TaskBatch:
        def cut(tensors: Tensors) -> dict[str, Tensor]:
            return {name: tensor[start:stop] for name, tensor in tensors.items()}

        optional = (None if part is None else cut(part) for part in (self.rehearsal, self.retention))
        return TaskBatch(self.numbers[start:stop], cut(self.support), cut(self.query), *optional)


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """Pre-training data mixed into every inner step, so that adaptation forgets less.

    The inner loss is `(1 - ratio) * support loss + ratio * rehearsal loss`; each inner step
    reads the next `num_sequences` stretches of the task's rehearsal data, cyclically.
    """

    ratio: float
    num_sequences: int


@dataclasses.dataclass(frozen=True)
class Learner:
    """`losses(objective, meta, fast, batch, step)`: the loss of each of T tasks.

    Tasks share neither fast weights nor anything inside the forward pass, so the gradient of
    `losses.sum()` with respect to `fast` is the stack of the tasks' own gradients.

    Attributes:
        adapter: the model together with what is fast in it.
        precision: the dtype of the forward pass; losses are always at least float32.
        rehearsal: how the inner loss mixes in rehearsal data; None for not at all.
    """

    adapter: Adapter
    precision: Precision
    rehearsal: Rehearsal | None = None

    def init(self, meta: Tensors, num_tasks: int) -> dict[str, Tensor]:
        """phi_0, differentiable in `meta`: name -> `[T, ...]`."""
        return self.adapter.init(meta, num_tasks)

    def losses(
        self, objective: Objective, meta: Tensors, fast: Tensors, batch: TaskBatch, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of each task at its own fast weights.

        Args:
            objective: `support` (the inner loss, rehearsal mixed in), `query` (the meta-loss)
                or `retention` (pre-training data that was not rehearsed).
            meta: meta-parameters by name, shared by the tasks.
            fast: fast weights by name, each `[T, ...]`.
            batch: the tasks' data.
            step: inner step, which chooses the rehearsal stretches of the support objective.

        Returns:
            Losses `[T]` in nats, and `accuracy` `[T]` (share of right answers, detached).
        """
        if objective == "query":
            inputs, targets = batch.query["inputs"], batch.query["targets"]
        elif objective == "retention":
            assert batch.retention is not None, "the retention objective needs data of its own"
            inputs, targets = batch.retention["inputs"], batch.retention["targets"]
        else:
            inputs, targets = self._support(batch, step)
        with self.precision.autocast(inputs.device):
            logits = self.adapter.forward(meta, fast, inputs)
        example_losses = cross_entropy(logits, targets)
        accuracy = (logits.detach().argmax(-1) == targets).flatten(1).double().mean(1)
        if objective == "support" and self.rehearsal is not None:
            num_support = batch.support["targets"].shape[1]
            own, old = example_losses[:, :num_support], example_losses[:, num_support:]
            ratio = self.rehearsal.ratio
            return (1.0 - ratio) * own.mean(1) + ratio * old.mean(1), {"accuracy": accuracy}
        return example_losses.mean(1), {"accuracy": accuracy}

    def _support(self, batch: TaskBatch, step: int) -> tuple[Tensor, Tensor]:
        inputs, targets = batch.support["inputs"], batch.support["targets"]
        if self.rehearsal is None:
            return inputs, targets
        assert batch.rehearsal is not None, "the recipe asks for rehearsal, the batch has none"
        available = batch.rehearsal["inputs"].shape[1]
        first = step * self.rehearsal.num_sequences
        rows = [(first + row) % available for row in range(self.rehearsal.num_sequences)]
        return (
            torch.cat([inputs, batch.rehearsal["inputs"][:, rows]], dim=1),
            torch.cat([targets, batch.rehearsal["targets"][:, rows]], dim=1),
        )


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of each example, `[T, N]`, in nats.

    Args:
        logits: `[T, N, C]` or `[T, N, L, C]`; half precision is raised to float32 first.
        targets: `[T, N]` or `[T, N, L]`, class indices.
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return losses.view(*targets.shape[:2], -1).mean(-1)


def bits_per_byte(nats: float) -> float:
    """A byte-level loss in bits."""
    return nats / math.log(2.0)
