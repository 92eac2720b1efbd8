"""Whether a namespace takes the pods of a job: its quotas, its limits, its pod security, their class.

A server checks most of it for pods alone, and not for the object that makes them. So it is asked whether it
would take one, where the user may create pods; else its rules are read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from metaloom.k8s.admission import OPTIONS, SAID_BY, read_refusal
from metaloom.k8s.finding import Finding, note
from metaloom.k8s.manifests import Backend, probe_pod
from metaloom.k8s.quantities import parse_quantity
from metaloom.k8s.refusals import RefusedError
from metaloom.k8s.request import JobRequest
from metaloom.k8s.resources import LIMIT_RANGES, NAMESPACES, PODS, PRIORITY_CLASSES, QUOTAS

if TYPE_CHECKING:
    from metaloom.k8s.client import Cluster

ENFORCED = "pod-security.kubernetes.io/enforce"


def ask_for_a_pod(cluster: Cluster, request: JobRequest, backend: Backend) -> Iterator[Finding]:
    """What the server refuses of a pod of the job, which it does not make."""
    try:
        cluster.create(PODS, probe_pod(request, backend), dry_run=True)
    except RefusedError as error:
        unknown = unasked("a pod of the job", error)
        if unknown is not None:
            yield unknown
        elif error.status != 403 or not error.told:
            yield Finding(f"a pod of the job is refused: {error}")
        else:
            yield from _refused(cluster, error.told)


def what_is_added(cluster: Cluster, request: JobRequest, backend: Backend) -> Iterator[Finding]:
    """What an operator puts into pods, which a server that is asked for a pod of the job does not see."""
    added = backend.adds(request)
    if added and _enforced_level(cluster) == "restricted":
        yield note(
            f"namespace {cluster.namespace} enforces the restricted level of pod security, and {added}: the "
            "pods may be refused"
        )


def _enforced_level(cluster: Cluster) -> str | None:
    """The level of pod security that the namespace enforces; None where it enforces none, or may not be
    looked at."""
    if not cluster.may("get", NAMESPACES):
        return None
    namespace = cluster.get(NAMESPACES, cluster.namespace) or {"metadata": {}}
    level: str | None = (namespace["metadata"].get("labels") or {}).get(ENFORCED)
    return level


def unasked(what: str, error: RefusedError) -> Finding | None:
    """The note that a server could not be asked for something, where that is all that its refusal says."""
    if "does not support dry run" not in error.told:
        return None
    return note(f"{what} could not be checked beforehand: {error.told}")


def _refused(cluster: Cluster, told: str) -> Iterator[Finding]:
    refusal = read_refusal(told)
    text = f"namespace {cluster.namespace} takes no pod of the job: {refusal.words}"
    text += "".join(f": {line}" for line in refusal.details)
    if not refusal.is_passing:
        yield Finding(f"{text}; {refusal.advice or 'change what that names, or ask who runs the cluster'}")
    elif not _is_read(cluster, refusal.quota):
        yield note(f"{text}: pods will be refused until others end")


def _is_read(cluster: Cluster, quota: str) -> bool:
    """Whether `read_quotas` has told of a quota."""
    if not cluster.may("list", QUOTAS):
        return False
    return any(one["metadata"]["name"] == quota for one in _quotas_of_all_pods(cluster))


# ---------------------------------------------------------------- quotas


def _quotas_of_all_pods(cluster: Cluster) -> list[dict[str, Any]]:
    """The quotas that count every pod, and not some alone."""
    quotas = cluster.list(QUOTAS)
    return [one for one in quotas if not {"scopes", "scopeSelector"} & (one.get("spec") or {}).keys()]


def read_quotas(cluster: Cluster, request: JobRequest) -> Iterator[Finding]:
    """Quotas of the namespace that the job alone exceeds, or for which it has to wait."""
    if not cluster.may("list", QUOTAS):
        return
    need = _needed(request)
    for quota in _quotas_of_all_pods(cluster):
        status = quota.get("status") or {}
        hard, used = status.get("hard") or {}, status.get("used") or {}
        for name, amount in need.items():
            if name not in hard:
                continue
            limit = parse_quantity(str(hard[name]))
            taken = parse_quantity(str(used.get(name, "0")))
            where = f"the quota {quota['metadata']['name']} of namespace {cluster.namespace}"
            if amount > limit:
                yield Finding(f"the job needs {_shown(amount)} of {name}, and {where} allows {hard[name]}")
            elif amount > limit - taken:
                yield note(
                    f"the job needs {_shown(amount)} of {name}; {where} allows {hard[name]}, of which "
                    f"{used.get(name)} are in use: pods will be refused until others end"
                )


def _needed(request: JobRequest) -> dict[str, Fraction]:
    """What all pods of a job count for in a quota."""
    amounts = {"pods": Fraction(1), "count/pods": Fraction(1)}
    if request.gpus_per_node:
        amounts[f"requests.{request.gpu_resource}"] = Fraction(request.gpus_per_node)
    for names, quantity in (
        (("memory", "requests.memory", "limits.memory"), request.memory),
        (("cpu", "requests.cpu"), request.cpus),
    ):
        if quantity is not None:
            with contextlib.suppress(ValueError):  # told by `problems`
                amounts |= dict.fromkeys(names, parse_quantity(quantity))
    return {name: amount * request.nodes for name, amount in amounts.items()}


def _shown(amount: Fraction) -> str:
    return str(amount.numerator) if amount.denominator == 1 else f"{float(amount):g}"


# ---------------------------------------------------------------- rules, where no pod can be asked for


def read_rules(cluster: Cluster, request: JobRequest, backend: Backend) -> Iterator[Finding]:
    """What can be seen to be against the rules of the namespace. What may not be read is passed over."""
    yield from _uncounted(cluster, request)
    yield from _priority_class(cluster, request)
    yield from _pod_security(cluster, request)
    yield from _limits(cluster, request, backend)


def _uncounted(cluster: Cluster, request: JobRequest) -> Iterator[Finding]:
    """What a quota counts and the pods do not say: they are refused, unless a LimitRange says it for them."""
    if not cluster.may("list", QUOTAS):
        return
    need = _needed(request)
    for quota in _quotas_of_all_pods(cluster):
        hard = (quota.get("status") or {}).get("hard") or {}
        for name, by in SAID_BY.items():
            if name in hard and name not in need:
                yield note(
                    f"the quota {quota['metadata']['name']} counts {name}, which the pods do not have, so "
                    f"that they may be refused: it takes {by}"
                )


def _priority_class(cluster: Cluster, request: JobRequest) -> Iterator[Finding]:
    name = request.priority_class
    if name is None or not cluster.may("get", PRIORITY_CLASSES):
        return
    if cluster.get(PRIORITY_CLASSES, name) is None:
        yield Finding(
            f"--priority-class {name}: the cluster has no such PriorityClass (kubectl get priorityclasses)"
        )


def _pod_security(cluster: Cluster, request: JobRequest) -> Iterator[Finding]:
    """Pods keep to the restricted level, but for what --rdma takes, which no level but privileged allows."""
    level = None if request.rdma is None else _enforced_level(cluster)
    if level in ("restricted", "baseline"):
        yield Finding(
            f"--rdma: namespace {cluster.namespace} enforces the {level} level of pod security, which takes "
            "no pods that may lock memory (IPC_LOCK): leave it out, or name a namespace that admits them "
            "with --namespace"
        )


def _limits(cluster: Cluster, request: JobRequest, backend: Backend) -> Iterator[Finding]:
    """Amounts beyond those that a LimitRange sets for a container or a pod, which here has one container."""
    if not cluster.may("list", LIMIT_RANGES):
        return
    (container,) = probe_pod(request, backend)["spec"]["containers"]
    amounts = container.get("resources") or {}
    asked = (amounts.get("requests") or {}) | (amounts.get("limits") or {})
    for limits in cluster.list(LIMIT_RANGES):
        for item in (limits.get("spec") or {}).get("limits") or []:
            if item.get("type") in ("Container", "Pod"):
                where = f"the LimitRange {limits['metadata']['name']} of namespace {cluster.namespace}"
                yield from _beyond(item, asked, where, request)


def _beyond(
    item: Mapping[str, Any], asked: Mapping[str, str], where: str, request: JobRequest
) -> Iterator[Finding]:
    options = OPTIONS | {request.gpu_resource: "--gpus-per-node"}
    options |= {} if request.rdma is None else {request.rdma[0]: "--rdma"}
    for name, amount in asked.items():
        bounds = {word: str((item.get(word) or {}).get(name, "")) for word in ("min", "max")}
        try:
            number = parse_quantity(amount)
        except ValueError:
            continue  # told by `problems`
        if bounds["max"] and number > parse_quantity(bounds["max"]):
            yield Finding(f"{options[name]} {amount}: {where} allows at most {bounds['max']} of {name}")
        if bounds["min"] and number < parse_quantity(bounds["min"]):
            yield Finding(f"{options[name]} {amount}: {where} wants at least {bounds['min']} of {name}")
