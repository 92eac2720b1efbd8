"""What is told of a job: for each situation that a cluster can be in, the exact words."""

from __future__ import annotations

import copy
import dataclasses
import datetime
from collections.abc import Sequence
from typing import Any

import pytest

from metaloom.k8s.heartbeat import Progress, read_heartbeat
from metaloom.k8s.pod_state import image_cause
from metaloom.k8s.status import Status, read_status
from metaloom.k8s.wording import clock_words, duration_words, indices_words, time_of
from tests.k8s.job_objects import (
    IMAGE,
    NOW,
    Object,
    at,
    condition,
    event,
    new_event,
    pod,
    stamped,
    terminated,
    top,
    unscheduled,
    waiting,
)

GPUS_TAKEN = (
    "0/5 nodes are available: 1 node(s) had untolerated taint {node-role.kubernetes.io/control-plane: }, "
    "4 Insufficient nvidia.com/gpu. preemption: 0/5 nodes are available: 1 Preemption is not helpful for "
    "scheduling, 4 No preemption victims found for incoming pod."
)
BACKOFF = "Job has reached the specified backoff limit"
MISTAKE = (
    "Container metaloom for pod lab/glyphs-1-x7x2k failed with exit code 2 matching FailJob rule at index 0"
)
NOT_THERE = (
    f'Back-off pulling image "{IMAGE}": ErrImagePull: rpc error: code = NotFound desc = failed to pull and '
    f'unpack image "{IMAGE}": failed to resolve reference "{IMAGE}": {IMAGE}: not found'
)
PREEMPTED = condition(
    "DisruptionTarget",
    "PreemptionByScheduler",
    "default-scheduler: preempting to accommodate a higher priority pod",
)
SCHEDULED = condition("PodScheduled")
CREATING = waiting("ContainerCreating")
STEPS = stamped(
    "13:55:00", "[rank 0] meta-train: 1200 of 5000 steps, loss 1.25, accuracy 50.0 %, 1 h 20 min left"
)


def told(
    job: Object,
    pods: Sequence[Object] = (),
    *,
    events: Sequence[Object] = (),
    log: Sequence[str] | None = (),
    others: Sequence[Object] = (),
) -> Status:
    return read_status(job, pods, events, log, NOW, others=others)


def suspended(queue: str = "") -> Object:
    job = top("Job", condition("Suspended", "JobSuspended", "Job suspended"))
    job["spec"]["suspend"] = True
    if queue:
        job["metadata"]["labels"] = job["metadata"]["labels"] | {"kueue.x-k8s.io/queue-name": queue}
    return job


def workload(*conditions: Object) -> Object:
    meta = {"name": "job-glyphs-1a2b3"}
    return {"kind": "Workload", "metadata": meta, "status": {"conditions": list(conditions)}}


NO_QUOTA = condition(
    "QuotaReserved",
    "Pending",
    "couldn't assign flavors to pod set main: insufficient unused quota for nvidia.com/gpu in flavor h100, 8 "
    "more needed",
    status="False",
)


# ---------------------------------------------------------------- waiting


def test_a_job_whose_gpus_are_taken_is_queued_for_them() -> None:
    status = told(top(gpus=1), [unscheduled(index, GPUS_TAKEN) for index in (0, 1)])
    assert (status.state, status.is_stuck) == ("queued", False)
    assert status.headline == "queued for 2 GPUs: 0 of the cluster's 5 nodes have them free"
    assert status.details == (
        "4 of 5 have too few nvidia.com/gpu free",
        "1 of 5 has the taint node-role.kubernetes.io/control-plane, which the job does not tolerate",
    )
    assert [one.words for one in status.nodes] == ["waiting for a machine"] * 2


@pytest.mark.parametrize(
    ("message", "headline", "details"),
    [
        (
            "0/5 nodes are available: 5 Insufficient nvidia.com/gpu. no new claims to deallocate, "
            "preemption: 0/5 nodes are available: 5 No preemption victims found for incoming pod.",
            "queued for 16 GPUs: 0 of the cluster's 5 nodes have them free",
            (),
        ),
        (
            "0/5 nodes are available: 2 Insufficient memory, 3 node(s) didn't match Pod's node "
            "affinity/selector. preemption: 0/5 nodes are available: 5 Preemption is not helpful.",
            "queued for 16 GPUs: none of the cluster's 5 nodes can take it",
            ("3 of 5 do not match its node selector", "2 of 5 have too little memory free"),
        ),
        (
            "0/1 nodes are available: 1 node(s) were unschedulable.",
            "queued for 16 GPUs: none of the cluster's 1 node can take it",
            ("1 of 1 is closed to new pods (cordoned)",),
        ),
        (
            "0/5 nodes are available: pod has unbound immediate PersistentVolumeClaims. not found",
            "queued for 16 GPUs: pod has unbound immediate PersistentVolumeClaims",
            (),
        ),
        (
            '0/5 nodes are available: persistentvolumeclaim "data" not found. not found',
            'queued for 16 GPUs: persistentvolumeclaim "data" not found',
            (),
        ),
        (
            "no nodes available to schedule pods",
            "queued for 16 GPUs: no nodes available to schedule pods",
            (),
        ),
        ("", "queued for 16 GPUs: waiting for the scheduler", ()),
    ],
)
def test_why_a_pod_has_no_machine_is_told_as_the_scheduler_has_it(
    message: str, headline: str, details: tuple[str, ...]
) -> None:
    status = told(top(), [unscheduled(index, message) for index in (0, 1)])
    assert (status.state, status.headline, status.details) == ("queued", headline, details)


def test_what_the_scheduler_says_is_taken_from_an_event_where_no_condition_has_it() -> None:
    bare = pod(0, "Pending", machine=None)
    status = told(top(nodes=1), [bare], events=[new_event(bare, "FailedScheduling", GPUS_TAKEN)])
    assert status.headline == "queued for 8 GPUs: 0 of the cluster's 5 nodes have them free"


