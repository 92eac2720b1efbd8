"""The Job controller of a fake cluster, and pods that do what a test says."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from metaloom.k8s.resources import EVENTS, JOBS, PODS
from tests.k8s.fake_admission import admit_pod
from tests.k8s.fake_store import Object, Refusal, Selection, Store, now

INDEX = "batch.kubernetes.io/job-completion-index"
JOB_NAME = "batch.kubernetes.io/job-name"
KUBEFLOW_INDEX = "training.kubeflow.org/replica-index"
KUBEFLOW_TYPE = "training.kubeflow.org/replica-type"
ENDED = ("Succeeded", "Failed")


@dataclasses.dataclass
class Log:
    """What one container of one pod wrote, from one start of it to its end.

    Attributes:
        lines: time in nanoseconds since 1970, and text.
        has_ended: whether nothing more will come.
    """

    lines: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    has_ended: bool = False


class Kubelet:
    """Where the logs of all pods are: by namespace, name and uid, one for each start of the container."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._logs: dict[str, list[Log]] = {}
        self._last = 0

    def logs(self, pod: Object) -> list[Log]:
        """Of the pod; its last is the one that is being written."""
        return self._logs.setdefault(pod["metadata"]["uid"], [])

    def write(self, pod: Object, lines: Sequence[str], at_ns: int | None) -> None:
        """Adds lines, each at a time of its own unless one is given."""
        with self._store.changed:
            log = self.logs(pod)[-1]
            for line in lines:
                self._last = max(self._last + 1, time.time_ns())
                log.lines.append((self._last if at_ns is None else at_ns, line))
            self._store.changed.notify_all()


def condition(kind: str, reason: str = "", message: str = "", *, is_true: bool = True) -> Object:
    """A condition, as in the status of pods and Jobs."""
    return {
        "type": kind,
        "status": "True" if is_true else "False",
        "lastProbeTime": now(),
        "lastTransitionTime": now(),
        "reason": reason,
        "message": message,
    }


def set_condition(status: Object, new: Object) -> None:
    """Puts the condition in place of the one of its type."""
    others = [each for each in status.get("conditions", []) if each["type"] != new["type"]]
    status["conditions"] = [*others, new]


