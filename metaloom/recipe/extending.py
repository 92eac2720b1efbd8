"""Recipes that say what they change of another one: `extends: other.yaml`."""

from pathlib import Path
from typing import Any

from metaloom.errors import RecipeError
from metaloom.recipe.reading import KeyPath, Problem, Source, read_yaml
from metaloom.recipe.wording import close_to

EXTENDS = "extends"


def read_source(path: Path, *, within: tuple[Path, ...] = ()) -> Source:
    """The values of a recipe's file, with those of the file that it extends under them.

    A section is changed key by key; one of another `kind`, a list, null or any other value takes the place of
    what was there. A file's name is relative to that of the file that extends it.

    Args:
        within: the files that extend this one.

    Raises:
        RecipeError: a file cannot be read, or extends itself.
    """
    source = read_yaml(_text(path, within))
    values = source.values
    if not isinstance(values, dict) or EXTENDS not in values:
        return source
    name = values.pop(EXTENDS)
    if not isinstance(name, str) or not name:
        source.add_problem((EXTENDS,), f"{name!r}; must be the name of another recipe's file")
        return source
    base_path = path.parent / name
    files = (*within, path)
    if any(base_path.resolve() == other.resolve() for other in files):
        raise RecipeError(f"{path}: extends {name}, which extends it: one of them has to stand alone")
    base = read_source(base_path, within=files)
    if not isinstance(base.values, dict):
        source.problems += _of_file(base.problems, name)
        if not source.problems:
            source.add_problem((EXTENDS,), f"{name} is empty, or no recipe")
        source.values = None  # without what lies under it, it is none either
        return source
    places: dict[KeyPath, str] = {key: _of(place, name) for key, place in base.places.items()}
    source.values = _changed(base.values, values, (), places)
    source.places = places | source.places
    source.problems = [*_of_file(base.problems, name), *source.problems]
    return source


def _changed(
    base: dict[str, Any], changes: dict[str, Any], path: KeyPath, places: dict[KeyPath, str]
) -> dict[str, Any]:
    """The values of a section with changes to it; what is replaced leaves `places`."""
    result = dict(base)
    for key, value in changes.items():
        here = (*path, key)
        old = base.get(key)
        if isinstance(old, str) and isinstance(value, dict):
            old = {"kind": old}
        if isinstance(old, dict) and isinstance(value, str) and value == old.get("kind"):
            continue  # the same kind, named again
        if isinstance(old, dict) and isinstance(value, dict) and _is_same_kind(old, value):
            result[key] = _changed(old, value, here, places)
            continue
        result[key] = value
        for place in [place for place in places if place[: len(here)] == here]:
            del places[place]
    return result


def _is_same_kind(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return "kind" not in new or new["kind"] == old.get("kind")


def _of(place: str, name: str) -> str:
    return f"{place} of {name}" if " of " not in place else place


def _of_file(problems: list[Problem], name: str) -> list[Problem]:
    return [Problem(_of(problem.place, name), problem.path, problem.text) for problem in problems]


def _text(path: Path, within: tuple[Path, ...]) -> str:
    by = f" (extended by {within[-1]})" if within else ""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not text in UTF-8 (byte {error.start}){by}") from None
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file{_similar_file(path)}{by}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RecipeError(f"{path}: cannot be read: {reason}{by}") from None


def _similar_file(path: Path) -> str:
    try:
        names = [file.name for file in path.parent.glob("*.y*ml")]
    except OSError:
        names = []
    meant = close_to(path.name, names)
    return f"; did you mean {path.parent / meant}?" if meant else ""
