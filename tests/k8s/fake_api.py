"""A stateful fake of a Kubernetes API server on 127.0.0.1, for the unmodified official client.

    with FakeCluster(tmp_path) as cluster:                  # core, batch, authorization; namespace "team"
        environ["KUBECONFIG"] = str(cluster.kubeconfig)     # context "fake", user "dev"
        ... Cluster.connect(), `metaloom submit`, kubectl ...
        pods = cluster.pods("glyphs")                       # of that Job; the controller made them
        pods.run()                                          # all containers start; pods.run(1): that one's
        pods.log(0, "[rank 0] meta-train: 10 of 50 steps")  # its output; it is followed as it is written
        pods.out_of_memory(1)                               # or .fail(1, code=3), .preempt(1), .succeed(),
                                                            # .image_error(), .unschedulable(), .delete(1)
        assert cluster.conditions(JOBS, "glyphs") == ["FailureTarget", "Failed"]

After each of these the Job's controller does what the Job says: replacements, podFailurePolicy,
backoffLimit with the deletion of the siblings, FailureTarget before Failed, SuccessCriteriaMet before
Complete. `cluster.exceed_deadline(JOB)` ends a Job as its activeDeadlineSeconds would. There are no
operators: `FakeCluster(tmp_path, kinds=[JOB_SETS])` serves their kinds, a test adds their pods with `add`
and writes their status with `set_status`. A Job with the label of a Kueue queue is suspended where
LOCAL_QUEUES are served, until `cluster.admit(JOB)`.

Faults: `refuse(429, times=2, retry_after_s=1)`, `refuse(503, body="<html>...")`, `reset()`,
`close_streams()` (watches and followed logs break off), `expire_versions()` (410 Gone), `forbid("create",
"jobs")`, `cluster.token = "another"` (401), `cluster.add(QUOTAS, ...)`, also LIMIT_RANGES, and
`enforce("restricted")` (pod security); `cluster.log_chunk_bytes` and `cluster.log_delay_s` make logs slow.
`cluster.version` is what /version says, and
`cluster.lacking[KIND]` are paths of fields that the server does not know, as those of an older operator.
`cluster.requests` are all requests: (method, path, query).
"""

from __future__ import annotations

import base64
import contextlib
import copy
import dataclasses
import datetime
import io
import json
import socket
import ssl
import struct
import threading
import time
import urllib.parse
from collections.abc import Callable, Collection, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from metaloom.k8s import resources
from metaloom.k8s.resources import (
    ACCESS_REVIEWS,
    JOBS,
    LOCAL_QUEUES,
    NAMESPACES,
    PODS,
    TRAIN_JOBS,
    TRAINING_RUNTIMES,
    Resource,
)
from tests.k8s.fake_admission import ENFORCE, admit_pod
from tests.k8s.fake_jobs import JobController, Kubelet, Pods, delete_pod, end_log, set_condition
from tests.k8s.fake_rules import check, check_update
from tests.k8s.fake_schema import Fields, check_fields, read_object
from tests.k8s.fake_store import Object, Refusal, Selection, Store, not_found, now

BUILT_IN = (
    resources.PODS,
    resources.SERVICES,
    resources.CONFIG_MAPS,
    resources.EVENTS,
    resources.SECRETS,
    resources.CLAIMS,
    resources.QUOTAS,
    resources.NAMESPACES,
    resources.NODES,
    resources.LIMIT_RANGES,
    resources.PRIORITY_CLASSES,
    resources.JOBS,
    resources.ACCESS_REVIEWS,
)
CLUSTER_WIDE = ""
QUEUE = "kueue.x-k8s.io/queue-name"
S = TypeVar("S", bound="FakeCluster")


@dataclasses.dataclass
class Fault:
    """What becomes of the next requests that it fits: an answer of that status, or a reset (status 0).

    Attributes:
        is_done: whether what the request asks for is done before the reset.
    """

    status: int
    times: int
    method: str
    path: str
    retry_after_s: int | None
    body: str | None
    is_done: bool = False

    def fits(self, method: str, path: str) -> bool:
        return self.times > 0 and self.method in ("", method) and self.path in path


