"""What objects of a job are known by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import metaloom
from metaloom.k8s.marks import JOB_LABEL, MANAGED, QUEUE_LABEL
from metaloom.k8s.request import JobRequest


def job_labels(name: str) -> dict[str, str]:
    """The labels that every object and every pod of a job has, and nothing else."""
    return {"app.kubernetes.io/name": "metaloom", **MANAGED, JOB_LABEL: name}


def metadata(request: JobRequest, name: str) -> dict[str, Any]:
    """Of an object beside the one that is the job."""
    return {
        "name": name,
        "namespace": request.namespace,
        "labels": {**request.labels, **job_labels(request.name)},
    }


def job_metadata(request: JobRequest, backend: str) -> dict[str, Any]:
    """Of the object that is the job: Kueue's queue, and what is asked of a job without its pods."""
    labels = {**request.labels, **job_labels(request.name)}
    if request.queue is not None:
        labels[QUEUE_LABEL] = request.queue
    return {
        "name": request.name,
        "namespace": request.namespace,
        "labels": labels,
        "annotations": {
            **request.annotations,
            "metaloom/recipe": request.recipe_name,
            "metaloom/backend": backend,
            "metaloom/nodes": str(request.nodes),
            "metaloom/gpus-per-node": str(request.gpus_per_node),
            "metaloom/ranks-per-node": str(request.num_ranks_per_node),
            "metaloom/run": request.run_folder,
            "metaloom/version": metaloom.__version__,
        },
    }


def owner_reference(owner: Mapping[str, Any]) -> dict[str, Any]:
    """By it the cluster deletes an object when it has deleted its owner.

    It does not hold up the deletion of the owner: a TrainingRuntime stays until the last TrainJob that names
    it is gone, and each would wait for the other.

    Args:
        owner: as the API server returned it, with its uid; in the same namespace.
    """
    return {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "controller": False,
        "blockOwnerDeletion": False,
    }
