"""What the object of a job says of it: a Job, a JobSet, a PyTorchJob or a TrainJob."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping
from typing import Any, Literal

from metaloom.k8s.marks import QUEUE_LABEL
from metaloom.k8s.wording import time_of

BACKENDS = {"Job": "job", "JobSet": "jobset", "PyTorchJob": "pytorchjob", "TrainJob": "trainjob"}
_DONE = ("Complete", "Completed", "Succeeded")
_FAILED = ("Failed",)


@dataclasses.dataclass(frozen=True)
class Condition:
    """A condition of an object that is true."""

    kind: str
    reason: str
    message: str
    since: datetime.datetime | None


@dataclasses.dataclass(frozen=True)
class Top:
    """What the object of a job says.

    Attributes:
        kind: of the object.
        nodes: pods that work at once.
        gpus_per_node: whatever the cluster calls them; 0 where it is not said.
        created, started, ended: moments.
        is_deleted: whether it was deleted and waits for what it owns to end.
        outcome: how it ended, with the condition that says so.
        verdict: the same, decided while pods still end.
        is_suspended: whether it is kept from having pods.
        queue: of Kueue.
        num_restarts: of the whole job, as the object counts them.
        max_restarts: how many it may take; None where the object does not say.
        num_failed: pods that have failed, also those that are gone, as the object counts them.
        deadline_s: how long it may take; None for any time.
        is_seen: whether its controller has written a status.
    """

    kind: str
    name: str
    uid: str
    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    created: datetime.datetime | None
    started: datetime.datetime | None
    ended: datetime.datetime | None
    is_deleted: bool
    outcome: tuple[Literal["done", "failed"], Condition] | None
    verdict: tuple[Literal["done", "failed"], Condition] | None
    is_suspended: bool
    queue: str
    num_restarts: int
    max_restarts: int | None
    num_failed: int
    deadline_s: int | None
    is_seen: bool


def read_top(top: Mapping[str, Any]) -> Top:
    """What the object of a job says; every field of it may be absent."""
    meta, spec, status = (top.get(key) or {} for key in ("metadata", "spec", "status"))
    kind = top.get("kind") or "Job"
    true = true_conditions(top)
    outcome = _outcome(true)
    policy = spec.get("runPolicy") or {}
    run_spec = policy if kind == "PyTorchJob" else spec
    failure_policy = spec.get("failurePolicy") or {}
    uncounted = status.get("uncountedTerminatedPods") or {}
    ended = time_of(status.get("completionTime")) or (outcome[1].since if outcome is not None else None)
    annotations = meta.get("annotations") or {}
    return Top(
        kind=kind,
        name=meta.get("name") or "",
        uid=meta.get("uid") or "",
        nodes=_number(annotations.get("metaloom/nodes")) or _num_nodes(kind, spec),
        ranks_per_node=_number(annotations.get("metaloom/ranks-per-node")) or 1,
        gpus_per_node=_number(annotations.get("metaloom/gpus-per-node")) or 0,
        created=time_of(meta.get("creationTimestamp")),
        started=time_of(status.get("startTime")) or time_of(meta.get("creationTimestamp")),
        ended=ended,
        is_deleted=meta.get("deletionTimestamp") is not None,
        outcome=outcome,
        verdict=_verdict(true),
        is_suspended=run_spec.get("suspend") is True or any(one.kind == "Suspended" for one in true),
        queue=(meta.get("labels") or {}).get(QUEUE_LABEL) or "",
        num_restarts=_number(status.get("restarts")) or 0,
        max_restarts=_number(failure_policy.get("maxRestarts")),
        num_failed=(_number(status.get("failed")) or 0) + len(uncounted.get("failed") or []),
        deadline_s=_number(run_spec.get("activeDeadlineSeconds")),
        is_seen=any(status.values()),
    )


def true_conditions(obj: Mapping[str, Any]) -> list[Condition]:
    """The conditions of an object that are true."""
    found = (obj.get("status") or {}).get("conditions") or []
    return [
        Condition(
            one.get("type") or "",
            one.get("reason") or "",
            (one.get("message") or "").strip(),
            time_of(one.get("lastTransitionTime")),
        )
        for one in found
        if one.get("status") == "True"
    ]


def _outcome(true: list[Condition]) -> tuple[Literal["done", "failed"], Condition] | None:
    for one in true:
        if one.kind in _FAILED:
            return "failed", one
        if one.kind in _DONE:
            return "done", one
    return None


def _verdict(true: list[Condition]) -> tuple[Literal["done", "failed"], Condition] | None:
    for one in true:
        if one.kind == "FailureTarget":
            return "failed", one
        if one.kind == "SuccessCriteriaMet":
            return "done", one
    return None


def _num_nodes(kind: str, spec: Mapping[str, Any]) -> int:
    """Pods that work at once, where no annotation says it."""
    if kind == "PyTorchJob":
        replicas = (spec.get("pytorchReplicaSpecs") or {}).values()
        return sum(_number(one.get("replicas")) or 1 for one in replicas) or 1
    if kind == "TrainJob":
        return _number((spec.get("trainer") or {}).get("numNodes")) or 1
    if kind == "JobSet":
        return sum(map(_num_replicated, spec.get("replicatedJobs") or [])) or 1
    return _number(spec.get("completions")) or _number(spec.get("parallelism")) or 1


def _num_replicated(job: Mapping[str, Any]) -> int:
    within = (job.get("template") or {}).get("spec") or {}
    return (_number(job.get("replicas")) or 1) * (_number(within.get("parallelism")) or 1)


def _number(value: object) -> int | None:
    """A whole number, also where it is written as text, as in annotations and quantities."""
    if isinstance(value, int):
        return value
    return int(value) if isinstance(value, str) and value.isdecimal() else None
