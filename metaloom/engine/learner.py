"""A model seen as the losses of T tasks: the one primitive that the engine stands on.

Shape letters: T tasks, S support examples, Q query examples, N examples of either kind,
L tokens, C classes (or vocabulary).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from metaloom.engine.adapters.base import Adapter
from metaloom.engine.adapters.model import Readout
from metaloom.engine.draws import Draws
from metaloom.engine.forward_pass import Derivative, ForwardPass
from metaloom.engine.losses import PLAIN, LossTensors, SupportLoss, example_means, is_right, token_losses
from metaloom.engine.precision import Precision
from metaloom.engine.recomputation import recomputed
from metaloom.errors import CapabilityError

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
        weights: what each task's meta-loss is multiplied by, `[T]`: 1, and 0 for a dummy, which is there so
            that every rank computes as many tasks; None where there are none. A dummy repeats the data of a
            task, so that it is finite where that is: 0 times infinity would not vanish.
    """

    numbers: tuple[int, ...]
    support: Tensors
    query: Tensors
    rehearsal: Tensors | None = None
    retention: Tensors | None = None
    weights: Tensor | None = None

    @property
    def num_tasks(self) -> int:
        return len(self.numbers)

    def split(self, size: int) -> list[TaskBatch]:
        """The same tasks as micro-batches of at most `size` tasks, in order."""
        return [self._slice(start, start + size) for start in range(0, self.num_tasks, size)]

    def _slice(self, start: int, stop: int) -> TaskBatch:
        def cut(tensors: Tensors) -> dict[str, Tensor]:
            return {name: tensor[start:stop] for name, tensor in tensors.items()}

        return TaskBatch(
            self.numbers[start:stop],
            cut(self.support),
            cut(self.query),
            rehearsal=None if self.rehearsal is None else cut(self.rehearsal),
            retention=None if self.retention is None else cut(self.retention),
            weights=None if self.weights is None else self.weights[start:stop],
        )


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

    Dropout acts in the support objective, at training and at evaluation alike: it is a part of adaptation,
    and what it draws follows from `seed`, the task and the step. The query and retention objectives have
    none.

    Attributes:
        adapter: the model together with what is fast in it.
        precision: the dtype of the forward pass; losses are always at least float32.
        rehearsal: how the inner loss mixes in rehearsal data; None for not at all.
        support_loss: the cross-entropy that tasks adapt by.
        seed: what dropout's draws follow from.
        recompute_blocks: keep the inputs of the model's blocks alone, and compute each again when it is
            differentiated: less memory, one more forward pass.
        head_chunk: tokens for which the head and its cross-entropy are computed at a time, and computed again
            when differentiated; None for all at once. With a large vocabulary the logits are what
            memory is needed for.
    """

    adapter: Adapter
    precision: Precision
    rehearsal: Rehearsal | None = None
    support_loss: SupportLoss = dataclasses.field(default_factory=SupportLoss)
    seed: int = 0
    recompute_blocks: bool = False
    head_chunk: int | None = None

    def init(self, meta: Tensors, num_tasks: int) -> dict[str, Tensor]:
        """phi_0, differentiable in `meta`: name -> `[T, ...]`."""
        return self.adapter.init(meta, num_tasks)

    def losses(
        self,
        objective: Objective,
        meta: Tensors,
        fast: Tensors,
        batch: TaskBatch,
        step: int,
        *,
        derivative: Derivative = "once",
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of each task at its own fast weights.

        Args:
            objective: `support` (the inner loss, rehearsal mixed in), `query` (the meta-loss)
                or `retention` (pre-training data that was not rehearsed).
            meta: meta-parameters by name, shared by the tasks.
            fast: fast weights by name, each `[T, ...]`.
            batch: the tasks' data.
            step: inner step, which chooses the rehearsal stretches and the draws of the support objective.
            derivative: how the losses will be differentiated: `once`, or twice, the second time in `reverse`
                or `forward` mode. Differentiating twice what was made for once may fail, or be wrong.

        Returns:
            Losses `[T]` in nats, and `accuracy` `[T]` (share of right answers, detached).
        """
        is_support = objective == "support"
        if objective == "query":
            inputs, targets = batch.query["inputs"], batch.query["targets"]
        elif objective == "retention":
            assert batch.retention is not None, "the retention objective needs data of its own"
            inputs, targets = batch.retention["inputs"], batch.retention["targets"]
        else:
            inputs, targets = self._support(batch, step)
        forward_pass = ForwardPass(
            precision=self.precision,
            device=inputs.device,
            derivative=derivative,
            draws=Draws(self.seed, batch.numbers, step) if is_support else None,
            recompute_blocks=self.recompute_blocks,
            holds_back_head=self.head_chunk is not None,
        )
        readout = self.adapter.forward(meta, fast, inputs, forward_pass)
        how = self.support_loss.at(meta) if is_support else PLAIN
        each, right = self._read(readout, targets, how, derivative)
        example_losses = example_means(each)
        accuracy = right.flatten(1).double().mean(1)
        if is_support and self.rehearsal is not None:
            num_support = batch.support["targets"].shape[1]
            own, old = example_losses[:, :num_support], example_losses[:, num_support:]
            ratio = self.rehearsal.ratio
            return (1.0 - ratio) * own.mean(1) + ratio * old.mean(1), {"accuracy": accuracy}
        return example_losses.mean(1), {"accuracy": accuracy}

    def _read(
        self, readout: Readout, targets: Tensor, how: LossTensors, derivative: Derivative
    ) -> tuple[Tensor, Tensor]:
        """The loss of each target, and whether the likeliest class is it; both shaped like the targets."""
        if self.head_chunk is None:
            return token_losses(readout.features, targets, how), is_right(readout.features, targets)
        if readout.head is None:
            raise CapabilityError(
                f"memory.head_chunk is {self.head_chunk}, and this model has no head that can be told from "
                "the rest: set it to null."
            )
        head = readout.head
        features = readout.features.flatten(1, -2)  # [T, N * L, D]
        wanted = targets.flatten(1)
        learned = [value for value in (how.temperature, how.label_smoothing) if isinstance(value, Tensor)]

        def compute(chunk: Tensor, wanted: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            rest = iter(tensors[: len(learned)])
            temperature, smoothing = (
                next(rest) if isinstance(value, Tensor) else value
                for value in (how.temperature, how.label_smoothing)
            )
            logits = head(chunk, *tensors[len(learned) :])
            return token_losses(logits, wanted, LossTensors(temperature, smoothing)), is_right(logits, wanted)

        pieces = [
            recomputed(
                compute,
                (
                    features[:, start : start + self.head_chunk],
                    wanted[:, start : start + self.head_chunk],
                    *learned,
                    *readout.tensors,
                ),
                derivative=derivative,
            )
            for start in range(0, features.shape[1], self.head_chunk)
        ]
        each, right = (torch.cat(parts, dim=1).view(targets.shape) for parts in zip(*pieces, strict=True))
        return each, right

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
