"""The output of a job's pods as one stream of lines, through replacements and connections that break.

Of a place in a log, the time of its last line is kept, and the lines that have that time: a connection that
breaks is opened again from that second on, and what was told is left out. So no line is lost or told twice,
as long as the node has it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import heapq
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from metaloom.errors import LaunchError
from metaloom.k8s.client import Cluster
from metaloom.k8s.marks import container_of, node_index
from metaloom.k8s.refusals import UNWELL, InterruptedStreamError, RefusedError
from metaloom.k8s.resources import PODS
from metaloom.k8s.streams import Lines
from metaloom.k8s.watching import Watched

Object = dict[str, Any]

ENDED = ("Succeeded", "Failed")
STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")
RANK = re.compile(r"\[rank (\d+)\] ?(.*)", re.DOTALL)
# Lines that readers hold for a consumer that is slow, over all pods.
NUM_WAITING = 1000
# How often a log that breaks off before its next line is opened again.
NUM_TRIES = 5
PAUSE_S = 0.5  # between two tries where the pod's machine does not answer
# How the server says that a container has no log yet, or that there is no such pod.
NOT_STARTED = 400
NOT_THERE = 404
# How often it is asked whether the job is over, while nothing comes.
ASK_S = 1.0
# How long threads are waited for when following ends early.
CLOSING_S = 2.0


@dataclasses.dataclass(frozen=True)
class LogLine:
    """A line that a pod wrote.

    Attributes:
        node: the pod's index in the job.
        rank: of the process that wrote it; None: the pod's agent did.
        text: without the rank's prefix.
        timestamp: when it was written, RFC 3339.
    """

    node: int
    rank: int | None
    text: str
    timestamp: str

    def __str__(self) -> str:
        return f"[node {self.node}] {self.text}" if self.rank is None else f"[rank {self.rank}] {self.text}"


def merged(
    cluster: Cluster,
    labels: Mapping[str, str],
    *,
    follow: bool = False,
    rank: int | None = None,
    tail: int | None = None,
    is_over: Callable[[], bool] | None = None,
) -> Iterator[LogLine]:
    """The lines of all pods that have the labels. What is there already comes in the order of its times.

    Every pod is read also where one rank is asked for: which ranks a pod holds changes when pods are lost.
    Memory: some lines a pod, however long the logs are.

    Args:
        follow: goes on, with pods that come later too, until the job is over and all was read. Where the
            iterator is closed before (or Ctrl-C raises in it), no connection is left.
        rank: lines of that rank alone.
        tail: of each pod, only so many of the lines that are there.
        is_over: whether the job makes no more pods; asked now and then while following (of a `patient`
            cluster, so that an outage does not end it). None: it is when there were pods, and all have ended.

    Raises:
        LaunchError: the cluster cannot be asked.
    """
    pods = [_Pod(obj) for obj in cluster.list(PODS, labels=labels)]
    pods.sort(key=lambda pod: (pod.node, pod.object["metadata"].get("creationTimestamp") or ""))
    if not follow:
        yield from _history(cluster, pods, rank, tail)
        return
    with contextlib.closing(cluster.patient()) as patient:
        yield from _history(patient, pods, rank, tail)
        with contextlib.closing(_Following(patient, labels, pods, rank, tail, is_over)) as following:
            yield from following.lines()


class _Pod:
    """A pod, and the place up to which its log was told.

    Attributes:
        object: the pod as it was last seen.
        is_gone: it was deleted.
        last: the time of the last line that was told; "" for none.
    """

    def __init__(self, obj: Object) -> None:
        self.object = obj
        self.is_gone = False
        self.last = ""
        self.num_restarts = 0
        self.stream: Lines | None = None
        self._told: collections.Counter[str] = collections.Counter()
        self._unstamped = ""

    @property
    def name(self) -> str:
        return str(self.object["metadata"]["name"])

    @property
    def uid(self) -> str:
        return str(self.object["metadata"]["uid"])

    @property
    def node(self) -> int:
        return node_index(self.object) or 0

    @property
    def container(self) -> str:
        return container_of(self.object)

    @property
    def has_ended(self) -> bool:
        return self.is_gone or self.object.get("status", {}).get("phase") in ENDED

    @property
    def restarts(self) -> int:
        """How often its container was started again."""
        for status in self.object.get("status", {}).get("containerStatuses") or []:
            if status["name"] == self.container:
                return int(status.get("restartCount", 0))
        return 0

    def parse(self, lines: Iterator[str]) -> Iterator[LogLine]:
        """The lines that were not told, of a log that is read from the second of the last one on."""
        left = self._told.copy()
        is_known = bool(self.last)
        for line in lines:
            at, _, text = line.partition(" ")
            if not STAMP.match(at):
                # A word of the node itself, such as that the log is gone; it comes with each connection.
                if line != self._unstamped:
                    self._unstamped = line
                    yield LogLine(self.node, None, line, self.last)
                continue
            key, last = _sortable(at), _sortable(self.last)
            if is_known and key < last:
                continue
            if is_known and key == last and left[text] > 0:
                left[text] -= 1
                continue
            if at != self.last:
                is_known = False
                self.last = at
                self._told.clear()
            self._told[text] += 1
            found = RANK.fullmatch(text)
            writer = int(found[1]) if found else None
            yield LogLine(self.node, writer, found[2] if found else text, at)


def _sortable(stamp: str) -> tuple[str, str]:
    """Times of one node, in order: fractions of a second may have any number of digits."""
    return stamp[:19], stamp[20:].partition("Z")[0].partition("+")[0]


def _read(
    cluster: Cluster, pod: _Pod, *, follow: bool = False, previous: bool = False, tail: int | None = None
) -> Iterator[LogLine]:
    """The lines after the place that was told, over one connection."""
    stream = cluster.log(
        pod.name,
        container=pod.container,
        follow=follow,
        timestamps=True,
        previous=previous,
        since_time=pod.last[:19] + "Z" if pod.last else None,
        tail=None if pod.last else tail,
    )
    with contextlib.closing(stream):
        pod.stream = stream
        yield from pod.parse(stream)


def _read_to_the_end(
    cluster: Cluster, pod: _Pod, *, previous: bool = False, tail: int | None = None
) -> Iterator[LogLine]:
    """What the log has now, over as many connections as it takes; nothing where there is none (any more)."""
    num_broken = 0
    while True:
        place = pod.last
        try:
            yield from _read(cluster, pod, previous=previous, tail=tail)
            return
        except InterruptedStreamError:
            num_broken = num_broken + 1 if pod.last == place else 0
            if num_broken > NUM_TRIES:
                raise
        except RefusedError as error:
            if error.status in (NOT_STARTED, NOT_THERE):
                return
            if error.status not in UNWELL:
                raise
            num_broken += 1
            if num_broken > NUM_TRIES:
                print(f"note: {error}", file=sys.stderr, flush=True)
                return
            time.sleep(PAUSE_S)


def _past(cluster: Cluster, pod: _Pod, rank: int | None, tail: int | None) -> Iterator[LogLine]:
    """The lines that a pod has written by now, of all starts of its container."""
    lines = _past_of_all(cluster, pod, tail if rank is None else None)
    if rank is None:
        return lines
    own = (line for line in lines if line.rank == rank)
    # The server would count the lines of all ranks.
    return own if tail is None else iter(collections.deque(own, maxlen=tail))


def _past_of_all(cluster: Cluster, pod: _Pod, tail: int | None) -> Iterator[LogLine]:
    if pod.restarts > pod.num_restarts:
        pod.num_restarts = pod.restarts
        if tail is None:
            yield from _read_to_the_end(cluster, pod, previous=True)
    yield from _read_to_the_end(cluster, pod, tail=tail)


def _history(cluster: Cluster, pods: Sequence[_Pod], rank: int | None, tail: int | None) -> Iterator[LogLine]:
    """The lines of all pods by now, in the order of their times."""
    streams = [_past(cluster, pod, rank, tail) for pod in pods]
    try:
        yield from heapq.merge(*streams, key=lambda line: _sortable(line.timestamp))
    finally:
        for pod in pods:
            if pod.stream is not None:
                pod.stream.close()


class _Following:
    """Threads that read the logs of all pods, one each, and one that watches for new pods.

    Args:
        cluster: that is patient; it is closed with this.
        pods: whose lines were told up to their places.
    """

    def __init__(
        self,
        cluster: Cluster,
        labels: Mapping[str, str],
        pods: Sequence[_Pod],
        rank: int | None,
        tail: int | None,
        is_over: Callable[[], bool] | None,
    ) -> None:
        self._cluster = cluster
        self._labels = labels
        self._rank = rank
        self._tail = tail
        self._is_over = is_over or self._have_all_ended
        self._lines: queue.Queue[LogLine] = queue.Queue(NUM_WAITING)
        self._changed = threading.Condition()
        self._pods: dict[str, _Pod] = {}
        self._busy: set[str] = set()
        self._threads: list[threading.Thread] = []
        self._error: LaunchError | None = None
        self._is_ending = False
        self._is_closed = False
        for pod in pods:
            self._begin(pod, tail if rank is None else None)
        self._watch: Watched = cluster.watch(PODS, labels=labels)
        self._start(self._watch_pods)

    def lines(self) -> Iterator[LogLine]:
        """What is written, until the job is over and all was read."""
        asked = 0.0
        while True:
            with contextlib.suppress(queue.Empty):
                yield self._lines.get(timeout=0.1)
                continue
            if self._error is not None:
                raise self._error
            if not self._busy and time.monotonic() - asked > ASK_S:
                asked = time.monotonic()
                if self._is_over():
                    break
        yield from self._ended()

    def close(self) -> None:
        """Ends all threads and connections; what was not told by then is dropped."""
        self._is_closed = True
        self._end()
        self._cluster.close()
        # One that just waits for an answer ends when that comes; no thread keeps the process.
        deadline = time.monotonic() + CLOSING_S
        while self._has_threads() and time.monotonic() < deadline:
            time.sleep(0.01)

    def _ended(self) -> Iterator[LogLine]:
        """All that is left when the job is over: also of pods that came and went between two looks."""
        self._end()
        while self._has_threads() or not self._lines.empty():
            with contextlib.suppress(queue.Empty):
                yield self._lines.get(timeout=0.05)
        pods = []
        for obj in self._cluster.list(PODS, labels=self._labels):
            pod = self._pods.get(obj["metadata"]["uid"]) or _Pod(obj)
            pod.object = obj
            pods.append(pod)
        yield from _history(self._cluster, pods, self._rank, None)

    def _end(self) -> None:
        with self._changed:
            self._is_ending = True
            self._changed.notify_all()
        self._watch.close()

    def _has_threads(self) -> bool:
        """Whether a thread is still there; hangs up on those that wait for lines."""
        for pod in list(self._pods.values()):
            if pod.stream is not None:
                pod.stream.close()
        return any(thread.is_alive() for thread in self._threads)

    def _have_all_ended(self) -> bool:
        pods = [_Pod(obj) for obj in self._cluster.list(PODS, labels=self._labels)]
        return bool(pods or self._pods) and all(pod.has_ended for pod in pods)

    def _start(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except LaunchError as error:
                if not self._is_ending:
                    self._error = error

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _watch_pods(self) -> None:
        for kind, obj in self._watch:
            with self._changed:
                pod = self._pods.get(obj["metadata"]["uid"])
                if pod is not None:
                    pod.object = obj
                    pod.is_gone = kind == "DELETED"
                elif kind != "DELETED" and not self._is_ending:
                    self._begin(_Pod(obj), None)
                self._changed.notify_all()

    def _begin(self, pod: _Pod, tail: int | None) -> None:
        self._pods[pod.uid] = pod
        self._busy.add(pod.uid)
        self._start(lambda: self._follow(pod, tail))

    def _follow(self, pod: _Pod, tail: int | None) -> None:
        """Reads a pod's log until the pod has ended, over connections that break and containers that start
        again."""
        pause_s = 0.05
        while not self._is_ending:
            place, had_ended = pod.last, pod.has_ended
            outcome = self._read_on(pod, tail)
            # A pod that had ended before its log was read to the end has no more to say.
            if pod.is_gone or (had_ended and outcome in ("whole", "not started")):
                break
            pause_s = 0.05 if pod.last != place else min(2 * pause_s, 2.0)
            with self._changed:
                if outcome in ("not started", "silent"):
                    self._busy.discard(pod.uid)
                if not self._is_ending:
                    self._changed.wait(pause_s)
                self._busy.add(pod.uid)
        self._busy.discard(pod.uid)

    def _read_on(self, pod: _Pod, tail: int | None) -> Literal["whole", "broken", "silent", "not started"]:
        """Reads what each start of the container has, over one connection each."""
        try:
            if not self._is_same(pod):
                return "whole"
            if pod.restarts > pod.num_restarts:
                self._put(_read_to_the_end(self._cluster, pod, previous=True))
                pod.num_restarts = pod.restarts
            self._put(_read(self._cluster, pod, follow=True, tail=tail))
        except InterruptedStreamError:
            return "broken"
        except RefusedError as error:
            if error.status in UNWELL:
                return "silent"  # its machine does not answer; it may again, or the pod is replaced
            if error.status not in (NOT_STARTED, NOT_THERE):
                raise
            pod.is_gone = error.status == NOT_THERE
            return "not started"
        return "whole"

    def _is_same(self, pod: _Pod) -> bool:
        """Whether the pod of that name still is that pod; sees how it is."""
        obj = self._cluster.get(PODS, pod.name)
        if obj is None or obj["metadata"]["uid"] != pod.uid:
            pod.is_gone = True
            return False
        pod.object = obj
        return True

    def _put(self, lines: Iterator[LogLine]) -> None:
        """Hands lines on, as fast as they are taken."""
        for line in lines:
            if self._rank is not None and line.rank != self._rank:
                continue
            while not self._is_closed:
                with contextlib.suppress(queue.Full):
                    self._lines.put(line, timeout=0.1)
                    break
