"""Manifests against the schemas of Kubernetes, JobSet and Kubeflow Trainer, and rules that no schema has."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import kubernetes_validate
import pytest
from kubernetes_validate import utils

from metaloom.k8s.manifests import BACKENDS
from tests.k8s.job_requests import CASES, all_templates, replicated_jobs_of
from tests.k8s.manifest_rules import job_faults, pod_faults, restricted_faults

VERSIONS = [
    version
    for version in dict.fromkeys(map(utils.major_minor, utils.all_versions()))
    if tuple(map(int, version.split("."))) >= (1, 29)
]
EVERY_VERSION = pytest.mark.parametrize("version", VERSIONS)
EVERY_CASE = pytest.mark.parametrize("case", CASES)
EVERY = pytest.mark.parametrize("backend", BACKENDS)
CORE = ("ConfigMap", "Service", "Job")
# As kubeflow-training 1.9.4 has them, which cannot be installed beside a current client of Kubernetes.
RUN_POLICY = {
    "activeDeadlineSeconds": int,
    "backoffLimit": int,
    "cleanPodPolicy": str,
    "managedBy": str,
    "schedulingPolicy": dict,
    "suspend": bool,
    "ttlSecondsAfterFinished": int,
}
REPLICA = {"replicas": int, "restartPolicy": str, "template": dict}


@pytest.fixture(autouse=True, scope="module")
def _schemas_read_once() -> Iterator[None]:
    """The package reads a file of some megabytes for every object."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "schema_contents", functools.cache(utils.schema_contents))
        yield


def test_schemas_reach_from_the_oldest_supported_release_to_a_new_one() -> None:
    assert VERSIONS[0] == "1.29"
    assert len(VERSIONS) >= 8


@EVERY_VERSION
@EVERY_CASE
@EVERY
def test_core_objects_keep_to_the_schema_of_every_release(backend: str, case: str, version: str) -> None:
    objects = BACKENDS[backend].build(CASES[case])
    checked = [each for each in objects if each["kind"] in CORE]
    for number, template in enumerate(all_templates(case, backend)):
        metadata = {**template["metadata"], "name": f"pod-{number}"}
        checked.append({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]})
    for each in objects:
        for job in replicated_jobs_of(each):
            checked.append({"apiVersion": "batch/v1", "kind": "Job", **job["template"]})

    for each in checked:
        assert kubernetes_validate.validate(each, version, strict=True) == version


def test_the_schemas_do_refuse_what_they_do_not_know() -> None:
    job = copy.deepcopy(BACKENDS["job"].build(CASES["small"])[-1])
    job["spec"]["replacementPolicy"] = "Failed"

    with pytest.raises(kubernetes_validate.ValidationError, match="replacementPolicy"):
        kubernetes_validate.validate(job, "1.34", strict=True)


@EVERY_CASE
@EVERY
def test_pods_and_jobs_keep_the_rules_that_no_schema_has(backend: str, case: str) -> None:
    request = CASES[case]

    for template in all_templates(case, backend):
        assert list(pod_faults(template["spec"])) == []
    for each in BACKENDS[backend].build(request):
        if each["kind"] == "Job":
            assert list(job_faults(each["spec"], each["metadata"]["name"])) == []
        for job in replicated_jobs_of(each):
            name = f"{request.name}-{job['name']}-0"
            assert list(job_faults(job["template"]["spec"], name)) == []


@EVERY
@pytest.mark.parametrize("case", ["small", "large"])
def test_pods_keep_to_the_restricted_level_of_pod_security(backend: str, case: str) -> None:
    for template in all_templates(case, backend):
        assert list(restricted_faults(template["spec"])) == []


@EVERY
def test_rdma_takes_one_capability_and_nothing_else(backend: str) -> None:
    for template in all_templates("full", backend):
        assert list(restricted_faults(template["spec"])) == ["capability IPC_LOCK"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"hostNetwork": True}, "hostNetwork"),
        ({"securityContext": {}}, "runs as root"),
        ({"volumes": [{"name": "host", "hostPath": {"path": "/"}}]}, "volume of kind hostPath"),
    ],
)
def test_the_rules_of_pod_security_do_refuse(change: dict[str, Any], fault: str) -> None:
    (template,) = all_templates("small", "job")

    assert fault in list(restricted_faults({**template["spec"], **change}))


@EVERY_CASE
@pytest.mark.parametrize("backend", ["jobset", "trainjob"])
def test_custom_resources_keep_to_the_schemas_of_their_projects(backend: str, case: str) -> None:
    """Kubeflow's own models, JobSet's among them. They drop what they do not know: nothing may be missing."""
    from kubeflow_trainer_api import models  # takes a second

    kinds = {
        "JobSet": models.JobsetV1alpha2JobSet,
        "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
        "TrainJob": models.TrainerV1alpha1TrainJob,
    }
    objects = [each for each in BACKENDS[backend].build(CASES[case]) if each["kind"] in kinds]

    assert [kinds[each["kind"]].from_dict(each).to_dict() for each in objects] == objects


@EVERY_CASE
def test_a_pytorch_job_has_the_fields_that_the_operator_knows(case: str) -> None:
    spec = BACKENDS["pytorchjob"].build(CASES[case])[-1]["spec"]

    assert set(spec) == {"runPolicy", "pytorchReplicaSpecs"}
    assert set(spec["pytorchReplicaSpecs"]) <= {"Master", "Worker"}
    for values, fields in [
        (spec["runPolicy"], RUN_POLICY),
        *((replica, REPLICA) for replica in spec["pytorchReplicaSpecs"].values()),
    ]:
        assert {name: type(value) for name, value in values.items()} == {
            name: fields[name] for name in values
        }
    assert spec["runPolicy"]["cleanPodPolicy"] in ("All", "Running", "None")
