"""The image's Dockerfile and the manifests in deploy/, judged without a builder and without a cluster."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_validate import validate
from kubernetes_validate.utils import all_versions
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from metaloom.k8s import resources
from metaloom.k8s.resources import Resource
from tests.commands import REPOSITORY

DOCKERFILE = REPOSITORY / "deploy" / "Dockerfile"
BASE = REPOSITORY / "deploy" / "kubernetes"
OLDEST = (1, 29)
VERSIONS = sorted(
    {version for version in all_versions() if tuple(map(int, version.split(".")[:2])) >= OLDEST}
)
FILES = sorted(path for path in BASE.glob("*.yaml") if path.name != "kustomization.yaml")
JOB_VERBS = {"create", "get", "list", "watch", "delete"}
# What the commands do with which kinds of objects.
NEEDED = {
    "jobs.batch": JOB_VERBS,
    "jobsets.jobset.x-k8s.io": JOB_VERBS,
    "pytorchjobs.kubeflow.org": JOB_VERBS,
    "trainjobs.trainer.kubeflow.org": JOB_VERBS,
    "trainingruntimes.trainer.kubeflow.org": {"create", "get", "list", "patch", "delete"},
    "configmaps": {"create", "get", "list", "patch", "delete"},
    "services": {"create", "get", "list", "patch", "delete"},
    "pods": {"create", "get", "list", "watch"},
    "pods/log": {"get"},
    "pods/portforward": {"create"},  # by kubectl, as docs/operations.md says
    "events": {"get", "list", "watch"},
    "namespaces": {"get"},
    "persistentvolumeclaims": {"get"},
    "secrets": {"get"},
    "serviceaccounts": {"get"},
    "resourcequotas": {"get", "list"},
    "localqueues.kueue.x-k8s.io": {"get", "list", "watch"},
    "workloads.kueue.x-k8s.io": {"get", "list", "watch"},
    "nodes": {"get", "list"},
}
# Read in place of asking for a pod, which the role may.
INSTEAD = {"limitranges", "priorityclasses.scheduling.k8s.io"}
FOR_ALL = {"selfsubjectaccessreviews.authorization.k8s.io"}  # Kubernetes lets everyone ask what they may


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile: names and arguments, continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


STEPS = instructions(DOCKERFILE.read_text())


def commands() -> list[str]:
    return [rest for name, rest in STEPS if name == "RUN"]


def objects() -> list[dict[str, Any]]:
    return [found for path in FILES for found in yaml.safe_load_all(path.read_text())]


def objects_of(kind: str) -> list[dict[str, Any]]:
    return [found for found in objects() if found["kind"] == kind]


def test_the_image_is_made_from_arguments_and_its_defaults_name_no_index() -> None:
    arguments = dict(rest.partition("=")[::2] for name, rest in STEPS if name == "ARG")
    assert arguments == {
        "BASE_IMAGE": "nvidia/cuda:12.8.1-base-ubuntu24.04",
        "TORCH_INDEX": "",
        "PIP_INDEX": "",
        "EXTRAS": "s3,gs,hf,http,transformers",
    }
    assert "://" not in DOCKERFILE.read_text()
    assert STEPS[1] == ("FROM", "${BASE_IMAGE} AS base")


def test_the_image_has_one_stage_that_builds_and_takes_the_environment_from_it_alone() -> None:
    stages = [rest for name, rest in STEPS if name == "FROM"]
    assert stages == ["${BASE_IMAGE} AS base", "base AS build", "base"]
    last = STEPS[max(index for index, (name, _) in enumerate(STEPS) if name == "FROM") + 1 :]
    assert [rest for name, rest in last if name == "COPY"] == ["--from=build /opt/metaloom /opt/metaloom"]


def test_the_image_runs_as_nobody_special_and_writes_below_its_home_alone() -> None:
    last = dict(STEPS)
    assert last["USER"] == "1000:1000"
    assert last["WORKDIR"] == "/home/metaloom"
    assert "HOME=/home/metaloom" in last["ENV"]
    assert "PYTHONDONTWRITEBYTECODE=1" in last["ENV"]
    # Pods say `metaloom train ...`; a base image's own entry point would stand before it.
    assert last["ENTRYPOINT"] == "[]"
    assert last["CMD"] == '["metaloom", "--help"]'
    assert "mkdir -p /home/metaloom && chown 1000:1000 /home/metaloom" in " ".join(commands())


def test_commands_of_the_image_are_sound_shell() -> None:
    for command in commands():
        done = subprocess.run(["sh", "-n"], input=command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), command


def test_the_index_decides_where_torch_comes_from_and_no_local_label_does(tmp_path: Path) -> None:
    (label,) = [command for command in commands() if command.startswith("sed ")]
    pins = ["torch==2.13.0+cpu", "torchdata==0.11.0", "numpy==2.4.6", "torchaudio==2.13.0+cu128.post1  "]
    (tmp_path / "constraints.txt").write_text("\n".join(pins) + "\n")
    subprocess.run(["sh", "-c", label], cwd=tmp_path, check=True)
    assert (tmp_path / "pinned.txt").read_text().splitlines() == [
        "torch==2.13.0",
        "torchdata==0.11.0",
        "numpy==2.4.6",
        "torchaudio==2.13.0",
    ]
    pips = [command for command in commands() if "pip install" in command]
    assert all("-c pinned.txt" in command for command in pips if "--force-reinstall" not in command)
    assert not any("+cpu" in command for command in commands())
    (of_torch,) = [command for command in pips if "TORCH_INDEX" in command]
    assert '--no-deps -c pinned.txt --index-url "$TORCH_INDEX" torch;' in of_torch


def run_pips(tmp_path: Path, **arguments: str) -> list[str]:
    """What the image's calls of pip are given, with a stand-in for the environment's Python."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\nprintf "%s|" "$@" >>"$(dirname "$0")/calls"\necho >>"$(dirname "$0")/calls"\n'
    )
    python.chmod(0o755)
    for command in commands():
        if "pip install" in command:
            own = command.replace("/opt/metaloom/bin/python", str(python))
            subprocess.run(["sh", "-c", own], env=arguments | {"PATH": "/usr/bin:/bin"}, check=True)
    return (tmp_path / "calls").read_text().splitlines()


