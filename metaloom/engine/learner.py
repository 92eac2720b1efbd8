"""A model seen as the losses of T tasks: the one primitive that the engine stands on.

Shape letters: T tasks, S support examples, Q query examples, N examples of either kind,
L tokens, C classes (or vocabulary), P numbers of a regression's target, R rehearsed examples of a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from metaloom.engine.adapters.base import Adapter
from metaloom.engine.adapters.model import Readout
from metaloom.engine.adapters.norms import MetStatistics
from metaloom.engine.draws import Draws
from metaloom.engine.examples import Examples, Reading, read
from metaloom.engine.forward_pass import Bottleneck, Derivative, ForwardPass
from metaloom.engine.learned_loss import LearnedLoss
from metaloom.engine.losses import Criterion, CrossEntropy, SupportLoss
from metaloom.engine.precision import Precision
from metaloom.errors import CapabilityError

Tensors = Mapping[str, Tensor]
Objective = Literal["support", "query", "outer", "retention"]


@dataclasses.dataclass(frozen=True)
class TaskBatch:
    """T tasks side by side.

    Tasks of fewer examples than others are padded with further ones behind their own, which have weight 0 and
    change nothing: neither losses, nor derivatives, nor batch statistics, nor draws. They have to be finite.
    Positions of padded tokens are for the model to tell: `metaloom.models.gpt.PAD`. A class index of
    `losses.IGNORE` counts for nothing. A single example has the same shape in all tasks of all ranks.

    Attributes:
        numbers: the global episode number of each task, length T.
        support: `inputs` `[T, S, ...]` and `targets`, class indices `[T, S]` or `[T, S, L]`, or numbers
            `[T, S, P]`; where tasks are padded `weights` `[T, S]`, 1 for an example and 0 for padding.
        query: the same with Q in place of S.
        rehearsal: the same with the stretches that the inner steps rehearse, or None.
        retention: the same with stretches of that kind that are not rehearsed: what forgetting
            is measured on, or None.
        weights: what each task's meta-loss is multiplied by, `[T]`; None for 1. It is 0 for a dummy, which is
            there so that every rank computes as many tasks. A dummy repeats the data of a task, so that it is
            finite where that is: 0 times infinity would not vanish, so what is not finite is replaced too
            (`metaloom.engine.left_out`).
        num_ways: `[T]`, int64, how many of the classes each task has, whose indices come first: the
            others have probability 0. None where all tasks have all.
        outer_rehearsal: the same as `rehearsal` with what the meta-loss rehearses, or None.
        groups: the group of each task, length T: user, domain, corruption, or data set of a mixture; None for
            a task that has none. None where no task has one.
    """

    numbers: tuple[int, ...]
    support: Tensors
    query: Tensors
    rehearsal: Tensors | None = None
    retention: Tensors | None = None
    weights: Tensor | None = None
    num_ways: Tensor | None = None
    outer_rehearsal: Tensors | None = None
    groups: tuple[str | None, ...] | None = None

    @property
    def num_tasks(self) -> int:
        return len(self.numbers)

    def split(self, size: int) -> list[TaskBatch]:
        """The same tasks as micro-batches of at most `size` tasks, in order."""
        return [self._slice(start, start + size) for start in range(0, self.num_tasks, size)]

    def _slice(self, start: int, stop: int) -> TaskBatch:
        cut = self.mapped(lambda tensor: tensor[start:stop])
        groups = None if self.groups is None else self.groups[start:stop]
        return dataclasses.replace(cut, numbers=self.numbers[start:stop], groups=groups)

    def picked(self, places: Sequence[int]) -> TaskBatch:
        """The tasks at these places, in their order; one may come more than once."""
        rows = list(places)
        picked = self.mapped(lambda tensor: tensor[rows])
        numbers = tuple(self.numbers[row] for row in rows)
        groups = None if self.groups is None else tuple(self.groups[row] for row in rows)
        return dataclasses.replace(picked, numbers=numbers, groups=groups)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> TaskBatch:
        """The batch with a function of each of its tensors in their place."""

        def of_part(part: Tensors | None) -> dict[str, Tensor] | None:
            return None if part is None else {name: function(tensor) for name, tensor in part.items()}

        return TaskBatch(
            self.numbers,
            {name: function(tensor) for name, tensor in self.support.items()},
            {name: function(tensor) for name, tensor in self.query.items()},
            rehearsal=of_part(self.rehearsal),
            retention=of_part(self.retention),
            weights=None if self.weights is None else function(self.weights),
            num_ways=None if self.num_ways is None else function(self.num_ways),
            outer_rehearsal=of_part(self.outer_rehearsal),
            groups=self.groups,
        )


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """Pre-training data mixed into adaptation, so that it forgets less.

    The inner loss is `(1 - ratio) * support loss + ratio * rehearsal loss`; each inner step reads the next
    `num_samples` stretches of the task's rehearsal data, cyclically. The meta-loss is
    `(1 - outer_ratio) * query loss + outer_ratio * rehearsal loss`, at the adapted weights, on data of its
    own.

    Attributes:
        ratio: in the inner loss, from 0 to 1; 0 for none.
        num_samples: stretches that an inner step reads.
        outer_ratio: in the meta-loss, from 0 to 1; 0 for none.
        criterion: the loss of its targets; None for that of the tasks.
        head: which output of a model that has several it is read from; None for that of the tasks.
    """

    ratio: float
    num_samples: int
    outer_ratio: float = 0.0
    criterion: Criterion | None = None
    head: str | None = None


@dataclasses.dataclass(frozen=True)
class Learner:
    """`losses(objective, meta, fast, batch, step)`: the loss of each of T tasks.

    Tasks share neither fast weights nor anything inside the forward pass, so the gradient of
    `losses.sum()` with respect to `fast` is the stack of the tasks' own gradients.

    Dropout acts in the support objective, at training and at evaluation alike: it is a part of adaptation,
    and what it draws follows from `seed`, the task and the step. The other objectives have none.

    Attributes:
        adapter: the model together with what is fast in it.
        precision: the dtype of the forward pass; losses are always at least float32.
        rehearsal: how rehearsal data is mixed in; None for not at all.
        support_loss: what the loss that tasks adapt by is changed by. Rehearsal of the tasks' own criterion
            and head is changed likewise in the inner loss, but for the weight of the task's group; any other
            is not changed.
        seed: what dropout's draws follow from.
        recompute_blocks: keep the inputs of the model's blocks alone, and compute each again when it is
            differentiated: less memory, one more forward pass.
        head_chunk: tokens for which the head and its loss are computed at a time, and computed again
            when differentiated; None for all at once. With a large vocabulary the logits are what
            memory is needed for.
        criterion: the loss of a target.
        head: which output the tasks' are, of a model that has several; None for a model with one.
        met: takes in what batch norms meet; None where nobody asks.
        learned_loss: what tasks adapt by in place of the criterion, without looking at support targets; None
            for the criterion.
        bottleneck: price of a nat that a stochastic layer of the model tells of a query example, in the
            meta-loss (Yin et al. 2020, "Meta-Learning without Memorization", section 4.1, equation 4:
            MR-MAML (A)); None for a model without. The layer draws in the objectives `support` and `outer`,
            as a function of `seed`, the task and the step, and gives its means in the others.

    Raises:
        CapabilityError: the criterion has no temperature and label smoothing, and they are given; or a
            learned loss is to be mixed with another, or computed in chunks.
    """

    adapter: Adapter
    precision: Precision
    rehearsal: Rehearsal | None = None
    support_loss: SupportLoss = dataclasses.field(default_factory=SupportLoss)
    seed: int = 0
    recompute_blocks: bool = False
    head_chunk: int | None = None
    criterion: Criterion = dataclasses.field(default_factory=CrossEntropy)
    head: str | None = None
    met: MetStatistics | None = None
    learned_loss: LearnedLoss | None = None
    bottleneck: float | None = None

    def __post_init__(self) -> None:
        rehearsal = self.rehearsal
        has_other = self.support_loss != SupportLoss() or (rehearsal is not None and rehearsal.ratio > 0.0)
        if self.learned_loss is not None and (has_other or self.head_chunk is not None):
            raise CapabilityError(
                "a learned loss of the outputs stands in the place of the cross-entropy, its temperature and "
                "label smoothing, has no rehearsal beside it in the inner loss, and sees all outputs at "
                "once: leave these and head_chunk out, or the learned loss."
            )
        if not self.criterion.takes_support_loss and self.support_loss.is_of_classes:
            loss = self.support_loss
            learned = ", ".join(loss.learned_of_classes) or "none"
            raise CapabilityError(
                f"adaptation.loss has a temperature of {loss.temperature} and a label smoothing of "
                f"{loss.label_smoothing}, learned: {learned}; these belong to the "
                "cross-entropy, and the tasks' loss is another: leave them out, or classify."
            )

    @property
    def rehearses_outside(self) -> bool:
        """Whether the meta-loss has rehearsal in it."""
        return self.rehearsal is not None and self.rehearsal.outer_ratio > 0.0

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of what is measured of tasks beside the loss, of which higher is better."""
        return self.criterion.scores

    @property
    def outer_measures(self) -> tuple[str, ...]:
        """Names of what the objective `outer` measures."""
        rehearsal = ("rehearsal_loss",) if self.rehearses_outside else ()
        return ("loss", *self.scores, *rehearsal, *(() if self.bottleneck is None else ("kl",)))

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
        """The loss of each task at its own fast weights: the mean over its examples, by their weights.

        Args:
            objective: `support` (the inner loss, rehearsal mixed in), `query` (the query loss alone), `outer`
                (the meta-loss: the query loss, rehearsal mixed in where it is to be) or `retention`
                (pre-training data that was not rehearsed).
            meta: meta-parameters by name, shared by the tasks.
            fast: fast weights by name, each `[T, ...]`.
            batch: the tasks' data.
            step: inner step, which chooses the rehearsal stretches and the draws of the support objective.
            derivative: how the losses will be differentiated: `once`, or twice, the second time in `reverse`
                or `forward` mode. Differentiating twice what was made for once may fail, or be wrong.

        Returns:
            Losses `[T]`, in nats where they are cross-entropies; and the scores, `[T]` each, detached, such
            as `accuracy` (share of right answers). `outer` adds its parts, as `outer_measures` names them.
            A learned loss has no scores.
        """
        tasks = Reading(self.criterion, self.head, num_ways=batch.num_ways, step=step, objective=objective)
        if objective == "support":
            draws = Draws(self.seed, batch.numbers, step)
            if self.learned_loss is not None:
                unlabelled, tasks = batch.support, dataclasses.replace(tasks, draws=draws, noise=draws)
                bottleneck = self._bottleneck(tasks)
                outputs = self._readout(meta, fast, unlabelled, tasks, derivative, bottleneck).features
                return self.learned_loss.of_outputs(meta, outputs, unlabelled.get("weights")), {}
            tasks = dataclasses.replace(tasks, how=self.support_loss.at(meta), draws=draws, noise=draws)
            return self._inner_losses(meta, fast, batch, step, tasks, derivative)
        if objective == "retention":
            assert batch.retention is not None, "the retention objective needs data of its own"
            old = self._examples(meta, fast, batch.retention, self._of_rehearsal(tasks), derivative)
            return old.loss(), old.mean_scores()
        if objective == "outer":
            tasks = dataclasses.replace(tasks, noise=Draws(self.seed, batch.numbers, step, part="query/"))
        own = self._examples(meta, fast, batch.query, tasks, derivative)
        loss, measures = own.loss(), own.mean_scores()
        if objective == "query":
            return loss, measures
        measures = {"loss": loss.detach().double()} | measures
        if self.bottleneck is not None:
            divergence = own.divergence()
            measures["kl"] = divergence.detach().double()
            loss = loss + self.bottleneck * divergence
        if self.rehearsal is None or not self.rehearses_outside:
            return loss, measures
        assert batch.outer_rehearsal is not None, "rehearsal in the meta-loss needs data of its own"
        old = self._examples(meta, fast, batch.outer_rehearsal, self._of_rehearsal(tasks), derivative)
        rehearsed, ratio = old.loss(), self.rehearsal.outer_ratio
        measures["rehearsal_loss"] = rehearsed.detach().double()
        return (1.0 - ratio) * loss + ratio * rehearsed, measures

    def outputs(self, meta: Tensors, fast: Tensors, inputs: Tensor, step: int) -> Tensor:
        """What the model says of examples, `[T, N, ..., V]`, as the objective `query` reads it.

        Args:
            meta, fast, step: as for `losses`.
            inputs: `[T, N, ...]`.
        """
        # With the head in the pass: nothing is differentiated here.
        whole = dataclasses.replace(self, head_chunk=None)
        reading = Reading(self.criterion, self.head, step=step, objective="query")
        bottleneck = self._bottleneck(reading)
        return whole._readout(meta, fast, {"inputs": inputs}, reading, "once", bottleneck).features

    def _inner_losses(
        self,
        meta: Tensors,
        fast: Tensors,
        batch: TaskBatch,
        step: int,
        tasks: Reading,
        derivative: Derivative,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rehearsal = self.rehearsal
        if rehearsal is None or rehearsal.ratio == 0.0:
            own = self._examples(meta, fast, batch.support, tasks, derivative)
            return self._weighted(own.loss(), meta, batch), own.mean_scores()
        assert batch.rehearsal is not None, "the recipe asks for rehearsal, the batch has none"
        stretches = _next_stretches(batch.rehearsal, step, rehearsal.num_samples)
        if self._rehearses_alike and _are_shaped_alike(stretches, batch.support):
            # In one pass. The support examples come last: their padding then changes no draws.
            both = self._examples(meta, fast, _joined(stretches, batch.support), tasks, derivative)
            old, own = both.rows(0, rehearsal.num_samples), both.rows(rehearsal.num_samples, None)
        else:
            own = self._examples(meta, fast, batch.support, tasks, derivative)
            old = self._examples(meta, fast, stretches, self._of_rehearsal(tasks), derivative)
        ratio = rehearsal.ratio
        loss = self._weighted(own.loss(), meta, batch)
        return (1.0 - ratio) * loss + ratio * old.loss(), own.mean_scores()

    def _weighted(self, losses: Tensor, meta: Tensors, batch: TaskBatch) -> Tensor:
        """Support losses `[T]` by the weights of the tasks' groups."""
        weights = self.support_loss.of_groups(meta, batch.groups or (None,) * batch.num_tasks)
        return losses if weights is None else weights * losses

    @property
    def _rehearses_alike(self) -> bool:
        """Whether rehearsal has the tasks' own criterion and head."""
        rehearsal = self.rehearsal
        return rehearsal is None or (
            rehearsal.criterion in (None, self.criterion) and rehearsal.head in (None, self.head)
        )

    def _of_rehearsal(self, tasks: Reading) -> Reading:
        """How rehearsal data is read in a pass of its own, where tasks are read so."""
        draws = None if tasks.draws is None else dataclasses.replace(tasks.draws, part="rehearsal/")
        rehearsal, objective = self.rehearsal, f"{tasks.objective}, rehearsal"
        if rehearsal is None or self._rehearses_alike:
            return dataclasses.replace(tasks, draws=draws, objective=objective)
        return Reading(
            rehearsal.criterion or self.criterion,
            rehearsal.head or self.head,
            draws=draws,
            step=tasks.step,
            objective=objective,
        )

    def _examples(
        self, meta: Tensors, fast: Tensors, data: Tensors, reading: Reading, derivative: Derivative
    ) -> Examples:
        """What examples cost, by a forward pass of their own."""
        bottleneck = self._bottleneck(reading)
        readout = self._readout(meta, fast, data, reading, derivative, bottleneck)
        weights, chunk = data.get("weights"), self.head_chunk
        examples = read(readout, data["targets"], weights, reading, head_chunk=chunk, derivative=derivative)
        if bottleneck is None or not bottleneck.divergences:
            return examples
        found = torch.cat(bottleneck.divergences).view(examples.losses.shape)
        return dataclasses.replace(examples, divergences=found)

    def _bottleneck(self, reading: Reading) -> Bottleneck | None:
        """What a stochastic layer draws, and where it says what it tells; None for a model without."""
        if self.bottleneck is None:
            return None
        return Bottleneck(reading.noise, [] if reading.objective == "outer" else None)

    def _readout(
        self,
        meta: Tensors,
        fast: Tensors,
        data: Tensors,
        reading: Reading,
        derivative: Derivative,
        bottleneck: Bottleneck | None,
    ) -> Readout:
        """What the model says of examples."""
        inputs = data["inputs"]
        forward_pass = ForwardPass(
            precision=self.precision,
            device=inputs.device,
            derivative=derivative,
            draws=reading.draws,
            recompute_blocks=self.recompute_blocks,
            holds_back_head=self.head_chunk is not None,
            head=reading.head,
            weights=data.get("weights"),
            step=reading.step,
            objective=reading.objective,
            met=self.met,
            bottleneck=bottleneck,
        )
        return self.adapter.forward(meta, fast, inputs, forward_pass)


def _next_stretches(rehearsal: Tensors, step: int, num_samples: int) -> dict[str, Tensor]:
    """What an inner step reads of the rehearsal data, cyclically; padding is passed over."""
    available = rehearsal["inputs"].shape[1]
    first = step * num_samples
    if "weights" not in rehearsal:
        rows = [(first + row) % available for row in range(num_samples)]
        return {name: value[:, rows] for name, value in rehearsal.items()}
    weights = rehearsal["weights"]
    counts = (weights != 0).sum(1, keepdim=True).clamp(min=1)  # [T, 1]
    positions = (first + torch.arange(num_samples, device=weights.device)) % counts  # [T, R]
    tasks = torch.arange(len(weights), device=weights.device)[:, None]
    return {name: value[tasks, positions] for name, value in rehearsal.items()}


def _are_shaped_alike(one: Tensors, other: Tensors) -> bool:
    """Whether the examples of two parts are of the same shapes and kinds."""
    return all(
        (one[name].shape[2:], one[name].dtype) == (other[name].shape[2:], other[name].dtype)
        for name in ("inputs", "targets")
    )


def _joined(first: Tensors, second: Tensors) -> dict[str, Tensor]:
    """The examples of both, side by side."""
    joined = {name: torch.cat([first[name], second[name]], dim=1) for name in ("inputs", "targets")}
    if "weights" in first or "weights" in second:
        like = next(part["weights"] for part in (second, first) if "weights" in part)
        weights = [
            part["weights"] if "weights" in part else like.new_ones(part["inputs"].shape[:2])
            for part in (first, second)
        ]
        joined["weights"] = torch.cat(weights, dim=1)
    return joined
