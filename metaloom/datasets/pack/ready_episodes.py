"""Ready episodes: records that hold lists of support and query examples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaloom.datasets.pack import payloads
from metaloom.datasets.pack.payloads import npy_bytes
from metaloom.datasets.pack.plan import BadSample
from metaloom.datasets.ready_episodes import SHARED, shared_example

PARTS = ("support", "query")


@dataclass(frozen=True)
class ExampleForm:
    """What an example of an episode looks like.

    Args:
        input: the name of its input.
        target: the name of its target.
        kind: `text`, `tokens` or `numbers`.
        tokenizer: file of a tokenizer for texts; None takes their bytes.
    """

    input: str
    target: str
    kind: str | None = None
    tokenizer: str | None = None


def episode_members(record: Mapping[str, Any], form: ExampleForm) -> dict[str, bytes]:
    """The members of a ready episode: `support.inputs.npy` and so on, the rest of the record as `json`.

    Texts and tokens become int32 [S, longest], filled up with -1, numbers float32 [S, ...]. Targets that are
    texts become int64 [S], places in the sorted labels of support, which `classes` of the JSON lists and
    `num_ways` counts; integers become int64 [S], other numbers float32 [S, P]. Where no example has a target,
    the next token is meant, and there are no targets.

    Raises:
        BadSample: the record is no episode, or an example of its query has the inputs of one of its support.
    """
    has_targets = form.kind == "numbers" or _has_a_target(record, form)
    parts = {name: examples_of(record, name, form, has_targets=has_targets) for name in PARTS}
    rest = {name: value for name, value in record.items() if name not in PARTS}
    targets = {name: [target for _, target in examples] for name, examples in parts.items()}
    labels = [*targets["support"], *targets["query"]]
    if all(isinstance(label, str) for label in labels):
        names = sorted({*targets["support"]})
        unknown = sorted({*labels}.difference(names))
        if unknown:
            raise BadSample(f"its query has labels that its support lacks: {', '.join(unknown)}")
        rest["classes"] = names
        if len(names) > 1:
            rest.setdefault("num_ways", len(names))
        targets = {name: [names.index(label) for label in found] for name, found in targets.items()}
        labels = [*targets["support"], *targets["query"]]
    is_integer = all(type(label) is int for label in labels)
    inputs = {name: _inputs([value for value, _ in examples], form) for name, examples in parts.items()}
    _require_apart(inputs["support"], inputs["query"])
    members = {"json": json_bytes(rest)}
    for name in PARTS:
        members[f"{name}.inputs.npy"] = npy_bytes(inputs[name])
        if has_targets:
            members[f"{name}.targets.npy"] = npy_bytes(_targets(targets[name], is_integer=is_integer))
    return members


def _require_apart(support: NDArray[Any], query: NDArray[Any]) -> None:
    """Raises BadSample where an example of query is one of support; what fills rows of tokens up is no part
    of them."""
    is_tokens = support.dtype.kind == "i"
    rows = ([row[row >= 0] for row in part] if is_tokens else [*part] for part in (support, query))
    twins = shared_example(*rows)
    if twins is not None:
        raise BadSample(SHARED.format(*twins))


def examples_of(
    record: Mapping[str, Any], part: str, form: ExampleForm, *, has_targets: bool
) -> list[tuple[Any, Any]]:
    """(input, target) of the examples of a part; a target is None where there are none.

    Raises:
        BadSample: it is no list of examples.
    """
    found = record.get(part)
    if not isinstance(found, list) or not found:
        raise BadSample(f"its {part!r} is no list of examples")
    names = {form.input, form.target} if has_targets else {form.input}
    for example in found:
        if not isinstance(example, Mapping) or not names <= {*example}:
            missing = f"{form.input!r} and {form.target!r}" if has_targets else repr(form.input)
            raise BadSample(f"an example of its {part!r} has no {missing} (--input, --target)")
    return [(example[form.input], example.get(form.target)) for example in found]


def _has_a_target(record: Mapping[str, Any], form: ExampleForm) -> bool:
    examples = [example for part in PARTS if isinstance(record.get(part), list) for example in record[part]]
    return any(isinstance(example, Mapping) and form.target in example for example in examples)


def json_bytes(value: Any) -> bytes:
    """The value as JSON in UTF-8.

    Raises:
        BadSample: JSON has no form for it.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise BadSample(f"cannot be written as JSON: {error}") from error


def _inputs(values: list[Any], form: ExampleForm) -> NDArray[Any]:
    if form.kind == "text":
        texts = (payloads.text(value) for value in values)
        return payloads.padded_rows([payloads.encode_text(text, form.tokenizer) for text in texts])
    if form.kind == "tokens":
        return payloads.padded_rows([payloads.tokens(value) for value in values])
    return _stacked(values, "inputs")


def _targets(values: list[Any], *, is_integer: bool) -> NDArray[Any]:
    if not is_integer:
        return _stacked(values, "targets")
    try:
        return np.array(values, "<i8")
    except OverflowError as error:
        raise BadSample("a target does not fit 64 bits") from error


def _stacked(values: list[Any], what: str) -> NDArray[np.float32]:
    """float32 [N, ...], at least two dimensions."""
    rows = [np.atleast_1d(payloads.numbers(value)) for value in values]
    shapes = sorted({row.shape for row in rows})
    if len(shapes) > 1:
        raise BadSample(f"its {what} differ in shape: {', '.join(map(str, shapes))}")
    return np.stack(rows)
