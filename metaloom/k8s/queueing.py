"""Why a job waits: what the scheduler or Kueue says, in words."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from metaloom.k8s.happening import Happening
from metaloom.k8s.top_state import true_conditions
from metaloom.k8s.wording import listed

_NODES = re.compile(r"(\d+)/(\d+) nodes are available: (.*)", re.DOTALL)
_COUNTED = re.compile(r"(\d+) (.*)", re.DOTALL)
_TAINT = re.compile(r"node\(s\) had untolerated taint\(?s?\)? ?\{([^}]*)\}")
_REASONS = {
    "node(s) didn't match Pod's node affinity/selector": (
        "does not match its node selector",
        "do not match its node selector",
    ),
    "node(s) were unschedulable": ("is closed to new pods (cordoned)", "are closed to new pods (cordoned)"),
    "node(s) didn't match pod topology spread constraints": (
        "would make its pods too unevenly spread",
        "would make its pods too unevenly spread",
    ),
    "node(s) had volume node affinity conflict": (
        "cannot reach one of its volumes",
        "cannot reach one of its volumes",
    ),
}
_FIRST_COUNTS = re.compile(r", (?=\d+ )")


@dataclasses.dataclass(frozen=True)
class Lack:
    """What nodes of the cluster lack for a pod.

    Attributes:
        num_total: nodes of the cluster.
        reasons: how many nodes each keeps from taking the pod, and it in words; 0 where the scheduler names
            no number.
        is_of_gpus: whether one of the reasons is that GPUs are taken.
    """

    num_total: int
    reasons: tuple[tuple[int, str], ...]
    is_of_gpus: bool


def read_lack(message: str) -> Lack | None:
    """What the scheduler says of a pod that has no machine; None where it speaks of something else."""
    found = _NODES.search(message)
    if found is None:
        return None
    # After the first full stop come other things than the nodes' reasons: claims of devices, preemption.
    said = re.split(r"\. |,? ?preemption: ", found[3])[0].strip().rstrip(".")
    reasons: list[tuple[int, str]] = []
    is_of_gpus = False
    for part in _FIRST_COUNTS.split(said):
        counted = _COUNTED.fullmatch(part)
        number, text = (int(counted[1]), counted[2]) if counted is not None else (0, part)
        is_of_gpus = is_of_gpus or (text.startswith("Insufficient ") and ("gpu" in text or "/mig-" in text))
        reasons.append((number, _reason_words(text.rstrip("."), number)))
    return Lack(int(found[2]), tuple(sorted(reasons, key=lambda one: -one[0])), is_of_gpus)


def _reason_words(text: str, number: int) -> str:
    """A reason of the scheduler in words that go on after the number of nodes."""
    is_one = number == 1
    has = "has" if is_one else "have"
    if text.startswith("Insufficient "):
        what = text.removeprefix("Insufficient ")
        return f"{has} too {'little' if 'memory' in what else 'few'} {what} free"
    taint = _TAINT.match(text)
    if taint is not None:
        return f"{has} the taint {taint[1].strip().removesuffix(':')}, which the job does not tolerate"
    one, several = _REASONS.get(text, (text, text))
    return one if is_one else several


@dataclasses.dataclass(frozen=True)
class KueueWords:
    """What Kueue says of a job that waits: whether it ran before, and why it does not now."""

    evicted_by: str = ""
    why_evicted: str = ""
    why_waiting: str = ""


def kueue_words(others: Sequence[Mapping[str, Any]], happenings: Sequence[Happening]) -> KueueWords:
    """What Kueue says.

    Args:
        others: objects beside the job, of which its Workload is read.
    """
    evicted, why_evicted, why = "", "", ""
    for workload in (one for one in others if one.get("kind") == "Workload"):
        for one in true_conditions(workload):
            if one.kind == "Evicted":
                evicted = "preempted" if one.reason == "Preempted" else f"evicted ({one.reason})"
                why_evicted = one.message
        for condition in (workload.get("status") or {}).get("conditions") or []:
            if condition.get("type") == "QuotaReserved" and condition.get("status") == "False":
                why = (condition.get("message") or "").strip()
    pending = [one for one in happenings if one.kind == "Workload" and one.reason == "Pending"]
    return KueueWords(evicted, why_evicted, (why or (pending[-1].message if pending else "")).rstrip("."))


def queue_details(others: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the LocalQueue says of itself."""
    lines: list[str] = []
    for queue in (one for one in others if one.get("kind") == "LocalQueue"):
        status = queue.get("status") or {}
        counts = [
            f"{status[key]} {words}"
            for key, words in (("pendingWorkloads", "waiting"), ("admittedWorkloads", "admitted"))
            if isinstance(status.get(key), int)
        ]
        name = (queue.get("metadata") or {}).get("name") or ""
        if counts:
            lines.append(f"queue {name}: {listed(counts)}")
        for condition in status.get("conditions") or []:
            if condition.get("type") == "Active" and condition.get("status") == "False":
                lines.append(f"queue {name} takes no work: {condition.get('message') or 'it is not active'}")
    return lines
