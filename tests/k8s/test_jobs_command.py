"""`metaloom jobs`: what a person reads of jobs on a cluster that plays along."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from metaloom.cli import main
from metaloom.k8s.resources import (
    CONFIG_MAPS,
    JOB_SETS,
    JOBS,
    LOCAL_QUEUES,
    PODS,
    PYTORCH_JOBS,
    SERVICES,
    WORKLOADS,
)
from tests.commands import command, environment
from tests.k8s import job_objects
from tests.k8s.fake_api import FakeCluster
from tests.k8s.job_objects import LABELS, Object, condition

PLACE = "namespace team of fake (http://127.0.0.1:"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    with FakeCluster(tmp_path) as found:
        monkeypatch.setenv("KUBECONFIG", str(found.kubeconfig))
        monkeypatch.setattr("metaloom.jobs_command.POLL_S", 0.02)
        yield found


def submitted(
    cluster: FakeCluster, name: str = "glyphs", *, nodes: int = 2, backoff: int = 6, queue: str = ""
) -> Object:
    """A job as it is submitted, with its service."""
    job = job_objects.top(nodes=nodes, ranks=2, gpus=1, name=name)
    del job["status"]
    job["metadata"] = {key: job["metadata"][key] for key in ("name", "labels", "annotations")}
    if queue:
        job["metadata"]["labels"] |= {"kueue.x-k8s.io/queue-name": queue}
        job["spec"]["suspend"] = True
    labels = LABELS | {"metaloom/job": name}
    job["spec"]["template"]["metadata"]["labels"] = labels
    job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = 60
    job["spec"] |= {
        "backoffLimit": backoff,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2, 3, 4, 5, 6]}},
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
            ]
        },
    }
    cluster.add(SERVICES, {"metadata": {"name": name, "labels": labels}, "spec": {"clusterIP": "None"}})
    made = cluster.add(JOBS, job)
    cluster.controller.sync(cluster.namespace, name)
    return made


def here(job: Object) -> Object:
    """The object of a job in the namespace of the tests' kubeconfig."""
    job["metadata"]["namespace"] = "team"
    return job


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    """What a command printed on standard output, where it ends with that code."""
    assert main(["jobs", *words]) == code
    return capsys.readouterr().out


@contextmanager
def meanwhile(cluster: FakeCluster, *acts: Callable[[], object]) -> Iterator[None]:
    """Does one thing after the other, each once the job was looked at twice since the one before."""

    def num_looks() -> int:
        return sum(path.endswith("/jobs/glyphs") for _, path, _ in list(cluster.requests))

    def play() -> None:
        for act in acts:
            before = num_looks()
            cluster.wait(lambda before=before: num_looks() >= before + 2)  # type: ignore[misc]
            act()

    thread = threading.Thread(target=play)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def without_times(text: str) -> list[str]:
    """Lines without the time of day with which they begin."""
    return [line.partition(" ")[2] if line[2:3] == ":" else line for line in text.splitlines()]


