"""What Kubernetes refuses and no schema says: rules of Jobs and pods, and restricted pod security."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from kubernetes.utils.quantity import parse_quantity

# https://kubernetes.io/docs/concepts/security/pod-security-standards/
ALLOWED_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


def restricted_faults(spec: dict[str, Any]) -> Iterator[str]:
    """What in a pod's spec the restricted level of pod security refuses."""
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(key):
            yield key
    for volume in spec.get("volumes", []):
        yield from (f"volume of kind {kind}" for kind in set(volume) - {"name"} - ALLOWED_VOLUMES)
    pod = spec.get("securityContext", {})
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        own = container.get("securityContext", {})
        effective = {**pod, **own}
        if own.get("allowPrivilegeEscalation") is not False:
            yield "allowPrivilegeEscalation"
        if own.get("privileged"):
            yield "privileged"
        if effective.get("runAsNonRoot") is not True or effective.get("runAsUser") == 0:
            yield "runs as root"
        if effective.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            yield "seccompProfile"
        capabilities = own.get("capabilities", {})
        if "ALL" not in capabilities.get("drop", []):
            yield "capabilities are not dropped"
        yield from (
            f"capability {name}" for name in capabilities.get("add", []) if name != "NET_BIND_SERVICE"
        )
        if any("hostPort" in port for port in container.get("ports", [])):
            yield "hostPort"


def pod_faults(spec: dict[str, Any]) -> Iterator[str]:
    """What an API server refuses in a pod's spec whatever its level of security."""
    names = [volume["name"] for volume in spec["volumes"]]
    if len(set(names)) < len(names) or not all(LABEL.fullmatch(name) and len(name) <= 63 for name in names):
        yield f"names of volumes: {names}"
    for volume in spec["volumes"]:
        if (size := volume.get("emptyDir", {}).get("sizeLimit")) is not None and parse_quantity(size) <= 0:
            yield f"sizeLimit {size}"
    for container in spec["containers"]:
        paths = [mount["mountPath"] for mount in container["volumeMounts"]]
        if len(set(paths)) < len(paths) or not all(path.startswith("/") for path in paths):
            yield f"mount paths: {paths}"
        if {mount["name"] for mount in container["volumeMounts"]} != set(names):
            yield "volumes and mounts do not match"
        variables = [variable["name"] for variable in container["env"]]
        if len(set(variables)) < len(variables):
            yield f"variables: {variables}"
        resources = container.get("resources", {})
        requests, limits = resources.get("requests", {}), resources.get("limits", {})
        for name in {*requests, *limits}:
            requested, limit = requests.get(name), limits.get(name)
            if (
                limit is not None
                and requested is not None
                and parse_quantity(requested) > parse_quantity(limit)
            ):
                yield f"{name}: requests more than its limit"
            if "/" in name and (requested is None or requested != limit or not requested.isdecimal()):
                yield f"{name}: {requested} requested, {limit} at most"


def job_faults(spec: dict[str, Any], name: str) -> Iterator[str]:
    """What an API server refuses in an Indexed Job's spec."""
    template = spec["template"]["spec"]
    if template.get("restartPolicy") != "Never":
        yield "podFailurePolicy needs restartPolicy Never"
    if spec.get("completionMode") != "Indexed" or "completions" not in spec:
        yield "an Indexed Job needs completions"
    longest = f"{name}-{spec['completions'] - 1}"
    if len(longest) > 63 or LABEL.fullmatch(longest) is None:
        yield f"host name {longest}"
    if spec.get("podReplacementPolicy") != "Failed":
        yield "podFailurePolicy needs podReplacementPolicy Failed"
    containers = {container["name"] for container in template["containers"]}
    for rule in spec["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        if (codes is None) == ("onPodConditions" not in rule):
            yield "a rule has either exit codes or conditions"
        if codes is not None:
            values = codes["values"]
            if values != sorted(set(values)) or 0 in values or codes["containerName"] not in containers:
                yield f"exit codes {codes}"
