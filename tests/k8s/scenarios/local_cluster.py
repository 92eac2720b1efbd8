"""The fake API server with machines: pods are processes of this machine, which train, stop and save.

    with LocalCluster(tmp_path) as cluster:
        ...                                    # as a FakeCluster: KUBECONFIG=cluster.kubeconfig

    python -m tests.k8s.scenarios.local_cluster FOLDER     # until Ctrl-C, for `pytest -m k8s`

What a container is here: its command with its variables, as a user who sees all files. In it and in the
recipe, paths that are mounted in a pod become folders here, and the host at which pods meet is 127.0.0.1. A
pod that is asked to go gets SIGTERM, and is gone when its process has ended, as on a machine. Only the image
IMAGE can be pulled. There are machines for 100 processors or 8 GPUs a pod, and what may have less than
MIN_MEMORY_BYTES is out of memory at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from metaloom.k8s.quantities import parse_quantity
from metaloom.k8s.resources import CLAIMS, CONFIG_MAPS, JOBS, PODS
from tests.commands import command, environment, kill_tree
from tests.hosts import free_port
from tests.k8s.fake_api import FakeCluster, Handler, Target
from tests.k8s.fake_jobs import INDEX, delete_pod
from tests.k8s.fake_store import Object, now
from tests.k8s.scenarios.fake_stage import mark_evicted

IMAGE = "registry.example/metaloom:1"
CLAIM = "shared"
MIN_MEMORY_BYTES = 2**28
MOST = {"cpu": 100, "nvidia.com/gpu": 8}
RENDEZVOUS_PORT = 29400
LOOK_S = 0.05


def words_in_pod(pod: Object) -> list[str]:
    """The command of a pod's container, as the kubelet starts it."""
    return [str(word).replace("$$", "$") for word in pod["spec"]["containers"][0]["command"]]


def variables_in_pod(pod: Object) -> dict[str, str]:
    """The variables of a pod's container."""
    found = {}
    for variable in pod["spec"]["containers"][0]["env"]:
        if "valueFrom" in variable:
            path = variable["valueFrom"]["fieldRef"]["fieldPath"]
            assert path == f"metadata.annotations['{INDEX}']"
            found[variable["name"]] = pod["metadata"]["annotations"][INDEX]
        else:
            found[variable["name"]] = variable["value"].replace("$$", "$")
    return found


@dataclasses.dataclass
class Place:
    """What stands here for what is mounted in a pod: texts, and by what they are replaced."""

    texts: dict[str, str]

    def here(self, text: str) -> str:
        for old, new in self.texts.items():
            text = text.replace(old, new)
        return text