@pytest.mark.parametrize("words", [("glyphs", "--timout=3s"), ("glyphs", "a=b"), (), ("glyphs", "--timeout")])
def test_a_mistyped_option_of_wait_is_not_taken_for_the_end_of_a_job(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for command_, code in (("wait", 125), ("status", 2)):
        with pytest.raises(SystemExit) as ended:
            main(["jobs", command_, *words])
        assert ended.value.code == code
        assert capsys.readouterr().err.startswith("usage: metaloom")
    with pytest.raises(SystemExit) as ended:
        main(["jobs", "wait", "--help"])
    assert ended.value.code == 0


# ---------------------------------------------------------------- status


def test_a_job_that_waits_for_gpus_says_for_how_many(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(cluster)
    cluster.pods("glyphs").unschedulable()
    assert said(capsys, "status", "glyphs") == (
        "glyphs: queued for 2 GPUs: 0 of the cluster's 3 nodes have them free\n"
        "  node  machine  state\n"
        "  ----  -------  -------------------\n"
        "  0     -        waiting for a machine\n"
        "  1     -        waiting for a machine\n"
    ).replace("-------------------\n", "---------------------\n")


def test_an_image_that_cannot_be_pulled_is_named_with_the_registrys_cause(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(cluster)
    cluster.pods("glyphs").image_error(message="pull access denied, repository does not exist")
    first = said(capsys, "status", "glyphs").splitlines()[0]
    assert first == (
        "glyphs: cannot start: image pull failed: registry.example/lab/metaloom:1.2: pull access denied, "
        "repository does not exist"
    )


def test_progress_comes_from_the_log_of_node_0(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(cluster)
    pods = cluster.pods("glyphs")
    pods.run()
    pods.log(0, "[rank 0] meta-train: 5000 steps")
    pods.log(0, "[rank 0] meta-train: 1200 of 5000 steps, loss 1.25, accuracy 50.0 %, 3 min 20 s left")
    lines = said(capsys, "status", "glyphs").splitlines()
    assert lines[0].startswith("glyphs: running: step 1200 of 5000, 3 min ")
    assert [line.split()[:1] for line in lines[1:]] == [["node"], ["----"], ["0"], ["1"]]
    plain = json.loads(said(capsys, "status", "glyphs", "--json"))
    assert (plain["state"], plain["kind"], plain["num_nodes"]) == ("running", "Job", 2)
    assert (plain["progress"]["step"], plain["progress"]["total"]) == (1200, 5000)
    assert plain["progress"]["eta"].endswith("+00:00")


def test_a_node_out_of_memory_is_told_though_its_siblings_are_deleted(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(cluster, nodes=4, backoff=0)
    pods = cluster.pods("glyphs")
    pods.run()
    pods.log(0, "[rank 0] meta-train: 1200 of 5000 steps, loss 1, 3 min 20 s left")
    pods.out_of_memory(3)
    assert [job_objects_index(pod) for pod in cluster.objects(PODS)] == ["3"]
    lines = said(capsys, "status", "glyphs").splitlines()
    assert re.sub(r"after \d+ s", "after ...", lines[0]) == (
        "glyphs: failed after ...: node 3 (ranks 6-7) ran out of memory (limit 64Gi, OOMKilled, exit code "
        "137)"
    )
    assert "  not started again: Job has reached the specified backoff limit" in lines


def job_objects_index(pod: Object) -> str:
    return str(pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"])


@pytest.mark.parametrize("versions", [("v1beta1",), ("v1beta1", "v1beta2"), ("v1beta2",)])
def test_a_job_in_a_queue_of_kueue_says_which(
    versions: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    queues, workloads = (
        [dataclasses.replace(kind, version=version) for version in versions]
        for kind in (LOCAL_QUEUES, WORKLOADS)
    )
    with FakeCluster(tmp_path, kinds=[*queues, *workloads]) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        cluster.add(queues[-1], {"metadata": {"name": "team-a"}, "status": {"pendingWorkloads": 3}})
        job = submitted(cluster, queue="team-a")
        owner = {"kind": "Job", "name": "glyphs", "uid": job["metadata"]["uid"]}
        no_quota = condition("QuotaReserved", "Pending", "8 more GPUs are needed", status="False")
        waits = {"metadata": {"name": "job-glyphs-1a2b3", "ownerReferences": [owner]}}
        cluster.add(workloads[-1], waits | {"status": {"conditions": [no_quota]}})
        assert said(capsys, "status", "glyphs").splitlines() == [
            "glyphs: queued for 2 GPUs: waiting in Kueue's queue team-a",
            "  8 more GPUs are needed",
            "  queue team-a: 3 waiting",
        ]


def test_what_may_not_be_read_is_noted_and_the_rest_is_told(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(cluster)
    cluster.pods("glyphs").run()
    cluster.forbid("list", "events")
    cluster.forbid("get", "pods/log")
    assert main(["jobs", "status", "glyphs"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("glyphs: running: on 2 nodes since ")
    assert [line.split(":")[0] for line in told.err.splitlines()] == ["note", "note"]
    assert "list events" in told.err
    cluster.forbid("list", "pods")
    assert main(["jobs", "status", "glyphs"]) == 5
    assert "list pods" in capsys.readouterr().err


def test_a_server_that_is_busy_is_asked_again(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(cluster)
    cluster.refuse(429, times=2, retry_after_s=0)
    assert said(capsys, "status", "glyphs").startswith("glyphs: queued for 2 GPUs: ")


def test_a_name_that_is_not_there_is_answered_with_one_that_is(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    # A run may end with 5 as well: waiting for one has a code of its own.
    for command_, code in (("status", 5), ("logs", 5), ("wait", 125)):
        assert main(["jobs", command_, "glyps"]) == code
        error = capsys.readouterr().err
        assert error.startswith(f"error: there is no job 'glyps' in {PLACE}")
        assert error.endswith("), nor any other of metaloom.\n")
    submitted(cluster)
    assert main(["jobs", "status", "glyps"]) == 5
    assert capsys.readouterr().err.endswith(
        "); did you mean 'glyphs'? All are listed by: metaloom jobs list\n"
    )
    assert main(["jobs", "status", "trees"]) == 5
    assert capsys.readouterr().err.endswith("); all are listed by: metaloom jobs list\n")


def test_a_job_of_someone_else_is_not_touched(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(cluster)
    cluster.edit(JOBS, "glyphs", lambda job: job["metadata"].update(labels={"app": "web"}))
    assert main(["jobs", "cancel", "glyphs"]) == 5
    assert "was not made by metaloom: it lacks the label app.kubernetes.io/managed-by=metaloom" in (
        capsys.readouterr().err
    )
    assert cluster.objects(JOBS)


def test_watching_tells_each_change_until_the_job_has_ended(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(cluster, nodes=1)
    pods = cluster.pods("glyphs")
    with meanwhile(cluster, pods.run, pods.succeed):
        assert main(["jobs", "status", "glyphs", "--watch"]) == 0
    lines = [line for line in without_times(capsys.readouterr().out) if line.startswith("glyphs")]
    assert [line.split(":")[1] for line in lines] == [" queued for 1 GPU", " running", " done"]


# ---------------------------------------------------------------- list


def test_a_listing_has_a_row_for_each_job_of_any_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeCluster(tmp_path, kinds=[JOB_SETS, PYTORCH_JOBS]) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        assert said(capsys, "list").startswith(f"no jobs of metaloom in {PLACE}")
        submitted(cluster)
        cluster.pods("glyphs").run()
        cluster.pods("glyphs").log(0, "[rank 0] meta-train: 1200 of 5000 steps, loss 1, 3 h 20 min left")
        for kind, resource, name in (("JobSet", JOB_SETS, "leaves"), ("PyTorchJob", PYTORCH_JOBS, "trees")):
            other = job_objects.top(kind, condition("Failed", "Any", "it broke"), name=name)
            cluster.add(resource, here(other))
        inside = job_objects.top(name="leaves-node-0")
        inside["metadata"]["ownerReferences"] = [{"kind": "JobSet", "name": "leaves", "uid": "x"}]
        cluster.add(JOBS, here(inside))
        foreign = job_objects.top(name="backup")
        foreign["metadata"]["labels"] = {"app": "backup"}
        cluster.add(JOBS, here(foreign))
        rows = said(capsys, "list").splitlines()
        assert rows[0].startswith(PLACE)
        assert rows[1].split() == ["name", "state", "nodes", "age", "progress"]
        by_name = {row.split()[0]: row for row in rows[3:]}
        assert sorted(by_name) == ["glyphs", "leaves", "trees"]
        assert by_name["glyphs"].split("  ")[1].strip() == "running"
        assert "2 of 2" in by_name["glyphs"]
        assert "1200 of 5000, 3 h " in by_name["glyphs"]
        assert "it broke" in by_name["trees"]
        plain = json.loads(said(capsys, "list", "--json"))
        assert {one["name"]: one["state"] for one in plain} == {
            "glyphs": "running",
            "leaves": "failed",
            "trees": "failed",
        }


def test_a_kind_that_may_not_be_listed_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeCluster(tmp_path, kinds=[JOB_SETS]) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        submitted(cluster)
        cluster.forbid("list", "jobsets")
        assert main(["jobs", "list"]) == 0
        told = capsys.readouterr()
        assert "glyphs" in told.out
        assert told.err.startswith("note: ")
        cluster.forbid("list", "jobs")
        assert main(["jobs", "list"]) == 5


# ---------------------------------------------------------------- wait


def test_waiting_tells_what_happens_and_ends_well(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(cluster)
    pods = cluster.pods("glyphs")
    acts = (pods.unschedulable, pods.run, lambda: pods.preempt(1), lambda: pods.run(1), pods.succeed)
    with meanwhile(cluster, *acts):
        assert main(["jobs", "wait", "glyphs"]) == 0
    told = [line.removeprefix("glyphs: ") for line in without_times(capsys.readouterr().out)]
    preempted = "node 1 (ranks 2-3) was preempted by a pod of higher priority"
    assert [re.sub(r"\d+ s$|since .*", "...", line) for line in told[:6]] == [
        "queued for 2 GPUs: waiting for the scheduler",
        "queued for 2 GPUs: 0 of the cluster's 3 nodes have them free",
        "running: on 2 nodes ...",
        f"{preempted}; queued again for 1 GPU: waiting for the scheduler",
        "running: on 2 nodes ...",
        "done: finished in ...",
    ]
    assert told[6:] == [f"  started again by the cluster once, the last time since {preempted}"]


@pytest.mark.parametrize(("code", "ends_with"), [(2, 2), (3, 3), (4, 4), (5, 5), (6, 6)])
def test_waiting_ends_with_the_exit_code_of_the_run(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str], code: int, ends_with: int
) -> None:
    submitted(cluster)
    pods = cluster.pods("glyphs")
    pods.run()
    pods.log(0, "error: what is wrong")
    pods.fail(1, code=code)
    assert main(["jobs", "wait", "glyphs"]) == ends_with
    assert f"node 1 (ranks 2-3) ended with exit code {code}" in capsys.readouterr().out


def test_a_run_that_was_killed_ends_the_waiting_with_1(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(cluster, backoff=0)
    cluster.pods("glyphs").run()
    cluster.pods("glyphs").out_of_memory(0)
    assert main(["jobs", "wait", "glyphs"]) == 1
    assert "node 0 (ranks 0-1) ran out of memory" in capsys.readouterr().out


def test_waiting_no_longer_says_that_the_job_goes_on(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(cluster)
    assert main(["jobs", "wait", "glyphs", "--timeout", "0s", "-n", "team"]) == 124
    assert capsys.readouterr().err == (
        "glyphs has not ended within 0s (--timeout), and goes on: queued for 2 GPUs: waiting for the "
        "scheduler\n"
        "wait on with: metaloom jobs wait glyphs --namespace team\n"
    )


@pytest.mark.parametrize("text", ["soon", "", "4 h", "-1s", "1.5h"])
def test_a_duration_that_is_none_is_refused(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    assert main(["jobs", "wait", "glyphs", f"--timeout={text}"]) == 125
    assert capsys.readouterr().err == (
        f"error: --timeout is {text!r}; it must be a duration such as 90s, 30m, 2h or 1h30m.\n"
    )


def test_waiting_goes_on_through_an_outage(
    cluster: FakeCluster,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("metaloom.k8s.client.PAUSES_S", (0.0,))
    submitted(cluster)
    pods = cluster.pods("glyphs")
    with meanwhile(cluster, lambda: cluster.reset(times=4, path="/pods"), pods.run, pods.succeed):
        assert main(["jobs", "wait", "glyphs"]) == 0
    assert "Trying again.\n" in capsys.readouterr().err


def test_a_job_that_is_deleted_while_it_is_waited_for_is_told(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(cluster)
    cluster.pods("glyphs").run()
    with meanwhile(cluster, lambda: cluster.delete(JOBS, "glyphs")):
        assert main(["jobs", "wait", "glyphs"]) == 125
    assert "error: job 'glyphs' was deleted while it was waited for; before, it was running" in (
        capsys.readouterr().err
    )


# ---------------------------------------------------------------- cancel


def test_cancelling_deletes_what_was_made_and_says_so(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(cluster)
    submitted(cluster, "leaves")
    made = {"name": "glyphs-recipe", "labels": LABELS}
    cluster.add(CONFIG_MAPS, {"metadata": made, "data": {}})
    cluster.pods("glyphs").run()
    told = said(capsys, "cancel", "glyphs").splitlines()
    assert told[0].startswith(f"cancelled: Job glyphs in {PLACE}")
    assert told[0].endswith(", and 2 pods, Service glyphs and ConfigMap glyphs-recipe")
    assert told[1] == "its ranks were told to stop (SIGTERM) and save, for which they have 60 s"
    cluster.wait(lambda: not [job for job in cluster.objects(JOBS) if job["metadata"]["name"] == "glyphs"])
    assert [one["metadata"]["name"] for one in cluster.objects(SERVICES)] == ["leaves"]
    assert cluster.objects(CONFIG_MAPS) == []
    again = said(capsys, "cancel", "glyphs")
    assert again.startswith(f"nothing to cancel: there is no job 'glyphs' in {PLACE}")


def test_a_job_that_has_ended_is_kept_unless_asked_for(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(cluster, nodes=1)
    cluster.pods("glyphs").run()
    cluster.pods("glyphs").succeed()
    told = said(capsys, "cancel", "glyphs").splitlines()
    assert told[0].startswith("nothing to cancel: glyphs has ended (done: finished in ")
    assert told[1] == (
        "its objects and logs are kept; delete them with: metaloom jobs cancel glyphs --finished"
    )
    assert cluster.objects(JOBS)
    assert said(capsys, "cancel", "glyphs", "--finished").startswith("deleted: Job glyphs in ")
    cluster.wait(lambda: not cluster.objects(JOBS))


def test_cancelling_without_permission_says_which_is_missing(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(cluster)
    cluster.forbid("delete", "jobs")
    assert main(["jobs", "cancel", "glyphs"]) == 5
    assert "may not delete jobs in namespace 'team'" in capsys.readouterr().err


# ---------------------------------------------------------------- logs


def test_logs_of_all_nodes_come_in_one_stream(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(cluster)
    pods = cluster.pods("glyphs")
    pods.run()
    pods.log(0, "ranks 0-1 of 4 here, on 2 hosts")
    pods.log(1, "[rank 2] two")
    pods.log(0, "[rank 0] zero", "[rank 1] one")
    assert said(capsys, "logs", "glyphs").splitlines() == [
        "[node 0] ranks 0-1 of 4 here, on 2 hosts",
        "[rank 2] two",
        "[rank 0] zero",
        "[rank 1] one",
    ]
    assert said(capsys, "logs", "glyphs", "--rank", "1") == "[rank 1] one\n"
    assert said(capsys, "logs", "glyphs", "--tail", "1") == "[rank 2] two\n[rank 1] one\n"


def test_logs_since_a_time_leave_out_what_is_older(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(cluster, nodes=1)
    cluster.pods("glyphs").run()
    cluster.pods("glyphs").log(0, "old", at_ns=time.time_ns() - 3_600_000_000_000)
    cluster.pods("glyphs").log(0, "new")
    assert said(capsys, "logs", "glyphs", "--since", "30m") == "[node 0] new\n"


def test_following_goes_on_to_the_end_through_breaks_and_replaced_pods(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(cluster)
    pods = cluster.pods("glyphs")
    pods.run()
    pods.log(0, "[rank 0] first")

    def are_followed(number: int) -> bool:
        followed = [path for _, path, query in list(cluster.requests) if query.get("follow") == "true"]
        return len(set(followed)) >= number

    def play() -> None:
        cluster.wait(lambda: are_followed(2))
        cluster.close_streams()
        cluster.expire_versions()
        pods.log(0, "[rank 0] second")
        pods.log(1, "[rank 2] preempted soon")
        pods.preempt(1)
        pods.run(1)
        cluster.wait(lambda: are_followed(3))
        pods.log(1, "[rank 2] again")
        pods.succeed()

    thread = threading.Thread(target=play)
    thread.start()
    assert main(["jobs", "logs", "glyphs", "--follow"]) == 0
    thread.join()
    told = capsys.readouterr()
    assert sorted(told.out.splitlines()) == [
        "[rank 0] first",
        "[rank 0] second",
        "[rank 2] again",
        "[rank 2] preempted soon",
    ]
    assert told.err.startswith("glyphs: done: finished in ")


def test_a_job_that_has_printed_nothing_says_why(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(cluster)
    assert main(["jobs", "logs", "glyphs"]) == 0
    told = capsys.readouterr()
    assert (told.out, told.err) == (
        "",
        "glyphs: nothing was printed; queued for 2 GPUs: waiting for the scheduler\n",
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rank", "4"], "--rank is 4; glyphs has ranks 0 to 3."),
        (["--rank", "-1"], "--rank is -1; glyphs has ranks 0 to 3."),
        (["--tail", "0"], "--tail is 0; it must be at least 1."),
        (["--since", "now"], "--since is 'now'; it must be a duration such as 90s, 30m, 2h or 1h30m."),
    ],
)
def test_options_of_logs_that_make_no_sense_are_refused(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    submitted(cluster)
    assert main(["jobs", "logs", "glyphs", *words]) == 5
    assert capsys.readouterr().err == f"error: {message}\n"


# ---------------------------------------------------------------- as processes


@pytest.mark.parametrize(
    ("words", "again"),
    [
        (["logs", "--follow"], "metaloom jobs logs glyphs --follow --context fake"),
        (["wait"], "metaloom jobs wait glyphs --context fake"),
        (["status", "--watch"], "metaloom jobs status glyphs --watch --context fake"),
    ],
)
def test_ctrl_c_leaves_the_job_running_and_says_how_to_come_back(
    cluster: FakeCluster, words: list[str], again: str
) -> None:
    submitted(cluster)
    cluster.pods("glyphs").run()
    cluster.pods("glyphs").log(0, "[rank 0] here")
    process = subprocess.Popen(
        command("jobs", words[0], "glyphs", *words[1:], "--context", "fake"),
        env=environment() | {"KUBECONFIG": os.environ["KUBECONFIG"]},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
        assert process.wait(timeout=60) == 130, errors
    assert errors == f"\ninterrupted: glyphs goes on in the cluster. Come back with: {again}\n"
    assert len(cluster.objects(PODS)) == 2


def test_the_module_loads_no_heavy_package() -> None:
    heavy = ("torch", "kubernetes", "urllib3", "yaml", "rich", "pydantic", "metaloom.k8s")
    program = f"import sys, metaloom.jobs_command; print([one for one in {heavy!r} if one in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert (done.stdout, done.stderr) == ("[]\n", "")
