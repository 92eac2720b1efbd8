"""The classes of a new task, and their numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from metaloom.errors import StreamError
from metaloom.recipe.tasks import TaskFacts


def class_names(labels: Sequence[str], facts: TaskFacts) -> tuple[str, ...]:
    """The names of the classes in the order of their numbers; none where the labels are the numbers.

    Raises:
        StreamError: the model's head has another number of classes, or labels are no numbers where classes
            mean the same in all tasks.
    """
    most = facts.num_outputs
    assert most is not None, "a classification has classes"
    names = tuple(sorted({*labels}))
    if facts.draws_labels or (facts.has_own_ways and not all(name.isdecimal() for name in names)):
        require_ways(names, most, is_fixed=not facts.has_own_ways)
        return names
    wrong = [name for name in names if not (name.isdecimal() and int(name) < most)]
    if wrong:
        raise StreamError(
            f"the run's classes mean the same in all tasks, and have numbers from 0 to {most - 1}; the new "
            f"task has {', '.join(wrong[:5])}: label examples by those numbers."
        )
    return ()


def class_numbers(labels: Sequence[str], names: Sequence[str]) -> NDArray[np.int64]:
    """int64 `[N]`.

    Args:
        names: of the classes; none where the labels are the numbers.
    """
    return np.array([names.index(label) if names else int(label) for label in labels], np.int64)


def require_known(labels: Sequence[str], names: Sequence[str], facts: TaskFacts) -> None:
    """Passes where all labels of a query are among the classes of support or, where these are numbers, among
    those that the model has.

    Raises:
        StreamError: one is not.
    """
    most = facts.num_outputs or 0
    unknown = [
        label
        for label in sorted({*labels})
        if label not in names and not (not names and label.isdecimal() and int(label) < most)
    ]
    if unknown:
        known = ", ".join(names[:5]) if names else f"the numbers from 0 to {most - 1}"
        raise StreamError(
            f"the query has classes that the support lacks: {', '.join(unknown[:5])}; those of the support "
            f"are {known}."
        )


def require_ways(names: Sequence[str], most: int, *, is_fixed: bool) -> None:
    """Passes where the model's head tells so many classes apart.

    Args:
        most: outputs of the head.
        is_fixed: whether all tasks have so many.

    Raises:
        StreamError: it does not.
    """
    if len(names) == most or (not is_fixed and 2 <= len(names) < most):
        return
    told = str(most) if is_fixed else f"2 to {most}"
    shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
    raise StreamError(
        f"the task has {len(names)} classes ({shown}), and the run's model tells {told} apart: give examples "
        "of so many, or train a run with another data.n_way."
    )
