"""Kubernetes objects of a job: pure functions from a request to plain dicts, one file per backend."""

from __future__ import annotations

from collections.abc import Callable

from metaloom.k8s import request as requests
from metaloom.k8s.manifests import job, jobset, pytorchjob, trainjob
from metaloom.k8s.manifests.backend import Backend
from metaloom.k8s.manifests.command import host_command
from metaloom.k8s.manifests.identity import owner_reference
from metaloom.k8s.manifests.pod import probe_pod
from metaloom.k8s.manifests.text import to_yaml
from metaloom.k8s.names import service_name_fault
from metaloom.k8s.request import JobRequest

__all__ = [
    "BACKENDS",
    "Backend",
    "choose",
    "host_command",
    "owner_reference",
    "probe_pod",
    "problems",
    "to_yaml",
]

_ALL = (job.BACKEND, jobset.BACKEND, pytorchjob.BACKEND, trainjob.BACKEND)
BACKENDS = {backend.name: backend for backend in _ALL}


def choose(suits: Callable[[Backend], bool]) -> Backend:
    """The backend of `auto`: jobset where it suits the cluster, else job.

    A JobSet restarts all pods together where a Job replaces one after the other, and has a Service of its
    own. Those of Kubeflow do nothing for a run that these do not: they are for clusters that want them, and
    have to be named.

    Args:
        suits: whether the API server has what a backend needs, and the user may create it.
    """
    return BACKENDS["jobset"] if suits(BACKENDS["jobset"]) else BACKENDS["job"]


def problems(request: JobRequest, backend: Backend) -> list[str]:
    """Everything that is wrong with a request to a backend, each with its option and what to do."""
    suffix = backend.longest_suffix(request)
    name = service_name_fault(request.name, longest_suffix=suffix)
    return [
        *([] if name is None else [f"--name: {name}"]),
        *requests.problems(request),
        *backend.refusals(request),
    ]
