"""All that was read of a job, and questions to it that several rules ask."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from metaloom.k8s.happening import Happening
from metaloom.k8s.heartbeat import Heartbeat, read_heartbeat
from metaloom.k8s.pod_state import NodeState
from metaloom.k8s.top_state import Top
from metaloom.k8s.wording import counted, indices_words, ranks_words, time_of

MISTAKES = (2, 3, 4, 5, 6)  # exit codes of what someone may have to mend


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
        """How often the cluster has started pods, or all of them, again."""
        per_node: dict[object, int] = {}
        for one in self.earlier:
            key = one.pod if one.index is None else one.index
            per_node[key] = per_node.get(key, 0) + (one.attempt == 0)
        again = max((one.num_restarts for one in self.present), default=0)
        attempt = max((one.attempt for one in self.present), default=0)
        return max(self.job.num_restarts, attempt, again, *per_node.values(), 0)

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
        number, of = self.num_restarts(), self.job.max_restarts
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