def test_half_a_gang_waits_for_the_other() -> None:
    late = unscheduled(1, GPUS_TAKEN)
    scaling = event(late, "TriggeredScaleUp", "pod triggered scale-up: [{gpus 1->2 (max: 4)}]", warning=False)
    status = told(top(), [pod(0), late], events=[scaling])
    assert status.headline == "queued for 8 GPUs: 0 of the cluster's 5 nodes have them free"
    assert status.details[-2:] == (
        "the autoscaler adds nodes: pod triggered scale-up: [{gpus 1->2 (max: 4)}]",
        "node 0 has a machine, and waits for the rest",
    )


def test_a_suspended_job_waits_in_its_queue_of_kueue() -> None:
    queue = {
        "kind": "LocalQueue",
        "metadata": {"name": "team-a"},
        "status": {"pendingWorkloads": 3, "admittedWorkloads": 1},
    }
    status = told(suspended("team-a"), others=[workload(NO_QUOTA), queue])
    assert (status.state, status.headline) == (
        "queued",
        "queued for 16 GPUs: waiting in Kueue's queue team-a",
    )
    assert status.details == (NO_QUOTA["message"], "queue team-a: 3 waiting and 1 admitted")


def test_why_kueue_lets_a_job_wait_is_taken_from_an_event_where_its_workload_is_not_readable() -> None:
    one = event(
        {"kind": "Workload", "metadata": {"name": "job-glyphs-1a2b3", "uid": "w"}}, "Pending", "no quota."
    )
    other = event(
        {"kind": "Workload", "metadata": {"name": "job-leaves-1a2b3", "uid": "v"}}, "Pending", "other"
    )
    assert told(suspended("team-a"), events=[one, other]).details == ("no quota",)


def test_a_job_that_kueue_preempted_says_so() -> None:
    evicted = condition("Evicted", "Preempted", "Preempted to accommodate a workload (UID: 1, JobUID: 2)")
    status = told(suspended("team-a"), others=[workload(NO_QUOTA, evicted)])
    assert status.headline == "queued for 16 GPUs: preempted, and waiting in Kueue's queue team-a again"
    assert status.details[0] == "Preempted to accommodate a workload (UID: 1, JobUID: 2)"


def test_a_suspended_job_without_a_queue_says_what_keeps_it() -> None:
    assert told(suspended()).headline == (
        "queued for 16 GPUs: suspended, so it has no pods until spec.suspend is false"
    )
    job = top("PyTorchJob", condition("Suspended", "PyTorchJobSuspended", "PyTorchJob glyphs is suspended."))
    job["spec"]["runPolicy"]["suspend"] = True
    assert told(job).state == "queued"


# ---------------------------------------------------------------- pods that are not made


@pytest.mark.parametrize(
    ("message", "state", "headline", "details"),
    [
        (
            'Error creating: pods "glyphs-0-x7x2k" is forbidden: exceeded quota: gpus, requested: '
            "requests.nvidia.com/gpu=8, used: requests.nvidia.com/gpu=12, limited: "
            "requests.nvidia.com/gpu=16",
            "queued",
            "queued for 16 GPUs: the quota gpus of the namespace is used up",
            (
                "requested requests.nvidia.com/gpu=8; used requests.nvidia.com/gpu=12 of "
                "requests.nvidia.com/gpu=16",
            ),
        ),
        (
            'Error creating: pods "glyphs-0-x7x2k" is forbidden: violates PodSecurity "restricted:latest": '
            'runAsNonRoot != true (pod or container "metaloom" must set securityContext.runAsNonRoot=true)',
            "starting",
            "cannot start: the namespace admits no such pods (pod security restricted:latest)",
            (
                'runAsNonRoot != true (pod or container "metaloom" must set '
                "securityContext.runAsNonRoot=true)",
            ),
        ),
        (
            'Error creating: pods "glyphs-0-x7x2k" is forbidden: exceeded quota: gpus, requested: '
            "requests.nvidia.com/gpu=8, used: requests.nvidia.com/gpu=0, limited: "
            "requests.nvidia.com/gpu=4",
            "starting",
            "cannot start: one pod asks for more requests.nvidia.com/gpu than the quota gpus of the "
            "namespace allows",
            (
                "requested requests.nvidia.com/gpu=8; used requests.nvidia.com/gpu=0 of "
                "requests.nvidia.com/gpu=4",
            ),
        ),
        (
            'Error creating: pods "glyphs-0-x7x2k" is forbidden: failed quota: all: must specify limits.cpu '
            "for: metaloom; requests.memory for: metaloom",
            "starting",
            "cannot start: the quota all of the namespace counts limits.cpu and requests.memory, which they "
            "do not say",
            (),
        ),
        (
            'Error creating: pods "glyphs-0-x7x2k" is forbidden: [maximum memory usage per Container is 1Gi, '
            "but limit is 2Gi, minimum cpu usage per Pod is 1.  No request is specified]",
            "starting",
            "cannot start: a limit of the namespace (LimitRange) does not allow it",
            (
                "maximum memory usage per Container is 1Gi, but limit is 2Gi, minimum cpu usage per Pod is "
                "1. No request is specified",
            ),
        ),
        (
            'Error creating: pods "glyphs-0-" is forbidden: no PriorityClass with name urgent was found',
            "starting",
            "cannot start: the cluster has no PriorityClass urgent",
            (),
        ),
        (
            'Error creating: pods "glyphs-0-" is forbidden: error looking up service account lab/train: '
            'serviceaccount "train" not found',
            "starting",
            'cannot start: error looking up service account lab/train: serviceaccount "train" not found',
            (),
        ),
        (
            'Error creating: admission webhook "policy.lab" denied the request: no team label',
            "starting",
            'cannot start: admission webhook "policy.lab" denied the request: no team label',
            (),
        ),
    ],
)
def test_pods_that_the_cluster_refuses_to_make_are_told_with_the_rule(
    message: str, state: str, headline: str, details: tuple[str, ...]
) -> None:
    job = top()
    status = told(job, events=[event(job, "FailedCreate", message)])
    assert (status.state, status.headline, status.details) == (state, headline, details)
    assert status.is_stuck == (state == "starting")


