"""What a Job makes of the end of a pod."""

from __future__ import annotations

from typing import Any

from metaloom.k8s.exit_codes import ASKED_TO_STOP, FINAL


def pod_failure_policy(container: str) -> dict[str, Any]:
    """Rules of a Job, of which the first that matches counts.

    A pod that was preempted, evicted or drained has not failed, whatever it exited with; what no rule matches
    (a fault after the restarts within the pod, a kill for memory, data that cannot be read) counts towards
    the limit.
    """
    return {
        "rules": [
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            {"action": "Ignore", "onExitCodes": _codes(container, (ASKED_TO_STOP,))},
            {"action": "FailJob", "onExitCodes": _codes(container, FINAL)},
        ]
    }


def _codes(container: str, codes: tuple[int, ...]) -> dict[str, Any]:
    return {"containerName": container, "operator": "In", "values": list(codes)}
