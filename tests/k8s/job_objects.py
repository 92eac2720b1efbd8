"""Objects as an API server of version 1.34 and the operators write them, for tests of a job's status."""

from __future__ import annotations

import datetime
from typing import Any

Object = dict[str, Any]

NAME = "glyphs"
UID = "6f9b1c4e-0f0f-4a6e-9d43-0d8f6f4f0a11"
CREATED = "2026-03-02T12:00:00Z"
NOW = datetime.datetime(2026, 3, 2, 14, 0, tzinfo=datetime.UTC)
IMAGE = "registry.example/lab/metaloom:1.2"
API_VERSIONS = {
    "Job": "batch/v1",
    "JobSet": "jobset.x-k8s.io/v1alpha2",
    "PyTorchJob": "kubeflow.org/v1",
    "TrainJob": "trainer.kubeflow.org/v1alpha1",
}
CONTAINERS = {"Job": "metaloom", "JobSet": "metaloom", "PyTorchJob": "pytorch", "TrainJob": "node"}
LABELS = {
    "app.kubernetes.io/name": "metaloom",
    "app.kubernetes.io/managed-by": "metaloom",
    "metaloom/job": NAME,
}


def at(clock: str) -> str:
    """A moment of the day of the tests: 13:05 or 13:05:30."""
    return f"2026-03-02T{clock}{':00' if clock.count(':') == 1 else ''}Z"


def condition(
    kind: str, reason: str = "", message: str = "", since: str = "13:00", status: str = "True"
) -> Object:
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message,
        "lastProbeTime": at(since),
        "lastTransitionTime": at(since),
    }


def template(kind: str) -> Object:
    amounts = {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "8"}
    resources = {"limits": amounts, "requests": amounts}
    container = {"name": CONTAINERS[kind], "image": IMAGE, "resources": resources}
    return {
        "metadata": {"labels": dict(LABELS)},
        "spec": {"restartPolicy": "Never", "containers": [container]},
    }


def top(
    kind: str = "Job",
    *conditions: Object,
    nodes: int = 2,
    ranks: int = 8,
    gpus: int = 8,
    name: str = NAME,
    **status: Any,
) -> Object:
    """The object of a job, as its controller has it."""
    pods = template(kind)
    specs: dict[str, Object] = {
        "Job": {"completions": nodes, "parallelism": nodes, "completionMode": "Indexed", "template": pods},
        "JobSet": {
            "failurePolicy": {"maxRestarts": 10},
            "replicatedJobs": [
                {
                    "name": "node",
                    "replicas": 1,
                    "template": {"spec": {"parallelism": nodes, "template": pods}},
                }
            ],
        },
        "PyTorchJob": {
            "pytorchReplicaSpecs": {
                "Master": {"replicas": 1, "template": pods},
                "Worker": {"replicas": nodes - 1, "template": pods},
            },
            "runPolicy": {"suspend": False},
        },
        "TrainJob": {"trainer": {"numNodes": nodes}},
    }
    return {
        "apiVersion": API_VERSIONS[kind],
        "kind": kind,
        "metadata": {
            "name": name,
            "namespace": "lab",
            "uid": UID,
            "resourceVersion": "4711",
            "creationTimestamp": CREATED,
            "labels": LABELS | {"metaloom/job": name},
            "annotations": {
                "metaloom/recipe": "glyphs-maml",
                "metaloom/backend": kind.lower(),
                "metaloom/nodes": str(nodes),
                "metaloom/gpus-per-node": str(gpus),
                "metaloom/ranks-per-node": str(ranks),
                "metaloom/run": "/run/metaloom/glyphs",
            },
        },
        "spec": specs[kind],
        "status": {"conditions": list(conditions), "startTime": CREATED, **status},
    }


