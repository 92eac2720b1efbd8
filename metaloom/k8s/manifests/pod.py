"""The pods of a job, the same for all backends, and the recipe that they read.

They keep to the restricted level of pod security, unless RDMA is asked for.
"""

from __future__ import annotations

import math
from typing import Any

from metaloom.k8s.manifests.backend import PORT, Backend
from metaloom.k8s.manifests.command import host_command, literal
from metaloom.k8s.manifests.identity import job_labels, metadata
from metaloom.k8s.request import (
    RECIPE_FILE,
    RECIPE_FOLDER,
    SCRATCH,
    SHARED_MEMORY,
    JobRequest,
    Toleration,
    is_within,
)
from metaloom.k8s.resources import CONFIG_MAPS, PODS

INDEX_VARIABLE = "METALOOM_HOST_INDEX"
# An annotation since Indexed Jobs exist; the label of the same name came later.
COMPLETION_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
# What a pod needs beside the time that its ranks have to stop: the agent ends those that are stuck, and other
# hosts hear of it.
GRACE_S = 50


def recipe_config_map(request: JobRequest) -> dict[str, Any]:
    """The recipe, which no one can change under a running job."""
    return {
        "apiVersion": CONFIG_MAPS.api_version,
        "kind": CONFIG_MAPS.kind,
        "metadata": metadata(request, recipe_config_map_name(request)),
        "immutable": True,
        "data": {RECIPE_FILE: request.recipe},
    }


def recipe_config_map_name(request: JobRequest) -> str:
    return f"{request.name}-recipe"


def grace_period_s(request: JobRequest) -> int:
    """How long a pod that is asked to stop may take."""
    return math.ceil(request.stop_within_s) + GRACE_S


def pod_template(
    request: JobRequest, backend: Backend, *, restart_policy: str | None, subdomain: str | None = None
) -> dict[str, Any]:
    """The template of the pods.

    Args:
        restart_policy: Never where podFailurePolicy is to hear of failures: a container that starts again in
            its pod tells it nothing. None where another object has it.
        subdomain: the headless Service under which the pods are found, where the cluster does not make one.
    """
    spec: dict[str, Any] = {
        "terminationGracePeriodSeconds": grace_period_s(request),
        # Credentials of the cluster's API, variables for every Service of the namespace: no run needs them.
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": request.user_id,
            "runAsGroup": request.group_id,
            # So that claims can be written. One that is right already is not gone through file by file again.
            "fsGroup": request.group_id,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(request, backend)],
        "volumes": [volume for volume, _ in _volumes(request)],
    }
    optional = {
        "restartPolicy": restart_policy,
        "subdomain": subdomain,
        "serviceAccountName": request.service_account,
        "priorityClassName": request.priority_class,
        "imagePullSecrets": [{"name": name} for name in request.image_pull_secrets],
        "nodeSelector": dict(request.node_selector),
        "tolerations": [_toleration(each) for each in request.tolerations],
        "topologySpreadConstraints": _spread(request),
    }
    spec |= {key: value for key, value in optional.items() if value}
    return {"metadata": {"labels": {**request.labels, **job_labels(request.name)}}, "spec": spec}


def probe_pod(request: JobRequest, backend: Backend) -> dict[str, Any]:
    """A pod like those of the job, with which a server can be asked whether it takes them.

    Pods have no label of Kueue's queue, which so does not hold this one back. Rules against pods that nothing
    owns do not hit it.
    """
    template = pod_template(request, backend, restart_policy="Never")
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": request.name, "controller": True}
    # Of no object: nothing is looked up for a pod that is not made.
    owner["uid"] = "00000000-0000-0000-0000-000000000000"
    return {
        "apiVersion": PODS.api_version,
        "kind": PODS.kind,
        "metadata": {
            **template["metadata"],
            "generateName": f"{request.name}-0-",
            "namespace": request.namespace,
            "ownerReferences": [owner],
        },
        "spec": template["spec"],
    }


