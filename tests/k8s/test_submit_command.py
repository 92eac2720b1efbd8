"""`metaloom submit` against a fake API server: what is sent, and what is refused before and told."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from metaloom.cli import main
from metaloom.k8s.resources import (
    CLAIMS,
    CONFIG_MAPS,
    JOB_SETS,
    JOBS,
    LIMIT_RANGES,
    LOCAL_QUEUES,
    NODES,
    PODS,
    PYTORCH_JOBS,
    QUOTAS,
    SECRETS,
    SERVICES,
    TRAIN_JOBS,
    TRAINING_RUNTIMES,
)
from tests.commands import RECIPES, REPOSITORY, command, environment
from tests.k8s.fake_api import FakeCluster

SMOKE = str(RECIPES / "smoke.yaml")
PLACES = ("data.url=s3://bucket/glyphs", "checkpoint.url=s3://bucket/one", "tracking.uri=http://mlflow:5000")
TWO_NODES = ("--nodes", "2", "--gpus-per-node", "4", "--image", "repository/metaloom:1", "--name", "one")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    with FakeCluster(tmp_path) as made:
        monkeypatch.setenv("KUBECONFIG", str(made.kubeconfig))
        yield made


@pytest.fixture
def submit(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*words: str) -> tuple[int, str, str]:
        code = main(["submit", SMOKE, *words])
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


Submit = Callable[..., tuple[int, str, str]]


def job_of(cluster: FakeCluster) -> dict[str, Any]:
    (job,) = cluster.objects(JOBS)
    return job


def test_a_job_is_sent_with_all_that_it_owns(cluster: FakeCluster, submit: Submit) -> None:
    code, output, errors = submit(*TWO_NODES, *PLACES)
    assert (code, errors) == (0, "")
    assert output.splitlines() == [
        f"submitted one: 2 nodes of 4 GPUs, as a Job in namespace team of fake ({cluster.url})",
        "what it does:  metaloom jobs status one",
        "its output:    metaloom jobs logs one --follow",
        "to end it:     metaloom jobs cancel one",
    ]
    job = job_of(cluster)
    for resource, name in ((CONFIG_MAPS, "one-recipe"), (SERVICES, "one")):
        (owner,) = cluster.get(resource, name)["metadata"]["ownerReferences"]
        assert owner["uid"] == job["metadata"]["uid"]
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["command"][:7] == [
        *("metaloom", "train", "/etc/metaloom/recipe.yaml", "--run", "/runs/one", "--run-id", "one")
    ]
    assert container["command"][7:] == [
        "launcher.num_processes=4",
        "launcher.show_all_ranks=true",
        "launcher.hosts.endpoint=one-0.one:29400",
        "launcher.hosts.num_hosts=2",
        "launcher.hosts.wait_s=604800",
        "launcher.hosts.own_folders=true",
    ]
    # The overrides are in the recipe.
    recipe = yaml.safe_load(cluster.get(CONFIG_MAPS, "one-recipe")["data"]["recipe.yaml"])
    assert recipe["checkpoint"]["url"] == "s3://bucket/one"


def test_a_dry_run_prints_what_is_sent(cluster: FakeCluster, submit: Submit) -> None:
    code, output, _ = submit(*TWO_NODES, *PLACES, "--dry-run")
    assert code == 0
    assert cluster.objects(JOBS) == []
    printed = list(yaml.safe_load_all(output))
    submit(*TWO_NODES, *PLACES)
    made = {
        obj["kind"]: obj
        for resource in (CONFIG_MAPS, SERVICES, JOBS)
        for obj in ({"kind": resource.kind} | each for each in cluster.objects(resource))
    }
    assert [obj["kind"] for obj in printed] == ["ConfigMap", "Service", "Job"]
    for obj in printed:
        there = made[obj["kind"]]
        # The server adds what it knows; what was printed is all there.
        assert {key: there["metadata"][key] for key in obj["metadata"]} == obj["metadata"]
        for part in obj.keys() - {"metadata"}:
            assert there[part] == obj[part]


def test_a_dry_run_needs_no_cluster_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, submit: Submit
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    code, output, _ = submit(*TWO_NODES, *PLACES, "--dry-run")
    assert code == 0
    assert output.startswith(
        "# No cluster could be asked which backends it has: this is that of --backend job.\n"
    )
    assert {obj["kind"] for obj in yaml.safe_load_all(output)} == {"ConfigMap", "Service", "Job"}


def test_the_backend_is_what_the_cluster_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, submit: Submit
) -> None:
    with FakeCluster(tmp_path, kinds=[JOB_SETS]) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        assert submit(*TWO_NODES, *PLACES)[0] == 0
        assert [obj["metadata"]["name"] for obj in cluster.objects(JOB_SETS)] == ["one"]
        assert cluster.objects(JOBS) == []


def test_a_backend_that_the_cluster_lacks_is_refused(cluster: FakeCluster, submit: Submit) -> None:
    code, _, errors = submit(*TWO_NODES, *PLACES, "--backend", "trainjob")
    assert code == 5
    assert "--backend trainjob: namespace team of fake" in errors
    assert "has no trainjobs.trainer.kubeflow.org" in errors
    assert "use --backend job, which needs nothing." in errors


def test_all_mistakes_are_told_at_once_and_nothing_is_sent(cluster: FakeCluster, submit: Submit) -> None:
    words = (
        "--name",
        "One",
        "--memory-per-node",
        "4 gigs",
        "--env",
        "API_KEY=abc",
        "--env-from-secret",
        "s3",
    )
    code, output, errors = submit(*words)
    assert (code, output) == (5, "")
    assert "error: 7 problems:" in errors
    for part in (
        "--image: name the image with metaloom that the pods run",
        "--name: 'One'",
        "--memory-per-node: '4 gigs' is not a quantity",
        "did you mean 4Gi?",
        "--env: API_KEY reads like a secret",
        "--env-from-secret s3: there is no such Secret in namespace team",
        "checkpoint.url is not set, and /runs/One (--run) is on a pod's own disk: checkpoints would be lost",
        "data.url is data/glyphs, a path that depends on where a pod starts",
    ):
        assert part in errors
    assert cluster.objects(JOBS) == cluster.objects(CONFIG_MAPS) == []


def add_claim(cluster: FakeCluster, *modes: str) -> None:
    cluster.add(CLAIMS, {"metadata": {"name": "shared"}, "spec": {"accessModes": list(modes)}})


def test_a_shared_claim_holds_run_and_checkpoints(cluster: FakeCluster, submit: Submit) -> None:
    add_claim(cluster, "ReadWriteMany")
    words = (*TWO_NODES, "--volume", "shared:/runs", "data.url=/runs/data")
    assert submit(*words)[0] == 0
    container = job_of(cluster)["spec"]["template"]["spec"]["containers"][0]
    assert "launcher.hosts.own_folders=false" in container["command"]


GPU_CONTAINER = {
    "name": "other",
    "image": "other:1",
    "resources": {"limits": {"nvidia.com/gpu": "8"}, "requests": {"nvidia.com/gpu": "8"}},
}
NODE = {
    "metadata": {"name": "gpu-1", "labels": {"pool": "a"}},
    "status": {"allocatable": {"nvidia.com/gpu": "2"}},
}


@pytest.mark.parametrize(
    ("prepare", "words", "message"),
    [
        (
            lambda cluster: None,
            ("--namespace", "elsewhere"),
            "there is no namespace 'elsewhere' in fake (",
        ),
        (
            lambda cluster: cluster.forbid("create", "jobs"),
            (),
            "you may not create jobs.batch in namespace team: ask whoever runs the cluster for a role",
        ),
        (
            lambda cluster: None,
            ("--queue", "gpus"),
            "--queue gpus: this cluster has no queues of Kueue",
        ),
        (
            lambda cluster: None,
            ("--env-from-secret", "s3", "--image-pull-secret", "pull"),
            "--env-from-secret s3: there is no such Secret in namespace team",
        ),
        (
            lambda cluster: None,
            ("--volume", "missing:/runs"),
            "--volume missing: there is no such PersistentVolumeClaim in namespace team",
        ),
        (
            lambda cluster: add_claim(cluster, "ReadWriteOnce"),
            ("--volume", "shared:/runs"),
            "--volume shared: the claim can be mounted as ReadWriteOnce, and 2 pods on several machines need "
            "ReadWriteMany",
        ),
        (
            lambda cluster: cluster.add(NODES, NODE),
            (),
            "--gpus-per-node 4: no node has so many nvidia.com/gpu; the most are 2, of gpu-1.",
        ),
        (
            lambda cluster: cluster.add(
                QUOTAS,
                {
                    "metadata": {"name": "gpus"},
                    "spec": {"hard": {"requests.nvidia.com/gpu": "6"}},
                    "status": {"hard": {"requests.nvidia.com/gpu": "6"}, "used": {}},
                },
            ),
            (),
            "the job needs 8 of requests.nvidia.com/gpu, and the quota gpus of namespace team allows 6",
        ),
    ],
)
def test_what_the_cluster_lacks_is_told_before_anything_is_sent(
    prepare: Callable[[FakeCluster], object],
    words: Sequence[str],
    message: str,
    cluster: FakeCluster,
    submit: Submit,
) -> None:
    prepare(cluster)
    code, output, errors = submit(*TWO_NODES, *PLACES, *words)
    assert (code, output) == (5, "")
    assert message in errors
    assert cluster.objects(JOBS) == []
    assert cluster.objects(CONFIG_MAPS) == []


@pytest.mark.parametrize("backend", ["job", "jobset", "pytorchjob", "trainjob"])
def test_a_cluster_that_is_too_old_is_told_by_its_version(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, submit: Submit
) -> None:
    with FakeCluster(tmp_path, kinds=[JOB_SETS, PYTORCH_JOBS, TRAIN_JOBS, TRAINING_RUNTIMES]) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        cluster.version = {"major": "1", "minor": "28+", "gitVersion": "v1.28.5-gke.100"}
        code, _, errors = submit(*TWO_NODES, *PLACES, "--backend", backend)
        if backend == "pytorchjob":  # the operator asks nothing of Jobs
            assert (code, errors) == (0, "")
            return
        assert (code, errors) == (
            5,
            f"error: Kubernetes is v1.28.5-gke.100 in fake ({cluster.url}), and --backend {backend} takes "
            "1.29 or newer: pods that fail would not be replaced as they have to be. Have it upgraded, or "
            "name another cluster with --context\n",
        )
        assert cluster.objects(CONFIG_MAPS) == []
        cluster.version = {"major": "1", "minor": "29+", "gitVersion": "v1.29.0-eks-abc"}
        assert submit(*TWO_NODES, *PLACES, "--backend", backend)[0] == 0


def test_a_server_that_does_not_tell_its_version_is_taken_as_it_is(
    cluster: FakeCluster, submit: Submit
) -> None:
    told = {"kind": "Status", "status": "Failure", "reason": "Forbidden", "code": 403, "message": "no"}
    cluster.refuse(403, path="/version", body=json.dumps(told))
    assert submit(*TWO_NODES, *PLACES)[0] == 0


def test_what_may_not_be_looked_at_is_noted_and_the_job_is_sent(cluster: FakeCluster, submit: Submit) -> None:
    cluster.forbid("get", "secrets")
    cluster.forbid("get", "pods/log")
    code, _, errors = submit(*TWO_NODES, *PLACES, "--env-from-secret", "s3")
    assert code == 0
    assert errors.splitlines() == [
        "note: you may not get pods/log: metaloom jobs will tell less of this job",
        "note: --env-from-secret: not looked for, since you may not get secrets",
    ]


def test_a_quota_on_what_the_pods_do_not_say_is_noted(cluster: FakeCluster, submit: Submit) -> None:
    cluster.forbid("create", "pods")
    cluster.add(QUOTAS, quota("all", {}, hard={"limits.cpu": "64", "requests.memory": "1Ti"}))
    code, _, errors = submit(*TWO_NODES, *PLACES)
    assert code == 0
    assert "note: the quota all counts limits.cpu, which the pods do not have" in errors
    assert "note: the quota all counts requests.memory, which the pods do not have, so that they " in errors
    assert "may be refused: it takes --memory-per-node" in errors


LIMITS = {
    "metadata": {"name": "small"},
    "spec": {"limits": [{"type": "Container", "max": {"memory": "1Gi"}, "min": {"cpu": "1"}}]},
}


def quota(name: str, used: dict[str, str], **spec: Any) -> dict[str, Any]:
    hard = spec["hard"]
    return {"metadata": {"name": name}, "spec": spec, "status": {"hard": hard, "used": used}}


@pytest.mark.parametrize(
    ("prepare", "words", "message"),
    [
        (
            lambda cluster: cluster.enforce("baseline"),
            ("--rdma", "rdma/hca=1"),
            "namespace team takes no pod of the job: the namespace admits no such pods (pod security "
            'baseline:latest): non-default capabilities (container "metaloom" must not include "IPC_LOCK" in '
            "securityContext.capabilities.add); leave out --rdma, whose pods may lock memory (IPC_LOCK), or "
            "name a namespace that admits them with --namespace, or ask who runs the cluster",
        ),
        (
            lambda cluster: cluster.enforce("restricted"),
            ("--rdma", "rdma/hca=1"),
            "(pod security restricted:latest): unrestricted capabilities (container",
        ),
        (
            lambda cluster: cluster.add(LIMIT_RANGES, LIMITS),
            ("--memory-per-node", "2Gi"),
            "namespace team takes no pod of the job: a limit of the namespace (LimitRange) does not allow "
            "it: maximum memory usage per Container is 1Gi, but limit is 2Gi; change --memory-per-node",
        ),
        (
            lambda cluster: None,
            ("--priority-class", "urgent"),
            "namespace team takes no pod of the job: the cluster has no PriorityClass urgent; name another "
            "with --priority-class (kubectl get priorityclasses)",
        ),
        (
            lambda cluster: cluster.add(QUOTAS, quota("all", {}, hard={"limits.cpu": "64"})),
            (),
            "namespace team takes no pod of the job: the quota all of the namespace counts limits.cpu, which "
            "they do not say; it takes a default of the namespace (LimitRange), since pods of metaloom limit",
        ),
        (
            # Of some pods only, so that it is not read.
            lambda cluster: cluster.add(
                QUOTAS, quota("low", {}, hard={"limits.memory": "1Gi"}, scopes=["NotBestEffort"])
            ),
            ("--memory-per-node", "2Gi"),
            "namespace team takes no pod of the job: one pod asks for more limits.memory than the quota low "
            "of the namespace allows: requested limits.memory=2147483648; used limits.memory=0 of "
            "limits.memory=1Gi; ask for less",
        ),
    ],
)
def test_pods_that_would_be_refused_are_told_before_anything_is_sent(
    prepare: Callable[[FakeCluster], object],
    words: Sequence[str],
    message: str,
    cluster: FakeCluster,
    submit: Submit,
) -> None:
    prepare(cluster)
    code, output, errors = submit(*TWO_NODES, *PLACES, *words)
    assert (code, output) == (5, "")
    assert message in errors
    assert errors.count("\n") == 1
    assert cluster.objects(JOBS) == cluster.objects(CONFIG_MAPS) == cluster.objects(PODS) == []


@pytest.mark.parametrize("backend", ["job", "jobset", "pytorchjob", "trainjob"])
def test_a_pod_of_every_backend_is_admitted_by_the_restricted_level(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, submit: Submit
) -> None:
    kinds = [JOB_SETS, PYTORCH_JOBS, TRAIN_JOBS, TRAINING_RUNTIMES, LOCAL_QUEUES]
    with FakeCluster(tmp_path, kinds=kinds) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        cluster.enforce("restricted")
        cluster.add(LOCAL_QUEUES, {"metadata": {"name": "gpus"}})
        words = (*TWO_NODES, *PLACES, "--backend", backend, "--queue", "gpus")
        code, _, told = submit(*words)
        assert code == 0
        # Its pods are as the others, until the operator has added to them.
        assert told == "" or backend == "pytorchjob"
        assert ("the training operator puts an init container" in told) is (backend == "pytorchjob")
        asked = [
            path
            for method, path, query in cluster.requests
            if method == "POST" and path.endswith("/pods") and query["dryRun"] == "All"
        ]
        assert len(asked) == 1


@pytest.mark.parametrize("backend", ["job", "jobset", "pytorchjob", "trainjob"])
def test_the_role_of_users_is_all_that_the_commands_take(
    backend: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    submit: Submit,
    capsys: pytest.CaptureFixture[str],
) -> None:
    users = (REPOSITORY / "deploy" / "kubernetes" / "users.yaml").read_text()
    kinds = [JOB_SETS, PYTORCH_JOBS, TRAIN_JOBS, TRAINING_RUNTIMES, LOCAL_QUEUES]
    with FakeCluster(tmp_path, namespace="metaloom", kinds=kinds) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        cluster.grant(list(yaml.safe_load_all(users)))
        cluster.add(LOCAL_QUEUES, {"metadata": {"name": "gpus"}})
        cluster.add(CLAIMS, {"metadata": {"name": "shared"}, "spec": {"accessModes": ["ReadWriteMany"]}})
        words = (*TWO_NODES, *PLACES, "--backend", backend, "--queue", "gpus", "--volume", "shared:/runs")
        code, _, told = submit(*words)
        assert (code, "may not" in told) == (0, False), told
        code, _, told = submit(*words, "--resume")
        assert (code, "has not ended" in told) == (5, True), told
        code, _, told = submit(*words)
        assert (code, "has been submitted before" in told) == (5, True), told
        for command in (["list"], ["status", "one"], ["logs", "one"], ["cancel", "one"]):
            assert main(["jobs", *command]) == 0
            assert "may not" not in capsys.readouterr().err
        code, _, told = submit(*words, "--namespace", "elsewhere")
        assert (code, "in namespace elsewhere" in told) == (5, True), told


def test_a_claim_for_one_machine_serves_the_pods_of_a_cluster_of_one_machine(
    cluster: FakeCluster, submit: Submit
) -> None:
    add_claim(cluster, "ReadWriteOnce")
    cluster.add(NODES, {"metadata": {"name": "only"}, "status": {"allocatable": {"nvidia.com/gpu": "8"}}})
    code, _, errors = submit(*TWO_NODES, "data.url=s3://b/data", "--volume", "shared:/runs")
    assert code == 0
    assert "note: --volume shared: the claim can be mounted as ReadWriteOnce" in errors


def test_a_quota_that_is_used_up_is_noted_once(cluster: FakeCluster, submit: Submit) -> None:
    gpus = {"requests.nvidia.com/gpu": "8"}
    cluster.add(QUOTAS, quota("gpus", gpus, hard=gpus))
    cluster.add(PODS, {"metadata": {"name": "other"}, "spec": {"containers": [GPU_CONTAINER]}})
    code, _, errors = submit(*TWO_NODES, *PLACES)
    assert code == 0
    assert errors == (
        "note: the job needs 8 of requests.nvidia.com/gpu; the quota gpus of namespace team allows 8, of "
        "which 8 are in use: pods will be refused until others end\n"
    )
    cluster.forbid("list", "resourcequotas")
    _, _, errors = submit(*TWO_NODES[:-1], "two", *PLACES)
    assert errors == (
        "note: namespace team takes no pod of the job: the quota gpus of the namespace is used up: requested "
        "requests.nvidia.com/gpu=4; used requests.nvidia.com/gpu=8 of requests.nvidia.com/gpu=8: pods will "
        "be refused until others end\n"
    )


@pytest.mark.parametrize(
    ("prepare", "words", "message"),
    [
        (
            lambda cluster: cluster.enforce("baseline"),
            ("--rdma", "rdma/hca=1"),
            "--rdma: namespace team enforces the baseline level of pod security, which takes no pods that "
            "may lock memory (IPC_LOCK): leave it out, or name a namespace that admits them with --namespace",
        ),
        (
            lambda cluster: cluster.add(LIMIT_RANGES, LIMITS),
            ("--memory-per-node", "2Gi", "--cpus-per-node", "4"),
            "--memory-per-node 2Gi: the LimitRange small of namespace team allows at most 1Gi of memory",
        ),
        (
            lambda cluster: None,
            ("--priority-class", "urgent"),
            "--priority-class urgent: the cluster has no such PriorityClass (kubectl get priorityclasses)",
        ),
    ],
)
def test_where_no_pod_may_be_asked_for_the_rules_are_read(
    prepare: Callable[[FakeCluster], object],
    words: Sequence[str],
    message: str,
    cluster: FakeCluster,
    submit: Submit,
) -> None:
    cluster.forbid("create", "pods")
    prepare(cluster)
    code, output, errors = submit(*TWO_NODES, *PLACES, *words)
    assert (code, output, errors) == (5, "", f"error: {message}\n")
    for what in ("namespaces", "limitranges", "priorityclasses"):
        cluster.forbid("*", what)
    assert submit(*TWO_NODES, *PLACES, *words)[0] == 0


def test_a_webhook_that_cannot_be_asked_beforehand_is_noted(cluster: FakeCluster, submit: Submit) -> None:
    told = 'admission webhook "policy.lab" does not support dry run'
    status = {"kind": "Status", "status": "Failure", "reason": "BadRequest", "code": 400, "message": told}
    cluster.refuse(400, method="POST", path="/pods", body=json.dumps(status))
    code, _, errors = submit(*TWO_NODES, *PLACES)
    assert code == 0
    assert errors == f"note: a pod of the job could not be checked beforehand: {told}\n"


def test_a_job_of_one_node_has_no_hosts_whatever_the_recipe_says(
    cluster: FakeCluster, submit: Submit
) -> None:
    hosts = "launcher.hosts={endpoint: 'a:1', num_hosts: 4, silence_s: 30}"
    words = ("--image", "repository/metaloom:1", "--name", "one", *PLACES, hosts)
    assert submit(*words)[0] == 0
    command_ = job_of(cluster)["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command_[-1] == "launcher.hosts=null"


def test_a_recipe_that_does_not_fit_the_nodes_is_refused(cluster: FakeCluster, submit: Submit) -> None:
    hosts = "launcher.hosts={endpoint: 'a:1', num_hosts: 4, min_hosts: 3}"
    code, _, errors = submit(*TWO_NODES, *PLACES, hosts)
    assert code == 2
    assert "launcher.hosts.min_hosts" in errors
    assert "must be at most launcher.hosts.num_hosts = 2" in errors


def test_what_another_option_decides_is_refused_as_an_override(cluster: FakeCluster, submit: Submit) -> None:
    code, _, errors = submit(*TWO_NODES, *PLACES, "launcher.num_processes=3")
    assert code == 5
    assert "launcher.num_processes=3: the job has 4 ranks on each node; say --ranks-per-node" in errors


def test_auto_takes_what_the_user_may_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, submit: Submit
) -> None:
    with FakeCluster(tmp_path, kinds=[JOB_SETS]) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        cluster.forbid("create", "jobsets")
        assert submit(*TWO_NODES, *PLACES)[0] == 0
        assert len(cluster.objects(JOBS)) == 1


def test_auto_passes_over_a_job_set_that_is_too_old_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, submit: Submit
) -> None:
    with FakeCluster(tmp_path, kinds=[JOB_SETS]) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        cluster.lacking["JobSet"] = {"spec.failurePolicy.rules"}
        old = (
            f"fake ({cluster.url}) knows no spec.failurePolicy.rules of a JobSet: --backend jobset takes "
            "JobSet (jobset.x-k8s.io/v1alpha2), 0.6 or newer"
        )
        why = f"note: {old}, so that another one is taken\n"
        code, output, errors = submit(*TWO_NODES, *PLACES, "--dry-run")
        assert (code, errors) == (0, why)
        assert "JobSet" not in {obj["kind"] for obj in yaml.safe_load_all(output)}
        assert submit(*TWO_NODES, *PLACES)[::2] == (0, why)
        assert job_of(cluster)["metadata"]["name"] == "one"
        code, _, errors = submit(*TWO_NODES, *PLACES, "--backend", "jobset")
        advice = "Have that installed, or choose another --backend"
        assert (code, errors) == (5, f"error: {old}. {advice}\n")


def test_auto_asks_no_cluster_about_a_request_with_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, submit: Submit
) -> None:
    with FakeCluster(tmp_path, kinds=[JOB_SETS]) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        code, _, errors = submit(*TWO_NODES, *PLACES, "--memory-per-node", "4 gigs")
        assert code == 5
        assert errors.startswith("error: --memory-per-node: '4 gigs' is not a quantity")
        assert not any(path.endswith("/jobsets") for _, path, _ in cluster.requests)


def test_a_dry_run_with_an_unknown_context_is_refused(cluster: FakeCluster, submit: Submit) -> None:
    code, output, errors = submit(*TWO_NODES, *PLACES, "--dry-run", "--context", "elsewhere")
    assert (code, output) == (5, "")
    assert "elsewhere" in errors


def test_a_run_of_which_the_cluster_knows_nothing_goes_on_with_a_note(
    cluster: FakeCluster, submit: Submit
) -> None:
    code, _, errors = submit(*TWO_NODES, *PLACES, "--resume")
    assert code == 0
    assert "note: there is no job one in namespace team of fake" in errors


def test_machines_that_may_come_on_demand_are_noted(cluster: FakeCluster, submit: Submit) -> None:
    cluster.add(NODES, NODE)
    words = (*PLACES, "--gpu-resource", "amd.com/gpu")
    code, _, errors = submit(*TWO_NODES, *words, "--node-selector", "pool=b")
    assert code == 0
    assert "note: --node-selector: none of the cluster's 1 nodes has the labels pool=b: unless" in errors
    _, _, errors = submit(*TWO_NODES[:-1], "two", *words)
    assert "note: no node of the cluster has amd.com/gpu now" in errors


def test_a_job_waits_for_gpus_whatever_the_cluster_calls_them(
    cluster: FakeCluster, submit: Submit, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--gpu-resource", "habana.ai/gaudi", "--rdma", "rdma/hca=2")
    assert submit(*TWO_NODES, *PLACES, *words)[0] == 0
    cluster.pods("one").unschedulable()
    assert main(["jobs", "status", "one"]) == 0
    assert capsys.readouterr().out.startswith("one: queued for 8 GPUs: ")


def test_without_preflight_nothing_is_asked(cluster: FakeCluster, submit: Submit) -> None:
    assert submit(*TWO_NODES, *PLACES, "--env-from-secret", "s3", "--no-preflight")[0] == 0
    assert not any("selfsubjectaccessreviews" in path for _, path, _ in cluster.requests)


def test_secrets_travel_by_reference(cluster: FakeCluster, submit: Submit) -> None:
    for name in ("s3", "mlflow"):
        cluster.add(SECRETS, {"metadata": {"name": name}})
    words = ("--env-from-secret", "s3", "--secret-files", "mlflow:/secrets/mlflow")
    assert submit(*TWO_NODES, *PLACES, *words)[0] == 0
    spec = job_of(cluster)["spec"]["template"]["spec"]
    assert spec["containers"][0]["envFrom"] == [{"secretRef": {"name": "s3"}}]
    assert {"secret": {"name": "mlflow"}} in spec["volumes"][-1]["projected"]["sources"]


@pytest.mark.parametrize("version", ["v1beta1", "v1beta2"])
def test_a_queue_of_kueue_is_a_label(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, submit: Submit
) -> None:
    queues = dataclasses.replace(LOCAL_QUEUES, version=version)
    with FakeCluster(tmp_path, kinds=[queues]) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        code, _, errors = submit(*TWO_NODES, *PLACES, "--queue", "gpus")
        assert code == 5
        assert "--queue gpus: there is no such LocalQueue" in errors
        cluster.add(queues, {"metadata": {"name": "gpus"}})
        assert submit(*TWO_NODES, *PLACES, "--queue", "gpus")[0] == 0
        assert job_of(cluster)["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"


def test_a_name_that_is_taken_is_refused_and_nothing_of_it_is_touched(
    cluster: FakeCluster, submit: Submit
) -> None:
    submit(*TWO_NODES, *PLACES)
    before = job_of(cluster)
    code, _, errors = submit(*TWO_NODES, *PLACES)
    assert code == 5
    assert "A job of this name has been submitted before: go on with its run by --resume" in errors
    assert job_of(cluster) == before
    assert cluster.get(CONFIG_MAPS, "one-recipe")["metadata"]["ownerReferences"]


def being_deleted(obj: dict[str, Any]) -> None:
    obj["metadata"]["deletionTimestamp"] = "2026-03-02T12:00:00Z"


def test_a_name_that_becomes_free_is_waited_for(
    cluster: FakeCluster, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metaloom.k8s.sending.POLL_S", 0.02)
    submit(*TWO_NODES, *PLACES)
    first = cluster.edit(JOBS, "one", being_deleted)["metadata"]["uid"]

    def is_waited_for() -> bool:
        return sum(path.endswith("/configmaps/one-recipe") for _, path, _ in list(cluster.requests)) > 4

    def play() -> None:
        cluster.wait(is_waited_for)
        cluster.delete(JOBS, "one")

    thread = threading.Thread(target=play)
    thread.start()
    code, output, errors = submit(*TWO_NODES, *PLACES)
    thread.join()
    assert code == 0
    assert output.startswith("submitted one: ")
    assert errors == (
        "note: a job one is being deleted: waiting until its name is free (Ctrl-C ends this, and nothing is "
        "sent)\n"
    )
    assert job_of(cluster)["metadata"]["uid"] != first
    (owner,) = cluster.get(CONFIG_MAPS, "one-recipe")["metadata"]["ownerReferences"]
    assert owner["uid"] == job_of(cluster)["metadata"]["uid"]


def test_what_is_deleted_and_does_not_go_is_named(
    cluster: FakeCluster, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metaloom.k8s.sending.GONE_WITHIN_S", 0.0)
    submit(*TWO_NODES, *PLACES)
    cluster.edit(JOBS, "one", being_deleted)
    code, output, errors = submit(*TWO_NODES, *PLACES)
    assert (code, output) == (5, "")
    assert errors.endswith(
        "error: ConfigMap one-recipe, which is being deleted, is still there after 0 s. See what holds it: "
        "kubectl get configmaps one-recipe -n team -o yaml\n"
    )
    cluster.delete(CONFIG_MAPS, "one-recipe")
    cluster.delete(SERVICES, "one")
    _, _, errors = submit(*TWO_NODES, *PLACES)
    assert "kubectl get jobs.batch one -n team -o yaml" in errors


def test_what_was_made_is_deleted_when_the_rest_is_refused(cluster: FakeCluster, submit: Submit) -> None:
    cluster.refuse(403, method="POST", path="/jobs")
    code, _, errors = submit(*TWO_NODES, *PLACES, "--no-preflight")
    assert code == 5
    assert "create jobs.batch 'one' in namespace 'team'" in errors
    for resource in (CONFIG_MAPS, SERVICES, JOBS):
        assert cluster.objects(resource) == []


def test_a_run_whose_job_has_ended_goes_on_under_its_name(cluster: FakeCluster, submit: Submit) -> None:
    submit(*TWO_NODES, *PLACES)
    first = job_of(cluster)["metadata"]["uid"]
    code, _, errors = submit(*TWO_NODES, *PLACES, "--resume")
    assert code == 5
    assert "--resume: the job one has not ended (" in errors
    pods = cluster.pods("one")
    pods.run()
    pods.fail(0, code=2)
    assert "Failed" in cluster.conditions(JOBS, "one")
    code, output, errors = submit(*TWO_NODES, *PLACES, "--resume", "--insist")
    assert code == 0, errors
    assert output.startswith("submitted one: ")
    again = job_of(cluster)
    (container,) = again["spec"]["template"]["spec"]["containers"]
    assert "--insist" in container["command"]
    assert again["metadata"]["uid"] != first
    (owner,) = cluster.get(CONFIG_MAPS, "one-recipe")["metadata"]["ownerReferences"]
    assert owner["uid"] == again["metadata"]["uid"]


def test_which_run_goes_on_has_to_be_said(submit: Submit) -> None:
    code, _, errors = submit("--image", "repository/metaloom:1", *PLACES, "--resume")
    assert code == 5
    assert "--resume: say by --name which run goes on." in errors
    code, _, errors = submit("--image", "repository/metaloom:1", *PLACES, "--name", "one", "--insist")
    assert (code, errors) == (5, "error: --insist is for a run that goes on: give --resume too.\n")


def test_a_recipe_with_a_mistake_is_refused_before_any_cluster_is_asked(
    cluster: FakeCluster, submit: Submit
) -> None:
    code, _, errors = submit(*TWO_NODES, *PLACES, "outer.num_stesp=5")
    assert code == 2
    assert "outer.num_stesp" in errors
    assert cluster.requests == []


def test_no_kubeconfig_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, submit: Submit
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    code, output, errors = submit(*TWO_NODES, *PLACES)
    assert (code, output) == (5, "")
    assert errors.startswith("error: there is no kubeconfig: ")
    assert errors.count("\n") == 1
    _, _, errors = submit(*TWO_NODES, *PLACES, "--memory-per-node", "4 gigs")
    assert "error: 2 problems:" in errors
    assert "--memory-per-node: '4 gigs' is not a quantity" in errors


def test_the_commands_of_clusters_import_neither_torch_nor_the_models_of_the_client(
    cluster: FakeCluster, tmp_path: Path
) -> None:
    script = (
        "import sys; from metaloom.cli import main; main(sys.argv[1:]); "
        "print([n for n in ('torch', 'kubernetes.client.models', 'mlflow') if n in sys.modules])"
    )
    words = [*command()[:1], "-c", script, "submit", SMOKE, *TWO_NODES, *PLACES]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
