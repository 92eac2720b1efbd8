"""A recipe from YAML or from plain values, or one error that names every mistake in it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from metaloom.errors import RecipeError
from metaloom.recipe.base import Section
from metaloom.recipe.extending import read_source
from metaloom.recipe.reading import COMMAND_LINE, KeyPath, Problem, Source, apply_overrides, dotted
from metaloom.recipe.rules import UnreadableValue, broken_rules
from metaloom.recipe.schema import Recipe
from metaloom.recipe.wording import (
    close_to,
    fault,
    has_items,
    item_fault,
    kind_of,
    not_a_choice,
    required_keys,
    sections_of,
    shown,
    wanted,
)

UNREADABLE: Any = UnreadableValue()

AnySection = TypeVar("AnySection", bound=Section)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with that which it extends under it, and `key=value` overrides applied.

    Raises:
        RecipeError: the file cannot be read, or holds mistakes; names all of them.
    """
    source = read_source(Path(path))
    if not source.problems and source.values is None:
        raise RecipeError(f"{path}: empty; a recipe has at least {', '.join(required_keys(Recipe))}")
    if isinstance(source.values, dict):
        apply_overrides(source, overrides)
    return _build(source, name=str(path))


def recipe_from_dict(data: dict[str, Any], *, source: str) -> Recipe:
    """The recipe with the given values, as a YAML file would hold them.

    Args:
        data: sections and values; not changed.
        source: what error messages call it.

    Raises:
        RecipeError: names every mistake.
    """
    return _build(Source(values=data), name=source)


def _build(source: Source, *, name: str) -> Recipe:
    """The checked recipe; raises one RecipeError with every problem of the source."""
    if isinstance(source.values, dict):
        recipe = _section(Recipe, source.values, (), source)
        reported = {problem.path for problem in source.problems}
        for path, text in broken_rules(recipe):
            if path not in reported:
                source.add_problem(tuple(path.split(".")), text)
        if not source.problems:
            return recipe
    elif not source.problems:
        source.add_problem((), f"a recipe is a list of 'key: value' lines, not {shown(source.values)}")
    raise RecipeError(_report(source.problems, name))


# ---------------------------------------------------------------- values to sections


def _section(section: type[AnySection], values: dict[str, Any], path: KeyPath, source: Source) -> AnySection:
    """The typed section; a value that breaks its type or range is reported and becomes unreadable."""
    fields = section.model_fields
    misspelt = set()
    for key in values:
        if key not in fields:
            meant = close_to(str(key), list(fields))
            misspelt.add(meant)
            hint = f"did you mean '{meant}'? " if meant else ""
            source.add_problem(
                (*path, str(key)), f"unknown key; {hint}({_title(section, path)} has: {', '.join(fields)})"
            )
    typed: dict[str, Any] = {}
    for name, info in fields.items():
        where = (*path, name)
        if name not in values:
            if name in misspelt:
                typed[name] = UNREADABLE
            elif info.is_required():
                typed[name] = UNREADABLE
                source.add_problem(where, f"missing; give {wanted(info)}")
        elif (item := _section_of_items(info)) is not None and isinstance(values[name], list):
            typed[name] = _list_of_sections(item, values[name], where, source)
        elif not sections_of(info):
            typed[name] = _tuples(values[name])
        elif values[name] is None and type(None) in get_args(info.annotation):
            typed[name] = None
        else:
            typed[name] = _subsection(info, values[name], where, source)
    readable = {name: value for name, value in typed.items() if value is not UNREADABLE}
    try:
        whole = section(**readable)
    except ValidationError as error:
        for name, index in _faults(error, readable):
            if index is None or not has_items(fields[name]):
                source.add_problem((*path, name), fault(fields[name], values[name]))
            else:
                item = values[name][index]
                source.add_problem((*path, name, str(index)), item_fault(fields[name], item, index=index))
            typed[name] = UNREADABLE
    else:
        if len(readable) == len(typed):
            return whole
    return section.model_construct(**typed)


