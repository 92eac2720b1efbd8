"""A recipe from YAML or from plain values, or one error that names every mistake in it."""

import difflib
import math
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from metaloom.errors import RecipeError
from metaloom.recipe.credentials import without_credentials
from metaloom.recipe.reading import COMMAND_LINE, KeyPath, Problem, Source, apply_overrides, dotted, read_yaml
from metaloom.recipe.rules import UnreadableValue, broken_rules
from metaloom.recipe.schema import Recipe, Section

UNREADABLE: Any = UnreadableValue()

AnySection = TypeVar("AnySection", bound=Section)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `key=value` overrides applied.

    Raises:
        RecipeError: the file cannot be read, or holds mistakes; names all of them.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not text in UTF-8 (byte {error.start})") from None
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file{_similar_file(Path(path))}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RecipeError(f"{path}: cannot be read: {reason}") from None
    source = read_yaml(text)
    if not source.problems and source.values is None:
        raise RecipeError(f"{path}: empty; a recipe has at least {', '.join(_required(Recipe))}")
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
        source.add_problem((), f"a recipe is a list of 'key: value' lines, not {_shown(source.values)}")
    raise RecipeError(_report(source.problems, name))


# ---------------------------------------------------------------- values to sections


def _section(section: type[AnySection], values: dict[str, Any], path: KeyPath, source: Source) -> AnySection:
    """The typed section; a value that breaks its type or range is reported and becomes unreadable."""
    fields = section.model_fields
    misspelt = set()
    for key in values:
        if key not in fields:
            meant = _close(str(key), list(fields))
            misspelt.add(meant)
            hint = f"did you mean '{meant}'? " if meant else ""
            source.add_problem(
                (*path, str(key)), f"unknown key; {hint}({_title(section, path)} has: {', '.join(fields)})"
            )
    typed: dict[str, Any] = {}
    for name, info in fields.items():
        where = (*path, name)
        if name not in values:
            if info.is_required():
                typed[name] = UNREADABLE
                if name not in misspelt:
                    source.add_problem(where, f"missing; give {_wanted(info.annotation, info.metadata)}")
        elif not _sections_of(info):
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
            _report_fault(fields[name], values[name], (*path, name), index, source)
            typed[name] = UNREADABLE
    else:
        if len(readable) == len(typed):
            return whole
    return section.model_construct(**typed)


def _subsection(info: FieldInfo, value: Any, path: KeyPath, source: Source) -> Any:
    """The section of a field: a mapping, or its bare kind; without a kind, it has that of the default."""
    kinds = {_kind(section): section for section in _sections_of(info)}
    if isinstance(value, str) and None not in kinds:
        value = {"kind": value}
        path_of_kind = path
    else:
        path_of_kind = (*path, "kind")
    if not isinstance(value, dict):
        keys = [key for section in kinds.values() for key in section.model_fields]
        wanted = f"of: {', '.join(keys)}" if None in kinds else f"with kind: {' or '.join(map(str, kinds))}"
        null = " (or null)" if type(None) in get_args(info.annotation) else ""
        source.add_problem(path, f"{_shown(value)} is not a section; give a section {wanted}{null}")
        return UNREADABLE
    if None in kinds:
        return _section(kinds[None], value, path, source)
    default = info.get_default(call_default_factory=True)
    kind = value.get("kind", getattr(default, "kind", None))
    if not isinstance(kind, str) or kind not in kinds:
        if "kind" in value:
            source.add_problem(path_of_kind, _not_a_choice(value["kind"], [str(kind) for kind in kinds]))
        else:
            source.add_problem(path_of_kind, f"missing; one of: {', '.join(map(str, kinds))}")
        return UNREADABLE
    return _section(kinds[kind], {"kind": kind, **value}, path, source)


def _sections_of(info: FieldInfo) -> list[type[Section]]:
    """The section classes that a field may hold; none for a plain value."""
    options = get_args(info.annotation) if _is_union(info.annotation) else (info.annotation,)
    return [option for option in options if _is_section(option)]


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _kind(section: type[Section]) -> str | None:
    return section.model_fields["kind"].default if "kind" in section.model_fields else None


def _required(section: type[Section]) -> list[str]:
    return [name for name, info in section.model_fields.items() if info.is_required()]


def _title(section: type[Section], path: KeyPath) -> str:
    kind = _kind(section)
    return (dotted(path) or "a recipe") + (f" of kind {kind}" if kind else "")


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# ---------------------------------------------------------------- faults in plain words


def _faults(error: ValidationError, values: dict[str, Any]) -> list[tuple[str, int | None]]:
    """The fields at fault, each with the number of the list item at fault where it is one."""
    faults: dict[tuple[str, int | None], None] = {}
    for detail in error.errors(include_url=False, include_context=False, include_input=False):
        name, *inside = detail["loc"]
        if name in values:
            value = values[str(name)]
            item = inside[0] if inside and isinstance(inside[0], int) and isinstance(value, tuple) else None
            faults[str(name), item if item is not None and item < len(value) else None] = None
    return list(faults)


def _report_fault(info: FieldInfo, value: Any, path: KeyPath, index: int | None, source: Source) -> None:
    if index is None:
        source.add_problem(path, _fault(info.annotation, info.metadata, value))
        return
    items = next(items for items in map(_items, _options(info.annotation)) if items)
    item = items[0] if items[-1] is Ellipsis else items[index]
    source.add_problem((*path, str(index)), _fault(item, (), value[index]))


