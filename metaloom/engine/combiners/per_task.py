"""Combinations that need the meta-gradients of single tasks.

Shape letters: T tasks of an outer step, W ranks of a shard group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metaloom.engine.combiners.base import (
    Combined,
    Combiner,
    MetricSums,
    TaskRecord,
    TaskRule,
    are_finite,
    groups_of,
    require_group,
    scaled,
    unscaled,
)
from metaloom.engine.combiners.cosines import Cosines, conflict_metrics, step_cosines
from metaloom.engine.combiners.gram import gram_matrix
from metaloom.engine.hypergradients.base import MetaGradient, Tensors, add_, order_of_completion
from metaloom.engine.learner import TaskBatch
from metaloom.engine.names import in_short, matching
from metaloom.engine.sharding.base import Sharding
from metaloom.errors import CapabilityError


class PerTask(Combiner):
    """`sum_t w_t g_t`, with coefficients that follow from the tasks' losses and the inner products of their
    gradients; meta-parameters that are not combined get the mean.

    One adjoint sweep per task. A task's gradient stays on the rank that computed it: a rank holds as many
    times the combined meta-parameters as it has tasks, until `combine`. What ranks tell each other is losses
    and the Gram matrix (`gram_matrix`); every rank finds the same coefficients, and the gradients cross ranks
    once, in the ordinary sum.

    Where the backbone is in shards, a pass adds up the gradients of the W ranks of a shard group. So that
    they can be told apart, the ranks take turns: in each of W passes the tasks of all but one have weight 0.
    That costs W times the computation; leave the backbone out of `of`, and it does not.

    Args:
        rule: what gives the coefficients.
        like: meta-parameters, for their names and shapes.
        of: kinds of meta-parameters (`init`, `backbone`, `rates`, `loss`), with which their names begin, or
            patterns of names (`init.*.A`), that are combined; empty for all.
        log_cosines: whether inner products are computed though the rule does not need them.
        metric_names: as of `Mean`.

    Raises:
        CapabilityError: an entry of `of` matches no meta-parameter.
    """

    per_task = True

    def __init__(
        self,
        rule: TaskRule,
        like: Tensors,
        sharding: Sharding,
        *,
        metric_names: Sequence[str],
        of: Sequence[str] = (),
        log_cosines: bool = False,
    ) -> None:
        self._rule, self._like, self._sharding = rule, like, sharding
        self._combined = selected(like, of)
        self._has_gram = rule.needs_gram or log_cosines
        self._metric_names = tuple(metric_names)
        self._num_turns = max(sharding.holders(name).num_sharing for name in self._combined)
        self._cosines: Cosines | None = None
        self._start()

    def _start(self) -> None:
        self._metrics = MetricSums(self._metric_names)
        self._records: list[tuple[int, int, TaskRecord]] = []  # rank, place among its tasks, task
        self._gradients: list[dict[str, Tensor]] = []  # one entry per part
        self._others: dict[str, Tensor] = {}

    @property
    def cosines(self) -> Cosines | None:
        return self._cosines

    def parts(self, batch: TaskBatch) -> list[TaskBatch]:
        parts = []
        for task in batch.split(1):
            group = groups_of(task)[0]
            if self._rule.needs_groups:
                require_group(group, task.numbers[0], self._rule.name)
            weighed = scaled(task, [self._rule.weight(group)], self._like)
            own_turn = self._sharding.rank % self._num_turns
            parts += [
                scaled(weighed, [1.0 if turn == own_turn else 0.0], self._like)
                for turn in range(self._num_turns)
            ]
        return parts

    def add(self, part: MetaGradient, batch: TaskBatch) -> None:
        owner = self._owner(len(self._gradients))
        is_own = owner == self._sharding.rank
        losses = unscaled(part.losses, batch.weights)
        if is_own and (batch.weights is None or bool(batch.weights != 0)):
            record = TaskRecord(batch.numbers[0], groups_of(batch)[0], float(losses))
            self._records.append((owner, len(self._gradients) // self._num_turns, record))
        kept: dict[str, Tensor] = {}
        for name, value in part.gradient.items():
            if name not in self._combined:
                add_(self._others, {name: value})
            elif is_own or self._sharding.holders(name).num_sharing > 1:
                kept[name] = value
        self._gradients.append(kept)
        self._metrics.add(dataclasses.replace(part, losses=losses))

    def combine(self, num_global: int, *, num_left_out: int = 0) -> Combined:
        gathered = self._sharding.gather(self._records)
        if not gathered:
            return self._nothing(num_global, num_left_out)
        owners, tasks = [owner for owner, _, _ in gathered], [task for _, _, task in gathered]
        gradients = self._by_task([(owner, place) for owner, place, _ in gathered])
        gram = gram_matrix(gradients, self._combined, owners, self._sharding) if self._has_gram else None
        is_finite = are_finite(tasks) and (gram is None or bool(gram.isfinite().all()))
        # What is not finite is not so in the mean either: the outer step is skipped.
        weights = self._rule.coefficients(tasks, gram) if is_finite else [1.0 / len(tasks)] * len(tasks)
        total = self._sharding.gradient_sum(self._like, order_of_completion(self._like))
        total.add({name: value / len(tasks) for name, value in self._others.items()})
        for task in sorted(gradients):
            total.add({name: weights[task] * value for name, value in gradients.pop(task).items()})
        device = next(iter(self._like.values())).device
        _, metrics = self._metrics.means(num_global, num_left_out, self._sharding, device)
        if is_finite:
            metrics |= self._rule.metrics() | ({} if gram is None else conflict_metrics(gram))
        self._cosines = None
        if is_finite and gram is not None:
            numbers, groups = [task.number for task in tasks], [task.group for task in tasks]
            self._cosines = step_cosines(gram, numbers, groups)
        self._start()
        return Combined(total.result(), metrics, len(tasks))

    def _nothing(self, num_global: int, num_left_out: int) -> Combined:
        """Of an outer step without a task that counts: no rule has anything to say of it."""
        total = self._sharding.gradient_sum(self._like, order_of_completion(self._like))
        gradient = {name: torch.full_like(value, torch.nan) for name, value in total.result().items()}
        device = next(iter(self._like.values())).device
        _, metrics = self._metrics.means(num_global, num_left_out, self._sharding, device)
        self._cosines = None
        self._start()
        return Combined(gradient, metrics, 0)

    def discard(self) -> None:
        self._start()

    def scalars(self) -> dict[str, Any]:
        return self._rule.scalars()

    def load(self, scalars: Mapping[str, Any]) -> None:
        self._rule.load(scalars)

    def _owner(self, part: int) -> int:
        """The rank that has the task of this rank's so many-th part."""
        rank, num_turns = self._sharding.rank, self._num_turns
        return rank - rank % num_turns + part % num_turns

    def _by_task(self, tasks: Sequence[tuple[int, int]]) -> dict[int, dict[str, Tensor]]:
        """This rank's gradients by the tasks' places among all; those of what does not count are dropped.

        Args:
            tasks: of all that count, the rank that has each, and its place among that rank's tasks.
        """
        places = {task: place for place, task in enumerate(tasks)}
        found: dict[int, dict[str, Tensor]] = {}
        for part, gradient in enumerate(self._gradients):
            task = self._owner(part), part // self._num_turns
            if task in places:
                found[places[task]] = gradient
        self._gradients = []
        return found


def selected(like: Tensors, of: Sequence[str]) -> dict[str, Tensor]:
    """Those meta-parameters that kinds or patterns of names match; all where there are none of these.

    Raises:
        CapabilityError: one of them matches nothing.
    """
    if not of:
        return dict(like)
    found: set[str] = set()
    for entry in of:
        meant = matching(like, entry)
        if not meant:
            raise CapabilityError(
                f"outer.combiner.of: {entry!r} matches no meta-parameter; this run learns {in_short(like)}."
            )
        found.update(meant)
    return {name: value for name, value in like.items() if name in found}
