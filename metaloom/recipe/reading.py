"""YAML text and command-line overrides as plain values, with the place that each came from.

The YAML is the 1.2 core schema (so `1e-3` is a number, and `no` and `on` are text), as one
document without aliases and tags, and without duplicate keys.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from metaloom.credentials import without_credentials

COMMAND_LINE = "(command line)"

KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class Problem:
    """One mistake: the place it comes from ("line 4"), the path in the recipe, and what is wrong."""

    place: str
    path: str
    text: str


@dataclass
class Source:
    """The values of a recipe before they are typed, and from which place each path has its value."""

    values: Any = None
    places: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, path: KeyPath) -> str:
        """The place of a path, or of the nearest section around it that is written down."""
        while path:
            if path in self.places:
                return self.places[path]
            path = path[:-1]
        return ""

    def add_problem(self, path: KeyPath, text: str, *, place: str | None = None) -> None:
        """Note a problem at a path; its place is where the path has its value from."""
        self.problems.append(Problem(self.place(path) if place is None else place, dotted(path), text))


def dotted(path: KeyPath) -> str:
    """The path as a user writes it."""
    return without_credentials(".".join(key if key.isprintable() else repr(key) for key in path))


# A number of more digits than any field allows stays text: Python refuses to convert thousands of them.
_INT = r"[-+]?[0-9](?:_?[0-9]){0,40}|0x[0-9a-fA-F]{1,16}"
_DIGITS = r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)"
_FLOAT = rf"{_DIGITS}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
RESOLVERS = (
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", re.compile(rf"^(?:{_INT})$"), list("-+0123456789")),
    ("tag:yaml.org,2002:float", re.compile(rf"^(?:{_FLOAT})$"), list("-+.0123456789")),
)


class _Loader(yaml.SafeLoader):
    """PyYAML's parser with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own shape)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        # A few nested aliases can stand for more values than memory holds.
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None, None, "aliases are not allowed; write the value out", mark
            )
        return super().compose_node(parent, index)


for _tag, _pattern, _first in RESOLVERS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)


def read_yaml(text: str, *, place: str | None = None, at: KeyPath = ()) -> Source:
    """The values and places of a YAML text; what is not readable is among the problems.

    Args:
        text: the YAML.
        place: the place of every value, instead of its line.
        at: the path of the outermost value.
    """
    source = Source()
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is not None:
            source.values = _value(node, at, source, place)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f"line {mark.line + 1}"
        reason = without_credentials(", ".join(filter(None, (error.context, error.problem))))
        source.add_problem(at, f"not YAML: {reason}", place=place or line)
    except yaml.reader.ReaderError as error:
        line = f"line {text.count(chr(10), 0, error.position) + 1}"
        source.add_problem(at, "not YAML: it holds a control character", place=place or line)
    except RecursionError:
        source.add_problem(at, "not a recipe: it is nested too deep", place=place)
    except (ValueError, OverflowError):  # PyYAML on "\UFFFFFFFF" and overlong %YAML versions
        source.add_problem(at, "not YAML: it holds a character or version that does not exist", place=place)
    return source


def _value(node: yaml.Node, path: KeyPath, source: Source, place: str | None) -> Any:
    here = place or f"line {node.start_mark.line + 1}"
    source.places.setdefault(path, here)
    plain = {"map", "seq", "str", "null", "bool", "int", "float", "merge", "value"}
    if node.tag.removeprefix("tag:yaml.org,2002:") not in plain:
        source.add_problem(path, f"the tag {node.tag} is not allowed; write a plain value", place=here)
        return None
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = place or f"line {key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                source.add_problem(path, "a key must be a word, not a list or section", place=line)
                continue
            key = (*path, key_node.value)
            if key_node.value in values:
                first = source.places[key]
                source.add_problem(key, f"given twice, first on {first}; keep one of them", place=line)
                continue
            source.places[key] = line
            values[key_node.value] = _value(value_node, key, source, place)
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*path, str(i)), source, place) for i, item in enumerate(node.value)]
    try:
        return _scalar(node)
    except ValueError:
        source.add_problem(path, f"not a value of its tag {node.tag}; write a plain value", place=here)
        return None


def _scalar(node: yaml.Node) -> bool | int | float | str | None:
    text: str = node.value
    match node.tag.removeprefix("tag:yaml.org,2002:"):
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text, 16) if text[:2].lower() == "0x" else int(text)
        case "float":
            return float(re.sub(r"\.(?=[inIN])", "", text))
        case _:
            return text


def apply_overrides(source: Source, overrides: Sequence[str]) -> None:
    """Set values by `key=value` arguments: the key a dotted path, the value in YAML; the later wins."""
    for override in overrides:
        key, equals, text = override.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            source.add_problem(
                (),
                f"'{without_credentials(override)}' is not an override; write key=value, "
                "for example outer.num_steps=100",
                place=COMMAND_LINE,
            )
            continue
        given = read_yaml(text, place=COMMAND_LINE, at=path)
        source.problems += given.problems
        if not given.problems:
            _set(source, path, given)


def _set(source: Source, path: KeyPath, given: Source) -> None:
    # A null or a bare kind on the way becomes a section, so that one of its keys can be set.
    around: Any = source.values
    for depth, key in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(around, list):
            if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < len(around)):
                text = f"no such item; the list has {len(around)}, numbered from 0"
                source.add_problem(path[: depth + 1], text, place=COMMAND_LINE)
                return
            index: Any = int(key)
        elif isinstance(around, dict):
            if key.isdigit() and not around:
                text = (
                    "no list is given here to change an item of; set the whole list, for example key=[a, b]"
                )
                source.add_problem(path[: depth + 1], text, place=COMMAND_LINE)
                return
            index = key
            around.setdefault(key, None)
        else:
            return
        if last:
            around[index] = given.values
        elif around[index] is None:
            around[index] = {}
        elif isinstance(around[index], str):
            around[index] = {"kind": around[index]}
        elif not isinstance(around[index], (dict, list)):
            text = f"{around[index]!r} has no parts; set {dotted(path[: depth + 1])} itself"
            source.add_problem(path, text, place=COMMAND_LINE)
            return
        source.places.setdefault(path[: depth + 1], COMMAND_LINE)
        around = around[index]
    for old in [place for place in source.places if place[: len(path)] == path]:
        del source.places[old]
    source.places.update(given.places)
    source.places[path] = COMMAND_LINE
