"""Makes the objects of a job in a cluster, and clears away those of one that has ended."""

from __future__ import annotations

import contextlib
import datetime
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from metaloom.errors import LaunchError
from metaloom.k8s.gathering import KINDS, Found, Gathering, NoSuchJobError
from metaloom.k8s.manifests import Backend, owner_reference
from metaloom.k8s.marks import JOB_LABEL
from metaloom.k8s.refusals import AlreadyExistsError, RefusedError
from metaloom.k8s.request import JobRequest
from metaloom.k8s.resources import CONFIG_MAPS, SERVICES, Resource
from metaloom.k8s.status import ENDED

if TYPE_CHECKING:
    from metaloom.k8s.client import Cluster

GONE_WITHIN_S = 180.0  # how long objects that are being deleted may take to be gone
POLL_S = 0.5
KNOWN_WITHIN_S = 30.0  # how long webhooks may take to know of an object that was just made


def send(cluster: Cluster, request: JobRequest, backend: Backend) -> None:
    """Makes the objects of a job. Names that become free are waited for.

    Raises:
        LaunchError: one of the objects is refused, or has a name that is taken; then none is made.
    """
    try:
        _make(cluster, request, backend)
    except AlreadyExistsError as error:
        _wait_for_names(cluster, request, backend, error)
        _make(cluster, request, backend)


def clear(cluster: Cluster, request: JobRequest, backend: Backend) -> None:
    """Deletes what is left in the cluster of a job that has ended: its run goes on under the same name.

    Raises:
        LaunchError: it has not ended, or does not go.
    """
    name = request.name
    gathering = Gathering(cluster)
    found: Found | None = None
    with contextlib.suppress(NoSuchJobError):
        found, status = gathering.status(name, datetime.datetime.now(datetime.UTC))
        is_deleted = found.top["metadata"].get("deletionTimestamp") is not None
        if status.state not in ENDED and not is_deleted:
            raise LaunchError(
                f"--resume: the job {name} has not ended ({status.headline}), and goes on by itself after "
                f"preemptions and faults. To begin anew from its last checkpoint: metaloom jobs cancel {name}"
            )
        cluster.delete(found.resource, name)
    if found is None:
        print(
            f"note: there is no job {name} in {cluster.shown}: its run goes on if its folder or "
            "checkpoint.url has it, and begins anew if not",
            file=sys.stderr,
        )
    labels = {JOB_LABEL: name}
    # Those that nothing owns, as of a job that kubectl has made.
    for resource in dict.fromkeys((SERVICES, CONFIG_MAPS, *backend.creates)):
        for obj in cluster.list(resource, labels=labels):
            cluster.delete(resource, obj["metadata"]["name"])
    if found is not None:
        _wait_until_gone(cluster, [(found.resource, name)])


def _make(cluster: Cluster, request: JobRequest, backend: Backend) -> None:
    """Makes the objects of a job, which the job owns: they go when it is deleted. All, or none.

    Raises:
        AlreadyExistsError: one of these names is taken.
        LaunchError: one is refused.
    """
    kinds = {resource.kind: resource for resource in (*backend.creates, backend.resource)}
    made: list[tuple[Resource, dict[str, Any]]] = []
    try:
        for obj in backend.build(request):
            resource = kinds[obj["kind"]]
            is_last = backend.is_named_last and resource == backend.resource
            made.append((resource, _made_when_known(cluster, resource, obj, KNOWN_WITHIN_S * is_last)))
        (job,) = [obj for resource, obj in made if resource == backend.resource]
        for resource, obj in made:
            if resource != backend.resource:
                change = {"metadata": {"ownerReferences": [owner_reference(job)]}}
                cluster.patch(resource, obj["metadata"]["name"], change)
    except BaseException:
        for resource, obj in reversed(made):
            with contextlib.suppress(LaunchError):
                cluster.delete(resource, obj["metadata"]["name"])
        raise


def _made_when_known(
    cluster: Cluster, resource: Resource, obj: dict[str, Any], within_s: float
) -> dict[str, Any]:
    """Makes an object; one that names another, as soon as the server knows of that.

    Args:
        within_s: how long that may take.
    """
    deadline = time.monotonic() + within_s
    while True:
        try:
            return cluster.create(resource, obj)
        except RefusedError as error:
            if "must be created before" not in error.told or time.monotonic() > deadline:
                raise
        time.sleep(POLL_S)


def _wait_for_names(
    cluster: Cluster, request: JobRequest, backend: Backend, taken: AlreadyExistsError
) -> None:
    """Waits for the names of a job's objects, where those that have them are being deleted.

    Raises:
        LaunchError: one of them stays.
    """
    kinds = {resource.kind: resource for resource in (*backend.creates, backend.resource)}
    named = [(kinds[obj["kind"]], str(obj["metadata"]["name"])) for obj in backend.build(request)]
    there = [(resource, name, cluster.get(resource, name)) for resource, name in named]
    if not all(obj is None or _is_going(cluster, obj) for _, _, obj in there):
        raise LaunchError(
            f"{taken} A job of this name has been submitted before: go on with its run by --resume, or "
            "choose another --name."
        ) from taken
    print(
        f"note: a job {request.name} is being deleted: waiting until its name is free (Ctrl-C ends this, and "
        "nothing is sent)",
        file=sys.stderr,
        flush=True,
    )
    _wait_until_gone(cluster, named)


def _is_going(cluster: Cluster, obj: Mapping[str, Any]) -> bool:
    """Whether an object is being deleted, or will be, since what owns it is."""
    if obj["metadata"].get("deletionTimestamp") is not None:
        return True
    owners = obj["metadata"].get("ownerReferences") or []
    kinds = {kind.kind: kind for kind in KINDS}
    for owner in owners:
        kind = kinds.get(owner["kind"])
        if kind is None:
            return False
        there = cluster.get(kind, owner["name"]) or {"metadata": {}}
        is_owner = there["metadata"].get("uid") == owner["uid"]
        if is_owner and there["metadata"].get("deletionTimestamp") is None:
            return False
    return bool(owners)


def _wait_until_gone(cluster: Cluster, named: Sequence[tuple[Resource, str]]) -> None:
    """Returns when objects that are being deleted are gone.

    Raises:
        LaunchError: one is not, after a while.
    """
    deadline = time.monotonic() + GONE_WITHIN_S
    for resource, name in named:
        while cluster.get(resource, name) is not None:
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"{resource.kind} {name}, which is being deleted, is still there after "
                    f"{GONE_WITHIN_S:g} s. See what holds it: kubectl get {resource.full_name} {name} -n "
                    f"{cluster.namespace} -o yaml"
                )
            time.sleep(POLL_S)
