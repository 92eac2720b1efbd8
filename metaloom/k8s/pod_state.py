"""What one pod does, from its conditions, its containers and its events."""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from metaloom.k8s.exit_codes import exit_words
from metaloom.k8s.happening import Happening
from metaloom.k8s.marks import CONTAINERS, node_index
from metaloom.k8s.wording import clock_words, time_of

Phase = Literal["queued", "starting", "running", "done", "failed", "stopping", "lost"]
_ATTEMPT_LABEL = "jobset.sigs.k8s.io/restart-attempt"

OUT_OF_MEMORY = "OOMKilled"
_DISRUPTIONS = {
    "PreemptionByScheduler": "preempted by a pod of higher priority",
    "DeletionByTaintManager": "evicted by a taint of its machine, which is lost or being drained",
    "EvictionByEvictionAPI": "evicted on request, as by a drain or an autoscaler",
    "DeletionByPodGC": "deleted, since its machine is gone",
    "TerminationByKubelet": "ended by its machine",
}
_IMAGE_REASONS = (
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "ImageInspectError",
    "RegistryUnavailable",
    "SignatureValidationFailed",
)
_CONFIG_REASONS = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
_VOLUME_REASONS = ("FailedMount", "FailedAttachVolume", "FailedMapVolume")
# What a runtime puts before the cause of an image that cannot be pulled.
_BEFORE_CAUSE = re.compile(
    r'(?:Back-off pulling image "[^"]*"(?:: )?|Failed to pull image "[^"]*": |ErrImagePull: |'
    r"rpc error: code = \w+ desc = |Error response from daemon: |"
    r'failed to pull and unpack image "[^"]*": |failed to resolve (?:reference|image) "[^"]*": |'
    r'Failed to apply default image tag "[^"]*": |Error: )'
)
_UNREACHABLE_S = (
    60  # past the end of its grace period, a pod that is still there is on a machine that is gone
)


@dataclasses.dataclass(frozen=True)
class NodeState:
    """What a node of a job does.

    Attributes:
        index: of the node; None where its pod does not say.
        machine: on which it runs; None before it was scheduled.
        words: what it does, without a subject: "running since 14:05 UTC".
        attempt: of the whole job, where that starts again as a whole.
        started, ended: of its container.
        exit_code: of its container, of the one before where that was started again.
        is_stuck: whether nothing will change unless someone does something.
        disruption: by what it was ended from outside; "" if by nothing.
        unscheduled: what the scheduler says of why it has no machine; "" where it has one.
        trouble: what its container or its machine says of why it does not start; "" where there is none.
        last_words: what its container left as its last message.
        num_restarts: of its container.
    """

    index: int | None
    pod: str
    machine: str | None
    phase: Phase
    words: str
    attempt: int = 0
    created: datetime.datetime | None = None
    started: datetime.datetime | None = None
    ended: datetime.datetime | None = None
    exit_code: int | None = None
    is_out_of_memory: bool = False
    is_stuck: bool = False
    disruption: str = ""
    unscheduled: str = ""
    trouble: str = ""
    last_words: str = ""
    num_restarts: int = 0


def read_pod(pod: Mapping[str, Any], happenings: Sequence[Happening], now: datetime.datetime) -> NodeState:
    """What a pod does.

    Args:
        happenings: of its job, oldest first.
    """
    return _Pod(pod, happenings, now).read()


def image_cause(message: str, image: str) -> str:
    """What a registry said, without what its callers put before it."""
    cause = message.strip()
    found = _BEFORE_CAUSE.match(cause)
    while found is not None:
        cause = cause[found.end() :].strip()
        found = _BEFORE_CAUSE.match(cause)
    return cause.removeprefix(f"{image}: ")


