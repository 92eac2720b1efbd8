"""What a way to run a job on Kubernetes is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from metaloom.k8s.request import JobRequest
from metaloom.k8s.resources import Resource

# Where the hosts of a job meet, on host 0.
PORT = 29400


@dataclasses.dataclass(frozen=True)
class Backend:
    """A way to run a job.

    Attributes:
        name: as in --backend.
        resource: of the object that is the job.
        creates: what `build` makes besides, in its order.
        container: the name of the pods' container.
        needs: what a cluster has to have, in words.
        oldest: the first release of Kubernetes whose Jobs do what `build` asks of them: older ones drop
            fields without a word. None where there are no Jobs.
        build: a request to its objects, in the order in which they are created; one of them is the job.
        first_host: the name under which pods of the same namespace find host 0.
        longest_suffix: what the cluster puts behind the job's name for its longest host name.
        index_variable: an environment variable that the cluster sets to the pod's index, where no annotation
            of the pod has it; None where one has.
        refusals: what of a request it cannot do, in words.
        is_named_last: whether the job is taken only once the server knows what it names, which `build` makes
            before it.
        adds: what is put into pods beside what `build` has, and may not keep to the restricted level of pod
            security, in words; "" for nothing.
    """

    name: str
    resource: Resource
    creates: tuple[Resource, ...]
    container: str
    needs: str
    build: Callable[[JobRequest], list[dict[str, Any]]]
    first_host: Callable[[JobRequest], str]
    longest_suffix: Callable[[JobRequest], str]
    oldest: tuple[int, int] | None = (1, 29)  # backoffLimitPerIndex, podReplacementPolicy
    index_variable: str | None = None
    refusals: Callable[[JobRequest], list[str]] = lambda request: []
    is_named_last: bool = False
    adds: Callable[[JobRequest], str] = lambda request: ""