def test_a_refusal_that_is_over_is_not_told() -> None:
    job = top()
    refused = event(
        job, "FailedCreate", "Error creating: exceeded quota: gpus, requested: a, used: b, limited: c"
    )
    assert told(job, [pod(0), pod(1)], events=[refused], log=[STEPS]).state == "running"
    later = [pod(0, created="13:30")]
    assert told(job, later, events=[refused], log=[STEPS]).headline == "starting: 1 of 2 nodes has no pod yet"


# ---------------------------------------------------------------- pods that do not start


@pytest.mark.parametrize(
    ("state", "happened", "headline"),
    [
        (
            waiting("ImagePullBackOff", NOT_THERE),
            None,
            f"cannot start: image pull failed: {IMAGE}: not found",
        ),
        (
            waiting("ImagePullBackOff", f'Back-off pulling image "{IMAGE}"'),
            (
                "Failed",
                f'Failed to pull image "{IMAGE}": rpc error: code = Unknown desc = failed to pull and unpack '
                f'image "{IMAGE}": failed to resolve reference "{IMAGE}": pull access denied, repository '
                f"does "
                "not exist or may require authorization",
            ),
            f"cannot start: image pull failed: {IMAGE}: pull access denied, repository does not exist or may "
            "require authorization",
        ),
        (
            waiting("ImagePullBackOff", f'Back-off pulling image "{IMAGE}"'),
            None,
            f"cannot start: image pull failed: {IMAGE} (ImagePullBackOff)",
        ),
        (
            waiting("CreateContainerConfigError", 'secret "s3-credentials" not found'),
            None,
            'cannot start: container not configured: secret "s3-credentials" not found',
        ),
        (
            waiting("CreateContainerError", "context deadline exceeded"),
            None,
            "cannot start: container not started: context deadline exceeded",
        ),
        (
            CREATING,
            ("FailedMount", 'MountVolume.SetUp failed for volume "data" : mount failed: exit status 32'),
            'cannot start: a volume does not mount: MountVolume.SetUp failed for volume "data" : mount '
            "failed: "
            "exit status 32",
        ),
        (
            CREATING,
            (
                "FailedAttachVolume",
                'Multi-Attach error for volume "pvc-1" Volume is already used by pod(s) a',
            ),
            'cannot start: a volume does not mount: Multi-Attach error for volume "pvc-1" Volume is already '
            "used by pod(s) a",
        ),
        (
            CREATING,
            ("FailedCreatePodSandBox", "Failed to create pod sandbox: rpc error: no IP addresses available"),
            "cannot start: its sandbox is not made: Failed to create pod sandbox: rpc error: no IP addresses "
            "available",
        ),
    ],
)
def test_a_pod_that_cannot_start_is_told_with_the_cause(
    state: Object, happened: tuple[str, str] | None, headline: str
) -> None:
    one = pod(0, "Pending", SCHEDULED, state=state)
    events = [] if happened is None else [event(one, *happened)]
    status = told(top(nodes=1), [one], events=events)
    assert (status.state, status.is_stuck, status.headline) == ("starting", True, headline)


def test_of_several_nodes_that_cannot_start_each_is_told() -> None:
    first = pod(0, "Pending", SCHEDULED, state=waiting("ErrImagePull", "no basic auth credentials"))
    second = pod(
        1, "Pending", SCHEDULED, state=waiting("CreateContainerConfigError", 'configmap "c" not found')
    )
    status = told(top(), [first, second])
    assert status.headline == f"cannot start: image pull failed: {IMAGE}: no basic auth credentials (node 0)"
    assert status.details == ('node 1 (ranks 8-15): container not configured: configmap "c" not found',)


def test_a_pod_that_is_on_its_way_says_how_far() -> None:
    one = pod(0, "Pending", SCHEDULED, state=CREATING)
    pulling = event(one, "Pulling", f'Pulling image "{IMAGE}"', "13:58", warning=False)
    assert told(top(nodes=1), [one], events=[pulling]).headline == (
        f"starting: pulling the image {IMAGE} since 13:58 UTC"
    )
    assert told(top(nodes=1), [one]).headline == "starting: its container is being created"
    first = pod(0, kind="PyTorchJob")
    init = [{"name": "init-pytorch", "state": {"running": {"startedAt": at("13:59")}}}]
    second = pod(1, "Pending", SCHEDULED, kind="PyTorchJob", state=waiting("PodInitializing"), init=init)
    assert told(top("PyTorchJob"), [first, second]).headline == (
        "starting: node 1: waits for its init container init-pytorch"
    )


def test_a_job_without_pods_says_whether_someone_has_taken_it_up() -> None:
    assert told(top()).headline == "starting: the cluster has it, and no pod is there yet"
    fresh = top("PyTorchJob")
    fresh["status"] = {}
    status = told(fresh)
    assert status.is_stuck
    assert status.headline == (
        "starting: nobody has taken it up for 2 h 00 min: is the controller of PyTorchJobs running?"
    )
    job = top("TrainJob")
    warning = event(job, "TrainJobResourcesWarning", "no runtime torch-distributed")
    assert told(job, events=[warning]).details == (
        "TrainJob glyphs: TrainJobResourcesWarning: no runtime torch-distributed",
    )


# ---------------------------------------------------------------- running