def pod(
    index: int,
    phase: str = "Running",
    *conditions: Object,
    kind: str = "Job",
    state: Object | None = None,
    last: Object | None = None,
    created: str = "12:00",
    machine: str | None = "gpu-a",
    suffix: str = "x7x2k",
    attempt: int = 0,
    ready: bool = True,
    deleted: str = "",
    init: list[Object] | None = None,
    restarts: int = 0,
    name: str = NAME,
    **status: Any,
) -> Object:
    """A pod, as the kubelet of version 1.34 reports it.

    Args:
        state: of its container; running since 12:01 by default.
        machine: None for one that is not scheduled.
        deleted: when its grace period ends.
    """
    labels = LABELS | {"metaloom/job": name}
    owner = {"apiVersion": API_VERSIONS[kind], "kind": kind, "name": name, "uid": UID, "controller": True}
    full = f"{name}-{index}-{suffix}"
    if kind == "PyTorchJob":
        role, replica = ("master", 0) if index == 0 else ("worker", index - 1)
        labels |= {
            "training.kubeflow.org/replica-type": role,
            "training.kubeflow.org/replica-index": str(replica),
        }
        full = f"{name}-{role}-{replica}"
    else:
        labels |= {"batch.kubernetes.io/job-completion-index": str(index)}
    if kind in ("JobSet", "TrainJob"):
        labels |= {"jobset.sigs.k8s.io/restart-attempt": str(attempt)}
        owner |= {
            "kind": "Job",
            "apiVersion": "batch/v1",
            "name": f"{name}-node-0",
            "uid": f"child-{attempt}",
        }
        full = f"{name}-node-0-{index}-{suffix}"
    state = {"running": {"startedAt": at("12:01")}} if state is None else state
    container: Object = {
        "name": CONTAINERS[kind],
        "image": IMAGE,
        "imageID": "",
        "ready": ready and "running" in state,
        "started": "running" in state,
        "restartCount": restarts,
        "state": state,
        "lastState": last or {},
    }
    built: Object = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": full,
            "namespace": "lab",
            "uid": f"{full}-uid",
            "creationTimestamp": at(created),
            "labels": labels,
            "ownerReferences": [owner],
        },
        "spec": template(kind)["spec"] | ({"nodeName": machine} if machine else {}),
        "status": {"phase": phase, "conditions": list(conditions), **status},
    }
    if machine:
        built["status"]["containerStatuses"] = [container]
    if init is not None:
        built["status"]["initContainerStatuses"] = init
    if deleted:
        built["metadata"] |= {"deletionTimestamp": at(deleted), "deletionGracePeriodSeconds": 60}
    return built


def waiting(reason: str, message: str = "") -> Object:
    return {"waiting": {"reason": reason} | ({"message": message} if message else {})}


def terminated(code: int, reason: str = "", finished: str = "13:00", message: str = "") -> Object:
    ended: Object = {
        "exitCode": code,
        "reason": reason or ("Completed" if code == 0 else "Error"),
        "startedAt": at("12:01"),
        "finishedAt": at(finished),
        "containerID": "containerd://0d5f",
    }
    return {"terminated": ended | ({"message": message} if message else {})}


def unscheduled(index: int, message: str, **more: Any) -> Object:
    return pod(
        index,
        "Pending",
        condition("PodScheduled", "Unschedulable", message, status="False"),
        machine=None,
        **more,
    )


def event(about: Object, reason: str, message: str, when: str = "13:00", *, warning: bool = True) -> Object:
    """An event as `v1` has it."""
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{about['metadata']['name']}.17", "namespace": "lab"},
        "involvedObject": {
            "kind": about["kind"],
            "name": about["metadata"]["name"],
            "namespace": "lab",
            "uid": about["metadata"]["uid"],
        },
        "reason": reason,
        "message": message,
        "type": "Warning" if warning else "Normal",
        "count": 3,
        "firstTimestamp": at("12:01"),
        "lastTimestamp": at(when),
        "eventTime": None,
        "reportingComponent": "job-controller",
    }


def new_event(about: Object, reason: str, note: str, when: str = "13:00") -> Object:
    """An event as `events.k8s.io/v1` has it."""
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": f"{about['metadata']['name']}.18", "namespace": "lab"},
        "regarding": {"kind": about["kind"], "name": about["metadata"]["name"], "namespace": "lab"},
        "reason": reason,
        "note": note,
        "type": "Warning",
        "eventTime": f"2026-03-02T{when}:00.123456Z",
        "series": {"count": 5, "lastObservedTime": f"2026-03-02T{when}:30.123456Z"},
        "deprecatedFirstTimestamp": None,
        "deprecatedLastTimestamp": None,
    }


def stamped(clock: str, text: str) -> str:
    """A line of a log with its time, as a kubelet writes it."""
    return f"2026-03-02T{clock}.123456789Z {text}"
