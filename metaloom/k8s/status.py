"""What is going on with a job, in words and for machines, from objects that were read: no request is made."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from metaloom.k8s.happening import happenings_of
from metaloom.k8s.heartbeat import Heartbeat, Progress, read_heartbeat
from metaloom.k8s.pod_state import Phase, read_pod
from metaloom.k8s.status_rules import RULES, State
from metaloom.k8s.top_state import read_top
from metaloom.k8s.view import View, is_of, sorted_out

ENDED: tuple[State, ...] = ("done", "failed")
_MAX_MESSAGE = 400


@dataclasses.dataclass(frozen=True)
class NodeStatus:
    """What one node of a job does: `machine` is where, `words` what."""

    index: int | None
    pod: str
    machine: str | None
    phase: Phase
    words: str


@dataclasses.dataclass(frozen=True)
class Status:
    """What is going on with a job.

    Attributes:
        kind: of its object.
        headline: one sentence.
        details: lines that say more.
        is_stuck: whether nothing will change unless someone does something.
        exit_code: of the run, where it has failed and left one.
        num_restarts: pods, or whole jobs, that the cluster started again.
        num_restarts_inside: restarts of the ranks inside the pods, as far as the log tells.
        heard_at: when the log's newest line was written.
        num_nodes: that it wants.
        nodes: those that there are, by their index.
    """

    name: str
    kind: str
    state: State
    headline: str
    details: tuple[str, ...] = ()
    is_stuck: bool = False
    exit_code: int | None = None
    num_restarts: int = 0
    num_restarts_inside: int = 0
    progress: Progress | None = None
    heard_at: datetime.datetime | None = None
    created: datetime.datetime | None = None
    num_nodes: int = 1
    nodes: tuple[NodeStatus, ...] = ()


def read_status(
    top: Mapping[str, Any],
    pods: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    log_tail: Sequence[str] | None,
    now: datetime.datetime,
    *,
    others: Sequence[Mapping[str, Any]] = (),
) -> Status:
    """What is going on with a job. Fields, events and log lines may be missing: less is said then.

    Args:
        top: its Job, JobSet, PyTorchJob or TrainJob.
        pods: with its label; those of an earlier job of that name are passed over.
        events: of its namespace, in either form.
        log_tail: the last lines of the node of rank 0, oldest first, with their times where there are any;
            None where they could not be read, so that their absence says nothing.
        others: its Kueue Workload and LocalQueue, and the Jobs that a JobSet or TrainJob has made.
    """
    job = read_top(top)
    happenings = happenings_of(job.name, events)
    states = [read_pod(pod, happenings, now) for pod in pods if is_of(pod, job)]
    present, earlier = sorted_out(states, job)
    beat = None if log_tail is None else read_heartbeat(log_tail)
    view = View(job, present, earlier, happenings, beat or Heartbeat(), beat is not None, list(others), now)
    told = next(told for told in (rule(view) for rule in RULES) if told is not None)
    return Status(
        name=job.name,
        kind=job.kind,
        state=told.state,
        headline=told.headline,
        details=tuple(_shortened(line) for line in told.details if line),
        is_stuck=told.is_stuck,
        exit_code=told.exit_code,
        num_restarts=view.num_restarts(),
        num_restarts_inside=0 if view.beat.restart is None else view.beat.restart[0],
        progress=view.beat.progress,
        heard_at=view.beat.heard_at,
        created=job.created,
        num_nodes=job.nodes,
        nodes=tuple(NodeStatus(one.index, one.pod, one.machine, one.phase, one.words) for one in present),
    )


def _shortened(line: str) -> str:
    return line if len(line) <= _MAX_MESSAGE else f"{line[: _MAX_MESSAGE - 3]}..."
