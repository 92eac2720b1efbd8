"""The launcher of Kubernetes: what a job asks of a cluster, checked, printed or sent."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from metaloom.errors import LaunchError
from metaloom.k8s.finding import Finding
from metaloom.k8s.kubeconfig import kubeconfig_paths
from metaloom.k8s.manifests import BACKENDS, Backend, choose, host_command, problems, to_yaml
from metaloom.k8s.preflight import check_cluster, check_places, outdated
from metaloom.k8s.request import DEFAULT_TTL_S, DEFAULT_WAIT_S, JobRequest, SecretFiles, Toleration, Volume
from metaloom.launchers.base import (
    Launcher,
    Need,
    Submission,
    Submitted,
    parse_time_limit,
    recipe_text,
    refuse,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from metaloom.k8s.client import Cluster
    from metaloom.recipe import Recipe

T = TypeVar("T")
AUTO = "auto"
RUNS = "/runs"  # where the folders of runs are in the pods, unless --run says otherwise


@dataclasses.dataclass(frozen=True)
class Kubernetes(Launcher):
    """One pod for each node, each with one agent and its ranks, in a Job or in what an operator offers.

    Attributes:
        namespace, context: None for those of the kubeconfig.
        backend: auto, job, jobset, pytorchjob or trainjob.
        has_preflight: whether the cluster is asked first for all that the job needs.

    The others are as in `JobRequest`.
    """

    name: ClassVar[str] = "kubernetes"
    summary: ClassVar[str] = "a job on Kubernetes, which goes on by itself after preemptions and lost nodes"
    unused: ClassVar[Mapping[str, str]] = {}

    image: str | None = None
    namespace: str | None = None
    context: str | None = None
    backend: str = AUTO
    gpu_resource: str = "nvidia.com/gpu"
    ephemeral_storage: str | None = None
    shared_memory: str | None = None
    node_selector: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()
    spread_over: str | None = "kubernetes.io/hostname"
    priority_class: str | None = None
    service_account: str | None = None
    image_pull_secrets: tuple[str, ...] = ()
    image_pull_policy: str | None = None
    env_from_secrets: tuple[str, ...] = ()
    secret_files: tuple[SecretFiles, ...] = ()
    volumes: tuple[Volume, ...] = ()
    rdma: tuple[str, int] | None = None
    max_restarts: int = 3
    ttl_s: int | None = DEFAULT_TTL_S
    user_id: int = 1000
    group_id: int = 1000
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    annotations: Mapping[str, str] = dataclasses.field(default_factory=dict)
    has_preflight: bool = True

    @classmethod
    def add_options(cls, group: argparse._ArgumentGroup) -> list[argparse.Action]:
        def listed(name: str, metavar: str, text: str) -> argparse.Action:
            text += "; may be given again"
            return group.add_argument(name, action="append", default=[], metavar=metavar, help=text)

        return [
            group.add_argument("--image", metavar="IMG", help="with metaloom and your code in it (required)"),
            group.add_argument("--namespace", "-n", metavar="NS", help="(default: that of the context)"),
            group.add_argument(
                "--context", metavar="NAME", help="of the kubeconfig (default: the current one)"
            ),
            group.add_argument(
                "--backend",
                choices=(AUTO, *BACKENDS),
                help="what runs the pods (default: auto, jobset where the cluster has it, else job)",
            ),
            listed("--volume", "CLAIM:PATH[:ro]", "mount a PersistentVolumeClaim"),
            listed("--env-from-secret", "SECRET", "each key of a Secret as a variable"),
            listed("--secret-files", "SECRET:PATH", "each key of a Secret as a file, read only"),
            listed("--image-pull-secret", "SECRET", "by which the image is pulled"),
            group.add_argument("--image-pull-policy", metavar="POLICY", help="Always, IfNotPresent or Never"),
            group.add_argument(
                "--service-account", metavar="NAME", help="of the pods; its token is not mounted"
            ),
            group.add_argument("--priority-class", metavar="NAME", help="of the pods"),
            listed("--node-selector", "KEY=VALUE", "label of the machines to run on"),
            listed("--toleration", "KEY[=VALUE][:EFFECT]", "taint of machines to put up with"),
            group.add_argument(
                "--spread-over",
                metavar="LABEL",
                help="label of machines whose values pods are spread over where there is room; none: not at "
                "all (default: kubernetes.io/hostname)",
            ),
            group.add_argument(
                "--gpu-resource", metavar="NAME", help="what the cluster calls GPUs (default: nvidia.com/gpu)"
            ),
            group.add_argument("--ephemeral-storage", metavar="SIZE", help="of the pod's own disk"),
            group.add_argument(
                "--shared-memory", metavar="SIZE", help="of /dev/shm (default: half of the memory, or 1Gi)"
            ),
            group.add_argument(
                "--rdma",
                metavar="NAME=COUNT",
                help="network cards for each pod, such as rdma/hca=1; the pods ask for IPC_LOCK then, which "
                "the restricted and baseline levels of pod security do not allow",
            ),
            group.add_argument(
                "--max-restarts",
                type=int,
                metavar="N",
                help="how often pods that fail are replaced (default: 3); those that were taken away do "
                "not count",
            ),
            group.add_argument(
                "--ttl",
                metavar="TIME",
                help="how long the job stays there when it has ended: 2d, 12h, or none for ever (default: "
                "7d)",
            ),
            group.add_argument(
                "--user", type=int, metavar="UID", help="of the pods, not root (default: 1000)"
            ),
            group.add_argument(
                "--group", type=int, metavar="GID", help="of the pods, not root (default: 1000)"
            ),
            listed("--label", "KEY=VALUE", "of all objects"),
            listed("--annotation", "KEY=VALUE", "of the job"),
            group.add_argument(
                "--no-preflight",
                action="store_true",
                help="do not ask the cluster first for what the job needs",
            ),
        ]

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> Kubernetes:
        wrong: list[str] = []

        def parsed(option: str, words: Sequence[str], parse: Callable[[str], T]) -> tuple[T, ...]:
            made: list[T] = []
            for word in words:
                try:
                    made.append(parse(word))
                except ValueError as error:
                    wrong.append(f"{option}: {error}")
            return tuple(made)

        given: dict[str, Any] = {
            "image": arguments.image,
            "namespace": arguments.namespace,
            "context": arguments.context,
            "backend": arguments.backend,
            "gpu_resource": arguments.gpu_resource,
            "ephemeral_storage": arguments.ephemeral_storage,
            "shared_memory": arguments.shared_memory,
            "node_selector": dict(parsed("--node-selector", arguments.node_selector, _pair)),
            "tolerations": parsed("--toleration", arguments.toleration, Toleration.parse),
            "priority_class": arguments.priority_class,
            "service_account": arguments.service_account,
            "image_pull_secrets": tuple(arguments.image_pull_secret),
            "image_pull_policy": arguments.image_pull_policy,
            "env_from_secrets": tuple(arguments.env_from_secret),
            "secret_files": parsed("--secret-files", arguments.secret_files, SecretFiles.parse),
            "volumes": parsed("--volume", arguments.volume, Volume.parse),
            "max_restarts": arguments.max_restarts,
            "user_id": arguments.user,
            "group_id": arguments.group,
            "labels": dict(parsed("--label", arguments.label, _pair)),
            "annotations": dict(parsed("--annotation", arguments.annotation, _pair)),
            "has_preflight": not arguments.no_preflight,
        }
        if arguments.rdma is not None:
            given["rdma"] = next(iter(parsed("--rdma", [arguments.rdma], _count)), None)
        given = {name: value for name, value in given.items() if value is not None}
        if arguments.spread_over is not None:
            given["spread_over"] = None if arguments.spread_over == "none" else arguments.spread_over
        if arguments.ttl is not None:
            given["ttl_s"] = next(iter(parsed("--ttl", [arguments.ttl], _ttl_s)), None)
        refuse(wrong)
        return cls(**given)

    @classmethod
    def needs(cls) -> list[Need]:
        return [
            Need(
                "the package kubernetes",
                importlib.util.find_spec("kubernetes") is not None,
                "pip install 'metaloom[kubernetes]'",
            ),
            Need(
                "a kubeconfig",
                _is_configured(),
                "put the one of your cluster at ~/.kube/config, or name it in KUBECONFIG",
            ),
        ]

    def plan(self, submission: Submission) -> str:
        """The objects as YAML, of which `kubectl apply -f` makes the same job. With the backend `auto` a
        cluster is asked which ones it has, where there is a kubeconfig."""
        with contextlib.ExitStack() as stack:
            has_none = self.context is None and not _is_configured()
            cluster = None if has_none else stack.enter_context(self._connected())
            namespace = self.namespace or ("default" if cluster is None else cluster.namespace)
            request = self._request(submission, namespace)
            comment = ""
            if self.backend != AUTO:
                backend = BACKENDS[self.backend]
            elif cluster is None:
                backend = BACKENDS["job"]
                comment = (
                    "# No cluster could be asked which backends it has: this is that of --backend job.\n"
                )
            else:
                backend = _chosen(cluster, request)
        self._tell(self._findings(request, backend, submission))
        self._check_recipe(request, backend, submission)
        return comment + to_yaml(backend.build(request))

    def submit(self, submission: Submission) -> Submitted:
        """Sends the job, after it was checked here and, unless told not to, in the cluster."""
        from metaloom.k8s.sending import clear, send  # neither help nor a plan needs it

        try:
            connected = self._connected()
        except LaunchError as error:
            # What can be seen to be wrong without a cluster is told as well.
            request = self._request(submission, self.namespace or "default")
            found = self._findings(request, BACKENDS.get(self.backend, BACKENDS["job"]), submission)
            self._tell([*found, Finding(str(error))])
            raise
        with connected as cluster:
            request = self._request(submission, cluster.namespace)
            backend = _chosen(cluster, request) if self.backend == AUTO else BACKENDS[self.backend]
            if not cluster.serves(backend.resource):
                raise LaunchError(
                    f"--backend {backend.name}: {cluster.shown} has no {backend.resource.full_name} of "
                    f"{backend.resource.api_version}; it takes {backend.needs}. Install that, or use "
                    "--backend job, which needs nothing."
                )
            found = self._findings(request, backend, submission)
            if self.has_preflight:
                found += check_cluster(
                    cluster, request, backend, is_right=not any(f.is_problem for f in found)
                )
            self._tell(found)
            self._check_recipe(request, backend, submission)
            if submission.is_resumed:
                clear(cluster, request, backend)
            send(cluster, request, backend)
        again = "".join(
            f" --{option} {value}"
            for option, value in (("namespace", self.namespace), ("context", self.context))
            if value is not None
        )
        gpus = f" of {request.gpus_per_node} GPUs" if request.gpus_per_node else ""
        nodes = f"{request.nodes} node" + ("s" if request.nodes > 1 else "")
        return Submitted(
            request.name,
            (
                f"submitted {request.name}: {nodes}{gpus}, as a {backend.resource.kind} in {cluster.shown}",
                f"what it does:  metaloom jobs status {request.name}{again}",
                f"its output:    metaloom jobs logs {request.name} --follow{again}",
                f"to end it:     metaloom jobs cancel {request.name}{again}",
            ),
        )

    def _connected(self) -> contextlib.closing[Cluster]:
        from metaloom.k8s.client import Cluster  # neither help nor a plan needs it

        return contextlib.closing(Cluster.connect(context=self.context, namespace=self.namespace))

    def _findings(self, request: JobRequest, backend: Backend, submission: Submission) -> list[Finding]:
        """All that is wrong and can be seen from here."""
        found = [Finding(text) for text in self.unused_options(submission)]
        if self.image is None:
            found.append(
                Finding("--image: name the image with metaloom that the pods run (deploy/Dockerfile)")
            )
        found += [Finding(text) for text in problems(request, backend)]
        found += _decided(submission)
        return [*found, *check_places(request, submission.recipe)]

    @staticmethod
    def _check_recipe(request: JobRequest, backend: Backend, submission: Submission) -> None:
        """Reads the recipe as the pods will.

        Raises:
            RecipeError: it does not hold together with what they are told.
        """
        from metaloom.recipe import load_recipe  # commands that look at no recipe are quick

        told = [word for word in host_command(request, backend) if word.startswith("launcher.")]
        load_recipe(submission.source, [*submission.overrides, *told])

    @staticmethod
    def _tell(findings: Sequence[Finding]) -> None:
        """Tells notes on standard error.

        Raises:
            LaunchError: names all problems at once.
        """
        wrong = [finding.text for finding in findings if finding.is_problem]
        for finding in findings:
            if not finding.is_problem:
                print(f"note: {finding.text}", file=sys.stderr)
        refuse(wrong)

    def _request(self, submission: Submission, namespace: str) -> JobRequest:
        recipe = submission.recipe
        own = {field.name for field in dataclasses.fields(self)} - {
            "image",
            "namespace",
            "context",
            "backend",
            "has_preflight",
        }
        request = JobRequest(
            name=submission.name,
            namespace=namespace,
            image=self.image or "metaloom",
            recipe=recipe_text(submission),
            recipe_name=recipe.name,
            run_folder=submission.run or f"{RUNS}/{submission.name}",
            nodes=submission.num_nodes,
            gpus_per_node=submission.gpus_per_node or 0,
            ranks_per_node=submission.num_ranks,
            cpus=None if submission.cpus_per_node is None else str(submission.cpus_per_node),
            memory=submission.memory_per_node,
            queue=submission.queue,
            env=submission.environment,
            stop_within_s=recipe.launcher.stop_within_s,
            wait_s=_wait_s(recipe),
            active_deadline_s=submission.time_limit_s,
            train_options=submission.train_options,
            **{name: getattr(self, name) for name in own},
        )
        has_own_folders = request.nodes > 1 and request.volume_of_run is None
        return dataclasses.replace(request, own_folders=has_own_folders)


def _chosen(cluster: Cluster, request: JobRequest) -> Backend:
    """The backend of `auto`: one that the cluster has, not too old, and the user may use."""

    def suits(backend: Backend) -> bool:
        resource = backend.resource
        if not (cluster.serves(resource) and cluster.may("create", resource)):
            return False
        old = outdated(cluster, request, backend)
        if old:
            print(f"note: {old}, so that another one is taken", file=sys.stderr)
        return not old

    return choose(suits)


def _is_configured() -> bool:
    """Whether a cluster is known here."""
    paths = kubeconfig_paths(os.environ)
    return any(path.exists() for path in paths) or "KUBERNETES_SERVICE_HOST" in os.environ


def _wait_s(recipe: Recipe) -> float:
    """How long pods wait for each other, unless the recipe says it."""
    hosts = recipe.launcher.hosts
    return DEFAULT_WAIT_S if hosts is None or "wait_s" not in hosts.model_fields_set else hosts.wait_s


def _decided(submission: Submission) -> list[Finding]:
    """Changes to the recipe that other options undo."""
    return [
        Finding(
            f"{override}: the job has {submission.num_ranks} ranks on each node; say --ranks-per-node, or "
            "leave it out"
        )
        for override in submission.overrides
        if override.partition("=")[0] == "launcher.num_processes"
        and submission.recipe.launcher.num_processes != submission.num_ranks
    ]


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"{text!r} is no pair: write KEY=VALUE")
    return key, value


def _count(text: str) -> tuple[str, int]:
    name, count = _pair(text)
    if not count.isdecimal():
        raise ValueError(f"{count!r} is no number: write NAME=COUNT, such as rdma/hca=1")
    return name, int(count)


def _ttl_s(text: str) -> int | None:
    if text == "none":
        return None
    try:
        return parse_time_limit(text)
    except LaunchError:
        raise ValueError(f"{text!r} is no time: write 12h or 2d, or none") from None