def _section_of_items(info: FieldInfo) -> type[Section] | None:
    """The section that each item of a list is; None where the field is no list of sections."""
    if get_origin(info.annotation) is not tuple:
        return None
    item = get_args(info.annotation)[0]
    return item if isinstance(item, type) and issubclass(item, Section) else None


def _list_of_sections(section: type[Section], items: list[Any], path: KeyPath, source: Source) -> Any:
    typed: list[Any] = []
    for index, item in enumerate(items):
        where = (*path, str(index))
        if isinstance(item, dict):
            typed.append(_section(section, item, where, source))
        else:
            fields = ", ".join(section.model_fields)
            source.add_problem(where, f"{shown(item)} is not a section; give a section of: {fields}")
            typed.append(UNREADABLE)
    return UNREADABLE if any(item is UNREADABLE for item in typed) else tuple(typed)


def _subsection(info: FieldInfo, value: Any, path: KeyPath, source: Source) -> Any:
    """The section of a field: a mapping, or its bare kind; without a kind, it has that of the default."""
    kinds = {kind_of(section): section for section in sections_of(info)}
    if isinstance(value, str) and None not in kinds:
        value = {"kind": value}
        path_of_kind = path
    else:
        path_of_kind = (*path, "kind")
    if not isinstance(value, dict):
        keys = [key for section in kinds.values() for key in section.model_fields]
        parts = f"of: {', '.join(keys)}" if None in kinds else f"with kind: {' or '.join(map(str, kinds))}"
        null = " (or null)" if type(None) in get_args(info.annotation) else ""
        source.add_problem(path, f"{shown(value)} is not a section; give a section {parts}{null}")
        return UNREADABLE
    if None in kinds:
        return _section(kinds[None], value, path, source)
    default = info.get_default(call_default_factory=True)
    # {hf: folder} is of kind hf.
    told = next((kind for kind in kinds if kind in value), getattr(default, "kind", None))
    kind = value.get("kind", told)
    if not isinstance(kind, str) or kind not in kinds:
        if "kind" in value:
            source.add_problem(path_of_kind, not_a_choice(value["kind"], [str(kind) for kind in kinds]))
        else:
            source.add_problem(path_of_kind, f"missing; one of: {', '.join(map(str, kinds))}")
        return UNREADABLE
    return _section(kinds[kind], {"kind": kind, **value}, path, source)


def _title(section: type[Section], path: KeyPath) -> str:
    kind = kind_of(section)
    return (dotted(path) or "a recipe") + (f" of kind {kind}" if kind else "")


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _faults(error: ValidationError, values: dict[str, Any]) -> list[tuple[str, int | str | None]]:
    """The fields at fault, each with the list item at fault, or the key of the value, where it is one."""
    faults: dict[tuple[str, int | str | None], None] = {}
    for detail in error.errors(include_url=False, include_context=False, include_input=False):
        name, *inside = detail["loc"]
        if name in values:
            value = values[str(name)]
            is_of_key = isinstance(value, dict) and inside[-1:] != ["[key]"]
            there_are = range(len(value)) if isinstance(value, tuple) else value if is_of_key else ()
            faults[str(name), inside[0] if inside and inside[0] in there_are else None] = None
    return list(faults)


# ---------------------------------------------------------------- the report


def _report(problems: list[Problem], name: str) -> str:
    def order(problem: Problem) -> tuple[int, int]:
        line = problem.place.removeprefix("line ")
        return (0, int(line)) if line.isdigit() else (int(problem.place == COMMAND_LINE), 0)

    problems = sorted(dict.fromkeys(problems), key=order)
    width = max(len(problem.place) for problem in problems)
    lines = []
    for problem in problems:
        place = f"{problem.place:{width}}  " if width else ""
        path = f"{problem.path}: " if problem.path else ""
        lines.append(f"  {place}{path}{problem.text}")
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n".join([f"{name} has {count}:", *lines])
