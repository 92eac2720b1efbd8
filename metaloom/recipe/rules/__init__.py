"""The rules that relate several values of a recipe to each other.

A rule yields `(path, text)` for each place where it is broken. It is called also with recipes
that have other mistakes: a value that could not be read raises `Unreadable` when a rule
looks at it, and that rule alone is passed over. Rules that need the data's index are
checked where the data is opened.
"""

from metaloom.recipe.rules import (
    adaptation,
    algorithm,
    combiner,
    data,
    evaluation,
    heads,
    machine,
    model,
    multi_task,
    outer,
    regularisation,
    set_learners,
    shift,
)
from metaloom.recipe.rules.base import Rule, Unreadable, UnreadableValue
from metaloom.recipe.schema import Recipe
from metaloom.recipe.tasks import UnknownTaskError

__all__ = ["RULES", "UnreadableValue", "broken_rules"]

RULES: tuple[Rule, ...] = (
    *data.RULES,
    *model.RULES,
    *adaptation.RULES,
    *algorithm.RULES,
    *regularisation.RULES,
    *heads.RULES,
    *set_learners.RULES,
    *shift.RULES,
    *multi_task.RULES,
    *outer.RULES,
    *combiner.RULES,
    *machine.RULES,
    *evaluation.RULES,
)


def broken_rules(recipe: Recipe) -> list[tuple[str, str]]:
    """`(path, text)` of every broken rule among those whose values could all be read."""
    broken: list[tuple[str, str]] = []
    for rule in RULES:
        try:
            broken.extend(rule(recipe))
        except (Unreadable, UnknownTaskError):
            continue
    return broken
