"""The objects of a fake API server: versions, history, selectors, refusals in the words of the real one."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import itertools
import re
import threading
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from metaloom.k8s.resources import Resource

Object = dict[str, Any]


class Refusal(Exception):
    """An answer that is no success: a `Status` of the real API server."""

    def __init__(
        self,
        code: int,
        reason: str,
        message: str,
        *,
        details: Mapping[str, Any] | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s
        self.status: Object = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "details": dict(details or {}),
            "code": code,
        }


def not_found(resource: Resource, name: str) -> Refusal:
    details = {"name": name, "group": resource.group, "kind": resource.plural}
    return Refusal(404, "NotFound", f'{resource.full_name} "{name}" not found', details=details)


def now() -> str:
    """The time as objects have it: UTC, whole seconds."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclasses.dataclass(frozen=True)
class Change:
    """Something that became of an object.

    Attributes:
        old: the object before; None where it was made.
        new: the object after; None where it was deleted.
        version: the resourceVersion that it gave.
    """

    version: int
    resource: Resource
    namespace: str
    old: Object | None
    new: Object | None


@dataclasses.dataclass(frozen=True)
class Selection:
    """Label and field selectors, as in a request."""

    labels: str = ""
    fields: str = ""

    def holds(self, obj: Object | None) -> bool:
        """Whether the object is there and selected."""
        if obj is None:
            return False
        labels = obj["metadata"].get("labels") or {}
        return all(_label_holds(term, labels) for term in _terms(self.labels)) and all(
            _field_holds(term, obj) for term in _terms(self.fields)
        )


def _terms(selector: str) -> list[str]:
    # Commas inside the parentheses of `in (a, b)` part nothing.
    return [term.strip() for term in re.split(r",(?![^(]*\))", selector) if term.strip()]


def _label_holds(term: str, labels: Mapping[str, str]) -> bool:
    if match := re.fullmatch(r"(\S+)\s+(in|notin)\s+\(([^)]*)\)", term):
        values = {value.strip() for value in match[3].split(",")}
        return (labels.get(match[1]) in values) == (match[2] == "in")
    if match := re.fullmatch(r"([^!=\s]+)\s*(!=|==|=)\s*(\S*)", term):
        return (labels.get(match[1]) == match[3]) == (match[2] != "!=")
    if term.startswith("!"):
        return term[1:] not in labels
    return term in labels


def _field_holds(term: str, obj: Object) -> bool:
    match = re.fullmatch(r"([\w.]+)(!=|==|=)(.*)", term)
    if match is None:
        raise Refusal(400, "BadRequest", f"invalid field selector {term!r}")
    value: Any = obj
    for key in match[1].split("."):
        value = value.get(key, "") if isinstance(value, dict) else ""
    return (str(value) == match[3]) == (match[2] != "!=")


Key = tuple[Resource, str, str]


class Store:
    """Objects by kind, namespace and name, with the history that watches read.

    Attributes:
        changed: held for each reading and writing; notified at each change.
        oldest: changes of versions up to it are forgotten.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.version = 100
        self.oldest = 100
        self.changes: list[Change] = []
        self._objects: dict[Key, Object] = {}
        self._letters = itertools.count()

    def get(self, resource: Resource, namespace: str, name: str) -> Object:
        """A copy of the object.

        Raises:
            Refusal: 404.
        """
        with self.changed:
            found = self._objects.get((resource, namespace, name))
            if found is None:
                raise not_found(resource, name)
            return copy.deepcopy(found)

    def find(self, resource: Resource, namespace: str, name: str) -> Object | None:
        """A copy of the object, if it is there."""
        with self.changed:
            return copy.deepcopy(self._objects.get((resource, namespace, name)))

    def create(self, resource: Resource, namespace: str, obj: Object) -> Object:
        """Stores an object with all that the server adds; its name is unused."""
        with self.changed:
            obj = copy.deepcopy(obj)
            metadata = obj["metadata"]
            if resource.is_namespaced:
                metadata["namespace"] = namespace
            metadata["uid"] = str(uuid.uuid4())
            metadata["creationTimestamp"] = now()
            metadata.setdefault("generation", 1)
            obj.setdefault("apiVersion", resource.api_version)
            obj.setdefault("kind", resource.kind)
            self._put(resource, namespace, None, obj)
            return copy.deepcopy(obj)

    def edit(self, resource: Resource, namespace: str, name: str, edit: Callable[[Object], object]) -> Object:
        """The object after `edit` changed a copy of it, which takes its place."""
        with self.changed:
            old = self.get(resource, namespace, name)
            new = copy.deepcopy(old)
            edit(new)
            if new != old:
                self._put(resource, namespace, old, new)
            return copy.deepcopy(new)

    def delete(self, resource: Resource, namespace: str, name: str) -> Object:
        """Deletes the object, and then those that it owns."""
        with self.changed:
            old = self.get(resource, namespace, name)
            self.edit(resource, namespace, name, lambda obj: obj["metadata"].update(deletionTimestamp=now()))
            del self._objects[resource, namespace, name]
            self._tell(resource, namespace, old, None)
            uid = old["metadata"]["uid"]
            for kind, within, owned in list(self._objects):
                obj = self._objects.get((kind, within, owned))
                owners = (obj or {"metadata": {}})["metadata"].get("ownerReferences", [])
                if any(owner["uid"] == uid for owner in owners):
                    self.delete(kind, within, owned)
            return old

    def letters(self) -> str:
        """Five letters for a generated name, never the same."""
        alphabet = "bcdfghjklmnpqrstvwxz"
        number = next(self._letters)
        return "".join(alphabet[number // len(alphabet) ** i % len(alphabet)] for i in (4, 3, 2, 1, 0))

    def since(self, version: int) -> list[Change]:
        """The changes after a version, in order."""
        with self.changed:
            newer = itertools.takewhile(lambda change: change.version > version, reversed(self.changes))
            return [*newer][::-1]

    def list(self, resource: Resource, namespace: str | None, selection: Selection) -> list[Object]:
        """Copies of the objects of a namespace (None: of all), by name."""
        with self.changed:
            found = [
                obj
                for (kind, within, _), obj in self._objects.items()
                if kind == resource and namespace in (None, within) and selection.holds(obj)
            ]
            found.sort(key=lambda obj: (obj["metadata"].get("namespace", ""), obj["metadata"]["name"]))
            return copy.deepcopy(found)

    def _put(self, resource: Resource, namespace: str, old: Object | None, new: Object) -> None:
        new["metadata"]["resourceVersion"] = str(self.version + 1)
        self._objects[resource, namespace, new["metadata"]["name"]] = new
        self._tell(resource, namespace, old, new)

    def _tell(self, resource: Resource, namespace: str, old: Object | None, new: Object | None) -> None:
        self.version += 1
        if new is None and old is not None:
            # A deletion is told with the object as it was, and with a version of its own.
            old = old | {"metadata": old["metadata"] | {"resourceVersion": str(self.version)}}
        change = Change(self.version, resource, namespace, copy.deepcopy(old), copy.deepcopy(new))
        self.changes.append(change)
        self.changed.notify_all()
