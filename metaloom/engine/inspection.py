"""Tasks whose numbers are not finite: found on the way to the meta-loss, before it is differentiated.

Shape letters: T tasks, K inner steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


class NotFiniteError(Exception):
    """Tasks of a batch are not finite; nothing of it was differentiated that anybody was told of.

    Attributes:
        tasks: this rank's, by episode number: the first of the task's numbers that was not finite; empty
            where they are those of other ranks.
    """

    def __init__(self, tasks: dict[int, str]) -> None:
        super().__init__(f"not finite: {tasks}")
        self.tasks = tasks


@dataclasses.dataclass(frozen=True)
class _Look:
    what: str
    is_finite: Tensor
    is_excused: bool


class Inspection:
    """What was looked at of T tasks, in the order in which they came to it.

    Looking costs no wait for the device; `settle` is one. A pass that is computed again is not looked at
    twice.

    Args:
        numbers: the global episode number of each task, length T.
        any_rank: whether a flag is set on any of the ranks that differentiate together, which then all leave
            their passes at the same place. By default a rank's own flag.
        is_blind: whether nothing is to be found, by a rank that computes for the others' sake alone.
    """

    def __init__(
        self, numbers: Sequence[int], *, any_rank: Callable[[bool], bool] = bool, is_blind: bool = False
    ) -> None:
        self._numbers = tuple(numbers)
        self._any_rank = any_rank
        self._is_blind = is_blind
        self._looks: dict[tuple[str, int | None], _Look] = {}
        self._is_settled = True

    def look(
        self, what: str, step: int | None, tensors: Iterable[Tensor], *, is_excused: bool = False
    ) -> None:
        """Takes in numbers of each task.

        Args:
            what: they are.
            step: how many inner steps they come after; None where there are none.
            tensors: `[T, ...]` each.
            is_excused: whether a task is kept whose first number that is not finite is one of these.
        """
        if (what, step) in self._looks:
            return
        parts = [tensor.detach().reshape(len(self._numbers), -1).isfinite().all(1) for tensor in tensors]
        self._looks[what, step] = _Look(_worded(what, step), torch.stack(parts).all(0), is_excused)
        self._is_settled = False

    def settle(self) -> None:
        """Passes where every task is finite in all that was looked at; at once where that is nothing new.

        Every rank of those that differentiate together must call.

        Raises:
            NotFiniteError: one is not, here or on another of these ranks.
        """
        if self._is_settled:
            return
        self._is_settled = True
        found = {} if self._is_blind else self._found()
        if self._any_rank(bool(found)):
            raise NotFiniteError(found)

    def _found(self) -> dict[int, str]:
        looks = list(self._looks.values())
        finite = torch.stack([look.is_finite for look in looks]).T.tolist()  # the one wait for the device
        found = {}
        for number, of_task in zip(self._numbers, finite, strict=True):
            bad = [look for look, is_finite in zip(looks, of_task, strict=True) if not is_finite]
            if bad and not bad[0].is_excused:
                found[number] = bad[0].what
        return found


Inspect = Callable[[Sequence[int]], Inspection]
"""Begins the inspection of the tasks of these episode numbers."""


def _worded(what: str, step: int | None) -> str:
    if step is None:
        return what
    if step == 0:
        return f"{what} before adaptation"
    return f"{what} after {step} inner step{'' if step == 1 else 's'}"
