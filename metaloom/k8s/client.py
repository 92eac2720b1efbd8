"""Talks to a Kubernetes API server: plain dicts in and out, and every failure as one message in words."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

from metaloom.k8s import watching
from metaloom.k8s.access import Access, namespace_of_pod
from metaloom.k8s.kubeconfig import kubeconfig_paths, read_context
from metaloom.k8s.quantities import parse_quantity
from metaloom.k8s.refusals import (
    UNWELL,
    AlreadyExistsError,
    Answer,
    Attempt,
    InterruptedStreamError,
    NotServedError,
    RefusedError,
    UnreachableError,
    foreign_answer,
    is_before_sending,
    is_lasting,
    is_no_such_object,
    is_no_such_path,
    reason_of,
    refusal,
    unreachable,
)
from metaloom.k8s.resources import ACCESS_REVIEWS, NAMESPACES, PODS, Resource
from metaloom.k8s.server_version import SERVER_VERSION, ServerVersion, read_version
from metaloom.k8s.streams import Lines
from metaloom.k8s.watching import Watched

__all__ = [
    "AlreadyExistsError",
    "Cluster",
    "InterruptedStreamError",
    "Lines",
    "NotServedError",
    "RefusedError",
    "UnreachableError",
]

Object = dict[str, Any]

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 60.0
# A log of which nothing comes for so long is opened anew: the connection may be dead without a word.
SILENCE_S = 120.0
PAGE_SIZE = 500
# A server that is busy is waited for so long in all, and for so long at once.
PATIENCE_S = 120.0
LONGEST_PAUSE_S = 30.0
BUSY = (429, 503)
STRICT = {"fieldValidation": "Strict"}
AMOUNTS = ("requests", "limits", "sizeLimit")  # fields whose values are quantities
# Pauses before another try where no connection came about, or it broke.
PAUSES_S = (0.2, 1.0, 3.0)


class Cluster:
    """A namespace of a cluster.

    All methods raise `LaunchError`, which says in words what failed, where, and what to do. They may be
    called in several threads.

    Attributes:
        namespace: in which all is read and written.
        place: context and server, for messages.
        shown: namespace, context and server, for messages.
    """

    def __init__(self, access: Access, *, context: str, namespace: str, outage_s: float = 0.0) -> None:
        self._access = access
        self._context = context
        self._outage_s = outage_s
        self._is_closed = threading.Event()
        self.place = f"{context} ({access.server})"
        self._served: dict[str, frozenset[str]] = {}
        self._versions: dict[str, tuple[str, ...]] = {}
        self._has_told = False
        self.namespace = namespace
        self.shown = f"namespace {namespace} of {self.place}"

    @staticmethod
    def connect(*, context: str | None = None, namespace: str | None = None) -> Cluster:
        """The cluster of a context of the kubeconfig; else, in a pod, the one that it runs in.

        No request is made.

        Args:
            context: None for the current one.
            namespace: None for that of the context.

        Raises:
            LaunchError: there is no kubeconfig, or it, the context or its credentials cannot be read.
        """
        paths = kubeconfig_paths(os.environ)
        is_in_pod = bool(os.environ.get("KUBERNETES_SERVICE_HOST")) and context is None
        if is_in_pod and not any(path.exists() for path in paths):
            namespace = namespace or namespace_of_pod()
            return Cluster(Access(None), context="this pod's cluster", namespace=namespace)
        chosen = read_context(paths, context)
        return Cluster(Access(chosen), context=chosen.name, namespace=namespace or chosen.namespace)

    def patient(self) -> Cluster:
        """The same, where a server that is away is waited for: 10 minutes, or until this is closed."""
        return Cluster(
            self._access, context=self._context, namespace=self.namespace, outage_s=watching.OUTAGE_S
        )

    def close(self) -> None:
        """Ends connections, and requests that wait to be tried again."""
        self._is_closed.set()
        self._access.pool.clear()

    def get(self, resource: Resource, name: str) -> Object | None:
        """An object; None where it is not there."""
        attempt = self._attempt("get", resource, name)
        answer = self._ask("GET", resource.path(self.namespace, _quoted(name)), attempt)
        if is_no_such_object(answer, attempt):
            return None
        return _checked(answer, attempt)

    def create(self, resource: Resource, obj: Object, *, dry_run: bool = False) -> Object:
        """Makes an object; fields that the server does not know are refused.

        Args:
            dry_run: the server checks it and makes nothing.

        Returns:
            The object as the server has it.

        Raises:
            AlreadyExistsError: there is one of that name.
        """
        name = obj.get("metadata", {}).get("name", "")
        attempt = self._attempt("create", resource, name)
        query = STRICT | ({"dryRun": "All"} if dry_run else {})
        doubt = _Doubt()
        answer = self._ask("POST", resource.path(self.namespace), attempt, query=query, body=obj, doubt=doubt)
        if doubt.is_there and answer.status == 409:
            # An earlier try may have made it, though its answer was lost.
            found = self.get(resource, name)
            if found is not None and _holds(found, obj):
                return found
        return _checked(answer, attempt)

    def patch(self, resource: Resource, name: str, change: Object) -> Object:
        """Changes an object by a JSON merge patch (RFC 7386); returns it as it is then.

        Fields that the server does not know are refused.
        """
        attempt = self._attempt("patch", resource, name)
        path = resource.path(self.namespace, _quoted(name))
        answer = self._ask("PATCH", path, attempt, query=STRICT, body=change)
        return _checked(answer, attempt)

    def delete(self, resource: Resource, name: str) -> bool:
        """Deletes an object, and what it owns before it; False where it was not there."""
        attempt = self._attempt("delete", resource, name)
        path = resource.path(self.namespace, _quoted(name))
        body = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Foreground"}
        answer = self._ask("DELETE", path, attempt, body=body)
        if is_no_such_object(answer, attempt):
            return False
        _checked(answer, attempt)
        return True

    def serves(self, resource: Resource) -> bool:
        """Whether the server has such a kind of objects."""
        if resource.api_version not in self._served:
            prefix = "apis" if resource.group else "api"
            kinds = self._discovered(f"/{prefix}/{resource.api_version}", resource).get("resources") or []
            self._served[resource.api_version] = frozenset(str(kind.get("name")) for kind in kinds)
        return resource.plural in self._served[resource.api_version]

    def as_served(self, resource: Resource) -> Resource | None:
        """A kind of a named group in a version that the server has, first the one that it prefers; None where
        it has none."""
        if resource.group not in self._versions:
            group = self._discovered(f"/apis/{resource.group}", resource)
            told = [group.get("preferredVersion") or {}, *(group.get("versions") or [])]
            versions = dict.fromkeys(str(one.get("version") or "") for one in told)
            self._versions[resource.group] = tuple(version for version in versions if version)
        kinds = [dataclasses.replace(resource, version=one) for one in self._versions[resource.group]]
        return next((kind for kind in kinds if self.serves(kind)), None)

    def version(self) -> ServerVersion | None:
        """The release of Kubernetes that the server is; None where it tells this user none."""
        attempt = self._attempt("get", SERVER_VERSION, "")
        answer = self._ask("GET", "/version", attempt)
        return None if answer.status in (403, 404) else read_version(_checked(answer, attempt))

    def may(self, verb: str, resource: Resource, *, subresource: str = "") -> bool:
        """Whether the user has the permission."""
        wanted = {"verb": verb, "group": resource.group, "resource": resource.plural}
        wanted |= {"subresource": subresource} if subresource else {}
        # A role in a namespace allows to look at that namespace itself, which lies in none.
        is_within = resource.is_namespaced or resource == NAMESPACES
        wanted |= {"namespace": self.namespace} if is_within else {}
        wanted |= {"name": self.namespace} if resource == NAMESPACES else {}
        review = {
            "apiVersion": ACCESS_REVIEWS.api_version,
            "kind": ACCESS_REVIEWS.kind,
            "spec": {"resourceAttributes": wanted},
        }
        attempt = self._attempt("create", ACCESS_REVIEWS, "")
        answer = self._ask("POST", ACCESS_REVIEWS.path(""), attempt, body=review)
        return bool((_checked(answer, attempt).get("status") or {}).get("allowed"))

    def watch(
        self,
        resource: Resource,
        *,
        labels: Mapping[str, str] = {},
        fields: str = "",
        timeout_s: float | None = None,
    ) -> Watched:
        """What is there, and what becomes of it: ("ADDED" | "MODIFIED" | "DELETED", object).

        It goes on after connections that break, the server's own timeouts and versions that the server has
        forgotten (410); then all is listed again, and what changed meanwhile is told, deletions too. An
        outage of up to 10 minutes is waited for.

        Args:
            timeout_s: it ends then; None: never.
        """
        attempt = self._attempt("watch", resource, "")
        selectors = _selectors(labels, fields)

        def list_all(outage_s: float) -> tuple[list[Object], str]:
            return self._list(resource, labels, fields, outage_s=outage_s)

        def open_stream(version: str, seconds: int, silence_s: float, outage_s: float) -> Lines | Answer:
            query = selectors | {"watch": "1", "allowWatchBookmarks": "true"}
            query |= {"resourceVersion": version, "timeoutSeconds": str(seconds)}
            path = resource.path(self.namespace)
            response = self._open(
                path, attempt, query=query, timeout_s=silence_s, is_repeatable=True, outage_s=outage_s
            )
            return Lines(response, "a watch") if response.status == 200 else _whole(response)

        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        return Watched(list_all, open_stream, attempt, deadline)

    def log(
        self,
        pod: str,
        *,
        container: str,
        follow: bool = False,
        tail: int | None = None,
        since_time: str | None = None,
        timestamps: bool = False,
        previous: bool = False,
    ) -> Lines:
        """The lines of a container's log.

        Args:
            follow: until the container ends.
            tail: the last lines alone.
            since_time: RFC 3339; of it, the server heeds whole seconds.
            timestamps: each line begins with its time and a space.
            previous: of the container before it was started again in its pod.

        Raises:
            RefusedError: with status 404 the pod is not there, with 400 the container has not started.
            InterruptedStreamError: while lines are read: the connection broke off.
        """
        query = {"container": container}
        query |= {"follow": "true"} if follow else {}
        query |= {"tailLines": str(tail)} if tail is not None else {}
        query |= {"sinceTime": since_time} if since_time is not None else {}
        query |= {"timestamps": "true"} if timestamps else {}
        query |= {"previous": "true"} if previous else {}
        attempt = self._attempt("read the log of", PODS, pod)
        path = PODS.path(self.namespace, f"{_quoted(pod)}/log")
        # A machine that is gone is answered for by the server, with a failure that lasts as long.
        response = self._open(path, attempt, query=query, timeout_s=SILENCE_S, is_repeatable=False)
        if response.status != 200:
            raise refusal(_whole(response), attempt)
        return Lines(response, f"the log of pod {pod!r} on {self.place}")

    # Requests.

    def _discovered(self, path: str, resource: Resource) -> Object:
        """What the server says that it has at a path of its API; {} where it has nothing there."""
        attempt = self._attempt("discover", resource, "")
        answer = self._ask("GET", path, attempt)
        return {} if is_no_such_path(answer) else _checked(answer, attempt)

    def _attempt(self, verb: str, resource: Resource, name: str) -> Attempt:
        namespace = self.namespace if resource.is_namespaced else ""
        return Attempt(verb, resource, name, namespace, self.place, self._access.user)

    def _list(
        self, resource: Resource, labels: Mapping[str, str], fields: str, *, outage_s: float = 0.0
    ) -> tuple[list[Object], str]:
        """All objects, and the version from which a watch goes on."""
        attempt = self._attempt("list", resource, "")
        query = _selectors(labels, fields) | {"limit": str(PAGE_SIZE)}
        found: list[Object] = []
        token = ""
        while True:
            page = query | ({"continue": token} if token else {})
            path = resource.path(self.namespace)
            answer = self._ask("GET", path, attempt, query=page, outage_s=outage_s)
            if answer.status == 410 and token:
                # The pages took longer than the server keeps versions. In one piece it takes no token.
                found, token = [], ""
                query.pop("limit", None)
                continue
            listed = _checked(answer, attempt)
            metadata = listed.get("metadata") or {}
            for item in listed.get("items") or []:
                found.append({"apiVersion": resource.api_version, "kind": resource.kind} | item)
            token = metadata.get("continue") or ""
            if not token:
                return found, str(metadata.get("resourceVersion") or "")

    def _ask(
        self,
        method: str,
        path: str,
        attempt: Attempt,
        *,
        query: Mapping[str, str] = {},
        body: Object | None = None,
        outage_s: float = 0.0,
        doubt: _Doubt | None = None,
    ) -> Answer:
        """The whole answer, of whatever status."""
        answer: Answer = self._tried(
            lambda: _whole(self._send(method, path, query, body, ANSWER_TIMEOUT_S)),
            attempt,
            outage_s=outage_s,
            is_repeatable=method == "GET",
            doubt=doubt,
        )
        return answer

    def _open(
        self,
        path: str,
        attempt: Attempt,
        *,
        query: Mapping[str, str],
        timeout_s: float,
        is_repeatable: bool,
        outage_s: float = 0.0,
    ) -> Any:
        """The answer to be read as it comes, of whatever status."""
        return self._tried(
            lambda: self._send("GET", path, query, None, timeout_s),
            attempt,
            outage_s=outage_s,
            is_repeatable=is_repeatable,
        )

    def _send(
        self, method: str, path: str, query: Mapping[str, str], body: Object | None, timeout_s: float
    ) -> Any:
        import urllib3

        headers = {"Accept": "application/json", "User-Agent": "metaloom"} | self._access.headers()
        if body is not None:
            kind = "merge-patch+json" if method == "PATCH" else "json"
            headers["Content-Type"] = f"application/{kind}"
        url = self._access.server + path + (f"?{urllib.parse.urlencode(query)}" if query else "")
        return self._access.pool.request(
            method,
            url,
            body=None if body is None else json.dumps(body),
            headers=headers,
            preload_content=False,
            retries=False,
            redirect=False,
            timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=timeout_s),
        )

    def _tried(
        self,
        send: Callable[[], Any],
        attempt: Attempt,
        *,
        outage_s: float,
        is_repeatable: bool,
        doubt: _Doubt | None = None,
    ) -> Any:
        """The answer, after as many tries as are due.

        Args:
            is_repeatable: whether a server that has failed is asked again.
            outage_s: a server that cannot be reached is tried for so long, in place of a few times.
            doubt: learns whether a try that failed may have reached the server.
        """
        import urllib3

        outage_s = max(outage_s, self._outage_s)
        begin = time.monotonic()
        num_broken = num_busy = 0
        has_logged_in = False
        while True:
            try:
                answer = send()
            except (urllib3.exceptions.HTTPError, OSError) as error:
                if doubt is not None and not is_before_sending(error):
                    doubt.is_there = True
                num_broken += 1
                is_over = num_broken > len(PAUSES_S) and time.monotonic() - begin >= outage_s
                if is_over or is_lasting(error) or self._is_closed.is_set():
                    raise unreachable(error, attempt) from None
                if num_broken > 1 and outage_s:
                    self._tell(f"{self.place} cannot be reached ({reason_of(error)}): trying again")
                self._pause(PAUSES_S[min(num_broken, len(PAUSES_S)) - 1])
                continue
            if answer.status == 401 and not has_logged_in:
                # A token may have been taken back before its time; another may be in the kubeconfig by now.
                has_logged_in = True
                _drop(answer)
                self._access.load()
                continue
            if answer.status in BUSY or (is_repeatable and answer.status in UNWELL):
                pause_s = _pause_s(answer, num_busy)
                waited_s = time.monotonic() - begin + pause_s
                if waited_s <= max(PATIENCE_S, outage_s) and not self._is_closed.is_set():
                    num_busy += 1
                    what = "is busy" if answer.status in BUSY else "has failed"
                    self._tell(f"{self.place} {what} ({answer.status}): trying again, first in {pause_s:g} s")
                    _drop(answer)
                    self._pause(pause_s)
                    continue
            return answer

    def _pause(self, seconds: float) -> None:
        self._is_closed.wait(seconds)

    def _tell(self, message: str) -> None:
        """Prints why things are slow, the first time."""
        if not self._has_told:
            self._has_told = True
            print(message, file=sys.stderr, flush=True)

    # Last, since its name hides the type's from annotations.
    def list(self, resource: Resource, *, labels: Mapping[str, str] = {}, fields: str = "") -> list[Object]:
        """All objects that have the labels, page by page."""
        return self._list(resource, labels, fields)[0]


@dataclasses.dataclass
class _Doubt:
    """Whether a try that failed may yet have done what it asked for."""

    is_there: bool = False


def _selectors(labels: Mapping[str, str], fields: str) -> dict[str, str]:
    query = {"labelSelector": ",".join(f"{key}={value}" for key, value in labels.items())}
    return {key: value for key, value in (query | {"fieldSelector": fields}).items() if value}


def _quoted(name: str) -> str:
    return urllib.parse.quote(name, safe="")


def _checked(answer: Answer, attempt: Attempt) -> Object:
    """The object that an answer holds.

    Raises:
        LaunchError: it is no success, or no object.
    """
    if not 200 <= answer.status < 300:
        raise refusal(answer, attempt)
    if answer.object is None:
        raise foreign_answer(answer, attempt)
    return answer.object


def _whole(response: Any) -> Answer:
    try:
        content = response.read()
    except BaseException:
        response.close()
        raise
    response.release_conn()
    kind, retry_after = response.headers.get("Content-Type", ""), response.headers.get("Retry-After", "")
    return Answer(response.status, kind, content, retry_after)


def _drop(answer: Any) -> None:
    if not isinstance(answer, Answer):
        answer.close()


def _pause_s(answer: Any, num_before: int) -> float:
    """How long a busy server wants to be left alone; it may not say."""
    told = answer.retry_after if isinstance(answer, Answer) else answer.headers.get("Retry-After", "")
    try:
        wanted = float(told)
    except ValueError:
        wanted = 2.0**num_before
    return min(max(wanted, 0.1), LONGEST_PAUSE_S)


def _holds(found: Any, wanted: Any, *, is_amount: bool = False) -> bool:
    """Whether an object has all that was sent; the server has added to it.

    Args:
        is_amount: whether these are quantities, which the server writes in its own way: 1000m as 1.
    """
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(
            key in found and _holds(found[key], value, is_amount=is_amount or key in AMOUNTS)
            for key, value in wanted.items()
        )
    if isinstance(wanted, list):
        return isinstance(found, list) and len(found) == len(wanted) and all(map(_holds, found, wanted))
    if is_amount and found != wanted:
        return parse_quantity(str(found)) == parse_quantity(str(wanted))
    return bool(found == wanted)