class LocalCluster(FakeCluster):
    """A fake cluster with a claim that all pods share, and a kubelet."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._server.RequestHandlerClass = LocalHandler
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._seen: set[str] = set()
        self._stopped: set[str] = set()
        self._ports: dict[str, int] = {}
        self._threads: list[threading.Thread] = []
        self._kubelet_thread = threading.Thread(target=self._look_after_pods)
        (folder / "claims" / CLAIM).mkdir(parents=True)
        self.add(CLAIMS, {"metadata": {"name": CLAIM}, "spec": {"accessModes": ["ReadWriteMany"]}})

    def __enter__(self) -> LocalCluster:
        super().__enter__()
        self._kubelet_thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.store.changed:
            self.is_ending = True
        self._kubelet_thread.join()
        for process in self._processes.values():
            if process.poll() is None:
                kill_tree(process.pid)
        for thread in self._threads:
            thread.join()
        super().__exit__(kind, error, trace)

    def ask_to_go(self, pod: str) -> None:
        """A pod that is to be deleted: gone at once where it does not run, else when it has ended."""
        with self.store.changed:
            found = self.get(PODS, pod)
            process = self._processes.get(found["metadata"]["uid"])
            if process is None or process.poll() is not None:
                self._remove(found)
                return
            if "deletionTimestamp" not in found["metadata"]:
                self.edit(PODS, pod, lambda obj: obj["metadata"].update(deletionTimestamp=now()))
            process.send_signal(signal.SIGTERM)

    def delete_job(self, name: str) -> None:
        """Deletes a Job when its pods are gone."""
        with self.store.changed:
            self.edit(JOBS, name, lambda obj: obj["metadata"].update(deletionTimestamp=now()))
            for pod in self.controller.pods(self.get(JOBS, name)):
                self.ask_to_go(pod["metadata"]["name"])
            self._go_on(name)

    def _look_after_pods(self) -> None:
        while not self.is_ending:
            for pod in self.objects(PODS):
                with self.store.changed:
                    # It may be gone by now: the Job's controller deletes pods as well.
                    if pod["metadata"]["uid"] not in self._seen and self._is_there(pod):
                        self._take_up(pod)
            with self.store.changed:
                there = {pod["metadata"]["uid"] for pod in self.objects(PODS)}
                for uid in self._processes.keys() - there - self._stopped:
                    self._processes[uid].send_signal(signal.SIGTERM)
                    self._stopped.add(uid)
            time.sleep(LOOK_S)

    def _is_there(self, pod: Object) -> bool:
        """Whether a pod is still wanted."""
        found = self.store.find(PODS, self.namespace, pod["metadata"]["name"])
        return found is not None and "deletionTimestamp" not in found["metadata"]

    def _take_up(self, pod: Object) -> None:
        """Starts a pod, if its machine, its image and the others allow it."""
        metadata, container = pod["metadata"], pod["spec"]["containers"][0]
        job, index = metadata["labels"]["metaloom/job"], int(metadata["labels"][INDEX])
        requests = container.get("resources", {}).get("requests", {})
        pods = self.pods(job)
        lacking = [name for name, most in MOST.items() if parse_quantity(requests.get(name, "0")) > most]
        if lacking:
            self._seen.add(metadata["uid"])
            pods.unschedulable(index, f"0/2 nodes are available: 2 Insufficient {lacking[0]}.")
        elif container["image"] != IMAGE:
            self._seen.add(metadata["uid"])
            pods.image_error(index)
        elif parse_quantity(requests.get("memory", "1Gi")) < MIN_MEMORY_BYTES:
            self._seen.add(metadata["uid"])
            pods.run(index)
            pods.out_of_memory(index)
        else:
            self._seen.add(metadata["uid"])
            pods.run(index)
            self._start(self.get(PODS, metadata["name"]))

    def _start(self, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        place = self._place(pod)
        variables = environment() | variables_in_pod(pod)
        process = subprocess.Popen(
            [*command(), *(place.here(word) for word in words_in_pod(pod)[1:])],
            cwd=self._folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._processes[uid] = process
        thread = threading.Thread(target=self._attend, args=(pod, process))
        self._threads.append(thread)
        thread.start()

    def _place(self, pod: Object) -> Place:
        job, uid = pod["metadata"]["labels"]["metaloom/job"], pod["metadata"]["uid"]
        own = self._folder / "pods" / uid
        own.mkdir(parents=True)
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        texts = {f"{job}-0.{job}:{RENDEZVOUS_PORT}": f"127.0.0.1:{self._port(job)}"}
        for mount in pod["spec"]["containers"][0]["volumeMounts"]:
            volume, path = volumes[mount["name"]], mount["mountPath"]
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                texts[f"{path}/"] = f"{self._folder / 'claims' / claim}/"
            elif path.startswith("/runs/"):
                texts[path] = str(own / "run")
        place = Place(texts)
        recipe = self.get(CONFIG_MAPS, f"{job}-recipe")["data"]["recipe.yaml"]
        (own / "recipe.yaml").write_text(place.here(recipe))
        texts["/etc/metaloom/recipe.yaml"] = str(own / "recipe.yaml")
        return place

    def _attend(self, pod: Object, process: subprocess.Popen[str]) -> None:
        """Takes down what a pod says, and how it ends."""
        assert process.stdout is not None
        with process:
            for line in process.stdout:
                self.kubelet.write(pod, [line.rstrip("\n")], None)
        with self.store.changed:
            name, index = pod["metadata"]["name"], int(pod["metadata"]["labels"][INDEX])
            found = self.store.find(PODS, self.namespace, name)
            if found is None or self.is_ending:
                return
            pods = self.pods(pod["metadata"]["labels"]["metaloom/job"])
            if "deletionTimestamp" in found["metadata"]:
                self._remove(found)
            elif process.returncode:
                pods.fail(index, code=process.returncode)
            else:
                pods.succeed(index)

    def _remove(self, pod: Object) -> None:
        job = pod["metadata"]["labels"]["metaloom/job"]
        delete_pod(self.store, self.kubelet, pod)
        self._go_on(job)

    def _go_on(self, name: str) -> None:
        """Makes the pods that a Job lacks; one that is deleted gets none, and is gone with its last."""
        job = self.store.find(JOBS, self.namespace, name)
        if job is None or "deletionTimestamp" not in job["metadata"]:
            self.controller.sync(self.namespace, name)
        elif not self.controller.pods(job):
            self.delete(JOBS, name)

    def _port(self, job: str) -> int:
        return self._ports.setdefault(job, free_port())


class LocalHandler(Handler):
    """Requests that take time where pods are real."""

    @property
    def cluster(self) -> LocalCluster:
        assert isinstance(self.server.cluster, LocalCluster)
        return self.server.cluster

    def _subresource(self, target: Target, query: dict[str, str], body: bytes) -> None:
        if (target.resource, target.subresource, self.command) != (PODS, "eviction", "POST"):
            super()._subresource(target, query, body)
            return
        with self.cluster.store.changed:
            self.cluster.edit(PODS, target.name, mark_evicted)
            self.cluster.ask_to_go(target.name)
        self._send(201, {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"})

    def _delete(self, target: Target, query: dict[str, str]) -> None:
        if target.resource != JOBS or query.get("dryRun") == "All":
            super()._delete(target, query)
            return
        with self.cluster.store.changed:
            job = self.cluster.get(JOBS, target.name)
            self.cluster.delete_job(target.name)
        self._send(200, job)


def serve(folder: Path) -> None:
    """A cluster until Ctrl-C, or SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    with LocalCluster(folder) as cluster, contextlib.suppress(KeyboardInterrupt):
        print(f"KUBECONFIG={cluster.kubeconfig} IMAGE={IMAGE} CLAIM={CLAIM}", flush=True)
        signal.pause()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
