"""What the end of a pod means, by the exit codes of the command in it."""

from __future__ import annotations

from typing import Any

# Stopped from outside, and saved: goes on where it stopped.
ASKED_TO_STOP = 75
# A mistake in the recipe, a command that the image does not have, and someone's Ctrl-C: they come again.
# Those of data, checkpoints, run folder and tracking store (3 to 6) may come of a storage that is down.
FINAL = (2, 126, 127, 130)


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