def _container(request: JobRequest, backend: Backend) -> dict[str, Any]:
    command = [literal(word) for word in host_command(request, backend)]
    if backend.index_variable is not None:
        command = ["env", f"{INDEX_VARIABLE}=$({backend.index_variable})", *command]
    container: dict[str, Any] = {
        "name": backend.container,
        "image": request.image,
        "command": command,
        "env": _environment(request, backend),
        "ports": [{"name": "rendezvous", "containerPort": PORT, "protocol": "TCP"}],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            # Memory that a network card reads and writes must not be moved.
            "capabilities": {"drop": ["ALL"]} | ({"add": ["IPC_LOCK"]} if request.rdma else {}),
        },
        # The last lines of the log are the reason of a failure: they end with the error.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [mount for _, mounts in _volumes(request) for mount in mounts],
    }
    if resources := _resources(request):
        container["resources"] = resources
    if request.image_pull_policy is not None:
        container["imagePullPolicy"] = request.image_pull_policy
    if request.env_from_secrets:
        container["envFrom"] = [{"secretRef": {"name": name}} for name in request.env_from_secrets]
    return container


def _environment(request: JobRequest, backend: Backend) -> list[dict[str, Any]]:
    # The user's number may have no name in the image, and torch names its caches after it; a home has to be
    # where files can be written.
    plain = {"HOME": SCRATCH, "USER": "metaloom"} | dict(request.env)
    environment: list[dict[str, Any]] = [
        {"name": name, "value": literal(value)} for name, value in plain.items()
    ]
    if backend.index_variable is None:
        source = {"fieldRef": {"apiVersion": "v1", "fieldPath": COMPLETION_INDEX}}
        environment.insert(0, {"name": INDEX_VARIABLE, "valueFrom": source})
    return environment


def _resources(request: JobRequest) -> dict[str, dict[str, str]]:
    """Requests and limits; equal but for processors, which nobody is kept from using while they are idle."""
    limits: dict[str, str] = {}
    if request.memory is not None:
        limits["memory"] = request.memory
    if request.ephemeral_storage is not None:
        limits["ephemeral-storage"] = request.ephemeral_storage
    if request.gpus_per_node:
        limits[request.gpu_resource] = str(request.gpus_per_node)
    if request.rdma is not None:
        limits[request.rdma[0]] = str(request.rdma[1])
    requests = ({} if request.cpus is None else {"cpu": request.cpus}) | limits
    return {name: amounts for name, amounts in (("requests", requests), ("limits", limits)) if amounts}


def _volumes(request: JobRequest) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each volume with its mounts."""
    volumes: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
        (
            {"name": "recipe", "configMap": {"name": recipe_config_map_name(request), "defaultMode": 0o444}},
            [{"name": "recipe", "mountPath": RECIPE_FOLDER, "readOnly": True}],
        ),
        (
            {
                "name": "shared-memory",
                "emptyDir": {"medium": "Memory", "sizeLimit": request.shared_memory_size},
            },
            [{"name": "shared-memory", "mountPath": SHARED_MEMORY}],
        ),
        ({"name": "scratch", "emptyDir": {}}, [{"name": "scratch", "mountPath": SCRATCH}]),
    ]
    if request.volume_of_run is None and not is_within(request.run_folder, SCRATCH):
        volumes.append(({"name": "run", "emptyDir": {}}, [{"name": "run", "mountPath": request.run_folder}]))
    for number, claim in enumerate(dict.fromkeys(volume.claim for volume in request.volumes)):
        name = f"claim-{number}"
        mounts = [
            {"name": name, "mountPath": volume.path} | ({"readOnly": True} if volume.is_read_only else {})
            for volume in request.volumes
            if volume.claim == claim
        ]
        volumes.append(({"name": name, "persistentVolumeClaim": {"claimName": claim}}, mounts))
    for number, files in enumerate(request.secret_files):
        name = f"secret-{number}"
        sources = [{"secret": {"name": files.secret}}]
        volumes.append(
            (
                # Read by the group alone, which the kubelet makes the one of the pod.
                {"name": name, "projected": {"sources": sources, "defaultMode": 0o440}},
                [{"name": name, "mountPath": files.path, "readOnly": True}],
            )
        )
    return volumes


def _toleration(toleration: Toleration) -> dict[str, str]:
    words = {"operator": "Exists"}
    if toleration.key:
        words = {"key": toleration.key, **words}
    if toleration.value is not None:
        words |= {"operator": "Equal", "value": toleration.value}
    return words | ({"effect": toleration.effect} if toleration.effect else {})


def _spread(request: JobRequest) -> list[dict[str, Any]]:
    if request.spread_over is None or request.nodes == 1:
        return []
    return [
        {
            "maxSkew": 1,
            "topologyKey": request.spread_over,
            # A wish: small jobs run on small clusters too.
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": job_labels(request.name)},
        }
    ]
