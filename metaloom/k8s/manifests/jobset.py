"""A JobSet of one Indexed Job: its failures restart all pods together."""

from __future__ import annotations

from typing import Any

from metaloom.k8s.manifests.backend import Backend
from metaloom.k8s.manifests.failures import pod_failure_policy
from metaloom.k8s.manifests.identity import job_labels, job_metadata
from metaloom.k8s.manifests.pod import pod_template, recipe_config_map
from metaloom.k8s.marks import GROUP
from metaloom.k8s.request import JobRequest
from metaloom.k8s.resources import CONFIG_MAPS, JOB_SETS


def build(request: JobRequest) -> list[dict[str, Any]]:
    """The recipe's ConfigMap and the JobSet, which makes its own Service."""
    spec = job_set_spec(request, BACKEND)
    if request.ttl_s is not None:
        spec["ttlSecondsAfterFinished"] = request.ttl_s
    job_set = {
        "apiVersion": JOB_SETS.api_version,
        "kind": JOB_SETS.kind,
        "metadata": job_metadata(request, BACKEND.name),
        "spec": spec,
    }
    return [recipe_config_map(request), job_set]


def job_set_spec(
    request: JobRequest, backend: Backend, *, job_labels_besides: dict[str, str] | None = None
) -> dict[str, Any]:
    """What the JobSet does.

    A pod that was taken away, or that saved and ended because it was asked to, is replaced alone: its Job
    does not count it, and the others wait for it. Any other failure fails the Job at once (its backoffLimit
    is 0), and all its pods start again together. A mistake, and the end of the time that was granted, fail
    the JobSet.

    Args:
        job_labels_besides: further labels of the Job.
    """
    job: dict[str, Any] = {
        "completionMode": "Indexed",
        "completions": request.nodes,
        "parallelism": request.nodes,
        "backoffLimit": 0,
        "podFailurePolicy": pod_failure_policy(backend.container),
        "podReplacementPolicy": "Failed",
        "template": pod_template(request, backend, restart_policy="Never"),
    }
    if request.active_deadline_s is not None:
        job["activeDeadlineSeconds"] = request.active_deadline_s
    labels = {**request.labels, **job_labels(request.name), **(job_labels_besides or {})}
    final = {
        "name": "final",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy", "DeadlineExceeded"],
    }
    return {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": {"maxRestarts": request.max_restarts, "rules": [final]},
        "replicatedJobs": [
            {"name": GROUP, "replicas": 1, "template": {"metadata": {"labels": labels}, "spec": job}}
        ],
    }


def first_host(request: JobRequest) -> str:
    """`<jobset>-<group>-<job>-<pod>.<jobset>`, in the pod's own namespace."""
    return f"{request.name}-{GROUP}-0-0.{request.name}"


def longest_suffix(request: JobRequest) -> str:
    """With the five letters that a pod's name ends with: JobSet wants them to fit too."""
    return f"-{GROUP}-0-{request.nodes - 1}-xxxxx"


BACKEND = Backend(
    name="jobset",
    resource=JOB_SETS,
    creates=(CONFIG_MAPS,),
    container="metaloom",
    needs="JobSet (jobset.x-k8s.io/v1alpha2), 0.6 or newer",
    build=build,
    first_host=first_host,
    longest_suffix=longest_suffix,
)
