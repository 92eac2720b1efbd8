"""What a value must be, and what is wrong with one, in plain words read off the types of the fields."""

import difflib
import math
import types
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from metaloom.credentials import without_credentials
from metaloom.recipe.base import Section

NOUNS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def fault(info: FieldInfo, value: Any) -> str:
    """What is wrong with a value that a field refused, and what it must be."""
    return _fault(info.annotation, info.metadata, value)


def wanted(info: FieldInfo) -> str:
    """The values that a field takes."""
    return _wanted(info.annotation, info.metadata)


def has_items(info: FieldInfo) -> bool:
    """Whether a field is a list, or a mapping of values of one type."""
    return any(map(_items, _options(info.annotation)))


def item_fault(info: FieldInfo, item: Any, *, index: int | str) -> str:
    """What is wrong with an item of a list, or a value of a mapping, that a field refused, and what it must
    be.

    Args:
        index: the item's number, or the value's key.
    """
    items = next(items for items in map(_items, _options(info.annotation)) if items)
    return _fault(
        items[index] if isinstance(index, int) and items[-1] is not Ellipsis else items[0], (), item
    )


def sections_of(info: FieldInfo) -> list[type[Section]]:
    """The section classes that a field may hold; none for a plain value."""
    return [option for option in _options(info.annotation) if _is_section(option)]


def kind_of(section: type[Section]) -> str | None:
    """The value of `kind` that names a section class; None where the section comes in one kind only."""
    return section.model_fields["kind"].default if "kind" in section.model_fields else None


def required_keys(section: type[Section]) -> list[str]:
    """The keys of a section that have no default."""
    return [name for name, info in section.model_fields.items() if info.is_required()]


def not_a_choice(value: Any, choices: Sequence[object]) -> str:
    """What is wrong with a value that is none of the choices, and which is close to it."""
    names = [str(choice) for choice in choices]
    meant = close_to(value, names) if isinstance(value, str) else None
    hint = f"did you mean '{meant}'?" if meant else "choose one of them"
    return f"{shown(value)} is not one of {', '.join(names)}; {hint}"


def close_to(word: str, words: list[str]) -> str | None:
    """The one of the words that was probably meant, if any."""
    return next(iter(difflib.get_close_matches(word, words, n=1)), None)


def shown(value: Any) -> str:
    """The value in a message: as YAML would have it, short, and without credentials."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "a section"
    items = value if isinstance(value, (list, tuple)) else (value,)
    if not all(isinstance(item, (int, float, str)) for item in items):
        return f"a {type(value).__name__}"
    try:
        text = without_credentials(repr(value))
    except ValueError:
        return "a whole number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:50]}... ({len(text)} characters)"


def _fault(annotation: Any, metadata: Iterable[Any], value: Any) -> str:
    """What is wrong with a value, and what it must be."""
    bare, metadata = _bare(annotation, metadata)
    options = _options(bare)
    null = " (or null)" if type(None) in options else ""
    options = [option for option in options if option is not type(None)]
    if len(options) == 1:
        bare, metadata = _bare(options[0], metadata)
        if get_origin(bare) is Literal:
            return not_a_choice(value, list(get_args(bare))) + null
        if bare in NOUNS:
            wanted = _wanted(bare, metadata)
            if not _has_type(value, bare):
                return f"{shown(value)} is not {NOUNS[bare]}; give {wanted}{null}"
            if isinstance(value, float) and not math.isfinite(value):
                return f"{shown(value)} is not a finite number; give {wanted}{null}"
            return f"{shown(value)}; must be {_range(metadata) or wanted}{null}"
    return f"{shown(value)}; must be {_wanted(annotation, metadata)}"


def _wanted(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """In plain words, the values that a type with its constraints has."""
    bare, metadata = _bare(annotation, metadata)
    if _is_union(bare):
        kinds = [str(kind_of(option)) for option in get_args(bare) if _is_section(option)]
        if kinds:
            return f"a section with kind: {' or '.join(kinds)}"
        return ", or ".join(_wanted(option, metadata) for option in get_args(bare))
    if _is_section(bare):
        kind = kind_of(bare)
        return f"a section with kind: {kind}" if kind else f"a section with {', '.join(required_keys(bare))}"
    if get_origin(bare) is Literal:
        choices = get_args(bare)
        return repr(choices[0]) if len(choices) == 1 else f"one of {', '.join(map(str, choices))}"
    if get_origin(bare) is tuple:
        items = get_args(bare)
        if items[-1] is Ellipsis:
            least = _limit(metadata, "min_length")
            some = (
                "a list" if not least else "a non-empty list" if least == 1 else f"a list of at least {least}"
            )
            return f"{some}, each item {_wanted(items[0])}"
        return f"a list of {len(items)}, each {_wanted(items[0])}"
    if get_origin(bare) is dict:
        items = _items(bare)
        return f"a section of keys{f', each value {_wanted(items[0])}' if items else ' and plain values'}"
    if bare is type(None):
        return "null"
    range_in_words = _range(metadata)
    between = " of " if range_in_words.startswith("at ") else " "
    return NOUNS[bare] + (between + range_in_words if range_in_words else "")


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


def _has_type(value: Any, of_type: type) -> bool:
    """Whether a value is of a type, where whole numbers are numbers and true and false are none."""
    if isinstance(value, bool):
        return of_type is bool
    return isinstance(value, (int, float) if of_type is float else of_type)


def _bare(annotation: Any, metadata: Iterable[Any] = ()) -> tuple[Any, list[Any]]:
    """The type without `Annotated`, and all constraints on it."""
    metadata = list(metadata)
    if get_origin(annotation) is Annotated:
        annotation, *parts = get_args(annotation)
        for part in parts:
            metadata += part.metadata if isinstance(part, FieldInfo) else [part]
    return annotation, metadata


def _items(annotation: Any) -> tuple[Any, ...]:
    """The item types of a list, with an ellipsis last where it may have any length; likewise of a mapping's
    values; none for other types."""
    bare, _ = _bare(annotation)
    if get_origin(bare) is dict:
        value = get_args(bare)[1]
        return (value, Ellipsis) if _bare(value)[0] in NOUNS else ()
    return get_args(bare) if get_origin(bare) is tuple else ()


def _options(annotation: Any) -> list[Any]:
    return list(get_args(annotation)) if _is_union(annotation) else [annotation]


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)