def test_a_run_tells_its_step_and_when_it_ends() -> None:
    status = told(
        top(), [pod(0), pod(1)], log=[stamped("12:30:00", "[rank 0] meta-train: 5000 steps"), STEPS]
    )
    assert (status.state, status.headline) == (
        "running",
        "running: step 1200 of 5000, 1 h 15 min left (until 15:15 UTC)",
    )
    assert status.progress is not None
    assert (status.progress.step, status.progress.total, status.progress.left_s) == (1200, 5000, 4800.0)
    assert status.progress.eta == datetime.datetime(2026, 3, 2, 15, 15, 0, 123456, tzinfo=datetime.UTC)
    assert [(one.index, one.machine, one.words) for one in status.nodes] == [
        (0, "gpu-a", "running since 12:01 UTC"),
        (1, "gpu-a", "running since 12:01 UTC"),
    ]


@pytest.mark.parametrize(
    ("log", "headline"),
    [
        (
            [stamped("13:59:00", "[rank 0] pretrain: 300 of 1500 steps, loss 2.2, 40.1 s left")],
            "running: pretrain step 300 of 1500, 0 s left (until 13:59 UTC)",
        ),
        ([stamped("13:59:00", "meta-train: 5000 steps")], "running: meta-train of 5000 steps has begun"),
        (["meta-train: 7 of 9 steps, loss 1, 3 min 20 s left"], "running: step 7 of 9, 3 min 20 s left"),
        (
            [stamped("13:59:00", "[rank 0] pretrain: done: 1500 of 1500 steps in 5 min 00 s")],
            "running: pretrain is done",
        ),
        (
            [stamped("13:59:00", "[rank 0] meta-train: done: 5000 of 5000 steps in 2 h 05 min, loss 1")],
            "running: meta-train is done after 5000 steps, and it is ending",
        ),
        (
            [stamped("13:59:00", "ranks 0-7 of 16 here, on 2 hosts")],
            "running: on 2 nodes since 12:01 UTC; no step is told yet",
        ),
        (
            [STEPS, stamped("13:56:00", "[rank 3] meta-train: 9 of 10 steps")],
            "running: step 1200 of 5000, 1 h 15 min left (until 15:15 UTC)",
        ),
    ],
)
def test_progress_is_read_from_the_newest_line_of_rank_0(log: list[str], headline: str) -> None:
    assert told(top(), [pod(0), pod(1)], log=log).headline == headline


def test_a_run_that_is_silent_for_longer_than_its_lines_are_apart_says_since_when() -> None:
    pods = [pod(0), pod(1)]
    line = "[rank 0] meta-train: 1200 of 5000 steps, loss 1.25, 20 min 00 s left"
    status = told(top(), pods, log=[stamped("12:55:00", line)])
    assert status.headline == (
        "running, but nothing has been heard of it since 12:55 UTC (1 h 05 min), at step 1200 of 5000"
    )
    # A run of a day tells of itself every hour and a quarter.
    slow = stamped("12:55:00", "[rank 0] meta-train: 1200 of 5000 steps, loss 1.25, 20 h 00 min left")
    assert told(top(), pods, log=[slow]).headline.startswith("running: step 1200 of 5000, 18 h 55 min left")
    assert told(top(), pods, log=[]).headline == (
        "running, but nothing has been heard of it since 12:01 UTC (1 h 59 min)"
    )
    # What could not be read says nothing.
    assert told(top(), pods, log=None).headline == "running: on 2 nodes since 12:01 UTC; no step is told yet"


def test_a_restart_inside_the_pods_is_told_until_the_run_goes_on() -> None:
    log = [
        STEPS,
        stamped("13:56:00", "fault: rank 3 was killed by SIGKILL at outer step 1204"),
        stamped("13:56:00", "restart 1 of 3, from the last checkpoint"),
    ]
    status = told(top(), [pod(0), pod(1)], log=log)
    assert (status.state, status.num_restarts, status.num_restarts_inside) == ("restarting", 0, 1)
    assert status.headline == (
        "restarting (1 of 3) from the last checkpoint: rank 3 was killed by SIGKILL at outer step 1204"
    )
    log += [
        stamped("13:57:00", "[rank 0] resumed after outer step 1200 of 5000"),
        stamped("13:57:00", "[rank 0] meta-train: 5000 steps"),
    ]
    status = told(top(), [pod(0), pod(1)], log=log)
    assert (status.state, status.headline) == ("running", "running: step 1200 of 5000")
    assert status.details == (
        "restarted inside its pods once of 3, the last time since rank 3 was killed by SIGKILL at outer "
        "step 1204",
    )


# ---------------------------------------------------------------- started again by the cluster


def test_a_preempted_node_is_followed_until_it_runs_again() -> None:
    gone = pod(1, "Failed", PREEMPTED, state=terminated(75), machine="gpu-b")
    ending = pod(1, "Running", PREEMPTED, machine="gpu-b", deleted="14:00:40")
    status = told(top(), [pod(0), ending], log=[STEPS])
    assert (status.state, status.headline) == (
        "restarting",
        "restarting: node 1 (ranks 8-15) was preempted by a pod of higher priority: saves and ends, for "
        "which it has until 14:00:40 UTC",
    )
    status = told(top(), [pod(0), gone], log=[STEPS])
    assert (status.state, status.headline) == (
        "restarting",
        "restarting: node 1 (ranks 8-15) was preempted by a pod of higher priority",
    )
    assert status.details == ("pod glyphs-1-x7x2k on machine gpu-b", "it had come to step 1200 of 5000")
    again = unscheduled(1, GPUS_TAKEN, suffix="zz9zz", created="13:10")
    status = told(top(), [again, pod(0), gone], log=[STEPS])
    assert (status.state, status.num_restarts) == ("queued", 1)
    assert status.headline == (
        "node 1 (ranks 8-15) was preempted by a pod of higher priority; queued again for 8 GPUs: 0 of the "
        "cluster's 5 nodes have them free"
    )
    creating = pod(1, "Pending", SCHEDULED, state=CREATING, suffix="zz9zz", created="13:10")
    assert told(top(), [creating, pod(0), gone]).headline == (
        "restarting: node 1 (ranks 8-15) was preempted by a pod of higher priority; node 1: its container is "
        "being created"
    )
    status = told(top(), [pod(1, suffix="zz9zz", created="13:10"), pod(0), gone], log=[STEPS])
    assert (status.state, status.num_restarts) == ("running", 1)
    assert status.details == (
        "started again by the cluster once, the last time since node 1 (ranks 8-15) was preempted by a pod "
        "of higher priority",
    )
    assert [one.pod for one in status.nodes] == ["glyphs-0-x7x2k", "glyphs-1-zz9zz"]


