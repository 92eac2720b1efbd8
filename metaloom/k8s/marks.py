"""By what the objects of metaloom's jobs are known in a cluster: labels, containers, indices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

JOB_LABEL = "metaloom/job"
MANAGED = {"app.kubernetes.io/managed-by": "metaloom"}
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
# Of the pods of a plain Job and of a JobSet; the operators of Kubeflow look for the others.
CONTAINERS = ("metaloom", "pytorch", "node")
# Of the one group of pods of a JobSet, in the names of all of them.
GROUP = "node"
_COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"
_REPLICA_INDEX = "training.kubeflow.org/replica-index"
_REPLICA_TYPE = "training.kubeflow.org/replica-type"


def node_index(pod: Mapping[str, Any]) -> int | None:
    """The index of a pod in its job; None where its labels do not tell."""
    labels = (pod.get("metadata") or {}).get("labels") or {}
    for label in (_COMPLETION_INDEX, _REPLICA_INDEX):
        text = labels.get(label, "")
        if text.isdecimal():
            # The master is a kind of its own.
            return int(text) + (label == _REPLICA_INDEX and labels.get(_REPLICA_TYPE) == "worker")
    return None


def container_of(pod: Mapping[str, Any]) -> str:
    """The container of a pod in which metaloom runs."""
    names = [str(one.get("name")) for one in (pod.get("spec") or {}).get("containers") or []]
    return next((name for name in CONTAINERS if name in names), names[0] if names else CONTAINERS[0])