def test_without_arguments_everything_comes_from_pips_own_index(tmp_path: Path) -> None:
    assert run_pips(tmp_path, EXTRAS="s3,gs", TORCH_INDEX="", PIP_INDEX="") == [
        "-m|pip|install|-c|pinned.txt|.[s3,gs]|",
        "-m|pip|install|--no-deps|--force-reinstall|.|",
    ]


def test_torch_and_the_rest_may_come_from_different_indices(tmp_path: Path) -> None:
    assert run_pips(tmp_path, EXTRAS="s3", TORCH_INDEX="https://a/cu128", PIP_INDEX="https://b/simple") == [
        "-m|pip|install|--no-deps|-c|pinned.txt|--index-url|https://a/cu128|torch|",
        "-m|pip|install|-c|pinned.txt|--index-url|https://b/simple|.[s3]|",
        "-m|pip|install|--no-deps|--force-reinstall|--index-url|https://b/simple|.|",
    ]


def test_what_the_image_copies_is_there_and_nothing_else_is_sent_to_the_builder() -> None:
    copied = {
        word
        for name, rest in STEPS
        if name == "COPY" and not rest.startswith("--from")
        for word in rest.split()[:-1]
    }
    assert copied == {
        "constraints.txt",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "metaloom/__init__.py",
        "metaloom",
    }
    assert all((REPOSITORY / name).exists() for name in copied)
    rules = [
        line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if not line.startswith("#")
    ]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == {name.split("/")[0] for name in copied}


def test_every_package_of_the_image_is_pinned_at_a_version_that_metaloom_takes() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = next(rest for name, rest in STEPS if name == "ARG" and rest.startswith("EXTRAS"))
    wanted = [*project["dependencies"]]
    for extra in extras.partition("=")[2].split(","):
        wanted += project["optional-dependencies"][extra]
    pins = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().split())
    versions = {canonicalize_name(name): version for name, version in pins.items()}
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


@pytest.mark.parametrize("version", VERSIONS)
def test_manifests_are_valid_for_every_version_of_kubernetes(version: str) -> None:
    for found in objects():
        validate(found, version, strict=True)


def test_versions_from_the_oldest_on_are_tried() -> None:
    assert len(VERSIONS) >= 9
    assert VERSIONS[0].startswith("1.29")


