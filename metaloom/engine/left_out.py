"""Tasks that are left out of an outer step, since their numbers are not finite.

A weight of zero is not enough: 0 times infinity is no zero, and a sum over tasks has no way back from NaN. So
what is not finite must not be differentiated at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from metaloom.engine.algorithms.base import Algorithm
from metaloom.engine.hypergradients.base import MetaGradient, OnGradient
from metaloom.engine.inspection import Inspection, NotFiniteError
from metaloom.engine.learner import TaskBatch
from metaloom.engine.precision import Scales
from metaloom.engine.sharding.base import Sharding


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A task that is left out.

    Attributes:
        number: the global episode number.
        reason: the first of its numbers that was not finite.
    """

    number: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Differentiated:
    """A micro-batch's meta-gradient without the tasks that are left out.

    Attributes:
        part: the meta-gradient.
        batch: of which tasks it is: others have weight 0, as dummies have.
        left_out: this rank's tasks that counted before.
    """

    part: MetaGradient
    batch: TaskBatch
    left_out: tuple[LeftOut, ...]


def differentiated(
    algorithm: Algorithm,
    meta: Mapping[str, Tensor],
    batch: TaskBatch,
    scales: Scales,
    sharding: Sharding,
    *,
    outer_step: int,
    on_final: OnGradient | None,
) -> Differentiated:
    """The meta-gradient of the tasks of a micro-batch that are finite. In lockstep every rank must call.

    Where all are, which is found before anything is differentiated, there is nothing more to do. Where one
    is not, the batch is computed once more with another task's data, at weight zero, in its place. A rank
    without any finite task has nothing to put there: out of lockstep it computes nothing; in lockstep it
    makes the same passes as the others, and adds zeros to what ranks sum up (`Sharding.silent`).

    In lockstep all ranks compute again where one has to: they tell each other by a flag.

    Args:
        on_final: as of `Algorithm.meta_gradient`.
    """
    found: dict[int, str] = {}
    counted = _counted(batch)
    any_rank = sharding.any_rank if sharding.is_lockstep else bool
    while True:
        is_empty = set(batch.numbers) <= found.keys()
        left_out = tuple(LeftOut(number, found[number]) for number in found if number in counted)
        if is_empty and not sharding.is_lockstep:
            return Differentiated(_nothing(batch, {}), batch, left_out)
        try:
            with sharding.silent() if is_empty else contextlib.nullcontext():
                part = algorithm.meta_gradient(
                    meta,
                    batch,
                    scales,
                    outer_step=outer_step,
                    on_final=None if is_empty else on_final,
                    inspect=functools.partial(Inspection, any_rank=any_rank, is_blind=is_empty),
                )
        except NotFiniteError as error:
            found |= error.tasks
            batch = without(batch, error.tasks, like=meta)
            continue
        if is_empty:
            # Of shards a rank has the sum over the tasks of others, which it must not keep from them.
            shared = {
                name: value for name, value in part.gradient.items() if sharding.holders(name).num_sharing > 1
            }
            part = _nothing(batch, shared)
        return Differentiated(part, batch, left_out)


def without(batch: TaskBatch, numbers: Collection[int], *, like: Mapping[str, Tensor]) -> TaskBatch:
    """The batch with another of its tasks, at weight zero, in the place of those of these numbers; where it
    has no other, the same at weight zero.

    Args:
        like: meta-parameters, for the weights' dtype and device.
    """
    if not numbers:
        return batch
    kept = [place for place, number in enumerate(batch.numbers) if number not in numbers]
    is_kept = [number not in numbers for number in batch.numbers]
    places = range(batch.num_tasks)
    if kept:
        batch = batch.picked([place if is_kept[place] else kept[0] for place in places])
    of = next(iter(like.values()))
    weights = torch.tensor(is_kept, dtype=of.dtype, device=of.device)
    if batch.weights is not None:
        weights = weights * batch.weights
    return dataclasses.replace(batch, weights=weights)


def _counted(batch: TaskBatch) -> set[int]:
    """The numbers of the tasks that are no dummies."""
    if batch.weights is None:
        return set(batch.numbers)
    is_counted = (batch.weights != 0).tolist()
    return {number for number, counts in zip(batch.numbers, is_counted, strict=True) if counts}


def _nothing(batch: TaskBatch, gradient: dict[str, Tensor]) -> MetaGradient:
    """What a batch amounts to none of whose tasks counts."""
    device = batch.query["inputs"].device
    return MetaGradient(gradient, torch.zeros(batch.num_tasks, dtype=torch.float64, device=device), {})
