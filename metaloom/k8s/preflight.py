"""What can be seen to be wrong before a job is sent: in the cluster, and in what its pods would not find."""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from metaloom.credentials import without_credentials
from metaloom.k8s.finding import Finding, note
from metaloom.k8s.manifests import Backend, problems
from metaloom.k8s.pod_checks import ask_for_a_pod, read_quotas, read_rules, unasked, what_is_added
from metaloom.k8s.quantities import parse_quantity
from metaloom.k8s.refusals import AlreadyExistsError, RefusedError
from metaloom.k8s.request import JobRequest, Volume, is_within
from metaloom.k8s.resources import (
    CLAIMS,
    EVENTS,
    LOCAL_QUEUES,
    NAMESPACES,
    NODES,
    PODS,
    SECRETS,
    SERVICE_ACCOUNTS,
    Resource,
)

if TYPE_CHECKING:
    from metaloom.k8s.client import Cluster
    from metaloom.recipe import Recipe

TRACKING_VARIABLE = "MLFLOW_TRACKING_URI"


# ---------------------------------------------------------------- what the pods would not find


def check_places(request: JobRequest, recipe: Recipe) -> list[Finding]:
    """Whether checkpoints, data and records are where pods find them, and where they outlive a pod."""
    return [*_checkpoints(request, recipe), *_data(request, recipe), *_records(request, recipe)]


def _checkpoints(request: JobRequest, recipe: Recipe) -> Iterator[Finding]:
    url = recipe.checkpoint.url
    if url is None:
        if request.volume_of_run is None:
            yield Finding(
                f"checkpoint.url is not set, and {request.run_folder} (--run) is on a pod's own disk: "
                "checkpoints would be lost with the pod. Give checkpoint.url=s3://BUCKET/... or mount a "
                f"claim there: --volume CLAIM:{_parent(request.run_folder)}"
            )
        return
    path = _path_of(url)
    if path is None:
        return
    volume = _volume_of(path, request)
    shown = without_credentials(url)
    if not path.startswith("/"):
        yield Finding(
            f"checkpoint.url is {shown}, a path that depends on where a pod starts; begin it with '/'"
        )
    elif volume is None:
        yield Finding(
            f"checkpoint.url is {shown}, on a pod's own disk: checkpoints would be lost with the pod. Name "
            f"an object store (s3://...), or mount a claim there: --volume CLAIM:{_parent(path)}"
        )
    elif volume.is_read_only:
        yield Finding(f"checkpoint.url is {shown}, on the claim {volume.claim}, mounted to read only")


def _data(request: JobRequest, recipe: Recipe) -> Iterator[Finding]:
    from metaloom.recipe.tasks import data_urls  # commands that look at no recipe are quick

    for key, url in data_urls(recipe).items():
        path = _path_of(url)
        if path is None:
            continue
        shown = without_credentials(url)
        if not path.startswith("/"):
            yield Finding(
                f"{key} is {shown}, a path that depends on where a pod starts. Give "
                f"{key}=s3://BUCKET/..., or "
                "a path on a claim that --volume mounts"
            )
        elif _volume_of(path, request) is None:
            yield note(f"{key} is {shown}, on no claim: the image has to hold it")


def _records(request: JobRequest, recipe: Recipe) -> Iterator[Finding]:
    from metaloom.recipe import MLflowTracking

    tracking = recipe.tracking
    if not isinstance(tracking, MLflowTracking):
        return
    is_named = tracking.uri is not None or TRACKING_VARIABLE in request.env or request.env_from_secrets
    if not is_named and request.volume_of_run is None:
        yield note(
            "no MLflow server is named, so the tracking store lies in the run's folder, on a pod's own disk, "
            f"and goes with it: give tracking.uri=http://... or --env {TRACKING_VARIABLE}=http://..."
        )


