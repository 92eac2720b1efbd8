"""What the end of a pod means, by the exit codes of the command in it."""

from __future__ import annotations

from typing import Any

from metaloom.k8s.request import JobRequest

# Stopped from outside, and saved: goes on where it stopped.
ASKED_TO_STOP = 75
# Of recipe, data, checkpoint, launch or run folder, tracking store: they come again. And someone's Ctrl-C.
MISTAKES = (2, 3, 4, 5, 6, 130)


def pod_failure_policy(container: str) -> dict[str, Any]:
    """Rules of a Job, of which the first that matches counts.

    A pod that was preempted, evicted or drained has not failed, whatever it exited with; what no rule matches
    (a fault after the restarts within the pod, a kill for memory) counts towards the limit.
    """
    return {
        "rules": [
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            {"action": "Ignore", "onExitCodes": _codes(container, (ASKED_TO_STOP,))},
            {"action": "FailJob", "onExitCodes": _codes(container, MISTAKES)},
        ]
    }


def num_failures(request: JobRequest) -> int:
    """How many pods may fail: one fault may take down all of them, `max_restarts` times."""
    return request.max_restarts * request.nodes


def _codes(container: str, codes: tuple[int, ...]) -> dict[str, Any]:
    return {"containerName": container, "operator": "In", "values": list(codes)}
