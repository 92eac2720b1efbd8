"""Which fields a fake API server knows, by the schemas of Kubernetes; others it drops or refuses."""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
from collections.abc import Collection, Iterator
from typing import Any

from metaloom.k8s.resources import Resource
from tests.k8s.fake_store import Object, Refusal

RELEASE = "v1.34.0"


class Fields(Object):
    """A JSON object.

    Attributes:
        twice: fields that were given more than once, of which the last counts.
    """

    twice: tuple[str, ...] = ()


def read_object(body: bytes) -> Fields:
    """The JSON object that a request brings.

    Raises:
        Refusal: 400, it brings none.
    """
    try:
        obj = json.loads(body, object_pairs_hook=_fields)
    except ValueError:
        obj = None
    if not isinstance(obj, Fields):
        raise Refusal(400, "BadRequest", "the object provided is unrecognized (must be of type ...)")
    return obj


def check_fields(
    resource: Resource, obj: Fields, mode: str, method: str, *, lacking: Collection[str]
) -> None:
    """Drops the fields of an object, or of a patch to it, that the server does not know.

    Args:
        mode: `fieldValidation` of the request.
        lacking: paths of fields that this server does not know, of a kind that operators bring or any other.

    Raises:
        Refusal: with `Strict` there are such fields, or some were given twice: 400, or 422 of a patch.
    """
    faults = list(_faults(obj, _schema(resource), "", lacking))
    if faults and mode == "Strict":
        told = "strict decoding error: " + ", ".join(text for text, _, _ in faults)
        if method == "PATCH":
            told = f' "" is invalid: patch: Invalid value: {json.dumps(json.dumps(obj))}: {told}'
            raise Refusal(422, "Invalid", told)
        kind, version = resource.kind, resource.version
        told = f'{kind} in version "{version}" cannot be handled as a {kind}: {told}'
        raise Refusal(400, "BadRequest", told)
    for _, within, key in faults:
        if key:
            del within[key]


def _fields(pairs: list[tuple[str, Any]]) -> Fields:
    made = Fields(pairs)
    names = [name for name, _ in pairs]
    made.twice = tuple(name for name in made if names.count(name) > 1)
    return made


@functools.cache
def _definitions() -> Object:
    folder = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema"
    text = (folder / f"{RELEASE}-local" / "_definitions.json").read_text()
    found: Object = json.loads(text)["$defs"]
    return found


def _schema(resource: Resource) -> Object:
    """Of a kind of Kubernetes' own; else one that knows all fields."""
    group = resource.group.partition(".")[0] or "core"
    found: Object = _definitions().get(f"io.k8s.api.{group}.{resource.version}.{resource.kind}", {})
    return found


def _faults(
    value: object, schema: Object, path: str, lacking: Collection[str]
) -> Iterator[tuple[str, Object, str]]:
    """What is wrong, where it is, and the field there that is unknown; "" for one that is known."""
    if "$ref" in schema:
        schema = _definitions()[schema["$ref"].rpartition("/")[2]]
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from _faults(item, schema.get("items") or {}, f"{path}[{i}]", lacking)
    if not isinstance(value, Fields):
        return
    known: Object | None = schema.get("properties")
    others: Object = schema.get("additionalProperties") or {}
    for key, inner in value.items():
        at = f"{path}.{key}" if path else key
        if (known is not None and key not in known) or re.sub(r"\[\d+\]", "", at) in lacking:
            yield f'unknown field "{at}"', value, key
            continue
        if key in value.twice:
            yield f'duplicate field "{at}"', value, ""
        yield from _faults(inner, (known or {}).get(key, others), at, lacking)
