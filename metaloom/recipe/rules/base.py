"""What the rules of a recipe are made of."""

import functools
from collections.abc import Callable, Iterator

from metaloom.recipe.algorithm import MAMLAlgorithm
from metaloom.recipe.schema import Recipe

Broken = Iterator[tuple[str, str]]
Rule = Callable[[Recipe], Broken]


def of_maml(rule: Callable[[Recipe, MAMLAlgorithm], Broken]) -> Rule:
    """A rule about an algorithm that adapts by inner steps, which says nothing of any other."""

    @functools.wraps(rule)
    def of_recipe(recipe: Recipe) -> Broken:
        return iter(()) if recipe.maml is None else rule(recipe, recipe.maml)

    return of_recipe


class Unreadable(Exception):
    """A rule looked at a value that has been reported already."""


class UnreadableValue:
    """Stands for a value that could not be read: any look at it raises `Unreadable`."""

    def _refuse(self, *_: object) -> bool:
        raise Unreadable

    __getattr__ = __eq__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __len__ = __getitem__ = __reversed__ = __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = _refuse
    __index__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __rmod__ = (
        __bool__
    ) = __contains__ = __iter__ = __hash__ = __fspath__ = _refuse


def repeated(path: str, values: tuple[str, ...]) -> Broken:
    """Names the values that are listed twice."""
    seen: set[str] = set()
    for value in values:
        if value in seen:
            yield path, f"'{value}' is listed twice; list it once"
        seen.add(value)
