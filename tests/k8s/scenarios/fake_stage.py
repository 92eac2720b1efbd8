"""Scenarios on the fake API server, whose pods do what the scenario says."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator

from metaloom.k8s.resources import PODS
from tests.k8s.fake_api import FakeCluster
from tests.k8s.fake_jobs import Pods, condition, set_condition
from tests.k8s.fake_store import Object

GRACE_S = 60
EVICTED = condition("DisruptionTarget", reason="EvictionByEvictionAPI", message="Eviction API: evicting")


class FakeStage:
    """A `Stage` without real pods."""

    options = ("--image", "repository/metaloom:1")
    where = ()
    missing_image = "repository/metaloom:there-is-none"
    pause_s = 0.02

    def __init__(self, cluster: FakeCluster) -> None:
        self._cluster = cluster
        self._job = ""

    def checkpoints(self, name: str) -> str:
        return f"s3://bucket/{name}"

    def play(self, act: Callable[[FakeCluster, Pods], object]) -> None:
        act(self._cluster, self._cluster.pods(self._job))

    def submitted(self, name: str) -> None:
        self._job = name

    def evict(self, node: int) -> None:
        pod = self._cluster.pods(self._job).name(node)
        self._cluster.edit(PODS, pod, mark_evicted)

    @contextlib.contextmanager
    def nobody(self) -> Iterator[None]:
        for plural in ("namespaces", "configmaps", "services", "jobs", "pods", "pods/log", "events"):
            self._cluster.forbid("*", plural)
        yield


def mark_evicted(pod: Object) -> None:
    """What the Eviction API does to a pod: it is a disruption's target, and has its grace period to end."""
    until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=GRACE_S)
    pod["metadata"] |= {
        "deletionTimestamp": f"{until:%Y-%m-%dT%H:%M:%SZ}",
        "deletionGracePeriodSeconds": GRACE_S,
    }
    set_condition(pod["status"], EVICTED)