class JobController:
    """Makes pods of Jobs, and ends Jobs, as the real controller does.

    Attributes:
        starts_pods: whether a pod runs as soon as it is made.
    """

    def __init__(self, store: Store, kubelet: Kubelet, *, starts_pods: bool) -> None:
        self._store = store
        self._kubelet = kubelet
        self._counted: dict[str, str] = {}
        self.starts_pods = starts_pods

    def sync(self, namespace: str, name: str) -> None:
        """Brings a Job to where its pods have it."""
        with self._store.changed:
            job = self._store.find(JOBS, namespace, name)
            if job is None or _is_over(job):
                return
            if job["spec"].get("suspend"):
                self._suspend(job)
                return
            self._resume(job)
            failure = self._count_failures(job)
            if failure is not None:
                self.fail(namespace, name, *failure)
                return
            self._fill(job)
            self._measure(namespace, name)
            self._complete(namespace, name)

    def fail(self, namespace: str, name: str, reason: str, message: str) -> None:
        """Ends a Job: it is condemned, then its pods are deleted, then it has failed."""
        told = (reason, message)
        with self._store.changed:
            self._edit(namespace, name, lambda s: set_condition(s, condition("FailureTarget", *told)))
            job = self._store.get(JOBS, namespace, name)
            for pod in self.pods(job):
                # A Job that has failed counts those that it ends as well, whatever their end.
                self._counted.setdefault(pod["metadata"]["uid"], job["metadata"]["uid"])
            self._delete_active(job)
            self._measure(namespace, name)
            self._edit(namespace, name, lambda s: set_condition(s, condition("Failed", *told)))
            self.event(self._store.get(JOBS, namespace, name), "Warning", reason, message)

    def event(self, about: Object, kind: str, reason: str, message: str, *, count: int = 1) -> Object:
        """Writes an Event about an object."""
        metadata = about["metadata"]
        name = f"{metadata['name']}.{self._store.letters()}"
        return self._store.create(
            EVENTS,
            metadata["namespace"],
            {
                "metadata": {"name": name},
                "involvedObject": {
                    "apiVersion": about.get("apiVersion", "v1"),
                    "kind": about.get("kind", "Pod"),
                    "name": metadata["name"],
                    "namespace": metadata["namespace"],
                    "uid": metadata["uid"],
                },
                "type": kind,
                "reason": reason,
                "message": message,
                "count": count,
                "firstTimestamp": now(),
                "lastTimestamp": now(),
            },
        )

    def _edit(self, namespace: str, name: str, edit: Callable[[Object], object]) -> None:
        self._store.edit(JOBS, namespace, name, lambda job: edit(job.setdefault("status", {})))

    def _suspend(self, job: Object) -> None:
        namespace, name = job["metadata"]["namespace"], job["metadata"]["name"]
        self._delete_active(job)
        suspended = condition("Suspended", reason="JobSuspended", message="Job suspended")
        if not any(each["type"] == "Suspended" for each in job.get("status", {}).get("conditions", [])):
            self._edit(namespace, name, lambda status: set_condition(status, suspended))
        self._measure(namespace, name)

    def _resume(self, job: Object) -> None:
        namespace, name = job["metadata"]["namespace"], job["metadata"]["name"]

        def edit(status: Object) -> None:
            status.setdefault("startTime", now())
            if any(each["type"] == "Suspended" for each in status.get("conditions", [])):
                resumed = condition("Suspended", reason="JobResumed", message="Job resumed", is_true=False)
                set_condition(status, resumed)

        self._edit(namespace, name, edit)

    def _count_failures(self, job: Object) -> tuple[str, str] | None:
        """Reason and message, where the failures of the Job's pods end it."""
        spec, uid = job["spec"], job["metadata"]["uid"]
        for pod in self.pods(job):
            if pod["status"]["phase"] != "Failed" or pod["metadata"]["uid"] in self._counted:
                continue
            rule = _matching_rule(spec.get("podFailurePolicy") or {}, pod)
            action = rule[1] if rule else "Count"
            self._counted[pod["metadata"]["uid"]] = uid if action == "Count" else ""
            if rule and action == "FailJob":
                return "PodFailurePolicy", _policy_message(pod, rule[0])
            if action == "Count" and "backoffLimitPerIndex" in spec:
                index = pod["metadata"]["labels"][INDEX]
                self._counted[pod["metadata"]["uid"]] = f"{uid}/{index}"
                if list(self._counted.values()).count(f"{uid}/{index}") > spec["backoffLimitPerIndex"]:
                    self._edit_failed_index(job, index)
                    return (
                        "MaxFailedIndexesExceeded",
                        "Job has exceeded the specified maximal number of failed indexes",
                    )
        if list(self._counted.values()).count(uid) > spec.get("backoffLimit", 6):
            return "BackoffLimitExceeded", "Job has reached the specified backoff limit"
        return None

    def _edit_failed_index(self, job: Object, index: str) -> None:
        metadata = job["metadata"]
        self._edit(metadata["namespace"], metadata["name"], lambda status: status.update(failedIndexes=index))

    def _fill(self, job: Object) -> None:
        """Makes a pod for each index that has none."""
        spec = job["spec"]
        completions = spec.get("completions") or 1
        have = {
            int(pod["metadata"]["labels"].get(INDEX, 0))
            for pod in self.pods(job)
            if pod["status"]["phase"] != "Failed"
        }
        room = spec.get("parallelism", 1) - len(
            [pod for pod in self.pods(job) if pod["status"]["phase"] not in ENDED]
        )
        for index in [i for i in range(completions) if i not in have][: max(room, 0)]:
            try:
                self.make_pod(job, index)
            except Refusal as refusal:
                self.event(job, "Warning", "FailedCreate", f"Error creating: {refusal}")

    def make_pod(self, job: Object, index: int) -> Object:
        """A new pod of a Job.

        Raises:
            Refusal: admission does not take it.
        """
        metadata, template = job["metadata"], copy.deepcopy(job["spec"]["template"])
        name = f"{metadata['name']}-{index}-{self._store.letters()}"
        labels = dict(template.get("metadata", {}).get("labels") or {})
        labels |= {JOB_NAME: metadata["name"], "job-name": metadata["name"]}
        labels |= {"batch.kubernetes.io/controller-uid": metadata["uid"], INDEX: str(index)}
        annotations = dict(template.get("metadata", {}).get("annotations") or {}) | {INDEX: str(index)}
        pod: Object = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name,
                "labels": labels,
                "annotations": annotations,
                "ownerReferences": [
                    {
                        "apiVersion": "batch/v1",
                        "kind": "Job",
                        "name": metadata["name"],
                        "uid": metadata["uid"],
                        "controller": True,
                        "blockOwnerDeletion": True,
                    }
                ],
            },
            "spec": template["spec"] | {"hostname": f"{metadata['name']}-{index}"},
        }
        made = self.add_pod(metadata["namespace"], admit_pod(self._store, metadata["namespace"], pod))
        self.event(job, "Normal", "SuccessfulCreate", f"Created pod: {name}")
        return made

    def add_pod(self, namespace: str, pod: Object) -> Object:
        """Stores a pod that admission has taken; it waits, or runs where pods are started."""
        pod = pod | {"status": {"phase": "Pending", "conditions": []}}
        made = self._store.create(PODS, namespace, pod)
        if self.starts_pods:
            start(self._store, self._kubelet, made)
        return made

    def pods(self, job: Object) -> list[Object]:
        """The pods that a Job owns."""
        uid, namespace = job["metadata"]["uid"], job["metadata"]["namespace"]
        return [
            pod
            for pod in self._store.list(PODS, namespace, Selection())
            if any(owner["uid"] == uid for owner in pod["metadata"].get("ownerReferences", []))
        ]

    def _delete_active(self, job: Object) -> None:
        for pod in self.pods(job):
            if pod["status"]["phase"] not in ENDED:
                delete_pod(self._store, self._kubelet, pod)

    def _measure(self, namespace: str, name: str) -> None:
        job = self._store.get(JOBS, namespace, name)
        pods = self.pods(job)
        phases = [pod["status"]["phase"] for pod in pods]
        done = sorted(
            {int(p["metadata"]["labels"][INDEX]) for p in pods if p["status"]["phase"] == "Succeeded"}
        )

        def edit(status: Object) -> None:
            status["active"] = len([phase for phase in phases if phase not in ENDED])
            status["ready"] = phases.count("Running")
            status["succeeded"] = len(done)
            # By index or not; what a policy ignores counts for nothing.
            counted = [owner.partition("/")[0] for owner in self._counted.values()]
            status["failed"] = counted.count(job["metadata"]["uid"])
            if job["spec"].get("completionMode") == "Indexed":
                status["completedIndexes"] = ",".join(map(str, done))

        self._edit(namespace, name, edit)

    def _complete(self, namespace: str, name: str) -> None:
        job = self._store.get(JOBS, namespace, name)
        if job["status"]["succeeded"] < (job["spec"].get("completions") or 1):
            return
        told = ("CompletionsReached", "Reached expected number of succeeded pods")
        self._edit(namespace, name, lambda s: set_condition(s, condition("SuccessCriteriaMet", *told)))
        self._edit(namespace, name, lambda s: set_condition(s, condition("Complete", *told)))
        self._edit(namespace, name, lambda status: status.update(completionTime=now()))


