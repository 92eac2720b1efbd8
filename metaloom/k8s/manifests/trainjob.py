"""A TrainJob of Kubeflow Trainer (v2)."""

from __future__ import annotations

from typing import Any

from metaloom.k8s.manifests.backend import Backend
from metaloom.k8s.manifests.identity import job_metadata, metadata
from metaloom.k8s.manifests.jobset import first_host, job_set_spec, longest_suffix
from metaloom.k8s.manifests.pod import recipe_config_map
from metaloom.k8s.request import DEFAULT_TTL_S, JobRequest
from metaloom.k8s.resources import CONFIG_MAPS, TRAIN_JOBS, TRAINING_RUNTIMES

# By it the operator knows which of a runtime's Jobs trains.
_TRAINER = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}


def build(request: JobRequest) -> list[dict[str, Any]]:
    """The recipe's ConfigMap, a TrainingRuntime of its own, and the TrainJob that names it.

    What a TrainJob may change of a shared runtime, as torch-distributed is, has had three names since 2.0
    (podSpecOverrides, podTemplateOverrides, runtimePatches), and in none of them could it say which exit
    codes are mistakes. A runtime in the job's namespace says everything, in every version: it is the JobSet
    that is made. It names no framework, so that no variables for torchrun are put into the pods.
    """
    runtime = {
        "apiVersion": TRAINING_RUNTIMES.api_version,
        "kind": TRAINING_RUNTIMES.kind,
        "metadata": metadata(request, request.name),
        "spec": {
            "mlPolicy": {"numNodes": request.nodes},
            "template": {
                "metadata": {"labels": metadata(request, request.name)["labels"]},
                "spec": job_set_spec(request, BACKEND, job_labels_besides=_TRAINER),
            },
        },
    }
    job = {
        "apiVersion": TRAIN_JOBS.api_version,
        "kind": TRAIN_JOBS.kind,
        "metadata": job_metadata(request, BACKEND.name),
        "spec": {
            "runtimeRef": {
                "apiGroup": TRAINING_RUNTIMES.group,
                "kind": TRAINING_RUNTIMES.kind,
                "name": request.name,
            },
            "trainer": {"numNodes": request.nodes},
        },
    }
    return [recipe_config_map(request), runtime, job]


def _refusals(request: JobRequest) -> list[str]:
    """It stays until someone deletes it; a time that was asked for would have no effect."""
    if request.ttl_s in (None, DEFAULT_TTL_S):
        return []
    return [
        f"--ttl is {request.ttl_s}; a TrainJob stays until it is deleted (metaloom jobs cancel): leave out "
        "--ttl, or choose another --backend"
    ]


BACKEND = Backend(
    name="trainjob",
    resource=TRAIN_JOBS,
    creates=(CONFIG_MAPS, TRAINING_RUNTIMES),
    # The operator looks for this name.
    container="node",
    needs="Kubeflow Trainer 2 (trainer.kubeflow.org/v1alpha1), and the right to create TrainingRuntimes",
    build=build,
    first_host=first_host,
    longest_suffix=longest_suffix,
    refusals=_refusals,
    is_named_last=True,
)