class _Pod:
    """One pod while it is read."""

    def __init__(
        self, pod: Mapping[str, Any], happenings: Sequence[Happening], now: datetime.datetime
    ) -> None:
        self._now = now
        meta, spec, status = (pod.get(key) or {} for key in ("metadata", "spec", "status"))
        self._meta, self._spec, self._status = meta, spec, status
        self._index = node_index(pod)
        self._own = [one for one in happenings if one.kind == "Pod" and one.name == meta.get("name")]
        self._conditions = {one.get("type"): one for one in status.get("conditions") or []}
        statuses = {one.get("name"): one for one in status.get("containerStatuses") or []}
        name = next((name for name in CONTAINERS if name in statuses), next(iter(statuses), ""))
        self._container = statuses.get(name) or {}
        self._state = self._container.get("state") or {}
        last = (self._container.get("lastState") or {}).get("terminated")
        self._terminated = self._state.get("terminated") or {}
        self._last = self._terminated or last or {}
        self._declared: Mapping[str, Any] = next(
            (one for one in spec.get("containers") or [] if one.get("name") in (name, *CONTAINERS)), {}
        )

    def read(self) -> NodeState:
        labels = self._meta.get("labels") or {}
        reason = self._last.get("reason")
        code = self._last.get("exitCode")
        running = self._state.get("running") or {}
        base = NodeState(
            index=self._index,
            pod=self._meta.get("name") or "",
            machine=self._spec.get("nodeName"),
            phase="starting",
            words="",
            attempt=int(labels.get(_ATTEMPT_LABEL) or 0),
            created=time_of(self._meta.get("creationTimestamp")),
            started=time_of(running.get("startedAt") or self._last.get("startedAt")),
            ended=time_of(self._terminated.get("finishedAt")),
            exit_code=code,
            is_out_of_memory=reason == OUT_OF_MEMORY,
            disruption=self._disruption(),
            last_words=(self._last.get("message") or "").strip(),
            num_restarts=self._container.get("restartCount") or 0,
        )
        phase = self._status.get("phase")
        if phase == "Succeeded":
            return dataclasses.replace(base, phase="done", words="done")
        if phase == "Failed":
            return dataclasses.replace(base, phase="failed", words=self._failed_words(base))
        if self._is_lost():
            is_ending = self._meta.get("deletionTimestamp") is not None
            return dataclasses.replace(base, phase="lost", words=self._lost_words(base), is_stuck=is_ending)
        if self._meta.get("deletionTimestamp") is not None:
            return dataclasses.replace(base, phase="stopping", words=self._stopping_words(base))
        if phase == "Running":
            return self._running(base)
        return self._pending(base)

    def _running(self, base: NodeState) -> NodeState:
        waiting = self._state.get("waiting")
        if waiting is not None:
            if waiting.get("reason") == "CrashLoopBackOff":
                words = f"{self._ended_words(base)}; started again in a moment"
                return dataclasses.replace(base, phase="failed", words=words)
            return self._pending(base)
        if self._terminated:
            code = base.exit_code
            return dataclasses.replace(
                base, phase="done" if code == 0 else "failed", words=self._ended_words(base)
            )
        since = "" if base.started is None else f" since {clock_words(base.started, self._now)}"
        return dataclasses.replace(base, phase="running", words=f"running{since}")

    def _pending(self, base: NodeState) -> NodeState:
        scheduled = self._conditions.get("PodScheduled") or {}
        if scheduled.get("status") == "False" or (not scheduled and base.machine is None):
            message = scheduled.get("message") or self._message_of("FailedScheduling")
            if scheduled.get("reason") == "SchedulingGated":
                return dataclasses.replace(base, phase="queued", words="held back by a scheduling gate")
            if not message:
                return dataclasses.replace(base, phase="queued", words="waiting for the scheduler")
            return dataclasses.replace(
                base, phase="queued", words="waiting for a machine", unscheduled=message
            )
        trouble = self._trouble()
        if trouble:
            return dataclasses.replace(base, words=trouble, trouble=trouble, is_stuck=True)
        return dataclasses.replace(base, words=self._starting_words())

    def _trouble(self) -> str:
        """Why a pod that has a machine does not start; "" if nothing is wrong."""
        for one in [*(self._status.get("initContainerStatuses") or []), self._container]:
            waiting = (one.get("state") or {}).get("waiting") or {}
            reason, message = waiting.get("reason") or "", (waiting.get("message") or "").strip()
            image = one.get("image") or self._declared.get("image") or ""
            if reason in _IMAGE_REASONS:
                cause = image_cause(message, image) or image_cause(self._message_of("Failed"), image)
                return f"image pull failed: {image}" + (f": {cause}" if cause else f" ({reason})")
            if reason in _CONFIG_REASONS:
                what = "not configured" if reason == "CreateContainerConfigError" else "not started"
                return f"container {what}: {message or reason}"
            ended = (one.get("lastState") or {}).get("terminated") or {}
            if reason == "CrashLoopBackOff" and one is not self._container:
                code = exit_words(int(ended.get("exitCode") or 1))
                return f"init container {one.get('name')} ended with {code} again and again"
        last = self._own[-1] if self._own else None
        if last is None or not last.is_warning:
            return ""
        if last.reason in _VOLUME_REASONS:
            return f"a volume does not mount: {last.message}"
        if last.reason == "FailedCreatePodSandBox":
            return f"its sandbox is not made: {last.message}"
        return ""

    def _starting_words(self) -> str:
        last = self._own[-1] if self._own else None
        image = self._container.get("image") or self._declared.get("image") or ""
        if last is not None and last.reason == "Pulling":
            since = "" if last.at is None else f" since {clock_words(last.at, self._now)}"
            return f"pulling the image {image}{since}"
        for one in self._status.get("initContainerStatuses") or []:
            if "terminated" not in (one.get("state") or {}):
                return f"starting: waits for its init container {one.get('name')}"
        return "starting: its container is being created"

    def _is_lost(self) -> bool:
        if self._status.get("reason") == "NodeLost" or self._status.get("phase") == "Unknown":
            return True
        killed_at = time_of(self._meta.get("deletionTimestamp"))  # once its grace period is over
        if killed_at is not None:
            overdue_s = (self._now - killed_at).total_seconds()
            return bool(self._spec.get("nodeName")) and overdue_s > _UNREACHABLE_S
        # No probe is declared: a container that is ready in a pod that is not has a machine that is silent.
        ready = self._conditions.get("Ready") or {}
        silent = ready.get("status") in ("False", "Unknown")
        return silent and "running" in self._state and self._container.get("ready") is True

    def _lost_words(self, base: NodeState) -> str:
        at = time_of((self._conditions.get("Ready") or {}).get("lastTransitionTime"))
        since = "" if at is None else f" since {clock_words(at, self._now)}"
        return f"its machine {base.machine or ''} has not answered{since}".replace("  ", " ")

    def _stopping_words(self, base: NodeState) -> str:
        until = time_of(self._meta.get("deletionTimestamp"))
        end = (
            "" if until is None else f", for which it has until {until.astimezone(datetime.UTC):%H:%M:%S} UTC"
        )
        return f"{base.disruption or 'stopped'}: saves and ends{end}"

    def _failed_words(self, base: NodeState) -> str:
        if base.disruption:
            return base.disruption
        reason, message = self._status.get("reason"), _sentence(self._status.get("message") or "")
        if reason == "DeadlineExceeded":
            return "ended, since it ran for longer than its deadline"
        if reason and not self._terminated:
            return f"refused or ended by its machine ({reason})" + (f": {message}" if message else "")
        return self._ended_words(base)

    def _ended_words(self, base: NodeState) -> str:
        if base.is_out_of_memory:
            return f"out of memory ({self._memory_words()}{OUT_OF_MEMORY}, exit code {base.exit_code})"
        if base.exit_code == 0:
            return "done"
        if base.exit_code is None:
            return "ended, and left no exit code"
        reason, message = self._last.get("reason"), (self._last.get("message") or "").strip()
        if reason in ("StartError", "ContainerCannotRun") and message:
            return f"not started: {message}"
        return f"ended with {exit_words(base.exit_code)}"

    def _memory_words(self) -> str:
        limit = ((self._declared.get("resources") or {}).get("limits") or {}).get("memory")
        return f"limit {limit}, " if limit else ""

    def _disruption(self) -> str:
        found = self._conditions.get("DisruptionTarget") or {}
        reason = found.get("reason") or ""
        if found.get("status") != "True":
            # Kubernetes before 1.26, and pods that their machine refused, have no such condition.
            if self._status.get("reason") not in ("Evicted", "Preempting", "NodeShutdown", "Terminated"):
                return ""
            reason = "TerminationByKubelet"
        words = _DISRUPTIONS.get(reason) or f"ended from outside ({reason or 'no reason given'})"
        said = _sentence(self._status.get("message") or found.get("message") or "")
        return f"{words}: {said}" if reason == "TerminationByKubelet" and said else words

    def _message_of(self, reason: str) -> str:
        return next((one.message for one in reversed(self._own) if one.reason == reason), "")


def _sentence(message: str) -> str:
    """The first sentence of a message, without its full stop."""
    return message.strip().partition(". ")[0].removesuffix(".")
