"""What an API server refuses: names, labels, quantities, pods, Jobs and quotas, in its own words."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from metaloom.k8s.resources import CONFIG_MAPS, JOBS, PODS, SERVICES, Resource
from tests.k8s.fake_store import Object, Refusal

LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
SUBDOMAIN = rf"{LABEL}(\.{LABEL})*"
WORD = r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?"
QUANTITY = re.compile(r"([+-]?[0-9.]+)([numkMGTPE]|[KMGTPE]i|[eE][+-]?[0-9]+)?")
FACTORS = {"n": "1e-9", "u": "1e-6", "m": "1e-3", "k": "1e3", "M": "1e6", "G": "1e9", "T": "1e12"} | {
    "P": "1e15",
    "E": "1e18",
}

# What a quota counts only of pods that say it.
COUNTED = ("cpu", "memory")

COUNTS_OF_A_JOB = (
    *("completions", "parallelism", "backoffLimit", "backoffLimitPerIndex", "maxFailedIndexes"),
    "activeDeadlineSeconds",
)

Cause = dict[str, str]


def cause(field: str, kind: str, value: object, message: str) -> Cause:
    """One field of an object that is invalid, as in `details.causes` of a Status."""
    words = {"Required": "Required value", "Invalid": "Invalid value", "NotSupported": "Unsupported value"}
    words |= {"Forbidden": "Forbidden"}
    shown = "" if kind in ("Required", "Forbidden") else f": {value!r}".replace("'", '"')
    return {"reason": f"FieldValue{kind}", "message": f"{words[kind]}{shown}: {message}", "field": field}


def quantity(text: object) -> Decimal:
    """The number that a quantity stands for.

    Raises:
        ValueError: it is none.
    """
    match = QUANTITY.fullmatch(str(text))
    if match is None or match[1].strip("+-").count(".") > 1 or not match[1].strip("+-."):
        raise ValueError(text)
    suffix = match[2] or ""
    if suffix.endswith("i"):
        return Decimal(match[1]) * Decimal(1024) ** ("KMGTPE".index(suffix[0]) + 1)
    if suffix[:1] in ("e", "E") and suffix != "E":
        return Decimal(match[1] + suffix)
    return Decimal(match[1]) * Decimal(FACTORS.get(suffix, "1"))


def check(resource: Resource, obj: Object) -> None:
    """Raises the refusal of an object that the server would not take.

    Raises:
        Refusal: 422 with all causes; 400 for a quantity that cannot be read.
    """
    causes = list(_metadata_causes(resource, obj["metadata"]))
    if resource == JOBS:
        causes += _job_causes(obj)
    if resource == PODS:
        causes += _pod_causes(obj.get("spec", {}), "spec", ("Always", "OnFailure", "Never"))
    _refuse(resource, obj["metadata"]["name"], causes)


def check_update(resource: Resource, old: Object, new: Object) -> None:
    """Raises the refusal of a change that the server would not take.

    Raises:
        Refusal: 409 for an outdated version, 422 for a field that is immutable.
    """
    name = old["metadata"]["name"]
    version = new["metadata"].get("resourceVersion")
    if version and version != old["metadata"]["resourceVersion"]:
        raise Refusal(
            409,
            "Conflict",
            f'Operation cannot be fulfilled on {resource.full_name} "{name}": the object has been modified; '
            "please apply your changes to the latest version and try again",
        )
    causes: list[Cause] = []
    if resource == JOBS:
        causes = list(_job_change_causes(old, new))
    if resource == CONFIG_MAPS and old.get("immutable"):
        message = "field is immutable when `immutable` is set"
        fixed = ("immutable", "data", "binaryData")
        causes = [cause(key, "Forbidden", "", message) for key in fixed if old.get(key) != new.get(key)]
    _refuse(resource, name, causes)
    check(resource, new)


def _refuse(resource: Resource, name: str, causes: list[Cause]) -> None:
    if not causes:
        return
    told = [f"{each['field']}: {each['message']}" for each in causes]
    kind = f"{resource.kind}.{resource.group}" if resource.group else resource.kind
    raise Refusal(
        422,
        "Invalid",
        f'{kind} "{name}" is invalid: ' + (told[0] if len(told) == 1 else f"[{', '.join(told)}]"),
        details={"name": name, "group": resource.group, "kind": resource.kind, "causes": causes},
    )


def _metadata_causes(resource: Resource, metadata: Object) -> Iterator[Cause]:
    name = metadata["name"]
    if resource == SERVICES:
        if len(name) > 63 or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
            yield cause("metadata.name", "Invalid", name, "a DNS-1035 label must consist of lower case ...")
    elif len(name) > 253 or not re.fullmatch(SUBDOMAIN, name):
        yield cause(
            "metadata.name",
            "Invalid",
            name,
            "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', "
            "and must start and end with an alphanumeric character",
        )
    yield from _label_causes(metadata.get("labels") or {}, "metadata.labels")
    for key, value in (metadata.get("annotations") or {}).items():
        if not isinstance(value, str):
            message = f"cannot unmarshal {type(value).__name__} into Go struct field ObjectMeta.metadata"
            raise Refusal(400, "BadRequest", f"{resource.kind} in version {resource.version!r}: {message}")
        yield from _key_causes(key, "metadata.annotations")


def _label_causes(labels: Mapping[str, Any], field: str) -> Iterator[Cause]:
    for key, value in labels.items():
        yield from _key_causes(key, field)
        if not isinstance(value, str):
            raise Refusal(400, "BadRequest", f"cannot unmarshal {value!r} of {field} into string")
        if len(value) > 63:
            yield cause(field, "Invalid", value, "must be no more than 63 characters")
        elif not re.fullmatch(WORD, value):
            yield cause(
                field,
                "Invalid",
                value,
                "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or "
                "'.', and must start and end with an alphanumeric character",
            )


def _key_causes(key: str, field: str) -> Iterator[Cause]:
    prefix, slash, name = key.rpartition("/")
    if (
        (slash and (len(prefix) > 253 or not re.fullmatch(SUBDOMAIN, prefix)))
        or not name
        or len(name) > 63
        or not re.fullmatch(WORD, name)
    ):
        message = "name part must consist of alphanumeric characters, '-', '_' or '.'"
        yield cause(field, "Invalid", key, message)


def _job_change_causes(old: Object, new: Object) -> Iterator[Cause]:
    was, is_ = old["spec"], new["spec"]
    changed = [key for key in (*was, *is_) if was.get(key) != is_.get(key)]
    # An Indexed Job may grow and shrink, with all its pods at once.
    if "completions" in changed and is_.get("completionMode") == "Indexed":
        if is_.get("completions") != is_.get("parallelism"):
            message = "can only be modified in tandem with spec.parallelism"
            yield cause("spec.completions", "Invalid", is_.get("completions"), message)
    elif "completions" in changed:
        yield cause("spec.completions", "Invalid", "...", "field is immutable")
    for key in ("selector", "completionMode", "podFailurePolicy", "backoffLimitPerIndex", "managedBy"):
        if key in changed:
            yield cause(f"spec.{key}", "Invalid", "...", "field is immutable")
    before, after = was["template"], is_["template"]
    if was.get("suspend") and not old.get("status", {}).get("startTime"):
        # As queues do, which so choose the machines of a Job that they let go on.
        before, after = _but_placement(before), _but_placement(after)
    if before != after:
        yield cause("spec.template", "Invalid", "...", "field is immutable")


def _but_placement(template: Object) -> Object:
    """A template of pods without what may be changed as long as a Job has not begun."""
    free = ("nodeSelector", "affinity", "tolerations", "schedulingGates")
    metadata = {k: v for k, v in template.get("metadata", {}).items() if k not in ("labels", "annotations")}
    return {"metadata": metadata, "spec": {k: v for k, v in template["spec"].items() if k not in free}}


def _job_causes(job: Object) -> Iterator[Cause]:
    spec = job.get("spec", {})
    name = job["metadata"]["name"]
    template = spec.get("template", {}).get("spec", {})
    if spec.get("completionMode") == "Indexed":
        if spec.get("completions") is None:
            message = "when completion mode is Indexed"
            yield cause("spec.completions", "Required", "", message)
        elif len(name) + len(f"-{max(spec['completions'] - 1, 0)}") > 63:
            yield cause("metadata.name", "Invalid", name, "must be no more than 63 characters")
    elif len(name) > 63:
        yield cause("metadata.name", "Invalid", name, "must be no more than 63 characters")
    for field in COUNTS_OF_A_JOB:
        if (spec.get(field) or 0) < 0:
            yield cause(f"spec.{field}", "Invalid", spec[field], "must be greater than or equal to 0")
    if spec.get("backoffLimitPerIndex") is not None and spec.get("completionMode") != "Indexed":
        message = "requires indexed completion mode"
        yield cause("spec.backoffLimitPerIndex", "Invalid", spec["backoffLimitPerIndex"], message)
    if (most := spec.get("maxFailedIndexes")) is not None:
        if spec.get("backoffLimitPerIndex") is None:
            yield cause("spec.backoffLimitPerIndex", "Required", "", "when maxFailedIndexes is specified")
        if spec.get("completions") is not None and most > spec["completions"]:
            message = "must be less than or equal to completions"
            yield cause("spec.maxFailedIndexes", "Invalid", most, message)
    replaced = ["Failed"] if spec.get("podFailurePolicy") else ["Failed", "TerminatingOrFailed"]
    if spec.get("podReplacementPolicy", "Failed") not in replaced:
        message = "supported values: " + ", ".join(f'"{value}"' for value in replaced)
        yield cause("spec.podReplacementPolicy", "NotSupported", spec["podReplacementPolicy"], message)
    policy = template.get("restartPolicy")
    if policy is None:
        yield cause("spec.template.spec.restartPolicy", "Required", "", 'valid values: "OnFailure", "Never"')
    elif policy not in ("Never", "OnFailure"):
        yield cause(
            "spec.template.spec.restartPolicy",
            "NotSupported",
            policy,
            'supported values: "OnFailure", "Never"',
        )
    if spec.get("podFailurePolicy") and policy != "Never":
        yield cause(
            "spec.template.spec.restartPolicy",
            "Invalid",
            policy,
            'only "Never" is supported when podFailurePolicy is specified',
        )
    containers = {container["name"] for container in template.get("containers", [])}
    for i, rule in enumerate((spec.get("podFailurePolicy") or {}).get("rules", [])):
        at = f"spec.podFailurePolicy.rules[{i}]"
        codes = rule.get("onExitCodes")
        if (codes is None) == (not rule.get("onPodConditions")):
            message = "specifying one of OnExitCodes and OnPodConditions is required"
            yield cause(at, "Invalid", "...", message)
        if rule.get("action") not in ("Ignore", "FailJob", "Count", "FailIndex"):
            yield cause(f"{at}.action", "NotSupported", rule.get("action"), 'supported values: "Count" ...')
        if rule.get("action") == "FailIndex" and spec.get("backoffLimitPerIndex") is None:
            message = "requires the backoffLimitPerIndex to be set"
            yield cause(f"{at}.action", "Invalid", "FailIndex", message)
        if codes and (values := codes.get("values", [])) != sorted(set(values)):
            yield cause(f"{at}.onExitCodes.values", "Invalid", values, "must be ordered")
        if codes and codes.get("operator") == "In" and 0 in codes.get("values", []):
            yield cause(f"{at}.onExitCodes.values", "Invalid", 0, "must not be 0 for the In operator")
        if codes and codes.get("containerName", next(iter(containers), "")) not in containers:
            message = "must be one of the container or initContainer names in the pod template"
            yield cause(f"{at}.onExitCodes.containerName", "Invalid", codes["containerName"], message)
    yield from _label_causes(
        spec.get("template", {}).get("metadata", {}).get("labels") or {}, "spec.template.labels"
    )
    yield from _pod_causes(template, "spec.template.spec", None)


def _pod_causes(spec: Object, at: str, policies: Sequence[str] | None) -> Iterator[Cause]:
    if policies is not None and spec.get("restartPolicy", "Always") not in policies:
        message = 'supported values: "Always", "OnFailure", "Never"'
        yield cause(f"{at}.restartPolicy", "NotSupported", spec["restartPolicy"], message)
    if not spec.get("containers"):
        yield cause(f"{at}.containers", "Required", "", "")
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    for volume in spec.get("volumes", []):
        size = volume.get("emptyDir", {}).get("sizeLimit")
        if size is not None:
            _read_quantity(size)
    for part in ("initContainers", "containers"):
        for i, container in enumerate(spec.get(part, [])):
            where = f"{at}.{part}[{i}]"
            if len(container["name"]) > 63 or not re.fullmatch(LABEL, container["name"]):
                message = "a lowercase RFC 1123 label must consist of alphanumeric characters or '-'"
                yield cause(f"{where}.name", "Invalid", container["name"], message)
            if not container.get("image"):
                yield cause(f"{where}.image", "Required", "", "")
            for j, mount in enumerate(container.get("volumeMounts", [])):
                if mount["name"] not in volumes:
                    field = f"{where}.volumeMounts[{j}].name"
                    yield {
                        "reason": "FieldValueNotFound",
                        "message": f'Not found: "{mount["name"]}"',
                        "field": field,
                    }
            yield from _resource_causes(container.get("resources", {}), where)


def _resource_causes(resources: Object, where: str) -> Iterator[Cause]:
    limits = {name: _read_quantity(value) for name, value in (resources.get("limits") or {}).items()}
    requests = {name: _read_quantity(value) for name, value in (resources.get("requests") or {}).items()}
    for name, value in requests.items():
        is_extended = "/" in name
        if is_extended and name not in limits:
            message = f"Limit must be set for non overcommitable resources: {name}"
            yield cause(f"{where}.resources.limits", "Required", "", message)
        elif is_extended and limits[name] != value:
            message = f"must be equal to {name} limit of {resources['limits'][name]}"
            yield cause(f"{where}.resources.requests", "Invalid", resources["requests"][name], message)
        elif name in limits and value > limits[name]:
            message = f"must be less than or equal to {name} limit of {resources['limits'][name]}"
            yield cause(f"{where}.resources.requests", "Invalid", resources["requests"][name], message)
    for name, value in limits.items():
        if "/" in name and value != int(value):
            yield cause(f"{where}.resources.limits", "Invalid", str(value), "must be an integer")


def _read_quantity(text: object) -> Decimal:
    try:
        return quantity(text)
    except ValueError:
        raise Refusal(
            400,
            "BadRequest",
            "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'",
        ) from None


@dataclasses.dataclass(frozen=True)
class Usage:
    """What pods take from a quota, by the quota's names."""

    amounts: dict[str, Decimal]

    @classmethod
    def of(cls, pods: Sequence[Object]) -> Usage:
        """The sum over the pods that have not ended."""
        sums: dict[str, Decimal] = {}
        for pod in pods:
            if pod.get("status", {}).get("phase") in ("Succeeded", "Failed"):
                continue
            sums["pods"] = sums.get("pods", Decimal(0)) + 1
            for container in pod["spec"].get("containers", []):
                for part in ("requests", "limits"):
                    for name, value in (container.get("resources", {}).get(part) or {}).items():
                        key = f"{part}.{name}"
                        sums[key] = sums.get(key, Decimal(0)) + quantity(value)
                        if part == "requests" and name in ("cpu", "memory"):
                            sums[name] = sums[key]
        return cls(sums)