def _fault(annotation: Any, metadata: Iterable[Any], value: Any) -> str:
    """What is wrong with a value, and what it must be."""
    bare, metadata = _bare(annotation, metadata)
    options = _options(bare)
    null = " (or null)" if type(None) in options else ""
    options = [option for option in options if option is not type(None)]
    if len(options) == 1:
        bare, metadata = _bare(options[0], metadata)
        if get_origin(bare) is Literal:
            return _not_a_choice(value, list(get_args(bare))) + null
        of_type = isinstance(value, (int, float) if bare is float else bare if isinstance(bare, type) else ())
        if isinstance(value, float) and not math.isfinite(value) and bare is float:
            return f"{_shown(value)} is not a finite number; give {_wanted(bare, metadata)}{null}"
        if of_type and not (isinstance(value, bool) and bare is not bool):
            return f"{_shown(value)}; must be {_range(metadata) or _wanted(bare, metadata)}{null}"
        if isinstance(bare, type):
            return f"{_shown(value)} is not {_noun(bare)}; give {_wanted(bare, metadata)}{null}"
    return f"{_shown(value)}; must be {_wanted(annotation, metadata)}"


def _wanted(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """In plain words, the values that a type with its constraints has."""
    bare, metadata = _bare(annotation, metadata)
    if _is_union(bare):
        kinds = [str(_kind(option)) for option in get_args(bare) if _is_section(option)]
        if kinds:
            return f"a section with kind: {' or '.join(kinds)}"
        return ", or ".join(_wanted(option, metadata) for option in get_args(bare))
    if _is_section(bare):
        kind = _kind(bare)
        return f"a section with kind: {kind}" if kind else f"a section with {', '.join(_required(bare))}"
    if get_origin(bare) is Literal:
        choices = get_args(bare)
        return repr(choices[0]) if len(choices) == 1 else f"one of {', '.join(choices)}"
    if get_origin(bare) is tuple:
        items = get_args(bare)
        if items[-1] is Ellipsis:
            some = "a non-empty list" if _limit(metadata, "min_length") else "a list"
            return f"{some}, each item {_wanted(items[0])}"
        return f"a list of {len(items)}, each {_wanted(items[0])}"
    if bare is type(None):
        return "null"
    range_in_words = _range(metadata)
    between = " of " if range_in_words.startswith("at ") else " "
    return _noun(bare) + (between + range_in_words if range_in_words else "")


def _range(metadata: Iterable[Any]) -> str:
    metadata = list(metadata)
    words = (
        ("gt", "greater than {}"),
        ("ge", "at least {}"),
        ("lt", "less than {}"),
        ("le", "at most {}"),
    )
    limits = [(_limit(metadata, name), text) for name, text in words]
    parts = [text.format(limit) for limit, text in limits if limit is not None]
    if _limit(metadata, "pattern") is not None:
        parts.append(
            f"made of at most {_limit(metadata, 'max_length')} letters, digits, '-', '_' and '.', "
            "the first a letter or digit"
        )
    elif _limit(metadata, "min_length") is not None:
        parts.append("not empty")
    return " and ".join(parts)


def _limit(metadata: Iterable[Any], name: str) -> Any:
    return next((getattr(part, name) for part in metadata if getattr(part, name, None) is not None), None)


def _noun(of_type: Any) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[of_type]


def _bare(annotation: Any, metadata: Iterable[Any] = ()) -> tuple[Any, list[Any]]:
    """The type without `Annotated`, and all constraints on it."""
    metadata = list(metadata)
    if get_origin(annotation) is Annotated:
        annotation, *parts = get_args(annotation)
        for part in parts:
            metadata += part.metadata if isinstance(part, FieldInfo) else [part]
    return annotation, metadata


def _items(annotation: Any) -> tuple[Any, ...]:
    """The item types of a list, with an ellipsis last where it may have any length; none for other types."""
    bare, _ = _bare(annotation)
    return get_args(bare) if get_origin(bare) is tuple else ()


def _options(annotation: Any) -> list[Any]:
    return list(get_args(annotation)) if _is_union(annotation) else [annotation]


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _not_a_choice(value: Any, choices: list[str]) -> str:
    meant = _close(value, choices) if isinstance(value, str) else None
    hint = f"did you mean '{meant}'?" if meant else "choose one of them"
    return f"{_shown(value)} is not one of {', '.join(choices)}; {hint}"


def _close(word: str, words: list[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, words, n=1)), None)


def _shown(value: Any) -> str:
    """The value in a message: as YAML would have it, short, and without credentials."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "a section"
    if not isinstance(value, (int, float, str)) and not (
        isinstance(value, (list, tuple)) and all(isinstance(item, (int, float, str)) for item in value)
    ):
        return f"a {type(value).__name__}"
    text = without_credentials(repr(value))
    return text if len(text) <= 60 else f"{text[:50]}... ({len(text)} characters)"


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


def _similar_file(path: Path) -> str:
    try:
        names = [file.name for file in path.parent.glob("*.y*ml")]
    except OSError:
        names = []
    meant = _close(path.name, names)
    return f"; did you mean {path.parent / meant}?" if meant else ""
