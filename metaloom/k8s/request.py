"""What a user asks a cluster for, and everything that is wrong with it, before anything is sent."""

from __future__ import annotations

import dataclasses
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, Self

from metaloom.credentials import has_credentials, is_secret_name
from metaloom.k8s.names import key_fault, label_name_fault, label_value_fault, object_name_fault
from metaloom.k8s.quantities import bytes_as_quantity, parse_quantity

RECIPE_FOLDER = "/etc/metaloom"
RECIPE_FILE = "recipe.yaml"
SHARED_MEMORY = "/dev/shm"
SCRATCH = "/tmp"
# What a ConfigMap may hold, in bytes.
MAX_RECIPE_BYTES = 2**20
# How long a finished job can be looked at: a week.
DEFAULT_TTL_S = 7 * 24 * 3600
# How long pods wait for each other.
DEFAULT_WAIT_S = 7.0 * 24 * 3600
# Environment variables by which a pod knows its place; the cluster sets them.
PLACE = ("METALOOM_HOST_INDEX", "JOB_COMPLETION_INDEX")
EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
PULL_POLICIES = ("Always", "IfNotPresent", "Never")
# Labels and annotations that metaloom itself, or Kueue by --queue, reads.
OWN_KEYS = ("app.kubernetes.io/name", "app.kubernetes.io/managed-by", "kueue.x-k8s.io/queue-name")
# What the command in the pods is given because of other options.
DECIDED = {
    "launcher.num_processes": "--ranks-per-node",
    "launcher.hosts": "--nodes",
    "launcher.show_all_ranks": "this command, which sets it to true",
}
_ENV_NAME = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")
_IMAGE = re.compile(
    r"([A-Za-z0-9]([-A-Za-z0-9.]*[A-Za-z0-9])?(:[0-9]+)?/)?"
    r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*"
    r"(:[A-Za-z0-9_][-A-Za-z0-9_.]{0,127})?(@[a-z0-9]+:[0-9a-f]{32,})?"
)
_MAX_INT32 = 2**31 - 1
# Pods of one Indexed Job.
_MAX_NODES = 100_000


@dataclasses.dataclass(frozen=True)
class Toleration:
    """A taint of machines that the pods put up with.

    Attributes:
        key: "" for every taint.
        value: None for every value.
        effect: one of EFFECTS; "" for all of them.
    """

    key: str
    value: str | None = None
    effect: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """KEY, KEY=VALUE, KEY:EFFECT or KEY=VALUE:EFFECT."""
        rest, _, effect = text.partition(":")
        key, equals, value = rest.partition("=")
        return cls(key, value if equals else None, effect)


@dataclasses.dataclass(frozen=True)
class Volume:
    """A PersistentVolumeClaim and where its files are in the pods."""

    claim: str
    path: str
    is_read_only: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """CLAIM:PATH or CLAIM:PATH:ro.

        Raises:
            ValueError: it is neither.
        """
        claim, _, rest = text.partition(":")
        path, colon, mode = rest.partition(":")
        if not claim or not path or (colon and mode not in ("ro", "rw")):
            raise ValueError(f"{text!r} names no volume: write CLAIM:/path or, to read only, CLAIM:/path:ro")
        return cls(claim, path, mode == "ro")


@dataclasses.dataclass(frozen=True)
class SecretFiles:
    """A Secret and the folder in the pods where each of its keys is a file."""

    secret: str
    path: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """SECRET:PATH.

        Raises:
            ValueError: it is not.
        """
        secret, _, path = text.partition(":")
        if not secret or not path:
            raise ValueError(f"{text!r} names no files of a secret: write SECRET:/path")
        return cls(secret, path)


