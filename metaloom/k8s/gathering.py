"""Reads from a cluster what the status of a job is told by."""

from __future__ import annotations

import dataclasses
import datetime
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from metaloom.errors import LaunchError
from metaloom.k8s.marks import JOB_LABEL, MANAGED, QUEUE_LABEL, container_of, node_index
from metaloom.k8s.refusals import UNWELL, InterruptedStreamError, RefusedError
from metaloom.k8s.resources import (
    EVENTS,
    JOB_SETS,
    JOBS,
    LOCAL_QUEUES,
    PODS,
    PYTORCH_JOBS,
    TRAIN_JOBS,
    WORKLOADS,
    Resource,
)
from metaloom.k8s.status import Status, read_status
from metaloom.k8s.top_state import read_top

if TYPE_CHECKING:
    from metaloom.k8s.client import Cluster

T = TypeVar("T")
KINDS = (JOBS, JOB_SETS, PYTORCH_JOBS, TRAIN_JOBS)
NUM_LOG_LINES = 200


class NoSuchJobError(LaunchError):
    """A job that is not there; the message names one that may be meant."""


@dataclasses.dataclass(frozen=True)
class Found:
    """The object of a job."""

    resource: Resource
    top: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.top["metadata"]["name"])

    @property
    def is_over(self) -> bool:
        """Whether the job has ended, as its object says."""
        return read_top(self.top).outcome is not None

    @property
    def labels(self) -> dict[str, str]:
        """Of all that was made for the job."""
        return {JOB_LABEL: self.name}