@pytest.mark.parametrize(
    ("reason", "more", "words"),
    [
        ("EvictionByEvictionAPI", {}, "was evicted on request, as by a drain or an autoscaler"),
        (
            "DeletionByTaintManager",
            {},
            "was evicted by a taint of its machine, which is lost or being drained",
        ),
        ("DeletionByPodGC", {}, "was deleted, since its machine is gone"),
        (
            "TerminationByKubelet",
            {
                "reason": "Evicted",
                "message": (
                    "The node was low on resource: ephemeral-storage. Threshold quantity: 1, available: 0. "
                ),
            },
            "was ended by its machine: The node was low on resource: ephemeral-storage",
        ),
    ],
)
def test_who_ended_a_node_from_outside_is_told(reason: str, more: Any, words: str) -> None:
    gone = pod(1, "Failed", condition("DisruptionTarget", reason), state=terminated(143), **more)
    assert told(top(), [pod(0), gone]).headline == f"restarting: node 1 (ranks 8-15) {words}"


def test_a_machine_that_does_not_answer_leaves_its_node_unknown() -> None:
    silent = [condition("Ready", status="False", since="13:57"), condition("ContainersReady")]
    status = told(top(), [pod(0), pod(1, "Running", *silent, machine="gpu-b")])
    assert (status.state, status.is_stuck) == ("unknown", False)
    assert status.headline == (
        "unknown: node 1 (ranks 8-15): its machine gpu-b has not answered since 13:57 UTC; node 0 runs"
    )
    by_taint = condition("DisruptionTarget", "DeletionByTaintManager")
    status = told(top(), [pod(0), pod(1, "Running", by_taint, *silent, machine="gpu-b", deleted="13:58")])
    assert (status.state, status.is_stuck) == ("unknown", True)
    assert status.details[0] == (
        "pod glyphs-1-x7x2k was to end and cannot: it stays until its machine is back, or is taken out of "
        "the cluster (kubectl delete node gpu-b)"
    )
    lost = pod(1, "Unknown", machine="gpu-b", reason="NodeLost", message="Node gpu-b was unresponsive")
    assert told(top(), [pod(0), lost]).state == "unknown"


def test_a_job_set_that_starts_all_nodes_again_is_restarting() -> None:
    job = top("JobSet", restarts=2)
    old = pod(0, "Failed", kind="JobSet", attempt=1, state=terminated(137, "OOMKilled"))
    new = pod(1, "Pending", SCHEDULED, kind="JobSet", attempt=2, state=CREATING, created="13:30")
    status = told(job, [old, new])
    assert (status.state, status.num_restarts) == ("restarting", 2)
    assert status.headline == (
        "restarting: node 0 (ranks 0-7) ran out of memory (limit 64Gi, OOMKilled, exit code 137); node 1: "
        "its container is being created"
    )
    assert told(job, [new]).headline == (
        "restarting: restart 2 of 10 of all nodes; node 1: its container is being created"
    )
    # Pods of the attempt before are still there, and no new one is.
    assert told(job, [pod(0, kind="JobSet", attempt=1), pod(1, kind="JobSet", attempt=1)]).headline == (
        "restarting: restart 2 of 10 of all nodes; the cluster has it, and no pod is there yet"
    )


def test_a_container_that_is_started_again_in_its_pod_is_restarting() -> None:
    crashed = pod(
        1,
        kind="PyTorchJob",
        state=waiting("CrashLoopBackOff", "back-off 10s restarting failed container=pytorch"),
        last=terminated(1, message="error: rank 9 at outer step 3: CUDA error"),
        restarts=2,
    )
    status = told(
        top("PyTorchJob", condition("Running", "PyTorchJobRunning")), [pod(0, kind="PyTorchJob"), crashed]
    )
    assert (status.state, status.num_restarts) == ("restarting", 2)
    assert status.headline == (
        "restarting: node 1 (ranks 8-15) ended with exit code 1 (a fault); started again in a moment: rank 9 "
        "at outer step 3: CUDA error"
    )


def created(job: Object, pod_name: str, when: str = "13:10", *, times: int = 1) -> Object:
    """The event by which a controller says that it has made a pod."""
    reason = "SuccessfulCreatePod" if job["kind"] == "PyTorchJob" else "SuccessfulCreate"
    made = event(job, reason, f"Created pod: {pod_name}", when, warning=False)
    return made | {"count": times}