def _is_over(job: Object) -> bool:
    conditions = job.get("status", {}).get("conditions", [])
    return any(each["type"] in ("Complete", "Failed") and each["status"] == "True" for each in conditions)


def _matching_rule(policy: Object, pod: Object) -> tuple[int, str] | None:
    for i, rule in enumerate(policy.get("rules", [])):
        for wanted in rule.get("onPodConditions") or []:
            held = {"type": wanted["type"], "status": wanted.get("status", "True")}
            if any(held.items() <= each.items() for each in pod["status"].get("conditions", [])):
                return i, rule["action"]
        codes = rule.get("onExitCodes")
        for status in pod["status"].get("containerStatuses", []) if codes else []:
            code = status["state"].get("terminated", {}).get("exitCode", 0)
            if code == 0 or codes.get("containerName", status["name"]) != status["name"]:
                continue
            if (code in codes["values"]) == (codes["operator"] == "In"):
                return i, rule["action"]
    return None


def _policy_message(pod: Object, rule: int) -> str:
    at = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
    for status in pod["status"].get("containerStatuses", []):
        code = status["state"].get("terminated", {}).get("exitCode", 0)
        if code:
            return (
                f"Container {status['name']} for pod {at} failed with exit code {code} matching FailJob rule "
                f"at index {rule}"
            )
    return f"Pod {at} has condition DisruptionTarget matching FailJob rule at index {rule}"


def container_status(pod: Object, **state: Any) -> Object:
    """The status of the pod's container in a state, with what it had before."""
    container = pod["spec"]["containers"][0]
    before = (pod["status"].get("containerStatuses") or [{}])[0]
    return {
        "name": container["name"],
        "image": container.get("image", ""),
        "imageID": "",
        "restartCount": before.get("restartCount", 0),
        "lastState": before.get("lastState", {}),
        "ready": "running" in state,
        "started": "running" in state,
        "state": state,
    }


def _schedule(pod: Object) -> None:
    pod["spec"].setdefault("nodeName", "node-0")
    set_condition(pod["status"], condition("PodScheduled"))
    pod["status"].setdefault("startTime", now())