class Gathering:
    """What can be read of jobs in a namespace.

    What a user may not read is left out, and told once in `notes`.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.notes: list[str] = []

    def jobs(self) -> list[Found]:
        """All jobs of metaloom, newest first.

        Raises:
            LaunchError: none of their kinds may be read.
        """
        found: list[Found] = []
        refusals: list[LaunchError] = []
        for kind in self._kinds():
            try:
                objects = self._cluster.list(kind, labels=MANAGED)
            except RefusedError as error:
                refusals.append(error)
                continue
            # A Job that a JobSet or a TrainJob has made is a part of one, and has its labels.
            found += [Found(kind, one) for one in objects if not one["metadata"].get("ownerReferences")]
        if refusals and len(refusals) == len(self._kinds()):
            raise refusals[0]
        for refusal in refusals:
            self._note(str(refusal))
        return sorted(found, key=lambda one: str(one.top["metadata"].get("creationTimestamp")), reverse=True)

    def job(self, name: str) -> Found:
        """A job by its name.

        Raises:
            NoSuchJobError: there is none.
            LaunchError: it may not be read, or is not one of metaloom's.
        """
        refusals: list[LaunchError] = []
        for kind in self._kinds():
            try:
                top = self._cluster.get(kind, name)
            except RefusedError as error:
                refusals.append(error)
                continue
            if top is None:
                continue
            if not (top["metadata"].get("labels") or {}).items() >= MANAGED.items():
                raise LaunchError(
                    f"{kind.kind} {name!r} in {self._cluster.shown} was not made by metaloom: it lacks the "
                    "label app.kubernetes.io/managed-by=metaloom. Use kubectl for it."
                )
            return Found(kind, {"kind": kind.kind, "apiVersion": kind.api_version} | top)
        if refusals:
            raise refusals[0]
        raise NoSuchJobError(self._missing(name))

    def status(self, name: str, now: datetime.datetime) -> tuple[Found, Status]:
        """A job, and what is going on with it.

        Its object is read before and after the rest: a job that ends in between is told by what its pods had
        come to at its end, and not by what they were before.

        Raises:
            NoSuchJobError: there is none.
        """
        found = self.job(name)
        while True:
            pods = self._cluster.list(PODS, labels=found.labels)
            events, tail = self._listed(EVENTS), self._log_tail(pods)
            was_over, found = found.is_over, self.job(name)
            if found.is_over == was_over:
                return found, self._read(found, pods, events, tail, now)

    def statuses(self, jobs: Sequence[Found], now: datetime.datetime) -> list[Status]:
        """What is going on with several jobs; of the logs, only those of jobs that run are read."""
        pods = self._cluster.list(PODS, labels=MANAGED)
        events = self._listed(EVENTS)
        told = []
        for found in jobs:
            own = [pod for pod in pods if (pod["metadata"].get("labels") or {}).get(JOB_LABEL) == found.name]
            status = self._read(found, own, events, None, now)
            if status.state == "running":
                status = self._read(found, own, events, self._log_tail(own), now)
            told.append(status)
        return told

    def _read(
        self,
        found: Found,
        pods: Sequence[dict[str, Any]],
        events: Sequence[dict[str, Any]],
        tail: Sequence[str] | None,
        now: datetime.datetime,
    ) -> Status:
        return read_status(found.top, pods, events, tail, now, others=self._others(found))

    def _others(self, found: Found) -> list[dict[str, Any]]:
        """What is told by objects beside the job: the Jobs inside it, its Workload and its queue."""
        others: list[dict[str, Any]] = []
        if found.resource in (JOB_SETS, TRAIN_JOBS):
            inside = self._listed(JOBS, found.labels)
            others += [{"kind": "Job"} | one for one in inside]
        queue = (found.top["metadata"].get("labels") or {}).get(QUEUE_LABEL)
        return [*others, *self._of_kueue(found, queue)] if queue else others

    def _of_kueue(self, found: Found, queue: str) -> list[dict[str, Any]]:
        """The Workload of a job, and the LocalQueue in which it waits."""
        others: list[dict[str, Any]] = []
        workloads, queues = (self._cluster.as_served(kind) for kind in (WORKLOADS, LOCAL_QUEUES))
        uid = found.top["metadata"].get("uid")
        for workload in [] if workloads is None else self._listed(workloads):
            owners = workload["metadata"].get("ownerReferences") or []
            if any(owner.get("uid") == uid for owner in owners):
                others.append({"kind": "Workload"} | workload)
        local = queues and self._optional(lambda: self._cluster.get(queues, queue))
        return [*others, {"kind": "LocalQueue"} | local] if local else others

    def _log_tail(self, pods: Sequence[dict[str, Any]]) -> list[str] | None:
        """The last lines of the newest pod of the first node that has started; of another, where none has.

        Returns:
            None where no log can be read.
        """
        begun = [pod for pod in pods if _has_begun(pod)]
        begun.sort(key=lambda pod: str(pod["metadata"].get("creationTimestamp")), reverse=True)
        first = [pod for pod in begun if node_index(pod) == 0]
        chosen = next(iter(first or begun), None)
        return None if chosen is None else self._optional(lambda: self._tail_of(chosen))

    def _tail_of(self, pod: dict[str, Any]) -> list[str] | None:
        lines: list[str] = []
        try:
            for line in self._cluster.log(
                pod["metadata"]["name"], container=container_of(pod), tail=NUM_LOG_LINES, timestamps=True
            ):
                lines.append(line)
        except InterruptedStreamError:
            pass  # whole lines came; those that are missing are read the next time
        except RefusedError as error:
            if error.status not in (400, 404, *UNWELL):
                raise
            return None  # the pod is gone, or its machine does not answer
        return lines

    def _kinds(self) -> list[Resource]:
        return [kind for kind in KINDS if kind is JOBS or self._cluster.serves(kind)]

    def _optional(self, read: Callable[[], T | None]) -> T | None:
        try:
            return read()
        except RefusedError as error:
            self._note(str(error))
            return None

    def _listed(self, resource: Resource, labels: Mapping[str, str] = {}) -> list[dict[str, Any]]:
        return self._optional(lambda: self._cluster.list(resource, labels=labels)) or []

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _missing(self, name: str) -> str:
        names = [found.name for found in self.jobs()]
        close = difflib.get_close_matches(name, names, n=1)
        if not names:
            return f"there is no job {name!r} in {self._cluster.shown}, nor any other of metaloom."
        meant = f"did you mean {close[0]!r}? All are" if close else "all are"
        return f"there is no job {name!r} in {self._cluster.shown}; {meant} listed by: metaloom jobs list"


def _has_begun(pod: dict[str, Any]) -> bool:
    """Whether the container of a pod runs, or has."""
    for one in (pod.get("status") or {}).get("containerStatuses") or []:
        state, last = one.get("state") or {}, one.get("lastState") or {}
        if "running" in state or "terminated" in state or "terminated" in last:
            return True
    return False