def _path_of(url: str) -> str | None:
    """The path that a URL names in the pods; None for one of an object store or a server."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    return urllib.parse.unquote(rest) if scheme in ("file", "local") else None


def _volume_of(path: str, request: JobRequest) -> Volume | None:
    holding = [volume for volume in request.volumes if is_within(path, volume.path)]
    return max(holding, key=lambda volume: len(volume.path), default=None)


def _parent(path: str) -> str:
    parent = path.rstrip("/").rpartition("/")[0]
    return parent or path


# ---------------------------------------------------------------- what the cluster lacks


def check_cluster(
    cluster: Cluster, request: JobRequest, backend: Backend, *, is_right: bool = True
) -> list[Finding]:
    """Whether the cluster has, and allows, what the job asks of it. What this user may not look at is noted.

    Args:
        is_right: whether the request is right as far as can be seen without the cluster: else the server is
            not asked for what it would refuse of the objects.

    Raises:
        LaunchError: the cluster does not answer, or knows nobody of these credentials.
    """
    missing = _namespace(cluster)
    if missing is not None:
        return [missing]
    parts: tuple[Callable[[Cluster, JobRequest, Backend], Iterator[Finding]], ...] = (
        _version,
        _permissions,
        _queue,
        _secrets,
        _claims,
        _service_account,
        _machines,
    )
    found = [finding for part in parts for finding in part(cluster, request, backend)]
    found += read_quotas(cluster, request)
    found += what_is_added(cluster, request, backend)
    may_ask = cluster.may("create", PODS)
    if not may_ask:
        found += read_rules(cluster, request, backend)
    if is_right and not any(finding.is_problem for finding in found):
        found += _admission(cluster, request, backend)
        found += ask_for_a_pod(cluster, request, backend) if may_ask else []
    return found


def _namespace(cluster: Cluster) -> Finding | None:
    if not cluster.may("get", NAMESPACES) or cluster.get(NAMESPACES, cluster.namespace) is not None:
        return None
    return Finding(
        f"there is no namespace {cluster.namespace!r} in {cluster.place}: name another "
        f"with --namespace, or make it: kubectl create namespace {cluster.namespace}"
    )


def _version(cluster: Cluster, request: JobRequest, backend: Backend) -> Iterator[Finding]:
    version = None if backend.oldest is None else cluster.version()
    if backend.oldest is not None and version is not None and version.number < backend.oldest:
        needed = ".".join(map(str, backend.oldest))
        yield Finding(
            f"Kubernetes is {version.text} in {cluster.place}, and --backend {backend.name} takes {needed} "
            "or newer: pods that fail would not be replaced as they have to be. Have it upgraded, or name "
            "another cluster with --context"
        )


def _permissions(cluster: Cluster, request: JobRequest, backend: Backend) -> Iterator[Finding]:
    """Those to send a job, which are needed, and those to look at it."""
    needed = [(verb, owned) for owned in backend.creates for verb in ("create", "patch", "delete")]
    needed += [(verb, backend.resource) for verb in ("create", "get", "delete")]
    denied = [_permission(verb, resource) for verb, resource in needed if not cluster.may(verb, resource)]
    if denied:
        yield Finding(
            f"you may not {', '.join(denied)} in namespace {cluster.namespace}: ask whoever runs the cluster "
            "for a role that may (deploy/kubernetes/users.yaml holds one), or name another --namespace"
        )
    looks = [("get", PODS, "log"), ("list", PODS, ""), ("watch", PODS, ""), ("list", EVENTS, "")]
    blind = [
        _permission(verb, resource, part)
        for verb, resource, part in looks
        if not cluster.may(verb, resource, subresource=part)
    ]
    if blind:
        yield note(f"you may not {', '.join(blind)}: metaloom jobs will tell less of this job")


def _permission(verb: str, resource: Resource, part: str = "") -> str:
    return f"{verb} {resource.full_name}" + (f"/{part}" if part else "")


def _queue(cluster: Cluster, request: JobRequest, backend: Backend) -> Iterator[Finding]:
    if request.queue is None:
        return
    queues = cluster.as_served(LOCAL_QUEUES)
    if queues is None:
        yield Finding(
            f"--queue {request.queue}: this cluster has no queues of Kueue ({LOCAL_QUEUES.full_name}), so "
            "the label would do nothing: leave it out"
        )
        return
    yield from _named(cluster, queues, "--queue", [request.queue])


def _secrets(cluster: Cluster, request: JobRequest, backend: Backend) -> Iterator[Finding]:
    yield from _named(cluster, SECRETS, "--image-pull-secret", request.image_pull_secrets)
    yield from _named(cluster, SECRETS, "--env-from-secret", request.env_from_secrets)
    yield from _named(cluster, SECRETS, "--secret-files", [files.secret for files in request.secret_files])


def _service_account(cluster: Cluster, request: JobRequest, backend: Backend) -> Iterator[Finding]:
    if request.service_account is not None:
        yield from _named(cluster, SERVICE_ACCOUNTS, "--service-account", [request.service_account])


def _claims(cluster: Cluster, request: JobRequest, backend: Backend) -> Iterator[Finding]:
    if not request.volumes or not (yield from _may_read(cluster, CLAIMS, "--volume")):
        return
    for claim in dict.fromkeys(volume.claim for volume in request.volumes):
        found = cluster.get(CLAIMS, claim)
        if found is None:
            yield Finding(_absent(cluster, CLAIMS, "--volume", claim))
            continue
        modes = (found.get("spec") or {}).get("accessModes") or []
        is_written = any(v.claim == claim and not v.is_read_only for v in request.volumes)
        shared = ("ReadWriteMany",) if is_written else ("ReadWriteMany", "ReadOnlyMany")
        if request.nodes > 1 and not set(shared) & set(modes):
            text = (
                f"--volume {claim}: the claim can be mounted as {', '.join(modes) or 'nothing'}, and "
                f"{request.nodes} pods on several machines need {' or '.join(shared)}"
            )
            # Of one machine, ReadWriteOnce admits any number of pods.
            yield Finding(text, is_problem="ReadWriteOnce" not in modes or not _has_one_machine(cluster))
        if (found.get("status") or {}).get("phase") == "Lost":
            yield Finding(f"--volume {claim}: the claim has lost its volume (phase Lost)")


def _has_one_machine(cluster: Cluster) -> bool:
    return cluster.may("list", NODES) and len(cluster.list(NODES)) == 1


def _named(cluster: Cluster, resource: Resource, option: str, names: Sequence[str]) -> Iterator[Finding]:
    if not names or not (yield from _may_read(cluster, resource, option)):
        return
    for name in dict.fromkeys(names):
        if cluster.get(resource, name) is None:
            yield Finding(_absent(cluster, resource, option, name))


def _may_read(cluster: Cluster, resource: Resource, option: str) -> Generator[Finding, None, bool]:
    """Whether these objects may be looked at: what the generator returns."""
    allowed = cluster.may("get", resource)
    if not allowed:
        yield note(f"{option}: not looked for, since you may not get {resource.full_name}")
    return allowed


def _absent(cluster: Cluster, resource: Resource, option: str, name: str) -> str:
    return (
        f"{option} {name}: there is no such {resource.kind} in namespace {cluster.namespace} (kubectl get "
        f"{resource.full_name} -n {cluster.namespace})"
    )


def _machines(cluster: Cluster, request: JobRequest, backend: Backend) -> Iterator[Finding]:
    """Machines with the labels and as many GPUs as a pod asks for, whether free or not."""
    if not (request.gpus_per_node or request.node_selector):
        return
    if not cluster.may("list", NODES):
        return  # as most users: the scheduler will tell
    nodes = cluster.list(NODES)
    chosen = [node for node in nodes if _has_labels(node, request.node_selector)]
    if not chosen and request.node_selector:
        wanted = ", ".join(f"{key}={value}" for key, value in request.node_selector.items())
        yield note(
            f"--node-selector: none of the cluster's {len(nodes)} nodes has the labels {wanted}: unless "
            "machines are added on demand, the job waits for ever"
        )
    counts = {node["metadata"]["name"]: _allocatable(node, request.gpu_resource) for node in chosen}
    most = max(counts, key=lambda name: counts[name], default="")
    if not counts or not request.gpus_per_node:
        return
    if counts[most] == 0:
        yield note(
            f"no node of the cluster has {request.gpu_resource} now: unless machines are added on demand, "
            "the job waits for ever (--gpu-resource names what the cluster calls its GPUs)"
        )
        return
    if counts[most] < request.gpus_per_node:
        among = " with the labels of --node-selector" if request.node_selector else ""
        yield Finding(
            f"--gpus-per-node {request.gpus_per_node}: no node{among} has so many {request.gpu_resource}; "
            f"the most are {counts[most]}, of {most}. Ask for fewer on more nodes (--nodes)"
        )
        return
    fitting = sum(count >= request.gpus_per_node for count in counts.values())
    if fitting * (counts[most] // request.gpus_per_node) < request.nodes:
        yield note(
            f"{request.nodes} pods of {request.gpus_per_node} {request.gpu_resource} are more than the "
            f"cluster's {fitting} fitting nodes can hold at once: the job waits until it has more"
        )


def _has_labels(node: Mapping[str, Any], wanted: Mapping[str, str]) -> bool:
    labels = node["metadata"].get("labels") or {}
    return all(labels.get(key) == value for key, value in wanted.items())


def _allocatable(node: Mapping[str, Any], resource: str) -> int:
    amounts = (node.get("status") or {}).get("allocatable") or {}
    return int(parse_quantity(str(amounts.get(resource, "0"))))


def _admission(cluster: Cluster, request: JobRequest, backend: Backend) -> Iterator[Finding]:
    """What the server itself refuses of the objects, which it makes none of."""
    kinds = {resource.kind: resource for resource in (*backend.creates, backend.resource)}
    for obj in backend.build(request):
        if backend.is_named_last and obj["kind"] == backend.resource.kind:
            continue  # what it names is not there
        try:
            cluster.create(kinds[obj["kind"]], obj, dry_run=True)
        except AlreadyExistsError:
            continue  # of the job that is being replaced
        except RefusedError as error:
            if error.unknown_fields:
                old = _outdated(cluster, backend, obj["kind"], error.unknown_fields)
                yield Finding(f"{old}. Have that installed, or choose another --backend")
            else:
                yield unasked(f"the {obj['kind']}", error) or Finding(str(error))


def outdated(cluster: Cluster, request: JobRequest, backend: Backend) -> str:
    """What in a job's object the cluster does not know, in words; "" for nothing, or where it cannot say.

    The server itself is asked, which looks at fields first: users may not read the schemas of its kinds.
    """
    if problems(request, backend):
        return ""
    kind = backend.resource.kind
    (job,) = [obj for obj in backend.build(request) if obj["kind"] == kind]
    try:
        cluster.create(backend.resource, job, dry_run=True)
    except RefusedError as error:
        if error.unknown_fields:
            return _outdated(cluster, backend, kind, error.unknown_fields)
    return ""


def _outdated(cluster: Cluster, backend: Backend, kind: str, fields: Sequence[str]) -> str:
    known = f"{cluster.place} knows no {', '.join(fields)} of a {kind}"
    return f"{known}: --backend {backend.name} takes {backend.needs}"
