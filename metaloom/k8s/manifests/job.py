"""An Indexed Job: what every cluster has."""

from __future__ import annotations

from typing import Any

from metaloom.k8s.manifests.backend import PORT, Backend
from metaloom.k8s.manifests.failures import pod_failure_policy
from metaloom.k8s.manifests.identity import job_labels, job_metadata, metadata
from metaloom.k8s.manifests.pod import pod_template, recipe_config_map
from metaloom.k8s.request import JobRequest
from metaloom.k8s.resources import CONFIG_MAPS, JOBS, SERVICES


def build(request: JobRequest) -> list[dict[str, Any]]:
    """The recipe's ConfigMap, a headless Service and the Job.

    The Job alone is deleted after its time, or by whoever cancels it. The others go with it once they are
    given its `owner_reference`, with the uid that it has when it is created: the sender sees to that.

    A pod that fails is replaced, and the new one meets the others, which wait for it. The one that failed is
    to be gone first (podReplacementPolicy): the next one has its host name, its index and its volumes.
    """
    return [recipe_config_map(request), _service(request), _job(request)]


def first_host(request: JobRequest) -> str:
    """`<job>-0.<service>`: looked up in the pod's own namespace first, whatever the cluster's domain is.

    With the namespace and `svc` behind it, it is found by the same list of domains, only later in it.
    """
    return f"{request.name}-0.{request.name}"


def _service(request: JobRequest) -> dict[str, Any]:
    return {
        "apiVersion": SERVICES.api_version,
        "kind": SERVICES.kind,
        "metadata": metadata(request, request.name),
        "spec": {
            "clusterIP": "None",
            # Hosts meet before any of them is ready for anything.
            "publishNotReadyAddresses": True,
            "selector": job_labels(request.name),
            "ports": [{"name": "rendezvous", "port": PORT, "targetPort": PORT, "protocol": "TCP"}],
        },
    }


def _job(request: JobRequest) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "completionMode": "Indexed",
        "completions": request.nodes,
        "parallelism": request.nodes,
        # Counted for each index, and so is the time before the next try: one fault may take down all pods,
        # and a pod that was taken away shall not hold up others.
        "backoffLimitPerIndex": request.max_restarts,
        "maxFailedIndexes": 0,
        "podFailurePolicy": pod_failure_policy(BACKEND.container),
        "podReplacementPolicy": "Failed",
        "template": pod_template(request, BACKEND, restart_policy="Never", subdomain=request.name),
    }
    if request.ttl_s is not None:
        spec["ttlSecondsAfterFinished"] = request.ttl_s
    if request.active_deadline_s is not None:
        spec["activeDeadlineSeconds"] = request.active_deadline_s
    return {
        "apiVersion": JOBS.api_version,
        "kind": JOBS.kind,
        "metadata": job_metadata(request, BACKEND.name),
        "spec": spec,
    }


BACKEND = Backend(
    name="job",
    resource=JOBS,
    creates=(CONFIG_MAPS, SERVICES),
    container="metaloom",
    needs="Kubernetes 1.29 or newer",
    build=build,
    first_host=first_host,
    longest_suffix=lambda request: f"-{request.nodes - 1}",
)