def start(store: Store, kubelet: Kubelet, pod: Object) -> None:
    """The pod's container runs."""
    with store.changed:
        kubelet.logs(pod).append(Log())

        def edit(pod: Object) -> None:
            _schedule(pod)
            for kind in ("Initialized", "ContainersReady", "Ready"):
                set_condition(pod["status"], condition(kind))
            pod["status"]["phase"] = "Running"
            pod["status"]["containerStatuses"] = [container_status(pod, running={"startedAt": now()})]

        store.edit(PODS, pod["metadata"]["namespace"], pod["metadata"]["name"], edit)


def end_log(kubelet: Kubelet, pod: Object) -> None:
    """Nothing more is written by the pod's container."""
    for log in kubelet.logs(pod):
        log.has_ended = True


def delete_pod(store: Store, kubelet: Kubelet, pod: Object) -> None:
    """The pod is gone, and its logs with it."""
    with store.changed:
        end_log(kubelet, pod)
        store.delete(PODS, pod["metadata"]["namespace"], pod["metadata"]["name"])


class Pods:
    """The pods of a job, by their index; each method does what the word says to the newest pod of an index.

    They are the pods with the label `metaloom/job` or `batch.kubernetes.io/job-name` of that name. Where an
    index may be None, it means every pod that has not ended.
    """

    def __init__(
        self, store: Store, kubelet: Kubelet, controller: JobController, namespace: str, job: str
    ) -> None:
        self._store = store
        self._kubelet = kubelet
        self._controller = controller
        self._namespace = namespace
        self._job = job

    def all(self) -> list[Object]:
        """Every pod there is, oldest first."""
        names = {"metaloom/job": self._job, JOB_NAME: self._job}
        found = [
            pod
            for pod in self._store.list(PODS, self._namespace, Selection())
            if names.items() & (pod["metadata"].get("labels") or {}).items()
        ]
        return sorted(found, key=lambda pod: int(pod["metadata"]["resourceVersion"]))

    def get(self, index: int) -> Object:
        """The newest pod of an index that has not ended, else the newest."""
        own = [pod for pod in self.all() if _index(pod) == index]
        if not own:
            raise AssertionError(f"job {self._job} has no pod of index {index}")
        live = [pod for pod in own if pod["status"]["phase"] not in ENDED]
        return (live or own)[-1]

    def name(self, index: int) -> str:
        return str(self.get(index)["metadata"]["name"])

    def run(self, index: int | None = None) -> None:
        """The container starts; one that runs goes on."""
        for pod in self._chosen(index):
            if pod["status"]["phase"] == "Pending":
                start(self._store, self._kubelet, pod)
        self._sync()

    def log(self, index: int, *lines: str, at_ns: int | None = None) -> None:
        """The container writes lines, at a time of their own unless one is given."""
        self._kubelet.write(self.get(index), lines, at_ns)

    def rotate_log(self, index: int, *, keep: int) -> None:
        """All lines of the container but the last ones are gone."""
        with self._store.changed:
            log = self._kubelet.logs(self.get(index))[-1]
            log.lines[:] = log.lines[len(log.lines) - keep :]

    def succeed(self, index: int | None = None) -> None:
        """The container exits with 0."""
        for pod in self._chosen(index):
            self._end(pod, 0, "Completed")
        self._sync()

    def fail(
        self, index: int | None = None, *, code: int = 1, reason: str = "Error", message: str = ""
    ) -> None:
        """The container exits with another code. With `restartPolicy: OnFailure` it is started again in its
        pod; else the pod has failed, and the Job's controller does as the Job says."""
        for pod in self._chosen(index):
            if pod["spec"].get("restartPolicy") == "OnFailure":
                self._restart(pod, code, reason)
            else:
                self._end(pod, code, reason, message)
        self._sync()

    def out_of_memory(self, index: int) -> None:
        """The container is killed for its memory."""
        self.fail(index, code=137, reason="OOMKilled")

    def preempt(
        self,
        index: int | None = None,
        *,
        reason: str = "PreemptionByScheduler",
        message: str = "default-scheduler: preempting to accommodate a higher priority pod",
        code: int = 75,
    ) -> None:
        """The pod is evicted: it is a disruption's target, and its container is stopped and exits."""
        for pod in self._chosen(index):
            target = condition("DisruptionTarget", reason=reason, message=message)
            self._set_condition(pod, target)
            self._controller.event(pod, "Normal", "Preempted", message)
            self._end(self._fresh(pod), code, "Error")
        self._sync()

    def unschedulable(
        self,
        index: int | None = None,
        message: str = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu. preemption: 0/3 nodes are "
        "available: 3 No preemption victims found for incoming pod.",
    ) -> None:
        """No node has room for the pod."""
        for pod in self._chosen(index):
            refused = condition("PodScheduled", reason="Unschedulable", message=message, is_true=False)
            self._set_condition(pod, refused)
            self._controller.event(pod, "Warning", "FailedScheduling", message)
        self._sync()

    def image_error(
        self, index: int | None = None, message: str = "not found", *, reason: str = "ImagePullBackOff"
    ) -> None:
        """The image cannot be pulled: ErrImagePull first, then ImagePullBackOff."""
        for pod in self._chosen(index):
            image = pod["spec"]["containers"][0].get("image", "")
            text = f'failed to pull and unpack image "{image}": {message}'
            for waiting in dict.fromkeys(("ErrImagePull", reason)):
                shown = text if waiting == "ErrImagePull" else f'Back-off pulling image "{image}": {text}'
                self._wait(pod, waiting, shown)
            self._controller.event(pod, "Warning", "Failed", f'Failed to pull image "{image}": {text}')
            self._controller.event(pod, "Warning", "Failed", "Error: ErrImagePull")
            self._controller.event(pod, "Normal", "BackOff", f'Back-off pulling image "{image}"', count=3)
        self._sync()

    def waiting(self, index: int | None = None, reason: str = "ContainerCreating", message: str = "") -> None:
        """The pod has a node, and its container waits."""
        for pod in self._chosen(index):
            self._wait(pod, reason, message)

    def delete(self, index: int) -> None:
        """The pod is deleted, with its logs; the Job's controller makes another."""
        delete_pod(self._store, self._kubelet, self.get(index))
        self._sync()

    def _chosen(self, index: int | None) -> list[Object]:
        if index is not None:
            return [self.get(index)]
        return [pod for pod in self.all() if pod["status"]["phase"] not in ENDED]

    def _fresh(self, pod: Object) -> Object:
        return self._store.get(PODS, self._namespace, pod["metadata"]["name"])

    def _change(self, pod: Object, edit: Callable[[Object], object]) -> None:
        self._store.edit(PODS, self._namespace, pod["metadata"]["name"], edit)

    def _set_condition(self, pod: Object, new: Object) -> None:
        self._change(pod, lambda pod: set_condition(pod["status"], new))

    def _wait(self, pod: Object, reason: str, message: str) -> None:
        def edit(pod: Object) -> None:
            _schedule(pod)
            waiting = {"reason": reason} | ({"message": message} if message else {})
            pod["status"]["containerStatuses"] = [container_status(pod, waiting=waiting)]

        self._change(pod, edit)

    def _end(self, pod: Object, code: int, reason: str, message: str = "") -> None:
        with self._store.changed:
            end_log(self._kubelet, pod)
            ended = {"exitCode": code, "reason": reason, "startedAt": now(), "finishedAt": now()}
            ended |= {"message": message} if message else {}

            def edit(pod: Object) -> None:
                pod["status"]["phase"] = "Failed" if code else "Succeeded"
                for kind in ("ContainersReady", "Ready"):
                    off = condition(kind, reason="PodFailed" if code else "PodCompleted", is_true=False)
                    set_condition(pod["status"], off)
                if "nodeName" in pod["spec"]:
                    pod["status"]["containerStatuses"] = [container_status(pod, terminated=ended)]

            self._change(pod, edit)

    def _restart(self, pod: Object, code: int, reason: str) -> None:
        with self._store.changed:
            end_log(self._kubelet, pod)
            self._kubelet.logs(pod).append(Log())
            ended = {"exitCode": code, "reason": reason, "startedAt": now(), "finishedAt": now()}

            def edit(pod: Object) -> None:
                status = container_status(pod, running={"startedAt": now()})
                status["restartCount"] += 1
                status["lastState"] = {"terminated": ended}
                pod["status"]["containerStatuses"] = [status]

            self._change(pod, edit)

    def _sync(self) -> None:
        owners = {
            owner["name"]
            for pod in self.all()
            for owner in pod["metadata"].get("ownerReferences", [])
            if owner["kind"] == "Job"
        }
        for name in owners | {self._job}:
            self._controller.sync(self._namespace, name)


def _index(pod: Object) -> int | None:
    labels = pod["metadata"].get("labels") or {}
    if INDEX in labels:
        return int(labels[INDEX])
    if KUBEFLOW_INDEX in labels:
        return int(labels[KUBEFLOW_INDEX]) + (labels.get(KUBEFLOW_TYPE) == "worker")
    return None