@dataclasses.dataclass(frozen=True)
class JobRequest:
    """All that a user asks for. Quantities are as in Kubernetes: "500m", "4", "64Gi".

    Attributes:
        name: of the job, and of the run: what the names of all objects begin with.
        recipe: its text, complete in itself.
        recipe_name: what people call it.
        run_folder: where the run's files are in the pods.
        own_folders: whether each pod has a run folder of its own; else all see the same.
        ranks_per_node: None for one per GPU, or one where there is none.
        gpu_resource: what the cluster calls its GPUs.
        cpus, memory, ephemeral_storage: of each pod; None leaves it to the cluster.
        shared_memory: size of /dev/shm; None for half of the memory, as Linux has it, or 1Gi.
        spread_over: label of machines over whose values pods are spread where there is room; None for none.
        queue: a LocalQueue of Kueue.
        env: plain values; what is secret comes by reference.
        env_from_secrets: Secrets whose keys become environment variables.
        rdma: a resource such as rdma/hca and how many; the container then may lock memory (IPC_LOCK), which
            neither the restricted nor the baseline level of pod security allows.
        wait_s: how long pods wait for each other: launcher.hosts.wait_s. Clusters find machines for some of
            them long before the others.
        max_restarts: how often each pod may fail and be replaced. Pods that were taken away do not count.
        stop_within_s: how long a pod that is asked to stop has to save what it did: launcher.stop_within_s.
        ttl_s: how long the finished job stays there to be looked at; None for ever.
        active_deadline_s: how long the job may take; None for any time.
        overrides: of the recipe, as key=value.
        train_options: further options of `metaloom train`.
    """

    name: str
    namespace: str
    image: str
    recipe: str
    recipe_name: str
    run_folder: str
    own_folders: bool = False
    nodes: int = 1
    gpus_per_node: int = 0
    ranks_per_node: int | None = None
    gpu_resource: str = "nvidia.com/gpu"
    cpus: str | None = None
    memory: str | None = None
    ephemeral_storage: str | None = None
    shared_memory: str | None = None
    node_selector: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tolerations: Sequence[Toleration] = ()
    spread_over: str | None = "kubernetes.io/hostname"
    priority_class: str | None = None
    service_account: str | None = None
    image_pull_secrets: Sequence[str] = ()
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    queue: str | None = None
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    env_from_secrets: Sequence[str] = ()
    secret_files: Sequence[SecretFiles] = ()
    volumes: Sequence[Volume] = ()
    rdma: tuple[str, int] | None = None
    wait_s: float = DEFAULT_WAIT_S
    max_restarts: int = 3
    stop_within_s: float = 25.0
    ttl_s: int | None = DEFAULT_TTL_S
    active_deadline_s: int | None = None
    user_id: int = 1000
    group_id: int = 1000
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    annotations: Mapping[str, str] = dataclasses.field(default_factory=dict)
    overrides: Sequence[str] = ()
    train_options: Sequence[str] = ()

    @property
    def num_ranks_per_node(self) -> int:
        return max(1, self.gpus_per_node) if self.ranks_per_node is None else self.ranks_per_node

    @property
    def shared_memory_size(self) -> str:
        """Of /dev/shm, as a quantity."""
        if self.shared_memory is not None:
            return self.shared_memory
        return "1Gi" if self.memory is None else bytes_as_quantity(int(parse_quantity(self.memory)) // 2)

    @property
    def volume_of_run(self) -> Volume | None:
        """The volume that holds the run's folder; None where it is on the pod's own disk."""
        holding = [volume for volume in self.volumes if is_within(self.run_folder, volume.path)]
        return max(holding, key=lambda volume: len(volume.path), default=None)


def is_within(path: str, folder: str) -> bool:
    """Whether a path is a folder or lies in it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def problems(request: JobRequest) -> list[str]:
    """Everything that is wrong with a request whatever runs it, each with its option and what to do."""
    parts: tuple[Callable[[JobRequest], Iterator[str]], ...] = (
        _names,
        _counts,
        _quantities,
        _placement,
        _environment,
        _mounts,
        _run_folder,
        _recipe,
        _labels,
    )
    return [text for part in parts for text in part(request)]


def _names(request: JobRequest) -> Iterator[str]:
    named: list[tuple[str, str | None, Callable[[str], str | None]]] = [
        ("--namespace", request.namespace, label_name_fault),
        ("--priority-class", request.priority_class, object_name_fault),
        ("--service-account", request.service_account, object_name_fault),
        ("--queue", request.queue, label_name_fault),
        ("--gpu-resource", request.gpu_resource, _resource_fault),
        *(("--image-pull-secret", name, object_name_fault) for name in request.image_pull_secrets),
        *(("--env-from-secret", name, object_name_fault) for name in request.env_from_secrets),
        *(("--secret-files", files.secret, object_name_fault) for files in request.secret_files),
        *(("--volume", volume.claim, object_name_fault) for volume in request.volumes),
    ]
    for option, name, fault in named:
        if name is not None and (text := fault(name)) is not None:
            yield f"{option}: {text}"
    if _IMAGE.fullmatch(request.image) is None:
        yield (
            f"--image: {request.image!r} names no image; write REPOSITORY:TAG or REPOSITORY@sha256:DIGEST, "
            "the repository in lower case"
        )
    if request.image_pull_policy not in (None, *PULL_POLICIES):
        yield f"--image-pull-policy: {request.image_pull_policy!r} is none of {', '.join(PULL_POLICIES)}"


def _counts(request: JobRequest) -> Iterator[str]:
    ranges: list[tuple[str, float | None, int, int]] = [
        ("--nodes", request.nodes, 1, _MAX_NODES),
        ("--gpus-per-node", request.gpus_per_node, 0, 1000),
        ("--ranks-per-node", request.ranks_per_node, 1, 1000),
        ("--max-restarts", request.max_restarts, 0, _MAX_INT32 // _MAX_NODES),
        ("launcher.stop_within_s", request.stop_within_s, 1, 100_000),
        ("--ttl", request.ttl_s, 0, _MAX_INT32),
        ("--time-limit", request.active_deadline_s, 1, _MAX_INT32),
    ]
    for option, value, low, high in ranges:
        if value is not None and not low <= value <= high:
            yield f"{option} is {value:g}; it must be between {low} and {high}"
    ranks, gpus = request.num_ranks_per_node, request.gpus_per_node
    if 0 < gpus < ranks:
        yield f"--ranks-per-node is {ranks} with {gpus} GPUs; each rank needs one of its own: at most {gpus}"
    for option, number in (("--user", request.user_id), ("--group", request.group_id)):
        if not 1 <= number <= _MAX_INT32:
            yield (
                f"{option} is {number}; pods run as a user and a group that are not root: between 1 and "
                f"{_MAX_INT32}"
            )


def _quantities(request: JobRequest) -> Iterator[str]:
    values = {}
    for option, text, least in (
        ("--cpus-per-node", request.cpus, "1m"),
        ("--memory-per-node", request.memory, "1Mi"),
        ("--ephemeral-storage", request.ephemeral_storage, "1Mi"),
        ("--shared-memory", request.shared_memory, "1Mi"),
    ):
        if text is None:
            continue
        try:
            value = parse_quantity(text)
        except ValueError as error:
            yield f"{option}: {error}"
            continue
        if value < parse_quantity(least):
            hint = f"; did you mean {text[:-1]}Mi?" if least == "1Mi" and text.endswith("m") else ""
            yield f"{option}: {text} is less than {least}{hint}"
            continue
        values[option] = value
    memory, shared = values.get("--memory-per-node"), values.get("--shared-memory")
    if memory is not None and shared is not None and shared > memory:
        yield (
            f"--shared-memory is {request.shared_memory}, more than --memory-per-node {request.memory}, of "
            "which it is a part"
        )


def _placement(request: JobRequest) -> Iterator[str]:
    for key, value in request.node_selector.items():
        yield from _label_problems("--node-selector", key, value)
    if request.spread_over is not None and (text := key_fault(request.spread_over)) is not None:
        yield f"--spread-over: {text}"
    for toleration in request.tolerations:
        if toleration.key:
            yield from _label_problems("--toleration", toleration.key, toleration.value or "")
        elif toleration.value is not None:
            yield f"--toleration: a value, {toleration.value!r}, without a key; write KEY=VALUE:EFFECT"
        if toleration.effect not in ("", *EFFECTS):
            yield f"--toleration: {toleration.effect!r} is no effect of a taint: {', '.join(EFFECTS)}"
    if request.rdma is not None:
        name, count = request.rdma
        if (text := _resource_fault(name)) is not None:
            yield f"--rdma: {text}"
        if not 1 <= count <= 1000:
            yield f"--rdma: {count} of {name}; it must be between 1 and 1000"
        if name == request.gpu_resource:
            yield f"--rdma: {name} is what --gpu-resource names; name the resource of the network cards"


def _environment(request: JobRequest) -> Iterator[str]:
    for name, value in request.env.items():
        if _ENV_NAME.fullmatch(name) is None:
            yield (
                f"--env: {name!r} is no name of a variable: letters, digits, '_', '-' and '.', not beginning "
                "with a digit"
            )
        elif name in PLACE:
            yield f"--env: {name} is set by the cluster, for each pod"
        elif (is_secret_name(name) and not _is_mounted(value, request)) or has_credentials(value):
            yield (
                f"--env: {name} reads like a secret, and everyone who may look at the job would see its "
                f"value: put it into a Secret (kubectl create secret generic NAME --from-literal={name}=...) "
                "and give --env-from-secret NAME"
            )
        elif "\0" in value:
            yield f"--env: the value of {name} holds a zero byte"


def _mounts(request: JobRequest) -> Iterator[str]:
    mounts = [("--volume", volume.claim, volume.path) for volume in request.volumes]
    mounts += [("--secret-files", files.secret, files.path) for files in request.secret_files]
    taken: dict[str, str] = {}
    for option, name, path in mounts:
        if (text := _path_fault(path)) is not None:
            yield f"{option} {name}: {text}"
            continue
        for own in (RECIPE_FOLDER, SHARED_MEMORY, "/proc", "/sys"):
            if is_within(path, own) or is_within(own, path):
                yield f"{option} {name}: {path} would cover {own}, which a pod needs; choose another path"
        if path == SCRATCH:
            yield f"{option} {name}: {path} is every pod's own scratch folder; choose another path"
        if path in taken:
            yield f"{option} {name}: {path} is where {taken[path]} is already"
        taken[path] = name


def _run_folder(request: JobRequest) -> Iterator[str]:
    folder, volume = request.run_folder, request.volume_of_run
    if (text := _path_fault(folder)) is not None:
        yield f"--run: {text}"
        return
    for own in (RECIPE_FOLDER, SHARED_MEMORY, "/proc", "/sys"):
        if is_within(folder, own) or is_within(own, folder):
            yield f"--run: {folder} is where a pod has {own}; choose another path"
    for files in request.secret_files:
        if is_within(folder, files.path) or is_within(files.path, folder):
            yield f"--run: {folder} is where the secret {files.secret} is, which is read only"
    if volume is not None and volume.is_read_only:
        yield f"--run: {folder} is on the claim {volume.claim}, mounted to read only; leave out ':ro'"
    if request.nodes <= 1:
        return
    if volume is None and not request.own_folders:
        yield (
            f"--run: {folder} is on each pod's own disk, and {request.nodes} pods are to see the same: mount "
            "a claim there (--volume CLAIM:PATH, one that many nodes may write)"
        )
    if volume is not None and request.own_folders:
        yield (
            f"--run: {folder} is on the claim {volume.claim}, which all pods see, and each is to have its "
            "own; choose a path that is not on a claim"
        )


def _recipe(request: JobRequest) -> Iterator[str]:
    size = len(request.recipe.encode())
    if size > MAX_RECIPE_BYTES:
        yield (
            f"the recipe {request.recipe_name} has {size:,} bytes; a ConfigMap holds at most "
            f"{MAX_RECIPE_BYTES:,}: put what is large into files of the image or at a URL"
        )
    if not request.recipe.strip():
        yield f"the recipe {request.recipe_name} is empty"
    for override in request.overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            yield f"{override!r} changes nothing of a recipe: write key=value"
        for decided, by in DECIDED.items():
            if key == decided or key.startswith(f"{decided}."):
                yield f"{override!r}: {decided} is decided by {by}"


def _labels(request: JobRequest) -> Iterator[str]:
    for option, pairs in (("--label", request.labels), ("--annotation", request.annotations)):
        for key, value in pairs.items():
            if key in OWN_KEYS or key.startswith("metaloom/"):
                yield f"{option}: {key} is set by metaloom"
            elif option == "--label":
                yield from _label_problems(option, key, value)
            elif (text := key_fault(key)) is not None:
                yield f"{option}: {text}"
    size = sum(len(key.encode()) + len(value.encode()) for key, value in request.annotations.items())
    if size > 200 * 1024:
        yield f"--annotation: {size:,} bytes in all; at most {200 * 1024:,} are allowed"


def _label_problems(option: str, key: str, value: str) -> Iterator[str]:
    for text in (key_fault(key), label_value_fault(value)):
        if text is not None:
            yield f"{option}: {text}"


def _resource_fault(name: str) -> str | None:
    if "/" not in name:
        return f"{name!r} is no resource of devices: it has a domain, as nvidia.com/gpu has"
    return key_fault(name)


def _is_mounted(value: str, request: JobRequest) -> bool:
    """Whether a value only says where a secret is."""
    folders = [files.path for files in request.secret_files] + [volume.path for volume in request.volumes]
    return any(is_within(value, folder) for folder in folders)


def _path_fault(path: str) -> str | None:
    if not path.startswith("/") or path == "/":
        return f"{path!r} is no path in a pod: it begins with '/' and names a folder"
    if posixpath.normpath(path) != path or path.startswith("//"):
        return f"{path!r} is no plain path; did you mean {'/' + posixpath.normpath(path).lstrip('/')}?"
    if ":" in path or any(ord(letter) < 32 for letter in path):
        return f"{path!r}: a path where something is mounted has no ':' and no control characters"
    return None