def test_a_restart_is_told_also_when_the_pod_before_is_gone() -> None:
    job = top()
    pods = [pod(0), pod(1, suffix="zz9zz", created="13:10")]
    events = [
        created(job, "glyphs-0-x7x2k", "12:00"),
        created(job, "glyphs-1-x7x2k", "12:00"),
        created(job, "glyphs-1-zz9zz"),
        # Of a job of this name before it, and of another one.
        created(job, "glyphs-0-aaaaa", "11:00"),
        created(top(name="glyphs-2"), "glyphs-2-0-aaaaa"),
    ]
    status = told(job, pods, events=events, log=[STEPS])
    assert (status.state, status.num_restarts) == ("running", 1)
    assert status.details == ("started again by the cluster once",)
    # The pod before counts once, whoever tells of it.
    gone = pod(1, "Failed", PREEMPTED, state=terminated(75), machine="gpu-b")
    status = told(job, [*pods, gone], events=events, log=[STEPS])
    assert status.num_restarts == 1
    # What stands for many is of the last pod alone.
    many = created(job, "glyphs-1-yyyyy", times=9)
    many["message"] = f"(combined from similar events): {many['message']}"
    assert told(job, pods, events=[*events, many], log=[STEPS]).num_restarts == 2
    ended = top("Job", condition("Complete", "CompletionsReached"))
    assert told(ended, events=events).details == ("started again by the cluster once",)


def test_a_restart_of_a_node_is_told_by_the_number_of_pods_that_have_failed() -> None:
    pods = [pod(0), pod(1, suffix="zz9zz", created="13:10")]
    assert told(top(failed=1), pods).num_restarts == 1
    assert told(top(failed=2), pods).num_restarts == 1
    assert told(top(failed=2, uncountedTerminatedPods={"failed": ["uid"]}), pods).num_restarts == 2
    # One that failed and is not replaced yet was not started again; nor were those of a job that has failed.
    assert told(top(failed=1), [pod(0), pod(1, "Failed", state=terminated(1))]).num_restarts == 0
    assert told(top(failed=2), [pod(0)]).num_restarts == 1
    assert told(failed("PodFailurePolicy", MISTAKE, failed=2)).num_restarts == 0
    assert told(failed("BackoffLimitExceeded", BACKOFF, failed=3)).num_restarts == 1


@pytest.mark.parametrize(
    ("kind", "maker", "names", "number"),
    [
        ("JobSet", "glyphs-node-0", ("glyphs-node-0-1-aaaaa", "glyphs-node-0-1-bbbbb"), 1),
        ("TrainJob", "glyphs-node-0", ("glyphs-node-0-0-aaaaa", "glyphs-node-0-1-bbbbb"), 0),
        ("PyTorchJob", "glyphs", ("glyphs-master-0", "glyphs-worker-0", "glyphs-worker-0"), 1),
    ],
)
def test_pods_of_the_other_backends_are_counted_by_what_makes_them(
    kind: str, maker: str, names: tuple[str, ...], number: int
) -> None:
    job = top(kind)
    inside = top("PyTorchJob" if kind == "PyTorchJob" else "Job", name=maker)
    events = [created(inside, name, times=names.count(name)) for name in dict.fromkeys(names)]
    assert told(job, events=events).num_restarts == number


def test_pods_of_an_earlier_job_of_that_name_are_passed_over() -> None:
    before = pod(0, "Failed", created="11:00", suffix="aaaaa", state=terminated(2))
    other = pod(1, "Failed", suffix="bbbbb", state=terminated(2))
    other["metadata"]["ownerReferences"][0]["uid"] = "of-the-job-before"
    status = told(top(), [before, other, pod(0), pod(1)], log=[STEPS])
    assert (status.state, status.num_restarts, len(status.nodes)) == ("running", 0, 2)


# ---------------------------------------------------------------- the end


def failed(reason: str, message: str, *, kind: str = "Job", nodes: int = 2, **status: Any) -> Object:
    ended = condition("Failed", reason, message, since="13:00")
    before = [condition("FailureTarget", reason, message, since="13:00")] if kind == "Job" else []
    return top(kind, *before, ended, nodes=nodes, **status)


def test_a_node_out_of_memory_is_named_with_its_ranks() -> None:
    killed = pod(3, "Failed", state=terminated(137, "OOMKilled", finished="12:59:30"), machine="gpu-d")
    follower = pod(0, "Failed", state=terminated(1, finished="12:59:00"))
    log = [
        "meta-train: 1200 of 5000 steps, loss 1, 3 min 20 s left",
        "error: the host of ranks 24-31 is silent",
    ]
    status = told(failed("BackoffLimitExceeded", BACKOFF, nodes=4), [follower, killed], log=log)
    assert (status.state, status.exit_code) == ("failed", 137)
    assert status.headline == (
        "failed after 1 h 00 min: node 3 (ranks 24-31) ran out of memory (limit 64Gi, OOMKilled, exit "
        "code 137)"
    )
    assert status.details == (
        "error: the host of ranks 24-31 is silent",
        "give its pods more memory, or lower outer.micro_batch or loading.read_ahead",
        "pod glyphs-3-x7x2k on machine gpu-d",
        "not started again: Job has reached the specified backoff limit",
        "it had come to step 1200 of 5000",
    )


@pytest.mark.parametrize(
    ("code", "meaning"),
    [
        (1, "a fault"),
        (2, "a mistake in the recipe"),
        (3, "the data"),
        (4, "a checkpoint"),
        (5, "the launch or the run folder"),
        (6, "the tracking store"),
        (75, "stopped from outside, and saved"),
        (130, "interrupted"),
        (137, "killed"),
    ],
)
def test_an_exit_code_is_told_with_its_meaning_and_the_error(code: int, meaning: str) -> None:
    pods = [pod(index, "Failed", state=terminated(code)) for index in (0, 1)]
    log = [STEPS, "error: the first line", "  the second line"]
    status = told(failed("PodFailurePolicy", "as the rule says"), pods, log=log)
    assert (status.state, status.exit_code) == ("failed", code)
    assert status.headline == (
        f"failed after 1 h 00 min: node 0 (ranks 0-7) ended with exit code {code} ({meaning}): the first line"
    )
    assert status.details[0] == "  the second line"