def check_quota(quotas: Sequence[Object], pods: Sequence[Object], pod: Object) -> None:
    """Raises the refusal of a pod that goes beyond a quota of its namespace.

    Raises:
        Refusal: 403.
    """
    used, wanted = Usage.of(pods).amounts, Usage.of([pod]).amounts
    name = pod["metadata"]["name"]
    for quota in quotas:
        hard, title = quota["spec"]["hard"], quota["metadata"]["name"]
        if unsaid := [text for text in (_unsaid(key, pod) for key in hard) if text]:
            raise Refusal(
                403,
                "Forbidden",
                f'pods "{name}" is forbidden: failed quota: {title}: must specify {"; ".join(unsaid)}',
                details={"name": name, "kind": "pods"},
            )
        over = [
            key
            for key in hard
            if key in wanted and used.get(key, Decimal(0)) + wanted[key] > quantity(hard[key])
        ]
        if over:
            said = (
                "requested: " + ",".join(f"{key}={_shown(wanted[key])}" for key in over),
                "used: " + ",".join(f"{key}={_shown(used.get(key, Decimal(0)))}" for key in over),
                "limited: " + ",".join(f"{key}={hard[key]}" for key in over),
            )
            raise Refusal(
                403,
                "Forbidden",
                f'pods "{name}" is forbidden: exceeded quota: {title}, {", ".join(said)}',
                details={"name": name, "kind": "pods"},
            )


def _unsaid(key: str, pod: Object) -> str:
    """What a quota counts and containers of a pod do not say; "" if they do."""
    part, _, name = (key if "." in key else f"requests.{key}").partition(".")
    if part not in ("requests", "limits") or name not in COUNTED:
        return ""
    silent = [
        one["name"]
        for one in pod["spec"].get("containers", [])
        if name not in (one.get("resources", {}).get(part) or {})
    ]
    return f"{key} for: {','.join(silent)}" if silent else ""


def _shown(number: Decimal) -> str:
    return f"{number.normalize():f}"