class FakeCluster:
    """The server, from `with` to its end, and all that a test may do to it.

    Args:
        folder: for the kubeconfig.
        namespace: of the kubeconfig's context; it exists.
        kinds: that operators would have brought.
        tls: with the certificate of a server that speaks TLS; the kubeconfig has no authority for it.
        starts_pods: whether each pod of a Job runs at once; else it waits for `pods(JOB).run()`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        namespace: str = "team",
        kinds: Sequence[Resource] = (),
        starts_pods: bool = False,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.store = Store()
        self.kubelet = Kubelet(self.store)
        self.controller = JobController(self.store, self.kubelet, starts_pods=starts_pods)
        self.namespace = namespace
        self.kinds = (*BUILT_IN, *kinds)
        self.version = {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
        self.lacking: dict[str, Collection[str]] = {}
        self.token = "planted-token-which-no-message-may-show"
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.headers: list[dict[str, str]] = []
        self.log_chunk_bytes = 0
        self.log_delay_s = 0.0
        self.gone_as_status = False
        self.is_ending = False
        self.stream_age = 0
        self.num_pages_left: int | None = None
        self.pages: dict[str, tuple[list[Object], int]] = {}
        self._faults: list[Fault] = []
        self._forbidden: list[tuple[str, str, str]] = []
        self._granted: list[tuple[Object, bool]] | None = None
        self._known_runtimes: set[str] = set()
        self._server = _Server(self)
        self._scheme = "http" if tls is None else "https"
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        for name in ("default", "kube-system", namespace):
            self.store.create(NAMESPACES, CLUSTER_WIDE, {"metadata": {"name": name}})
        self.kubeconfig = folder / "kubeconfig"
        self.kubeconfig.write_text(json.dumps(self.config(), indent=2))

    def __enter__(self: S) -> S:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.store.changed:
            self.is_ending = True
            self.store.changed.notify_all()
        self._server.shutdown()
        self._thread.join()
        self._server.hang_up()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._server.server_address[1]}"

    def config(self) -> Object:
        """A kubeconfig with one context, to be changed and written."""
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fake",
            "clusters": [{"name": "fake", "cluster": {"server": self.url}}],
            "users": [{"name": "dev", "user": {"token": self.token}}],
            "contexts": [
                {"name": "fake", "context": {"cluster": "fake", "user": "dev", "namespace": self.namespace}}
            ],
        }

    # What a test sees and does.

    def pods(self, job: str) -> Pods:
        """The pods of a job, to be run, failed and so on."""
        return Pods(self.store, self.kubelet, self.controller, self.namespace, job)

    def get(self, resource: Resource, name: str) -> Object:
        """An object of the namespace."""
        return self.store.get(resource, self._within(resource), name)

    def objects(self, resource: Resource) -> list[Object]:
        """All objects of a kind in the namespace."""
        return self.store.list(resource, self._within(resource), Selection())

    def add(self, resource: Resource, obj: Object) -> Object:
        """Makes an object past permissions and rules; a pod waits unless it brings a status."""
        namespace = obj["metadata"].get("namespace", self._within(resource))
        if resource == PODS and "status" not in obj:
            return self.controller.add_pod(namespace, obj)
        return self.store.create(resource, namespace, obj)

    def edit(self, resource: Resource, name: str, edit: Callable[[Object], object]) -> Object:
        """Changes an object past the rules."""
        made = self.store.edit(resource, self._within(resource), name, edit)
        self._after(resource, self._within(resource), name)
        return made

    def set_status(self, resource: Resource, name: str, status: Object) -> Object:
        """Writes the whole status of an object, as an operator would."""
        return self.edit(resource, name, lambda obj: obj.update(status=copy.deepcopy(status)))

    def set_condition(self, resource: Resource, name: str, condition: Object) -> Object:
        """Puts one condition into the status of an object."""
        return self.edit(resource, name, lambda obj: set_condition(obj.setdefault("status", {}), condition))

    def delete(self, resource: Resource, name: str) -> None:
        """Deletes an object past permissions."""
        self.store.delete(resource, self._within(resource), name)

    def conditions(self, resource: Resource, name: str) -> list[str]:
        """The types of the conditions that are true, in the order in which they came."""
        conditions = self.get(resource, name).get("status", {}).get("conditions", [])
        return [each["type"] for each in conditions if each["status"] == "True"]

    def event(self, about: Object, kind: str, reason: str, message: str, *, count: int = 1) -> Object:
        """Writes an Event about an object."""
        return self.controller.event(about, kind, reason, message, count=count)

    def admit(self, job: str) -> None:
        """The queue lets a suspended Job run."""
        self.edit(JOBS, job, lambda obj: obj["spec"].update(suspend=False))

    def exceed_deadline(self, job: str) -> None:
        """The Job has run for longer than its activeDeadlineSeconds."""
        message = "Job was active longer than specified deadline"
        self.controller.fail(self.namespace, job, "DeadlineExceeded", message)

    def wait(self, holds: Callable[[], object], timeout_s: float = 60) -> None:
        """Waits until a condition holds that reads objects or `requests`.

        Raises:
            AssertionError: it does not come true.
        """
        deadline = time.monotonic() + timeout_s
        while not holds():
            if time.monotonic() > deadline:
                raise AssertionError(f"did not come true within {timeout_s} s")
            with self.store.changed:
                self.store.changed.wait(0.02)

    def wait_for(self, resource: Resource, name: str) -> None:
        """Waits until an object is there."""
        self.wait(lambda: self.store.find(resource, self._within(resource), name))

    # Faults.

    def refuse(
        self,
        status: int,
        *,
        times: int = 1,
        method: str = "",
        path: str = "",
        retry_after_s: int | None = None,
        body: str | None = None,
    ) -> None:
        """The next requests are refused.

        Args:
            method: of those requests; "": any.
            path: what their path holds.
            retry_after_s: for a header of that name.
            body: an answer that is no JSON, as of a proxy; None: a Status.
        """
        self._faults.append(Fault(status, times, method, path, retry_after_s, body))

    def reset(self, *, times: int = 1, method: str = "", path: str = "", is_done: bool = False) -> None:
        """The connections of the next requests are reset without an answer.

        Args:
            is_done: what they ask for is done before.
        """
        self._faults.append(Fault(0, times, method, path, None, None, is_done))

    def forbid(self, verb: str, plural: str, namespace: str = "") -> None:
        """The user may not do that (any more); "*" is any verb or kind, `pods/log` a subresource."""
        self._forbidden.append((verb, plural, namespace))

    def grant(self, roles: Sequence[Object]) -> None:
        """The user may do what these roles allow, and nothing else: a Role in the namespace, a ClusterRole
        where it is asked for."""
        self._granted = [
            (rule, role["kind"] == "Role")
            for role in roles
            if role["kind"] in ("Role", "ClusterRole")
            for rule in role["rules"]
        ]

    def enforce(self, level: str) -> None:
        """The namespace admits no pods but those of a level of pod security."""
        self.edit(NAMESPACES, self.namespace, lambda obj: obj["metadata"].update(labels={ENFORCE: level}))

    def close_streams(self) -> None:
        """All watches and followed logs break off, in the middle of what they say."""
        with self.store.changed:
            self.stream_age += 1
            self.store.changed.notify_all()

    def expire_pages_after(self, num_pages: int) -> None:
        """The next list's pages are gone once so many of them were read."""
        self.num_pages_left = num_pages

    def expire_versions(self) -> None:
        """Watches and lists cannot go on from any version that was told until now."""
        with self.store.changed:
            self.store.version += 1
            self.store.oldest = self.store.version
            self.pages.clear()

    # What the server asks.

    def fault(self, method: str, path: str) -> Fault | None:
        """The fault of a request, which is used up."""
        with self.store.changed:
            for fault in self._faults:
                if fault.fits(method, path):
                    fault.times -= 1
                    return fault
        return None

    def is_allowed(self, verb: str, plural: str, namespace: str) -> bool:
        """Whether the user may do that."""
        if self._granted is not None and plural != ACCESS_REVIEWS.plural:
            return any(
                verb in rule["verbs"]
                and plural in rule["resources"]
                and (not is_within or namespace == self.namespace)
                for rule, is_within in self._granted
            )
        return not any(
            each[0] in ("*", verb) and each[1] in ("*", plural) and each[2] in ("", namespace)
            for each in self._forbidden
        )

    def admit_object(self, resource: Resource, obj: Object) -> None:
        """What admission changes in a new object."""
        labels = obj["metadata"].get("labels") or {}
        has_queues = LOCAL_QUEUES.full_name in {kind.full_name for kind in self.kinds}
        if resource == JOBS and QUEUE in labels and has_queues:
            obj["spec"]["suspend"] = True
        if resource == TRAIN_JOBS:
            self._check_runtime(obj["spec"]["runtimeRef"]["name"])

    def _check_runtime(self, name: str) -> None:
        """The webhook of Kubeflow Trainer, which hears of a runtime a moment after it was made."""
        is_known = name in self._known_runtimes
        if self.store.find(TRAINING_RUNTIMES, self.namespace, name) is not None:
            self._known_runtimes.add(name)
        if not is_known:
            raise Refusal(
                403,
                "Forbidden",
                'admission webhook "validator.trainjob.trainer.kubeflow.org" denied the request: '
                f'spec.runtimeRef: Invalid value: "{name}": trainingruntimes.trainer.kubeflow.org "{name}" '
                "not found: specified trainingRuntime must be created before the TrainJob is created",
            )

    def created(self, resource: Resource, namespace: str, name: str) -> None:
        """Something was made or changed by a request."""
        self._after(resource, namespace, name)

    def _after(self, resource: Resource, namespace: str, name: str) -> None:
        if resource == JOBS:
            self.controller.sync(namespace, name)

    def _within(self, resource: Resource) -> str:
        return self.namespace if resource.is_namespaced else CLUSTER_WIDE


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True
    request_queue_size = 64

    def __init__(self, cluster: FakeCluster) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.cluster = cluster
        self.connections: set[socket.socket] = set()

    def hang_up(self) -> None:
        """Ends the connections that are kept for more requests, so that their threads end."""
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is no news."""


@dataclasses.dataclass(frozen=True)
class Target:
    """What a path names."""

    resource: Resource
    namespace: str | None
    name: str
    subresource: str


class Handler(BaseHTTPRequestHandler):
    """Answers one connection's requests."""

    protocol_version = "HTTP/1.1"

    server: _Server

    @property
    def cluster(self) -> FakeCluster:
        return self.server.cluster

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, *args: object) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_PATCH(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.cluster.requests.append((self.command, url.path, query))
        self.cluster.headers.append(dict(self.headers.items()))
        fault = self.cluster.fault(self.command, url.path)
        try:
            if fault is not None and fault.is_done:
                whole, self.wfile = self.wfile, io.BytesIO()
                try:
                    self._route(url.path, query, body)
                finally:
                    self.wfile = whole
            if fault is not None:
                self._fail(fault)
                return
            kind, _, token = self.headers.get("Authorization", "").partition(" ")
            if (kind.lower(), token) != ("bearer", self.cluster.token):
                raise Refusal(401, "Unauthorized", "Unauthorized")
            self._route(url.path, query, body)
        except Refusal as refusal:
            self._send(refusal.code, refusal.status, retry_after_s=refusal.retry_after_s)
        except _NoSuchPath:
            self._send_text(404, "404 page not found\n")

    def _fail(self, fault: Fault) -> None:
        if not fault.status:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        elif fault.body is not None:
            self._send_text(fault.status, fault.body, retry_after_s=fault.retry_after_s)
        else:
            words = {429: "TooManyRequests", 503: "ServiceUnavailable", 504: "Timeout", 410: "Expired"}
            reason = words.get(fault.status, "InternalError")
            refusal = Refusal(fault.status, reason, "the server is told to refuse this")
            self._send(fault.status, refusal.status, retry_after_s=fault.retry_after_s)

    def _send(self, status: int, obj: Object, *, retry_after_s: int | None = None) -> None:
        self._send_bytes(status, json.dumps(obj).encode(), "application/json", retry_after_s)

    def _send_text(self, status: int, text: str, *, retry_after_s: int | None = None) -> None:
        kind = "text/html" if text.startswith("<") else "text/plain; charset=utf-8"
        self._send_bytes(status, text.encode(), kind, retry_after_s)

    def _send_bytes(self, status: int, content: bytes, kind: str, retry_after_s: int | None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if retry_after_s is not None:
            self.send_header("Retry-After", str(retry_after_s))
        self.end_headers()
        self.wfile.write(content)

    def _route(self, path: str, query: dict[str, str], body: bytes) -> None:
        parts = [urllib.parse.unquote(part) for part in path.strip("/").split("/")]
        if (found := self._discovery(parts)) is not None:
            self._send(200, found)
            return
        target = self._target(parts)
        self._authorize(target, query)
        if target.subresource:
            self._subresource(target, query, body)
            return
        obj = read_object(body) if self.command != "GET" and body else Fields()
        lacking = self.cluster.lacking.get(target.resource.kind, ())
        if self.command in ("POST", "PUT", "PATCH"):
            mode = query.get("fieldValidation", "Warn")
            check_fields(target.resource, obj, mode, self.command, lacking=lacking)
        if target.resource == resources.ACCESS_REVIEWS:
            self._review(obj)
        elif self.command == "POST":
            self._create(target, query, obj)
        elif self.command == "DELETE":
            self._delete(target, query)
        elif self.command in ("PUT", "PATCH"):
            self._update(target, query, obj)
        elif target.name:
            self._send(200, self.cluster.store.get(target.resource, target.namespace or "", target.name))
        elif _is_on(query, "watch"):
            self._watch(target, query)
        else:
            self._list(target, query)

    def _discovery(self, parts: list[str]) -> Object | None:
        kinds = self.cluster.kinds
        if parts == ["version"]:
            return self.cluster.version
        if parts == ["api"]:
            return {"kind": "APIVersions", "versions": ["v1"]}
        groups: dict[str, list[str]] = {}
        for kind in kinds:
            if kind.group and kind.version not in groups.setdefault(kind.group, []):
                groups[kind.group].append(kind.version)
        if parts == ["apis"]:
            told = [_group(group, versions) for group, versions in groups.items()]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": told}
        if parts[0] == "apis" and len(parts) == 2 and parts[1] in groups:
            return {"kind": "APIGroup", "apiVersion": "v1"} | _group(parts[1], groups[parts[1]])
        version = "/".join(parts[1:])
        if parts[0] not in ("api", "apis") or version not in {kind.api_version for kind in kinds}:
            return None
        listed = [
            {"name": kind.plural, "kind": kind.kind, "namespaced": kind.is_namespaced, "verbs": ["get"]}
            for kind in kinds
            if kind.api_version == version
        ]
        return {"kind": "APIResourceList", "groupVersion": version, "resources": listed}

    def _target(self, parts: list[str]) -> Target:
        start = {"api": 2, "apis": 3}.get(parts[0], len(parts))
        version, rest = "/".join(parts[1:start]), parts[start:]
        namespace: str | None = None
        if rest[:1] == ["namespaces"] and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        for kind in self.cluster.kinds:
            if kind.api_version == version and rest[:1] == [kind.plural]:
                if not kind.is_namespaced:
                    namespace = CLUSTER_WIDE
                name, subresource = (*rest[1:], "", "")[:2]
                return Target(kind, namespace, name, subresource)
        raise _NoSuchPath

    def _authorize(self, target: Target, query: dict[str, str]) -> None:
        verb = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}.get(self.command)
        if verb is None:
            verb = "get" if target.name else "watch" if _is_on(query, "watch") else "list"
        resource, namespace = target.resource, target.namespace or ""
        if resource == NAMESPACES:
            namespace = target.name or ""  # each is one that lies in itself
        plural = resource.plural + (f"/{target.subresource}" if target.subresource else "")
        if self.cluster.is_allowed(verb, plural, namespace):
            return
        named = f' "{target.name}"' if target.name else ""
        where = f'in the namespace "{namespace}"' if namespace else "at the cluster scope"
        raise Refusal(
            403,
            "Forbidden",
            f'{resource.full_name}{named} is forbidden: User "dev" cannot {verb} resource "{plural}" in API '
            f'group "{resource.group}" {where}',
            details={"name": target.name, "group": resource.group, "kind": resource.plural},
        )

    def _review(self, review: Object) -> None:
        wanted = review["spec"]["resourceAttributes"]
        plural = wanted["resource"] + (f"/{wanted['subresource']}" if wanted.get("subresource") else "")
        allowed = self.cluster.is_allowed(wanted["verb"], plural, wanted.get("namespace", ""))
        self._send(201, review | {"status": {"allowed": allowed}})

    def _create(self, target: Target, query: dict[str, str], obj: Object) -> None:
        resource, namespace, store = target.resource, target.namespace or "", self.cluster.store
        metadata = obj.setdefault("metadata", {})
        with store.changed:
            if resource.is_namespaced and store.find(NAMESPACES, CLUSTER_WIDE, namespace) is None:
                raise not_found(NAMESPACES, namespace)
            if metadata.get("namespace", namespace) != namespace:
                raise Refusal(
                    400,
                    "BadRequest",
                    "the namespace of the provided object does not match the namespace sent on the request",
                )
            if "name" not in metadata and "generateName" in metadata:
                metadata["name"] = metadata["generateName"] + store.letters()
            if not metadata.get("name"):
                raise Refusal(422, "Invalid", "name or generateName is required")
            if store.find(resource, namespace, metadata["name"]) is not None:
                raise Refusal(
                    409,
                    "AlreadyExists",
                    f'{resource.full_name} "{metadata["name"]}" already exists',
                    details={"name": metadata["name"], "group": resource.group, "kind": resource.plural},
                )
            check(resource, obj)
            self.cluster.admit_object(resource, obj)
            if resource == PODS:
                obj = admit_pod(store, namespace, obj)
            if query.get("dryRun") == "All":
                self._send(201, obj | {"metadata": metadata | {"namespace": namespace, "uid": "dry-run"}})
                return
            if resource == PODS:
                made = self.cluster.controller.add_pod(namespace, obj)
            else:
                made = store.create(resource, namespace, obj)
            self.cluster.created(resource, namespace, metadata["name"])
        self._send(201, made)

    def _update(self, target: Target, query: dict[str, str], obj: Object) -> None:
        resource, namespace, store = target.resource, target.namespace or "", self.cluster.store
        with store.changed:
            old = store.get(resource, namespace, target.name)
            new = merged(old, obj) if self.command == "PATCH" else obj
            check_update(resource, old, new)
            for key in ("uid", "creationTimestamp", "resourceVersion"):
                new["metadata"][key] = old["metadata"][key]
            new["status"] = old.get("status", {})

            def put(kept: Object) -> None:
                kept.clear()
                kept.update(new)

            if query.get("dryRun") != "All":
                store.edit(resource, namespace, target.name, put)
                self.cluster.created(resource, namespace, target.name)
                new = store.get(resource, namespace, target.name)
        self._send(200, new)

    def _delete(self, target: Target, query: dict[str, str]) -> None:
        resource, namespace, store = target.resource, target.namespace or "", self.cluster.store
        with store.changed:
            obj = store.get(resource, namespace, target.name)
            if query.get("dryRun") != "All":
                owned = [
                    pod
                    for pod in store.list(PODS, namespace, Selection())
                    if pod["metadata"]["uid"] == obj["metadata"]["uid"]
                    or any(
                        owner["uid"] == obj["metadata"]["uid"]
                        for owner in pod["metadata"].get("ownerReferences", [])
                    )
                ]
                for pod in owned:
                    end_log(self.cluster.kubelet, pod)
                if resource == PODS:
                    delete_pod(store, self.cluster.kubelet, obj)
                    for owner in obj["metadata"].get("ownerReferences", []):
                        self.cluster.controller.sync(namespace, owner["name"])
                else:
                    store.delete(resource, namespace, target.name)
        self._send(200, obj | {"metadata": obj["metadata"] | {"deletionTimestamp": now()}})

    def _list(self, target: Target, query: dict[str, str]) -> None:
        store, pages = self.cluster.store, self.cluster.pages
        selection = Selection(query.get("labelSelector", ""), query.get("fieldSelector", ""))
        with store.changed:
            if token := query.get("continue"):
                if token not in pages:
                    raise Refusal(
                        410,
                        "Expired",
                        "The provided continue parameter is too old to display a consistent list result. You "
                        "can start a new list without the continue parameter.",
                    )
                items, version = pages.pop(token)
            else:
                items, version = store.list(target.resource, target.namespace, selection), store.version
            metadata: Object = {"resourceVersion": str(version)}
            limit = int(query.get("limit") or 0)
            if limit and len(items) > limit:
                token = base64.urlsafe_b64encode(f"{version}/{store.letters()}".encode()).decode()
                pages[token] = (items[limit:], version)
                if self.cluster.num_pages_left is not None:
                    self.cluster.num_pages_left -= 1
                    if not self.cluster.num_pages_left:
                        self.cluster.num_pages_left = None
                        pages.clear()
                metadata |= {"continue": token, "remainingItemCount": len(items) - limit}
                items = items[:limit]
        # Objects in a list bear neither apiVersion nor kind.
        bare = [{key: item[key] for key in item if key not in ("apiVersion", "kind")} for item in items]
        kind, api_version = target.resource.kind, target.resource.api_version
        self._send(
            200, {"kind": f"{kind}List", "apiVersion": api_version, "metadata": metadata, "items": bare}
        )

    def _watch(self, target: Target, query: dict[str, str]) -> None:
        store = self.cluster.store
        selection = Selection(query.get("labelSelector", ""), query.get("fieldSelector", ""))
        with store.changed:
            version, there = int(query.get("resourceVersion") or 0), []
            if not version:
                # Without a version, it begins with what is there.
                there, version = store.list(target.resource, target.namespace, selection), store.version
            gone = Refusal(410, "Expired", f"too old resource version: {version} ({store.oldest})")
            if version < store.oldest and self.cluster.gone_as_status:
                raise gone
        self._begin_chunks("application/json")
        for obj in there:
            self._chunk(_line("ADDED", obj))
        if version < store.oldest:
            self._chunk(_line("ERROR", gone.status))
            self._end_chunks()
            return
        deadline = time.monotonic() + float(query.get("timeoutSeconds") or 1800)
        age = self.cluster.stream_age
        while True:
            with store.changed:
                left = deadline - time.monotonic()
                if store.version == version and self._goes_on(age) and left > 0:
                    store.changed.wait(left)
                changes, version = store.since(version), store.version
            if not self._goes_on(age):
                self._cut(b'{"type": "MODIF')
                return
            for change in changes:
                if change.resource == target.resource and target.namespace in (None, change.namespace):
                    self._tell(change, selection)
            if time.monotonic() >= deadline:
                break
        if _is_on(query, "allowWatchBookmarks"):
            kind, api_version = target.resource.kind, target.resource.api_version
            metadata = {"resourceVersion": str(version), "creationTimestamp": None}
            self._chunk(_line("BOOKMARK", {"kind": kind, "apiVersion": api_version, "metadata": metadata}))
        self._end_chunks()

    def _tell(self, change: Any, selection: Selection) -> None:
        was, is_ = selection.holds(change.old), selection.holds(change.new)
        if is_:
            self._chunk(_line("MODIFIED" if was else "ADDED", change.new))
        elif was:
            # An object that is selected no longer is told as deleted, with the version of the change.
            version = {"resourceVersion": str(change.version)}
            obj = change.new or change.old
            self._chunk(_line("DELETED", obj | {"metadata": obj["metadata"] | version}))

    def _subresource(self, target: Target, query: dict[str, str], body: bytes) -> None:
        if target.subresource == "log" and target.resource == PODS and self.command == "GET":
            self._log(target, query)
        elif target.subresource == "status" and self.command in ("PUT", "PATCH"):
            status = read_object(body).get("status", {})
            made = self.cluster.store.edit(
                target.resource, target.namespace or "", target.name, lambda obj: obj.update(status=status)
            )
            self._send(200, made)
        else:
            raise _NoSuchPath

    def _log(self, target: Target, query: dict[str, str]) -> None:
        store, kubelet = self.cluster.store, self.cluster.kubelet
        with store.changed:
            pod = store.get(PODS, target.namespace or "", target.name)
            names = [container["name"] for container in pod["spec"]["containers"]]
            container = query.get("container", names[0])
            if container not in names:
                message = f"container {container} is not valid for pod {target.name}"
                raise Refusal(400, "BadRequest", message)
            logs = list(kubelet.logs(pod))
            if _is_on(query, "previous"):
                logs = logs[:-1]
                if not logs:
                    raise Refusal(
                        400,
                        "BadRequest",
                        f'previous terminated container "{container}" in pod "{target.name}" not found',
                    )
            if not logs:
                waiting = (pod["status"].get("containerStatuses") or [{"state": {}}])[0]["state"]
                reason = waiting.get("waiting", {}).get("reason", "ContainerCreating")
                words = (
                    "is waiting to start"
                    if reason == "ContainerCreating"
                    else "is waiting to start: trying and failing to pull image"
                )
                text = f'container "{container}" in pod "{target.name}" {words}: {reason}'
                raise Refusal(400, "BadRequest", text)
            log = logs[-1]
            lines = _since(log.lines, query)
            if "tailLines" in query:
                lines = lines[max(len(lines) - int(query["tailLines"]), 0) :]
            # What is told next begins after the lines that are there now, however many were left out.
            last = log.lines[-1] if log.lines else None
        self._begin_chunks("text/plain")
        follows = _is_on(query, "follow")
        age = self.cluster.stream_age
        while True:
            for at_ns, text in lines:
                if not self._write_log(
                    (stamp(at_ns) + " " if _is_on(query, "timestamps") else "") + text, age
                ):
                    return
            with store.changed:
                if not follows or (log.has_ended and (not log.lines or log.lines[-1] is last)):
                    break
                while (not log.lines or log.lines[-1] is last) and not log.has_ended and self._goes_on(age):
                    store.changed.wait(10)
                if not self._goes_on(age):
                    self._cut(b"half a li")
                    return
                position = next((i + 1 for i, line in enumerate(log.lines) if line is last), 0)
                lines = log.lines[position:]
                last = log.lines[-1] if log.lines else last
        self._end_chunks()

    def _write_log(self, line: str, age: int) -> bool:
        """Whether all of the line was sent: False where the stream was told to break off."""
        content = (line + "\n").encode("utf-8", "surrogateescape")
        size = self.cluster.log_chunk_bytes or len(content)
        for start in range(0, len(content), size):
            if self.cluster.log_delay_s:
                with self.cluster.store.changed:
                    self.cluster.store.changed.wait_for(
                        lambda: not self._goes_on(age), self.cluster.log_delay_s
                    )
            if not self._goes_on(age):
                self._cut(b"")
                return False
            self._chunk(content[start : start + size])
        return True

    def _goes_on(self, age: int) -> bool:
        return not self.cluster.is_ending and age == self.cluster.stream_age

    def _begin_chunks(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, content: bytes) -> None:
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
        self.wfile.flush()

    def _end_chunks(self) -> None:
        self.wfile.write(b"0\r\n\r\n")

    def _cut(self, content: bytes) -> None:
        """The connection ends inside a chunk."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.write(b"ffff\r\n" + content)


def _group(name: str, versions: Sequence[str]) -> Object:
    """A group of kinds, which prefers the newest of its versions."""
    told = [{"groupVersion": f"{name}/{version}", "version": version} for version in versions]
    return {"name": name, "versions": told, "preferredVersion": max(told, key=lambda one: one["version"])}


class _NoSuchPath(Exception):
    """The server has nothing there."""


def _is_on(query: dict[str, str], key: str) -> bool:
    return query.get(key, "").lower() in ("1", "true")


def _line(kind: str, obj: Object | None) -> bytes:
    return json.dumps({"type": kind, "object": obj}).encode() + b"\n"


def _since(lines: list[tuple[int, str]], query: dict[str, str]) -> list[tuple[int, str]]:
    if "sinceTime" not in query:
        return list(lines)
    since = datetime.datetime.fromisoformat(query["sinceTime"].replace("Z", "+00:00"))
    # The real server passes whole seconds on.
    return [line for line in lines if line[0] >= int(since.timestamp()) * 10**9]


def stamp(at_ns: int) -> str:
    """A time as before each line of a log."""
    whole = datetime.datetime.fromtimestamp(at_ns // 10**9, datetime.UTC)
    return f"{whole:%Y-%m-%dT%H:%M:%S}.{at_ns % 10**9:09d}Z"


def merged(obj: Any, patch: Any) -> Any:
    """The object after a JSON merge patch (RFC 7386)."""
    if not isinstance(patch, dict) or not isinstance(obj, dict):
        return copy.deepcopy(patch)
    result = copy.deepcopy(obj)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key, {}), value)
    return result