def test_an_error_is_taken_from_the_last_message_of_a_container_where_there_is_no_log() -> None:
    left = terminated(3, message="meta-train: 5000 steps\nerror: data/train-000.tar is truncated\n")
    status = told(failed("PodFailurePolicy", MISTAKE), [pod(1, "Failed", state=left)], log=None)
    assert status.headline == (
        "failed after 1 h 00 min: node 1 (ranks 8-15) ended with exit code 3 (the data): data/train-000.tar "
        "is truncated"
    )


def test_a_job_whose_pods_are_gone_is_told_by_its_condition() -> None:
    status = told(failed("PodFailurePolicy", MISTAKE))
    assert (status.exit_code, status.headline) == (
        2,
        "failed after 1 h 00 min: node 1 (ranks 8-15) ended with exit code 2 (a mistake in the recipe)",
    )
    child = {"kind": "Job", "status": {"conditions": [condition("Failed", "PodFailurePolicy", MISTAKE)]}}
    told_by_set = "jobset failed due to one or more job failures (first failed job: glyphs-node-0)"
    status = told(failed("FailedJobs", told_by_set, kind="JobSet"), others=[child])
    assert status.exit_code == 2
    assert told(failed("JobsFailed", told_by_set, kind="TrainJob")).headline == (
        f"failed after 1 h 00 min: {told_by_set}"
    )


def test_a_failure_that_is_decided_is_told_before_the_pods_have_ended() -> None:
    job = top("Job", condition("FailureTarget", "PodFailurePolicy", MISTAKE))
    ended = pod(1, "Failed", state=terminated(2))
    status = told(job, [pod(0, deleted="14:00:50"), ended], log=["error: outer.num_stepz is no key"])
    assert (status.state, status.exit_code) == ("stopping", 2)
    assert status.headline == (
        "stopping: it has failed, since node 1 (ranks 8-15) ended with exit code 2 (a mistake in the "
        "recipe): outer.num_stepz is no key; node 0 is being stopped"
    )
    # Before the controller has seen it, a mistake is not taken for something that is tried again.
    assert told(top(), [pod(0), ended]).state == "stopping"
    assert told(top(), [pod(0), pod(1, "Failed", state=terminated(1))]).headline == (
        "restarting: node 1 (ranks 8-15) ended with exit code 1 (a fault)"
    )


def test_a_deadline_and_spent_restarts_are_told_as_such() -> None:
    job = failed("DeadlineExceeded", "Job was active longer than specified deadline")
    job["spec"]["activeDeadlineSeconds"] = 3600
    assert told(job, log=[STEPS]).headline == (
        "failed after 1 h 00 min: it ran for longer than its deadline of 1 h 00 min "
        "(activeDeadlineSeconds 3600)"
    )
    message = "jobset failed due to reaching max number of restarts (first failed job: glyphs-node-0)"
    spent = failed("ReachedMaxRestarts", message, kind="JobSet", restarts=10)
    status = told(spent, [pod(1, "Failed", kind="JobSet", attempt=10, state=terminated(1))])
    assert status.headline == "failed after 1 h 00 min: node 1 (ranks 8-15) ended with exit code 1 (a fault)"
    assert status.details == (
        "pod glyphs-node-0-1-x7x2k on machine gpu-a",
        f"not started again: {message}",
        "started again by the cluster 10 times",
    )


@pytest.mark.parametrize(
    ("kind", "condition_of_it"),
    [
        ("Job", condition("Complete", "CompletionsReached", "Reached expected number of succeeded pods")),
        ("JobSet", condition("Completed", "AllJobsCompleted", "jobset completed successfully")),
        (
            "PyTorchJob",
            condition("Succeeded", "PyTorchJobSucceeded", "PyTorchJob glyphs is successfully completed."),
        ),
        ("TrainJob", condition("Complete", "JobsCompleted", "jobset completed successfully")),
    ],
)
def test_a_finished_job_tells_how_long_it_took(kind: str, condition_of_it: Object) -> None:
    log = ["[rank 0] meta-train: done: 5000 of 5000 steps in 55 min 12 s, loss 1"]
    ended = [pod(index, "Succeeded", kind=kind, state=terminated(0)) for index in (0, 1)]
    status = told(top(kind, condition("Created"), condition_of_it), ended, log=log)
    assert (status.state, status.headline) == ("done", "done: finished in 1 h 00 min, 5000 steps")
    assert told(top(kind, condition_of_it)).headline == "done: finished in 1 h 00 min"


@pytest.mark.parametrize("kind", ["Job", "JobSet", "PyTorchJob", "TrainJob"])
def test_every_kind_of_job_is_followed_from_queue_to_failure(kind: str) -> None:
    assert told(top(kind), [unscheduled(i, GPUS_TAKEN, kind=kind) for i in (0, 1)]).state == "queued"
    assert told(top(kind), [pod(i, kind=kind) for i in (0, 1)], log=[STEPS]).state == "running"
    ended = [pod(0, kind=kind), pod(1, "Failed", kind=kind, state=terminated(3))]
    status = told(top(kind, condition("Failed", "Any", "any")), ended)
    assert status.headline.endswith("node 1 (ranks 8-15) ended with exit code 3 (the data)")
    assert [one.index for one in status.nodes] == [0, 1]


def test_success_is_told_before_the_last_pods_have_ended() -> None:
    job = top("Job", condition("SuccessCriteriaMet", "CompletionsReached"))
    status = told(job, [pod(0), pod(1, "Succeeded", state=terminated(0))])
    assert (status.state, status.headline) == ("stopping", "stopping: done; node 0 is being stopped")


def test_a_deleted_job_tells_what_still_saves() -> None:
    job = top()
    job["metadata"]["deletionTimestamp"] = at("13:59")
    status = told(job, [pod(0, deleted="14:00:40"), pod(1, deleted="14:00:40")])
    assert (status.state, status.headline) == ("stopping", "stopping: deleted; nodes 0 and 1 save and end")
    assert told(job).headline == "stopping: deleted, and about to be gone"


