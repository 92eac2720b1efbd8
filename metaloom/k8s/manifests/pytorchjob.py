"""A PyTorchJob of Kubeflow's training operator (v1)."""

from __future__ import annotations

from typing import Any

from metaloom.k8s.manifests.backend import Backend
from metaloom.k8s.manifests.identity import job_metadata
from metaloom.k8s.manifests.pod import pod_template, recipe_config_map
from metaloom.k8s.request import JobRequest
from metaloom.k8s.resources import CONFIG_MAPS, PYTORCH_JOBS


def build(request: JobRequest) -> list[dict[str, Any]]:
    """The recipe's ConfigMap and the PyTorchJob: host 0 is its master, host i its worker i - 1.

    The operator knows no podFailurePolicy. Its ExitCode tells failures by their codes, but takes 75, a pod
    that saved and ended because it was asked to, for a failure of the job, which so would end at the first
    preemption. With OnFailure pods that are taken away are replaced, and whatever else fails starts again
    in its pod. So does a mistake, until the restarts of all containers together reach `backoffLimit`: one
    fault may take down all of them. The operator fails a job when so many are reached, not when they are
    passed.
    """
    policy: dict[str, Any] = {
        # What has ended stays to be looked at; what still runs when the job has ended does not.
        "cleanPodPolicy": "Running",
        "backoffLimit": request.max_restarts * request.nodes + 1,
    }
    if request.ttl_s is not None:
        policy["ttlSecondsAfterFinished"] = request.ttl_s
    if request.active_deadline_s is not None:
        policy["activeDeadlineSeconds"] = request.active_deadline_s
    replicas = {"Master": _replica(request, 1)}
    if request.nodes > 1:
        replicas["Worker"] = _replica(request, request.nodes - 1)
    job = {
        "apiVersion": PYTORCH_JOBS.api_version,
        "kind": PYTORCH_JOBS.kind,
        "metadata": job_metadata(request, BACKEND.name),
        "spec": {"runPolicy": policy, "pytorchReplicaSpecs": replicas},
    }
    return [recipe_config_map(request), job]


def _replica(request: JobRequest, number: int) -> dict[str, Any]:
    return {
        "replicas": number,
        "restartPolicy": "OnFailure",
        "template": pod_template(request, BACKEND, restart_policy=None),
    }


def _longest_suffix(request: JobRequest) -> str:
    return "-master-0" if request.nodes == 1 else f"-worker-{request.nodes - 2}"


def _adds(request: JobRequest) -> str:
    if request.nodes == 1:
        return ""
    return (
        "the training operator puts an init container into all pods but the first, which by default does not "
        "keep to that level (its --pytorch-init-container-template-file names one that does)"
    )


BACKEND = Backend(
    name="pytorchjob",
    resource=PYTORCH_JOBS,
    creates=(CONFIG_MAPS,),
    # The operator looks for this name.
    container="pytorch",
    needs="Kubeflow's training operator (kubeflow.org/v1), with an init container that the namespace allows",
    oldest=None,
    build=build,
    first_host=lambda request: f"{request.name}-master-0",
    longest_suffix=_longest_suffix,
    # The operator's labels count masters and workers apart; its RANK is the number of the pod among all.
    index_variable="RANK",
    adds=_adds,
)
