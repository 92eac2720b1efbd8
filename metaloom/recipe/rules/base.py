"""What the rules of a recipe are made of."""

from collections.abc import Callable, Iterator

from metaloom.recipe.schema import Recipe

Broken = Iterator[tuple[str, str]]
Rule = Callable[[Recipe], Broken]


class Unreadable(Exception):
    """A rule looked at a value that has been reported already."""


class UnreadableValue:
    """Stands for a value that could not be read: any look at it raises `Unreadable`."""

    def _refuse(self, *_: object) -> bool:
        raise Unreadable

    __getattr__ = __eq__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __index__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __rmod__ = (
        __bool__
    ) = __contains__ = __iter__ = __hash__ = _refuse


def repeated(path: str, values: tuple[str, ...]) -> Broken:
    """Names the values that are listed twice."""
    seen: set[str] = set()
    for value in values:
        if value in seen:
            yield path, f"'{value}' is listed twice; list it once"
        seen.add(value)