# ---------------------------------------------------------------- what is missing


def stripped(value: Any, key: str) -> Any:
    """An object without a key, wherever it stands."""
    if isinstance(value, dict):
        return {name: stripped(inner, key) for name, inner in value.items() if name != key}
    return [stripped(inner, key) for inner in value] if isinstance(value, list) else value


def keys_of(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*map(keys_of, value.values()), set())
    return set().union(*map(keys_of, value)) if isinstance(value, list) else set()


def test_any_field_may_be_missing() -> None:
    gone = pod(1, "Failed", PREEMPTED, state=terminated(137, "OOMKilled"), machine="gpu-b")
    again = unscheduled(1, GPUS_TAKEN, suffix="zz9zz", created="13:10")
    stuck = pod(0, "Pending", SCHEDULED, state=waiting("ErrImagePull", NOT_THERE), deleted="13:10", init=[])
    for kind in ("Job", "JobSet", "PyTorchJob", "TrainJob"):
        job = top(kind, condition("FailureTarget", "Any", MISTAKE))
        world = {
            "top": job,
            "pods": [gone, again, stuck, pod(0, kind=kind, attempt=1)],
            "events": [event(job, "FailedCreate", "no"), new_event(gone, "FailedMount", "no")],
            "others": [workload(NO_QUOTA), {"kind": "LocalQueue", "metadata": {"name": "q"}}],
        }
        for key in sorted(keys_of(world)):
            less = {"top": {}, "pods": [], "events": [], "others": []} | stripped(world, key)
            status = read_status(less["top"], less["pods"], less["events"], [], NOW, others=less["others"])
            assert status.headline, key
    assert read_status({}, [{}], [{}], ["", "\x00"], NOW, others=[{}]).headline


def test_null_is_as_good_as_absent() -> None:
    job = copy.deepcopy(top())
    job["status"] = job["metadata"]["annotations"] = job["metadata"]["labels"] = None
    empty = {"metadata": None, "spec": None, "status": {"conditions": None, "containerStatuses": None}}
    bare = {"involvedObject": None, "series": None, "message": None, "lastTimestamp": None}
    assert read_status(job, [empty], [bare], [], NOW).headline == (
        "queued for 1 node: waiting for the scheduler"
    )


def test_a_long_message_is_shortened() -> None:
    job = top()
    status = told(
        job, events=[event(job, "FailedCreate", 'violates PodSecurity "restricted": ' + "x" * 5000)]
    )
    assert [len(line) for line in status.details] == [400]


def test_a_status_can_be_written_for_machines() -> None:
    plain = dataclasses.asdict(told(top(), [pod(0), pod(1)], log=[STEPS]))
    assert (plain["state"], plain["progress"]["step"], plain["nodes"][1]["machine"]) == (
        "running",
        1200,
        "gpu-a",
    )


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize(
    ("lines", "progress"),
    [
        (["meta-train: 1 of 1 step, loss 1"], Progress("meta-train", 1, 1)),
        (
            ["pretrain: 5 steps", "pretrain: stopped after 3 of 5 steps in 2.0 s"],
            Progress("pretrain", 3, 5, is_ended=True),
        ),
        (["meta-train: done: 5000 steps in 2 h 05 min"], Progress("meta-train", 5000, 5000, is_ended=True)),
        (["resumed after outer step 7 of 9", "meta-train: 9 steps"], Progress("meta-train", 7, 9)),
        (["meta-train: 7 of 9 steps, 1.0 s left", "meta-train: 9 steps"], Progress("meta-train", None, 9)),
        (["validate: 20 of 50 episodes, 1.0 s left", "fault: 3 of 4 steps"], None),
        (["meta-train: 7 of 9 steps, 1.5 s left"], Progress("meta-train", 7, 9, 1.5)),
        (["meta-train: 7 of 9 steps, 2 h 05 min left"], Progress("meta-train", 7, 9, 7500.0)),
    ],
)
def test_a_line_of_progress_is_understood(lines: list[str], progress: Progress | None) -> None:
    assert read_heartbeat(lines).progress == progress


def test_an_error_that_the_run_went_on_after_is_not_the_one_that_ended_it() -> None:
    beat = read_heartbeat(["error: old", "more", "[rank 0] meta-train: 9 steps", "warning: w"])
    assert beat.error == ()
    assert read_heartbeat(["error: new", "  line", "[rank 3] noise", "last"]).error == (
        "new",
        "  line",
        "last",
    )


def test_a_registrys_cause_is_freed_of_what_stands_before_it() -> None:
    assert image_cause(NOT_THERE, IMAGE) == "not found"
    bad = (
        'Failed to apply default image tag "A:B": couldn\'t parse image name "A:B": invalid reference format'
    )
    assert image_cause(bad, "A:B") == 'couldn\'t parse image name "A:B": invalid reference format'
    assert image_cause(f'Back-off pulling image "{IMAGE}"', IMAGE) == ""


def test_times_and_durations_in_words() -> None:
    assert [duration_words(s) for s in (0, 59.4, 200, 7500, 90_000)] == [
        "0 s",
        "59 s",
        "3 min 20 s",
        "2 h 05 min",
        "1 d 01 h",
    ]
    yesterday = datetime.datetime(2026, 3, 1, 9, 5, tzinfo=datetime.UTC)
    assert clock_words(yesterday, NOW) == "2026-03-01 09:05 UTC"
    assert time_of("2026-03-02T13:00:00.123456789Z") == datetime.datetime(
        2026, 3, 2, 13, 0, 0, 123456, tzinfo=datetime.UTC
    )
    assert [time_of(text) for text in (None, "", "soon", 5)] == [None] * 4
    assert indices_words([5, 0, 1, 2]) == "nodes 0-2 and 5"
    assert indices_words([3]) == "node 3"
