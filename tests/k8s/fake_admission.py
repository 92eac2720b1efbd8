"""What a fake API server's admission does to pods, in the words of the real one: defaults and limits of a
LimitRange, classes of priority, pod security, quotas."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

from metaloom.k8s.resources import LIMIT_RANGES, NAMESPACES, PODS, PRIORITY_CLASSES, QUOTAS
from tests.k8s.fake_rules import check, check_quota, quantity
from tests.k8s.fake_store import Object, Refusal, Selection, Store

ENFORCE = "pod-security.kubernetes.io/enforce"
# Of the Pod Security Standards: what a container may add to its capabilities.
BASELINE_CAPABILITIES = {
    *("AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE"),
    *("SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"),
}
RESTRICTED_CAPABILITIES = {"NET_BIND_SERVICE"}
RESTRICTED_VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image", "persistentVolumeClaim"),
    *("projected", "secret"),
}
SYSTEM_CLASSES = ("system-cluster-critical", "system-node-critical")


def admit_pod(store: Store, namespace: str, pod: Object) -> Object:
    """A pod as admission leaves it: first what changes pods, then what only looks at them, quotas last.

    Raises:
        Refusal: 403, or 422 for a pod that defaults have made invalid.
    """
    pod = copy.deepcopy(pod)
    ranges = [
        item
        for limits in store.list(LIMIT_RANGES, namespace, Selection())
        for item in limits["spec"]["limits"]
    ]
    for container in pod["spec"].get("containers", []):
        _set_defaults(container, ranges)
    wanted = pod["spec"].get("priorityClassName")
    known = {one["metadata"]["name"] for one in store.list(PRIORITY_CLASSES, "", Selection())}
    if wanted and wanted not in known and wanted not in SYSTEM_CLASSES:
        raise _forbidden(pod, f"no PriorityClass with name {wanted} was found")
    check(PODS, pod)
    beyond = [text for item in ranges for text in _beyond(pod, item)]
    if beyond:
        raise _forbidden(pod, beyond[0] if len(beyond) == 1 else f"[{', '.join(beyond)}]")
    space = store.find(NAMESPACES, "", namespace) or {"metadata": {}}
    level = (space["metadata"].get("labels") or {}).get(ENFORCE, "privileged")
    if violations := list(_violations(pod["spec"], level)):
        raise _forbidden(pod, f'violates PodSecurity "{level}:latest": {", ".join(violations)}')
    check_quota(store.list(QUOTAS, namespace, Selection()), store.list(PODS, namespace, Selection()), pod)
    return pod


def _forbidden(pod: Object, why: str) -> Refusal:
    name = pod["metadata"].get("name") or pod["metadata"]["generateName"]
    message = f'pods "{name}" is forbidden: {why}'
    return Refusal(403, "Forbidden", message, details={"name": name, "kind": "pods"})


def _set_defaults(container: Object, ranges: Sequence[Object]) -> None:
    """Requests that follow from limits, and then what a LimitRange gives to a container without a limit."""
    resources = container.setdefault("resources", {})
    limits, requests = (resources.get(key) or {} for key in ("limits", "requests"))
    requests = limits | requests
    for item in ranges:
        if item["type"] == "Container":
            default = (item.get("max") or {}) | (item.get("default") or {})
            limits = default | limits
            requests = (item.get("min") or {}) | default | (item.get("defaultRequest") or {}) | requests
    resources |= {key: value for key, value in (("limits", limits), ("requests", requests)) if value}


def _beyond(pod: Object, item: Object) -> Iterator[str]:
    kind = item["type"]
    if kind not in ("Container", "Pod"):
        return
    # The pods of these tests have one container, which so is what a pod has.
    for container in pod["spec"].get("containers", []):
        limits, requests = (container["resources"].get(key) or {} for key in ("limits", "requests"))
        for name, bound in (item.get("min") or {}).items():
            least = f"minimum {name} usage per {kind} is {bound}"
            if name not in requests:
                yield f"{least}.  No request is specified"
            elif quantity(requests[name]) < quantity(bound):
                yield f"{least}, but request is {requests[name]}"
            elif name in limits and quantity(limits[name]) < quantity(bound):
                yield f"{least}, but limit is {limits[name]}"
        for name, bound in (item.get("max") or {}).items():
            most = f"maximum {name} usage per {kind} is {bound}"
            if name not in limits:
                yield f"{most}.  No limit is specified"
            elif quantity(limits[name]) > quantity(bound):
                yield f"{most}, but limit is {limits[name]}"
            elif name in requests and quantity(requests[name]) > quantity(bound):
                yield f"{most}, but request is {requests[name]}"


def _violations(spec: Object, level: str) -> Iterator[str]:
    """What a level of pod security does not allow of a pod, check by check in the order of their names."""
    if level == "privileged":
        return
    containers = [*spec.get("initContainers", []), *spec.get("containers", [])]
    of_pod = spec.get("securityContext") or {}
    own = {one["name"]: one.get("securityContext") or {} for one in containers}
    added = {name: (one.get("capabilities") or {}).get("add") or [] for name, one in own.items()}
    if level == "restricted":
        if bad := [name for name, one in own.items() if one.get("allowPrivilegeEscalation") is not False]:
            must = "must set securityContext.allowPrivilegeEscalation=false"
            yield f"allowPrivilegeEscalation != false ({_named(bad)} {must})"
        dropped = {name: (one.get("capabilities") or {}).get("drop") or [] for name, one in own.items()}
        keeps = [name for name, words in dropped.items() if "ALL" not in words]
        parts = [f'{_named(keeps)} must set securityContext.capabilities.drop=["ALL"]'] if keeps else []
        parts += _capabilities(added, RESTRICTED_CAPABILITIES)
        if parts:
            yield f"unrestricted capabilities ({'; '.join(parts)})"
    elif parts := _capabilities(added, BASELINE_CAPABILITIES):
        yield f"non-default capabilities ({'; '.join(parts)})"
    volumes = {one["name"]: next(key for key in one if key != "name") for one in spec.get("volumes", [])}
    if bad := [name for name, kind in volumes.items() if kind == "hostPath"]:
        yield f"hostPath volumes ({_named(bad, 'volume')})"
    if bad := [name for name, one in own.items() if one.get("privileged")]:
        yield f"privileged ({_named(bad)} must not set securityContext.privileged=true)"
    if level == "baseline":
        return
    if bad := [name for name, kind in volumes.items() if kind not in RESTRICTED_VOLUMES]:
        kinds = ", ".join(f'"{kind}"' for kind in dict.fromkeys(volumes[name] for name in bad))
        yield f"restricted volume types ({_named(bad, 'volume')} uses restricted volume type {kinds})"
    if bad := [name for name, one in own.items() if not (of_pod | one).get("runAsNonRoot")]:
        yield f"runAsNonRoot != true (pod or {_named(bad)} must set securityContext.runAsNonRoot=true)"
    if bad := [name for name, one in own.items() if (of_pod | one).get("runAsUser") == 0]:
        yield f"runAsUser=0 ({_named(bad)} must not set runAsUser=0)"
    if bad := [name for name, one in own.items() if not (of_pod | one).get("seccompProfile")]:
        must = 'must set securityContext.seccompProfile.type to "RuntimeDefault" or "Localhost"'
        yield f"seccompProfile (pod or {_named(bad)} {must})"


def _capabilities(added: dict[str, list[str]], allowed: set[str]) -> list[str]:
    bad = {name: set(words) - allowed for name, words in added.items() if set(words) - allowed}
    if not bad:
        return []
    words = ", ".join(f'"{word}"' for word in sorted(set().union(*bad.values())))
    return [f"{_named(list(bad))} must not include {words} in securityContext.capabilities.add"]


def _named(names: Sequence[str], what: str = "container") -> str:
    shown = ", ".join(f'"{name}"' for name in names)
    return f"{what} {shown}" if len(names) == 1 else f"{what}s {shown}"
