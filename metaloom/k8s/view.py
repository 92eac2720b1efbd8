"""All that was read of a job, and questions to it that several rules ask."""

from __future__ import annotations

import dataclasses
import datetime
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from metaloom.k8s.exit_codes import MISTAKES
from metaloom.k8s.happening import Happening
from metaloom.k8s.heartbeat import Heartbeat, read_heartbeat
from metaloom.k8s.marks import GROUP
from metaloom.k8s.pod_state import NodeState
from metaloom.k8s.top_state import Top
from metaloom.k8s.wording import counted, indices_words, ranks_words, time_of

# What controllers say of a pod that they have made: of a Job's, its index and five letters.
_CREATED = re.compile(r"Created pod: (?P<pod>\S*?(?:-(?P<index>\d+)-[a-z0-9]{5})?)$")


@dataclasses.dataclass(frozen=True)
class View:
    """All that was read of a job.

    Attributes:
        present: the pods that count now, by index.
        earlier: pods of attempts before, which were replaced or are about to be.
        is_heard: whether the log could be read.
    """

    job: Top
    present: list[NodeState]
    earlier: list[NodeState]
    happenings: list[Happening]
    beat: Heartbeat
    is_heard: bool
    others: list[Mapping[str, Any]]
    now: datetime.datetime

    def are(self, *phases: str) -> list[NodeState]:
        """The present nodes in one of these phases."""
        return [one for one in self.present if one.phase in phases]

    def num_missing(self) -> int:
        return max(0, self.job.nodes - len(self.present))

    def num_restarts(self) -> int:
        """How often the cluster has started pods, or all of them, again; of pods that are gone, as far as it
        still tells of them."""
        again = max((one.num_restarts for one in self.present), default=0)
        of_nodes = [number - 1 for number in self._num_pods().values()]
        return max(self._num_restarts_of_all(), again, self._num_by_failures(), *of_nodes, 0)

    def _num_restarts_of_all(self) -> int:
        return max([self.job.num_restarts, *(one.attempt for one in self.present)])

    def _num_pods(self) -> dict[object, int]:
        """How many pods each node has had: those that are there, and those of which events tell."""
        pods: dict[object, dict[str, int]] = {}
        for one in (*self.present, *self.earlier):
            pods.setdefault(one.pod if one.index is None else one.index, {})[one.pod] = 1
        makers = (self.job.name, f"{self.job.name}-{GROUP}-0")
        for event in self.happenings:
            created = _CREATED.search(event.message)
            if event.name not in makers or created is None or not event.is_after(self.job.created):
                continue
            pod = created["pod"]
            # One that stands for many, in a short time, tells of the last pod alone.
            number = 1 if event.message.startswith("(combined") else event.num_times
            own = pods.setdefault(pod if created["index"] is None else int(created["index"]), {})
            own[pod] = max(own.get(pod, 0), number)
        return {key: sum(own.values()) for key, own in pods.items()}

    def _num_by_failures(self) -> int:
        """How often some node was started again at least, by the number of pods of a Job that have failed."""
        if self.job.kind != "Job":
            return 0
        told = self.job.outcome or self.job.verdict
        if told is None:
            not_again = len(self.are("failed")) + self.num_missing()
        else:
            # Where a job has failed, so have all nodes for good: some were ended since another had failed.
            not_again = self.job.nodes if told[0] == "failed" else 0
        return math.ceil(max(0, self.job.num_failed - not_again) / self.job.nodes)

    def who(self, node: NodeState) -> str:
        """A node with its ranks: node 3 (ranks 24-31)."""
        if node.index is None:
            return f"pod {node.pod}"
        if self.job.nodes == 1 and self.job.ranks_per_node == 1:
            return "node 0"
        return f"node {node.index} ({ranks_words(node.index, self.job.ranks_per_node)})"

    def what(self, nodes: Sequence[NodeState]) -> str:
        """Several nodes: nodes 0-2 and 5."""
        indices = [one.index for one in nodes if one.index is not None]
        return indices_words(indices) if len(indices) == len(nodes) else counted(len(nodes), "pod")

    def blamed(self) -> NodeState | None:
        """The node by which others have ended: of those that ended badly, the first that nobody stopped."""
        bad = [one for one in (*self.present, *self.earlier) if has_failed(one)]
        newest_attempt = max((one.attempt for one in bad), default=0)
        return min((one for one in bad if one.attempt == newest_attempt), key=self._blame, default=None)

    def _blame(self, node: NodeState) -> tuple[int, datetime.datetime, int]:
        ended = node.ended or self.now
        if node.is_out_of_memory:
            weight = 0
        elif node.exit_code in MISTAKES:
            weight = 1
        elif node.disruption:
            weight = 2
        else:
            weight = 4 if node.exit_code in (75, 130, 143) else 3
        return weight, ended, -1 if node.index is None else node.index

    def error_lines(self, node: NodeState | None) -> list[str]:
        """The error that ended the run: of the log, else of a node's last message."""
        if self.beat.error:
            return list(self.beat.error)
        return [] if node is None else list(read_heartbeat(node.last_words.splitlines()).error)

    def before(self) -> str:
        """By what the job is being started again; "" if it is not."""
        gone = [one for one in self.earlier if has_failed(one)]
        if gone:
            last = max(gone, key=lambda one: (one.attempt, one.ended or one.created or self.now))
            together = [one for one in gone if one.words == last.words and one.attempt == last.attempt]
            who = self.who(last) if len({one.index for one in together}) == 1 else self.what(together)
            return f"{who} {verb(last, len(together))}"
        number, of = self._num_restarts_of_all(), self.job.max_restarts
        if self.job.kind in ("JobSet", "TrainJob") and number:
            return f"restart {number}" + ("" if of is None else f" of {of}") + " of all nodes"
        return ""


def verb(node: NodeState, number: int) -> str:
    """What a node did, as words that go on after its name."""
    was = "was" if number == 1 else "were"
    if node.disruption or node.words.startswith(("preempted", "evicted", "deleted", "refused")):
        return f"{was} {node.words}"
    if node.is_out_of_memory:
        return f"ran {node.words}"
    return node.words


def has_failed(node: NodeState) -> bool:
    if node.phase in ("failed", "lost"):
        return True
    return node.phase == "stopping" and bool(node.disruption)


def is_of(pod: Mapping[str, Any], job: Top) -> bool:
    """Whether a pod belongs to the job, and not to an earlier one of the same name."""
    meta = pod.get("metadata") or {}
    created = time_of(meta.get("creationTimestamp"))
    if job.created is not None and created is not None and created < job.created:
        return False
    owners = [one for one in meta.get("ownerReferences") or [] if one.get("kind") == job.kind]
    return not (job.uid and owners) or any(one.get("uid") == job.uid for one in owners)


def sorted_out(states: Sequence[NodeState], job: Top) -> tuple[list[NodeState], list[NodeState]]:
    """The pods that count now, one for each node, and those that earlier attempts left."""
    attempt = max(
        [one.attempt for one in states] + ([job.num_restarts] if job.kind == "JobSet" else []), default=0
    )
    oldest = datetime.datetime.min.replace(tzinfo=datetime.UTC)
    present: dict[object, NodeState] = {}
    earlier: list[NodeState] = []
    for one in sorted(states, key=lambda one: (one.attempt, one.created or oldest)):
        key: object = one.pod if one.index is None else one.index
        if one.attempt < attempt:
            earlier.append(one)
        else:
            if key in present:
                earlier.append(present[key])
            present[key] = one
    return sorted(present.values(), key=lambda one: (one.index is None, one.index or 0, one.pod)), earlier