def test_the_kustomization_lists_every_file_and_sets_the_namespace_that_they_have() -> None:
    kustomization = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    assert sorted(kustomization["resources"]) == [path.name for path in FILES]
    (namespace,) = objects_of("Namespace")
    assert namespace["metadata"]["name"] == kustomization["namespace"] == "metaloom"
    cluster_wide = ("Namespace", "ClusterRole", "ClusterRoleBinding")
    assert all(
        found["metadata"].get("namespace") == (None if found["kind"] in cluster_wide else "metaloom")
        for found in objects()
    )
    names = [(found["kind"], found["metadata"]["name"]) for found in objects()]
    assert len(set(names)) == len(names)


def granted() -> dict[str, set[str]]:
    rules = [
        rule for kind in ("Role", "ClusterRole") for found in objects_of(kind) for rule in found["rules"]
    ]
    return {
        f"{name}.{group}" if group else name: set(rule["verbs"])
        for rule in rules
        for group in rule["apiGroups"]
        for name in rule["resources"]
    }


def test_users_may_do_what_the_commands_do_and_nothing_else() -> None:
    assert granted() == NEEDED


def test_every_kind_that_the_client_knows_is_granted() -> None:
    known = [value for value in vars(resources).values() if isinstance(value, Resource)]
    assert len(known) >= 14
    names = {f"{found.plural}.{found.group}" if found.group else found.plural for found in known}
    assert names <= NEEDED.keys() | FOR_ALL | INSTEAD
    of_no_namespace = {found.plural for found in known if not found.is_namespaced} - {"priorityclasses"}
    (role,) = objects_of("ClusterRole")
    # A namespace itself may be read by a role in it.
    assert of_no_namespace - {"selfsubjectaccessreviews", "namespaces"} == {
        name for rule in role["rules"] for name in rule["resources"]
    }


def test_roles_are_bound_to_one_group_of_users() -> None:
    for binding, role in (("RoleBinding", "Role"), ("ClusterRoleBinding", "ClusterRole")):
        (bound,) = objects_of(binding)
        (of,) = objects_of(role)
        assert (bound["roleRef"]["kind"], bound["roleRef"]["name"]) == (role, of["metadata"]["name"])
        assert [(who["kind"], who["name"]) for who in bound["subjects"]] == [("Group", "metaloom-users")]


def test_the_namespace_admits_restricted_pods_alone() -> None:
    (namespace,) = objects_of("Namespace")
    labels = namespace["metadata"]["labels"]
    assert {labels[f"pod-security.kubernetes.io/{mode}"] for mode in ("enforce", "audit", "warn")} == {
        "restricted"
    }


def test_the_mlflow_server_is_a_restricted_pod_without_a_token() -> None:
    (deployment,) = objects_of("Deployment")
    (account,) = objects_of("ServiceAccount")
    pod = deployment["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == account["metadata"]["name"]
    assert pod["automountServiceAccountToken"] is account["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 1000
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in (*pod["initContainers"], *pod["containers"]):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        # An image of its own would be another MLflow than the pods have.
        assert container["image"] == "metaloom"
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/mlflow", "/tmp"}
        assert container["workingDir"] == "/tmp"
        assert {"name": "HOME", "value": "/tmp"} in container["env"]


def test_the_mlflow_server_is_found_by_its_service_and_keeps_its_store_on_the_volume() -> None:
    (deployment,) = objects_of("Deployment")
    (service,) = objects_of("Service")
    (claim,) = objects_of("PersistentVolumeClaim")
    (policy,) = objects_of("NetworkPolicy")
    template = deployment["spec"]["template"]
    labels = template["metadata"]["labels"]
    assert labels == deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    assert labels == policy["spec"]["podSelector"]["matchLabels"]
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    assert deployment["spec"]["replicas"] == 1
    (container,) = template["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports[service["spec"]["ports"][0]["targetPort"]] == 5000
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
    assert volumes["store"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    options = dict(word.split("=", 1) for word in container["command"][2:])
    store = options["--backend-store-uri"]
    assert store == template["spec"]["initContainers"][0]["command"][-1] == "sqlite:////mlflow/mlflow.db"
    assert options["--artifacts-destination"] == "/mlflow/artifacts"
    assert options["--workers"] == "1"
    hosts = options["--allowed-hosts"].split(",")
    name = service["metadata"]["name"]
    for host in (name, f"{name}.metaloom.svc", f"{name}.team-a.svc.cluster.local", "localhost"):
        assert any(fnmatch.fnmatch(f"{host}:5000", allowed) for allowed in hosts)
    assert not any(fnmatch.fnmatch(f"{name}.elsewhere.org:5000", allowed) for allowed in hosts)
