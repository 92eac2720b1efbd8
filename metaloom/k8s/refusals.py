"""What an API server's refusal means, in words: the answer of a request -> an error that users can act on."""

from __future__ import annotations

import dataclasses
import json
import re
import socket
import ssl
from typing import Any

from metaloom.errors import LaunchError
from metaloom.k8s.resources import NAMESPACES, Resource

# What a server answers, or a proxy in front of it, while it or its leader is being replaced; and for a log,
# where the pod's machine does not answer.
UNWELL = (500, 502, 504)


class RefusedError(LaunchError):
    """The API server refused a request.

    Attributes:
        status: of the answer: 403, 404 ...
        reason: the server's word for it: `Forbidden`, `NotFound` ...; "" where it gave none.
        told: what the server said, as it did; "" where that is of no use.
    """

    def __init__(self, message: str, *, status: int, reason: str = "", told: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.told = told

    @property
    def unknown_fields(self) -> list[str]:
        """Paths of the fields that the server does not know, where it refused the object for that."""
        return re.findall(r'unknown field "([^"]+)"', self.told)


class AlreadyExistsError(RefusedError):
    """There is an object of that name already."""


class NotServedError(RefusedError):
    """The API server has no such kind of objects."""


class InterruptedStreamError(LaunchError):
    """A connection broke off while an answer was read; what was read is whole lines."""


class UnreachableError(LaunchError):
    """The API server could not be reached, or does not speak as one."""


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What was to be done.

    Attributes:
        verb: as in rules of permissions: `create`, `list`.
        name: of the object; "" for all.
        namespace: "" where the kind has none.
        cluster: the context and server, in messages.
        user: the name of the credentials in the kubeconfig.
    """

    verb: str
    resource: Resource
    name: str
    namespace: str
    cluster: str
    user: str

    @property
    def words(self) -> str:
        name = f" {self.name!r}" if self.name else ""
        where = f" in namespace {self.namespace!r}" if self.namespace else ""
        return f"{self.verb} {self.resource.full_name}{name}{where} on {self.cluster}"


@dataclasses.dataclass(frozen=True)
class Answer:
    """A whole answer.

    Attributes:
        kind: its Content-Type.
        retry_after: that header, as it is; "" for none.
    """

    status: int
    kind: str
    content: bytes
    retry_after: str = ""

    @property
    def object(self) -> dict[str, Any] | None:
        """What it says, if that is a JSON object."""
        try:
            found = json.loads(self.content)
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    @property
    def status_object(self) -> dict[str, Any]:
        """The `Status` that it is, else an empty one."""
        found = self.object or {}
        return found if found.get("kind") == "Status" else {}

    @property
    def excerpt(self) -> str:
        """How its text begins, on one line."""
        text = " ".join(self.content[:2000].decode(errors="replace").split())
        return repr(text[:120] + ("..." if len(text) > 120 else ""))


def is_no_such_object(answer: Answer, attempt: Attempt) -> bool:
    """Whether a 404 says that the object is not there; else the kind of it, or its namespace, is not."""
    details = answer.status_object.get("details") or {}
    is_about_namespace = details.get("kind") == "namespaces" and attempt.resource != NAMESPACES
    return answer.status == 404 and bool(details.get("name")) and not is_about_namespace


def is_no_such_path(answer: Answer) -> bool:
    """Whether an API server says that it has nothing at a path; a 404 of something else does not."""
    said = answer.content[:100].decode(errors="replace").strip()
    return answer.status == 404 and (bool(answer.status_object) or said == "404 page not found")


def foreign_answer(answer: Answer, attempt: Attempt) -> UnreachableError:
    """The error for an answer that no API server gives."""
    kind = answer.kind.partition(";")[0] or "nothing that is named"
    return UnreachableError(
        f"cannot {attempt.words}: what answered there is no Kubernetes API server ({answer.status}, {kind}, "
        f"{answer.excerpt}); look whether a proxy or a login page is in between, and at the `server` of the "
        "kubeconfig."
    )


def refusal(answer: Answer, attempt: Attempt) -> LaunchError:
    """The error for an answer that is no success."""
    status = answer.status_object
    if not status and not is_no_such_path(answer) and answer.status not in (401, 429, 503):
        return foreign_answer(answer, attempt)
    reason = str(status.get("reason") or "")
    told = str(status.get("message") or "") or f"HTTP {answer.status}"
    if answer.status == 404:
        return _missing(answer, attempt)
    if answer.status == 409 and reason == "AlreadyExists":
        message = (
            f"cannot {attempt.words}: there is one of that name already; choose another name, or delete that "
            "one first."
        )
        return AlreadyExistsError(message, status=409, reason=reason)
    words = {401: _unauthorized, 403: _forbidden, 409: _conflict, 422: _invalid, 400: _bad_request}
    if answer.status in words:
        message = words[answer.status](attempt, told, status)
    elif answer.status in (429, 503):
        message = (
            f"cannot {attempt.words}: the API server is too busy ({answer.status}: {told}), also after "
            "waiting; try again later."
        )
    else:
        message = (
            f"cannot {attempt.words}: the API server answered {answer.status} ({told}); try again later."
        )
    return RefusedError(message, status=answer.status, reason=reason, told=told)


def _missing(answer: Answer, attempt: Attempt) -> RefusedError:
    reason = str(answer.status_object.get("reason") or "")
    where = f" in namespace {attempt.namespace!r}" if attempt.namespace else ""
    if is_no_such_object(answer, attempt):
        named = f"{attempt.resource.full_name} {attempt.name!r}"
        return RefusedError(f"there is no {named}{where} on {attempt.cluster}.", status=404, reason=reason)
    if (answer.status_object.get("details") or {}).get("kind") != "namespaces":
        return NotServedError(_not_served(attempt), status=404, reason=reason)
    message = (
        f"there is no namespace {attempt.namespace!r} on {attempt.cluster}: make it (kubectl create "
        f"namespace {attempt.namespace}), or name another with --namespace."
    )
    return RefusedError(message, status=404, reason=reason)


def _unauthorized(attempt: Attempt, told: str, status: dict[str, Any]) -> str:
    return (
        f"{attempt.cluster} does not accept the credentials of user {attempt.user!r} (401, {told}): the "
        "token or certificate is wrong or has expired; log in to the cluster again, so that the kubeconfig "
        "has a new one."
    )


def _forbidden(attempt: Attempt, told: str, status: dict[str, Any]) -> str:
    said = re.search(r'User "(?P<user>[^"]*)" cannot (?P<verb>\S+) resource "(?P<resource>[^"]*)"', told)
    if said is not None:
        where = f"in namespace {attempt.namespace!r}" if attempt.namespace else "in the whole cluster"
        return (
            f"user {said['user']!r} may not {said['verb']} {said['resource']} {where} of {attempt.cluster}: "
            f"ask for a Role that has the verb {said['verb']!r} for {said['resource']!r}, or name a "
            "namespace of your own with --namespace."
        )
    if "exceeded quota" in told:
        return (
            f"cannot {attempt.words}: a quota of the namespace does not allow it ({told}); ask for less, or "
            "cancel a job that holds it."
        )
    if "being terminated" in told:
        return (
            f"cannot {attempt.words}: the namespace is being deleted ({told}); name another with --namespace."
        )
    return (
        f"cannot {attempt.words}: it is forbidden ({told}); change what that names, or ask who runs the "
        "cluster."
    )


def _conflict(attempt: Attempt, told: str, status: dict[str, Any]) -> str:
    return f"cannot {attempt.words}: it was changed meanwhile ({told}); try again."


def _bad_request(attempt: Attempt, told: str, status: dict[str, Any]) -> str:
    return f"cannot {attempt.words}: the API server cannot read the request ({told}); mend what that names."


def _invalid(attempt: Attempt, told: str, status: dict[str, Any]) -> str:
    causes = (status.get("details") or {}).get("causes") or []
    lines = [
        f"  {cause.get('field') or 'object'}: {cause.get('message', '')}"
        for cause in causes
        if isinstance(cause, dict)
    ]
    shown = "\n".join(lines) or f"  {told}"
    return f"cannot {attempt.words}: the API server finds it invalid; mend these fields:\n{shown}"


def _not_served(attempt: Attempt) -> str:
    resource = attempt.resource
    return (
        f"{attempt.cluster} serves no {resource.kind} ({resource.full_name} of {resource.api_version}): its "
        "operator is not installed there, or in another version; have it installed, or choose another "
        "backend."
    )


def unreachable(error: Exception, attempt: Attempt) -> UnreachableError:
    """The error for a connection that does not come about, or breaks."""
    return UnreachableError(f"cannot {attempt.words}: {_unreachable(error)}")


def _unreachable(error: Exception) -> str:
    reason = reason_of(error)
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text or "doesn't match" in text:
        return (
            f"the certificate of the server is not trusted ({reason}); the kubeconfig "
            "needs the cluster's `certificate-authority-data`, and `server` the name that the "
            "certificate is for."
        )
    if isinstance(_root(error), ssl.SSLError):
        return (
            f"no TLS connection comes about ({reason}); look whether `server` of "
            "the kubeconfig has the right port, and https or http."
        )
    if isinstance(_root(error), socket.gaierror):
        return (
            f"the name of the server is not known ({reason}); look at `server` "
            "of the kubeconfig, and whether this machine is in the cluster's network (VPN)."
        )
    if "timed out" in text:
        return (
            "the server does not answer in time; look whether this machine is in the "
            "cluster's network (VPN), and whether the cluster is up."
        )
    return (
        f"there is no connection to the server ({reason}); look whether the cluster is "
        "up, at `server` of the kubeconfig, and at HTTPS_PROXY."
    )


def _root(error: BaseException) -> BaseException:
    """What an error of the connection goes back to."""
    seen: list[BaseException] = []
    while error not in seen:
        seen.append(error)
        inner = [
            error.__cause__,
            getattr(error, "reason", None),
            error.__context__,
            *error.args[1:],
            *error.args,
        ]
        error = next((each for each in inner if isinstance(each, BaseException)), error)
    return error


def reason_of(error: BaseException) -> str:
    """The last words of an error of the connection, without the objects that urllib3 puts before them."""
    root = _root(error)
    if isinstance(root, OSError) and root.strerror:
        return str(root.strerror)
    return str(root).rpartition(">: ")[2] or type(root).__name__


def is_before_sending(error: BaseException) -> bool:
    import urllib3

    return isinstance(error, urllib3.exceptions.ConnectTimeoutError | urllib3.exceptions.NewConnectionError)


def is_lasting(error: BaseException) -> bool:
    """Whether the next try would end as this one did."""
    return isinstance(_root(error), ssl.SSLError) and "EOF occurred" not in str(error)
