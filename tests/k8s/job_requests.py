"""Requests of several kinds, and their manifests as golden files hold them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from metaloom.k8s.manifests import BACKENDS, to_yaml
from metaloom.k8s.request import JobRequest, SecretFiles, Toleration, Volume

GOLDEN = Path(__file__).parent / "golden"
RECIPE = """\
# a recipe
name: glyphs
launcher: {kind: local}
notes: "it costs $5, $(not much)"
"""
SMALL = JobRequest(
    name="glyphs",
    namespace="research",
    image="registry.example.com/metaloom:0.1.0",
    recipe=RECIPE,
    recipe_name="glyphs-maml",
    run_folder="/runs/glyphs",
)
LARGE = dataclasses.replace(
    SMALL,
    name="glyphs-large",
    nodes=16,
    gpus_per_node=8,
    cpus="64",
    memory="512Gi",
    ephemeral_storage="200Gi",
    own_folders=True,
    queue="gpus",
    priority_class="high",
    overrides=("outer.steps=5000", "checkpoint.url=s3://bucket/glyphs"),
)
FULL = dataclasses.replace(
    SMALL,
    name="glyphs-full",
    nodes=2,
    gpus_per_node=4,
    ranks_per_node=2,
    gpu_resource="amd.com/gpu",
    cpus="7500m",
    memory="96.5Gi",
    shared_memory="32Gi",
    run_folder="/work/runs/glyphs",
    volumes=(Volume("runs", "/work"), Volume("data", "/data", is_read_only=True), Volume("runs", "/again")),
    env={"NCCL_DEBUG": "INFO", "PRICE": "$(5) or $6", "LIMIT": "1e3"},
    env_from_secrets=("mlflow", "bucket"),
    secret_files=(SecretFiles("gcs", "/secrets/gcs"),),
    rdma=("rdma/hca", 4),
    node_selector={"gpu": "mi300", "zone": "1e3"},
    tolerations=(
        Toleration("amd.com/gpu"),
        Toleration("team", "research", "NoSchedule"),
        Toleration(""),
    ),
    spread_over="topology.kubernetes.io/zone",
    service_account="trainer",
    image_pull_secrets=("registry",),
    image_pull_policy="Always",
    max_restarts=5,
    stop_within_s=119.5,
    ttl_s=None,
    active_deadline_s=86400,
    user_id=1234,
    group_id=2345,
    labels={"team": "research"},
    annotations={"example.com/ticket": "ML-1"},
)
CASES = {"small": SMALL, "large": LARGE, "full": FULL}


def rendered(backend: str, case: str) -> str:
    """The manifests of a case, whatever the version of metaloom is."""
    objects = BACKENDS[backend].build(CASES[case])
    job_of(objects, backend)["metadata"]["annotations"]["metaloom/version"] = "VERSION"
    return to_yaml(objects)


def job_of(objects: list[dict[str, Any]], backend: str) -> dict[str, Any]:
    """The object that is the job."""
    (job,) = (each for each in objects if each["kind"] == BACKENDS[backend].resource.kind)
    return job


def templates_of(obj: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod templates in an object of any of the backends."""
    if obj["kind"] == "Job":
        return [obj["spec"]["template"]]
    if obj["kind"] == "PyTorchJob":
        return [replica["template"] for replica in obj["spec"]["pytorchReplicaSpecs"].values()]
    return [job["template"]["spec"]["template"] for job in replicated_jobs_of(obj)]


def replicated_jobs_of(obj: dict[str, Any]) -> list[dict[str, Any]]:
    """The Jobs that a JobSet, or a runtime's JobSet, is made of."""
    if obj["kind"] == "JobSet":
        return list(obj["spec"]["replicatedJobs"])
    if obj["kind"] == "TrainingRuntime":
        return list(obj["spec"]["template"]["spec"]["replicatedJobs"])
    return []


def all_templates(case: str, backend: str) -> list[dict[str, Any]]:
    return [template for obj in BACKENDS[backend].build(CASES[case]) for template in templates_of(obj)]


if __name__ == "__main__":
    for backend_name in BACKENDS:
        for case_name in CASES:
            (GOLDEN / f"{backend_name}-{case_name}.yaml").write_text(rendered(backend_name, case_name))
