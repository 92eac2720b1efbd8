"""What a person reads of jobs in all that may happen to them: on the fake API server, with pods that are
processes of this machine, and on the cluster that KUBECONFIG names (`pytest -m k8s`, see CONTRIBUTING.md)."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from metaloom.k8s.resources import PODS
from tests.commands import RECIPES
from tests.k8s.fake_api import FakeCluster
from tests.k8s.fake_jobs import Pods
from tests.k8s.scenarios.cluster_stage import ClusterStage, Given
from tests.k8s.scenarios.fake_stage import FakeStage
from tests.k8s.scenarios.local_cluster import CLAIM, IMAGE, LocalCluster
from tests.k8s.scenarios.stage import Stage, Terminal

# The limits are those of a cluster that pulls the image first.
ON_CLUSTER = pytest.param("cluster", marks=[pytest.mark.k8s, pytest.mark.timeout(3600)])
LIMIT_S = {"fake": 60.0, "processes": 240.0, "cluster": 1500.0}
on_all_stages = pytest.mark.parametrize("stage", ["fake", "processes", ON_CLUSTER], indirect=True)

STEPS = 40
SHORT = (f"outer.num_steps={STEPS}", "outer.tasks_per_step=4", "validation.num_episodes=4")
# Long enough that it has not ended before it is interrupted. No checkpoint is written but when it is.
MANY_STEPS = 6000
LONG = (
    f"outer.num_steps={MANY_STEPS}",
    f"validation.every_steps={MANY_STEPS}",
    "validation.num_episodes=4",
    "checkpoint.every_steps=null",
    "checkpoint.every_minutes=null",
)
RESUMED = rf"^\[rank 0\] resumed after outer step (\d+) of {MANY_STEPS}$"


@pytest.fixture(params=["fake", ON_CLUSTER])
def stage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    with ExitStack() as stack:
        if request.param == "cluster":
            given = Given.by(request.config)
            if lack := given.lack(os.environ):
                pytest.skip(lack)
            yield ClusterStage(given, tmp_path)
            return
        monkeypatch.setattr("metaloom.jobs_command.POLL_S", 0.1)
        if request.param == "processes":
            cluster: FakeCluster = stack.enter_context(LocalCluster(tmp_path))
        else:
            cluster = stack.enter_context(FakeCluster(tmp_path))
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        if request.param == "processes":
            yield ClusterStage(Given(IMAGE, claim=CLAIM), tmp_path)
        else:
            yield FakeStage(cluster)


@pytest.fixture
def terminal(
    stage: Stage, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> Iterator[Terminal]:
    made = Terminal(stage, capsys, limit_s=LIMIT_S[request.node.callspec.params["stage"]])
    yield made
    made.clear()


def begin(num_steps: int, told: str = "") -> Callable[[FakeCluster, Pods], None]:
    """Two pods that meet and begin to train."""

    def act(cluster: FakeCluster, pods: Pods) -> None:
        pods.run()
        pods.log(0, "rank 0 of 2 here, on 2 hosts")
        pods.log(1, "rank 1 of 2 here, on 2 hosts; progress is shown on host-0", "[rank 1] connected")
        pods.log(0, f"[rank 0] meta-train: {num_steps} steps")
        if told:
            pods.log(0, f"[rank 0] meta-train: {told}")

    return act


TRAINING = f"1200 of {MANY_STEPS} steps, loss 1.25, 3 min 20 s left"


@on_all_stages
def test_a_job_of_two_pods_trains_and_is_followed_to_its_end(stage: Stage, terminal: Terminal) -> None:
    name = terminal.new_name("trains")
    # So that the other rank says something, too.
    talkative = ("--env", "TORCH_CPP_LOG_LEVEL=INFO")
    output, _ = terminal.submit(name, *talkative, changes=SHORT)
    assert output.startswith(f"submitted {name}: 2 nodes, as a Job in ")
    with terminal.following(name) as followed:
        stage.play(begin(STEPS))
        stage.play(
            lambda _, pods: pods.log(0, f"[rank 0] meta-train: done: {STEPS} of {STEPS} steps in 2.0 s")
        )
        stage.play(lambda _, pods: pods.succeed())
        waited = terminal.jobs("wait", name)
        code, output, errors = followed()
    assert waited.splitlines()[-1].partition(" ")[2].startswith(f"{name}: done: finished in "), waited
    assert code == 0, errors
    lines = output.splitlines()
    assert "[node 0] rank 0 of 2 here, on 2 hosts" in lines
    assert any(line.startswith("[node 1] rank 1 of 2 here, on 2 hosts; progress is ") for line in lines)
    assert f"[rank 0] meta-train: {STEPS} steps" in lines
    assert any(line.startswith(f"[rank 0] meta-train: done: {STEPS} of {STEPS} steps in ") for line in lines)
    assert all(re.match(r"\[(rank|node) [01]\] ", line) for line in lines if line), lines
    assert errors.splitlines()[-1].startswith(f"{name}: done: finished in ")
    # The logs stay.
    own = terminal.jobs("logs", name, "--rank", "1").splitlines()
    assert own
    assert set(own) == {line for line in lines if line.startswith("[rank 1]")}
    (row,) = [line for line in terminal.jobs("list").splitlines() if line.split()[:1] == [name]]
    assert "done: finished in " in row
    assert terminal.jobs("cancel", name).startswith(
        f"nothing to cancel: {name} has ended (done: finished in "
    )
    # So do its checkpoints, where it was told to put them.
    terminal.submit(name, "--resume", changes=SHORT)
    stage.play(lambda _, pods: pods.run())
    stage.play(lambda _, pods: pods.log(0, f"the run {name} is finished"))
    stage.play(lambda _, pods: pods.succeed())
    terminal.jobs("wait", name)
    assert f"[node 0] the run {name} is finished" in terminal.jobs("logs", name).splitlines()


def test_a_pod_that_is_out_of_memory_is_named(stage: Stage, terminal: Terminal) -> None:
    name = terminal.new_name("memory")
    terminal.submit(name, "--memory-per-node", "64Mi", "--max-restarts", "0", changes=SHORT)
    stage.play(lambda _, pods: pods.run())
    stage.play(lambda _, pods: pods.out_of_memory(1))
    lines = terminal.jobs("wait", name, code=1).splitlines()
    told = [line.partition(" ")[2].strip() for line in lines]
    failed = [line for line in told if line.startswith(f"{name}: failed")]
    assert len(failed) == 1
    assert re.fullmatch(
        rf"{name}: failed after [^:]*: node ([01]) \(rank \1\) ran out of memory \(limit 64Mi, OOMKilled, "
        r"exit code 137\)",
        failed[0],
    )
    assert "give its pods more memory, or lower outer.micro_batch or loading.read_ahead" in told
    status = terminal.status(name)
    assert (status["state"], status["exit_code"], status["num_restarts"]) == ("failed", 137, 0)


def test_an_image_that_cannot_be_pulled_is_named(stage: Stage, terminal: Terminal) -> None:
    name = terminal.new_name("image")
    terminal.submit(name, "--image", stage.missing_image, changes=SHORT)
    stage.play(lambda _, pods: pods.image_error())
    status = terminal.until(name, lambda status: status["is_stuck"])
    assert status["state"] == "starting"
    assert status["headline"].startswith(f"cannot start: image pull failed: {stage.missing_image}")
    code, _, errors = terminal.ask("jobs", "wait", name, "--timeout", "0s")
    assert code == 124
    assert f"goes on: cannot start: image pull failed: {stage.missing_image}" in errors
    assert terminal.jobs("cancel", name).startswith(f"cancelled: Job {name} in ")
    terminal.until_gone(name)


@pytest.mark.parametrize(
    ("options", "resource", "waits", "lack"),
    [
        (
            ("--cpus-per-node", "1000"),
            "cpu",
            "queued for 2 nodes: none of the cluster's ",
            "too few cpu free",
        ),
        (
            ("--gpus-per-node", "1000", "--no-preflight"),
            "nvidia.com/gpu",
            "queued for 2000 GPUs: 0 of the cluster's ",
            "have them free",
        ),
    ],
    ids=["processors", "GPUs"],
)
def test_a_job_that_no_machine_can_take_says_what_they_lack(
    stage: Stage, terminal: Terminal, options: tuple[str, ...], resource: str, waits: str, lack: str
) -> None:
    name = terminal.new_name("waits")
    terminal.submit(name, *options, changes=SHORT)
    stage.play(
        lambda _, pods: pods.unschedulable(message=f"0/3 nodes are available: 3 Insufficient {resource}.")
    )
    status = terminal.until(name, lambda status: status["headline"].startswith(waits))
    assert (status["state"], status["num_nodes"]) == ("queued", 2)
    assert [node["words"] for node in status["nodes"]] == 2 * ["waiting for a machine"]
    assert any(lack in line for line in (status["headline"], *status["details"]))
    assert "nothing was printed; queued for " in terminal.ask("jobs", "logs", name)[2]


def gone(name: str, node: int) -> Callable[[FakeCluster, Pods], None]:
    """The pod that was evicted has saved and is gone; all train on from there, with another in its place."""

    def act(cluster: FakeCluster, pods: Pods) -> None:
        pods.log(0, f"[rank 0] meta-train: stopped after 1234 of {MANY_STEPS} steps in 10 s, loss 1.2")
        pods.log(0, "[rank 0] saved after outer step 1234")
        cluster.delete(PODS, pods.name(node))
        if node == 0:
            pods.fail(1, code=75)  # the others end with the host at which they meet
        cluster.controller.sync(cluster.namespace, name)
        pods.run()
        pods.log(0, f"[rank 0] resumed after outer step 1234 of {MANY_STEPS}")
        pods.log(0, f"[rank 0] meta-train: {MANY_STEPS} steps")

    return act


@pytest.mark.parametrize(
    ("stage", "node"),
    [
        ("fake", 1),
        ("fake", 0),
        ("processes", 0),
        *(pytest.param("cluster", node, marks=ON_CLUSTER.marks) for node in (1, 0)),
    ],
    indirect=["stage"],
)
def test_a_job_that_loses_a_pod_saves_and_goes_on_by_itself(
    stage: Stage, terminal: Terminal, node: int
) -> None:
    name = terminal.new_name("evicted")
    terminal.submit(name, changes=LONG)
    stage.play(begin(MANY_STEPS, TRAINING))
    step = terminal.until_trained(name)
    pod = terminal.status(name)["nodes"][node]["pod"]
    stage.evict(node)
    evicted = f"node {node} (rank {node}) was evicted on request, as by a drain or an autoscaler"
    status = terminal.until(name, lambda status: "evicted" in status["headline"])
    assert status["state"] == "restarting"
    assert status["headline"].startswith(f"restarting: {evicted}: saves and ends, for which it has until ")
    stage.play(gone(name, node))
    resumed = int(terminal.until_logged(name, RESUMED)[1])
    assert resumed >= step
    if node == 1:
        # The log of the pod that stays has both ends.
        assert int(terminal.until_logged(name, r"^\[rank 0\] saved after outer step (\d+)$")[1]) == resumed
    status = terminal.until(name, lambda status: status["state"] == "running")
    assert status["progress"]["step"] >= resumed
    assert status["nodes"][node]["pod"] != pod
    assert len(status["nodes"]) == 2
    if node == 0:
        # The other pod, which stays to be looked at, has ended with the host at which both meet.
        cause = "node 1 (rank 1) ended with exit code 75 (stopped from outside, and saved)"
        assert f"started again by the cluster once, the last time since {cause}" in status["details"]


def test_data_that_is_not_there_ends_the_job_with_its_exit_code_when_no_more_tries_are_left(
    stage: Stage, terminal: Terminal
) -> None:
    name = terminal.new_name("mistake")
    # The path looks well from here; in the pods nothing is there.
    options = ("--max-restarts", "0")
    _, notes = terminal.submit(
        name, *options, recipe=RECIPES / "smoke.yaml", changes=["data.url=/no/such/data"]
    )
    assert "note: data.url is /no/such/data, on no claim: the image has to hold it" in notes
    problem = "/no/such/data holds no index.json, so it is not a finished metaloom data set"
    stage.play(lambda _, pods: pods.run())
    stage.play(lambda _, pods: pods.log(0, f"error: {problem}. Make one with ..."))
    stage.play(lambda _, pods: pods.fail(0, code=3))
    waited = terminal.jobs("wait", name, code=3)
    assert re.search(
        rf"{name}: failed after .*: node [01] \(rank [01]\) ended with exit code 3 \(the data\)", waited
    )
    status = terminal.status(name)
    assert (status["state"], status["exit_code"], status["num_restarts"]) == ("failed", 3, 0)
    assert [one["phase"] for one in status["nodes"] if one["phase"] != "failed"] == []
    assert len(status["nodes"]) in (1, 2)
    assert f"error: {problem}" in terminal.jobs("logs", name)


def test_a_job_that_is_cancelled_saves_before_it_goes(stage: Stage, terminal: Terminal) -> None:
    name = terminal.new_name("cancelled")
    terminal.submit(name, changes=LONG)
    stage.play(begin(MANY_STEPS, TRAINING))
    step = terminal.until_trained(name)
    told = terminal.jobs("cancel", name).splitlines()
    assert told[0].startswith(f"cancelled: Job {name} in ")
    assert told[0].endswith(", and 2 pods")
    assert told[1] == "its ranks were told to stop (SIGTERM) and save, for which they have 75 s"
    terminal.until_gone(name)
    terminal.submit(name, "--resume", changes=LONG)
    stage.play(lambda _, pods: pods.run())
    stage.play(lambda _, pods: pods.log(0, f"[rank 0] resumed after outer step 1234 of {MANY_STEPS}"))
    assert int(terminal.until_logged(name, RESUMED)[1]) >= step


def test_a_name_that_is_taken_is_refused(stage: Stage, terminal: Terminal) -> None:
    name = terminal.new_name("taken")
    waits = ("--cpus-per-node", "1000")  # so that it does nothing
    terminal.submit(name, *waits, changes=SHORT)
    _, errors = terminal.submit(name, *waits, changes=SHORT, code=5)
    assert "A job of this name has been submitted before: go on with its run by --resume" in errors
    _, errors = terminal.submit(name, "--resume", *waits, changes=SHORT, code=5)
    assert f"--resume: the job {name} has not ended (" in errors
    assert terminal.status(name)["num_nodes"] == 2


def test_a_namespace_that_is_not_there_is_refused(stage: Stage, terminal: Terminal) -> None:
    name = terminal.new_name("elsewhere")
    _, errors = terminal.submit(name, "--namespace", "there-is-none", changes=SHORT, code=5)
    # Whoever may not look at namespaces may not make anything in this one.
    assert re.search(
        "there is no namespace 'there-is-none' in |you may not .* in namespace there-is-none: ", errors
    )


def test_who_may_do_nothing_is_told_what_is_missing(stage: Stage, terminal: Terminal) -> None:
    name = terminal.new_name("forbidden")
    with stage.nobody():
        _, errors = terminal.submit(name, changes=SHORT, code=5)
        assert re.search(
            r"error: you may not create configmaps, .*create jobs\.batch, .* in namespace \S+: ask whoever",
            errors,
        )
        code, _, errors = terminal.ask("jobs", "list")
        assert code == 5
        assert "may not list jobs in namespace " in errors


def test_what_scenarios_on_a_cluster_take_is_told_where_they_are_skipped(tmp_path: Path) -> None:
    there = {"KUBECONFIG": str(tmp_path)}
    assert Given(None).lack({"KUBECONFIG": str(tmp_path / "none")}) == (
        "scenarios on a cluster take an image with metaloom (--k8s-image IMG), and a place for checkpoints "
        "that two pods may write to at once (either --k8s-checkpoints URL or --k8s-claim CLAIM), and a "
        "kubeconfig (KUBECONFIG)"
    )
    assert "a place for checkpoints" in Given("image", url="s3://bucket", claim="both").lack(there)
    assert Given("image", claim="shared").lack(there) == ""
