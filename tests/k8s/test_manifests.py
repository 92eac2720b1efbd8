from __future__ import annotations

import dataclasses
import re
from typing import Any

import hypothesis
import pytest
import yaml
from hypothesis import strategies as st

from metaloom.k8s.manifests import (
    BACKENDS,
    choose,
    host_command,
    owner_reference,
    probe_pod,
    problems,
    to_yaml,
)
from metaloom.k8s.manifests.command import literal
from metaloom.k8s.request import JobRequest, Volume
from metaloom.k8s.resources import JOB_SETS, JOBS, Resource
from metaloom.launchers.local import AGENT_STOP_MARGIN_S
from tests.k8s.job_requests import (
    CASES,
    FULL,
    GOLDEN,
    LARGE,
    RECIPE,
    SMALL,
    all_templates,
    job_of,
    rendered,
    replicated_jobs_of,
)

EVERY = pytest.mark.parametrize("backend", BACKENDS)
EVERY_CASE = pytest.mark.parametrize("case", CASES)


@EVERY
@EVERY_CASE
def test_manifests_are_the_golden_ones(backend: str, case: str) -> None:
    """After a change that is meant: python -m tests.k8s.job_requests, and read the difference."""
    assert rendered(backend, case) == (GOLDEN / f"{backend}-{case}.yaml").read_text()


def test_every_golden_file_is_compared() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == {
        f"{name}-{case}" for name in BACKENDS for case in CASES
    }


@EVERY
@EVERY_CASE
def test_requests_of_the_golden_files_have_no_problems(backend: str, case: str) -> None:
    refused = [text for text in problems(CASES[case], BACKENDS[backend]) if "--ttl" not in text]

    assert refused == []


@EVERY
@EVERY_CASE
def test_a_file_of_manifests_says_what_is_sent(backend: str, case: str) -> None:
    objects = BACKENDS[backend].build(CASES[case])

    assert list(yaml.safe_load_all(to_yaml(objects))) == objects


@EVERY
def test_the_same_request_makes_the_same_manifests_and_shares_nothing(backend: str) -> None:
    first, second = BACKENDS[backend].build(FULL), BACKENDS[backend].build(FULL)
    job_of(first, backend)["metadata"]["labels"]["changed"] = "yes"

    assert "changed" not in job_of(second, backend)["metadata"]["labels"]
    assert FULL.labels == {"team": "research"}


@EVERY
def test_objects_are_of_the_kinds_that_the_backend_names_in_their_order(backend: str) -> None:
    chosen = BACKENDS[backend]

    made = [(each["apiVersion"], each["kind"]) for each in chosen.build(SMALL)]

    assert made == [(each.api_version, each.kind) for each in (*chosen.creates, chosen.resource)]


@EVERY
@EVERY_CASE
def test_every_object_and_pod_is_known_by_its_labels_and_namespace(backend: str, case: str) -> None:
    request = CASES[case]
    objects = BACKENDS[backend].build(request)

    for labels in [
        *(each["metadata"]["labels"] for each in objects),
        *(template["metadata"]["labels"] for template in all_templates(case, backend)),
    ]:
        assert labels["app.kubernetes.io/name"] == labels["app.kubernetes.io/managed-by"] == "metaloom"
        assert labels["metaloom/job"] == request.name
    assert {each["metadata"]["namespace"] for each in objects} == {"research"}


@EVERY
def test_the_job_says_what_it_is(backend: str) -> None:
    metadata = job_of(BACKENDS[backend].build(LARGE), backend)["metadata"]

    annotations = metadata["annotations"]
    assert metadata["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert annotations["metaloom/recipe"] == "glyphs-maml"
    assert annotations["metaloom/backend"] == backend
    counts = ("metaloom/nodes", "metaloom/gpus-per-node", "metaloom/ranks-per-node")
    assert [annotations[name] for name in counts] == ["16", "8", "8"]
    assert annotations["metaloom/run"] == "/runs/glyphs"


@EVERY
def test_pods_and_other_objects_carry_no_queue_of_their_own(backend: str) -> None:
    """Kueue would queue each pod besides."""
    text = to_yaml(BACKENDS[backend].build(LARGE))

    assert text.count("kueue.x-k8s.io/queue-name") == 1


# ---------------------------------------------------------------- what runs in a pod


@EVERY
def test_one_node_needs_no_hosts(backend: str) -> None:
    assert host_command(SMALL, BACKENDS[backend]) == [
        *("metaloom", "train", "/etc/metaloom/recipe.yaml", "--run", "/runs/glyphs", "--run-id", "glyphs"),
        *("launcher.num_processes=1", "launcher.show_all_ranks=true", "launcher.hosts=null"),
    ]


@pytest.mark.parametrize(
    ("backend", "host"),
    [
        ("job", "glyphs-large-0.glyphs-large"),
        ("jobset", "glyphs-large-node-0-0.glyphs-large"),
        ("pytorchjob", "glyphs-large-master-0"),
        ("trainjob", "glyphs-large-node-0-0.glyphs-large"),
    ],
)
def test_hosts_meet_at_host_0_of_the_backend(backend: str, host: str) -> None:
    assert host_command(LARGE, BACKENDS[backend])[-4:] == [
        f"launcher.hosts.endpoint={host}:29400",
        "launcher.hosts.num_hosts=16",
        "launcher.hosts.wait_s=604800",
        "launcher.hosts.own_folders=true",
    ]


def test_overrides_come_before_what_the_request_decides() -> None:
    command = host_command(LARGE, BACKENDS["job"])

    at = command.index("checkpoint.url=s3://bucket/glyphs")
    assert command[at - 1 : at + 2] == ["outer.steps=5000", LARGE.overrides[1], "launcher.num_processes=8"]


@EVERY
@EVERY_CASE
def test_containers_run_the_command_and_know_their_index(backend: str, case: str) -> None:
    chosen, request = BACKENDS[backend], CASES[case]

    for template in all_templates(case, backend):
        (container,) = template["spec"]["containers"]
        variables = {each["name"]: each for each in container["env"]}
        assert container["name"] == chosen.container
        assert container["image"] == request.image
        seen = [_kubelet(word, {"RANK": "3"}) for word in container["command"]]
        if backend == "pytorchjob":
            assert seen == ["env", "METALOOM_HOST_INDEX=3", *host_command(request, chosen)]
        else:
            assert seen == host_command(request, chosen)
            path = variables["METALOOM_HOST_INDEX"]["valueFrom"]["fieldRef"]["fieldPath"]
            assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def test_plain_variables_arrive_as_they_were_given() -> None:
    (template,) = all_templates("full", "job")
    variables = {each["name"]: each.get("value") for each in template["spec"]["containers"][0]["env"]}

    assert _kubelet(variables["PRICE"], {"5": "five"}) == "$(5) or $6"
    assert variables["LIMIT"] == "1e3"
    assert variables["HOME"] == "/tmp"


def test_a_variable_of_the_user_takes_the_place_of_ours() -> None:
    request = dataclasses.replace(SMALL, env={"HOME": "/runs/glyphs/home"})

    (template,) = _templates(request)

    home = [each for each in template["spec"]["containers"][0]["env"] if each["name"] == "HOME"]
    assert home == [{"name": "HOME", "value": "/runs/glyphs/home"}]


@hypothesis.settings(deadline=None)
@hypothesis.given(st.text(alphabet="$()aA{} "))
def test_texts_reach_the_command_unchanged(text: str) -> None:
    assert _kubelet(literal(text), {"a": "replaced", "A": "replaced"}) == text


def _kubelet(text: str, variables: dict[str, str]) -> str:
    """What the kubelet makes of a text: $(NAME) is replaced where NAME is known, and $$ is one $."""

    def replaced(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return variables.get(match["name"], match[0])

    return re.sub(r"\$\$|\$\((?P<name>[^)]*)\)", replaced, text)


# ---------------------------------------------------------------- the pod


def test_what_has_to_be_written_can_be_although_the_image_is_read_only() -> None:
    (template,) = all_templates("small", "job")
    (container,) = template["spec"]["containers"]
    volumes = {each["name"]: each for each in template["spec"]["volumes"]}

    writable = {each["mountPath"]: volumes[each["name"]] for each in container["volumeMounts"]}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert writable["/tmp"] == {"name": "scratch", "emptyDir": {}}
    assert writable["/runs/glyphs"] == {"name": "run", "emptyDir": {}}
    assert writable["/dev/shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}


def test_a_run_folder_on_a_claim_is_not_covered() -> None:
    (template,) = all_templates("full", "job")

    mounts = {each["mountPath"]: each["name"] for each in template["spec"]["containers"][0]["volumeMounts"]}
    claims = {
        each["name"]: each["persistentVolumeClaim"]["claimName"]
        for each in template["spec"]["volumes"]
        if "persistentVolumeClaim" in each
    }
    assert "/work/runs/glyphs" not in mounts
    assert {path: claims[name] for path, name in mounts.items() if name in claims} == {
        "/work": "runs",
        "/again": "runs",
        "/data": "data",
    }


@pytest.mark.parametrize(
    ("memory", "shared", "size"),
    [
        (None, None, "1Gi"),
        ("512Gi", None, "256Gi"),
        ("1Gi", None, "512Mi"),
        ("3Ki", None, "1536"),
        ("1G", None, "500000000"),
        ("8Gi", "6Gi", "6Gi"),
    ],
)
def test_shared_memory_is_half_of_the_memory_or_what_was_asked_for(
    memory: str | None, shared: str | None, size: str
) -> None:
    request = dataclasses.replace(SMALL, memory=memory, shared_memory=shared)

    assert request.shared_memory_size == size


def test_devices_and_memory_are_requested_as_they_are_limited_and_processors_are_not_limited() -> None:
    (template,) = all_templates("full", "job")

    resources = template["spec"]["containers"][0]["resources"]
    assert resources["requests"] == {"cpu": "7500m", **resources["limits"]}
    assert resources["limits"] == {"memory": "96.5Gi", "amd.com/gpu": "4", "rdma/hca": "4"}


@pytest.mark.parametrize(("stop_within_s", "grace_s"), [(25.0, 75), (25.1, 76), (119.5, 170)])
def test_a_pod_has_longer_to_stop_than_its_ranks(stop_within_s: float, grace_s: int) -> None:
    (template,) = _templates(dataclasses.replace(SMALL, stop_within_s=stop_within_s))

    assert template["spec"]["terminationGracePeriodSeconds"] == grace_s
    # What the command in it grants its agent.
    assert grace_s >= stop_within_s + AGENT_STOP_MARGIN_S


def test_secrets_come_by_reference_alone() -> None:
    (template,) = all_templates("full", "job")

    (container,) = template["spec"]["containers"]
    files = [each for each in template["spec"]["volumes"] if "projected" in each]
    assert container["envFrom"] == [{"secretRef": {"name": "mlflow"}}, {"secretRef": {"name": "bucket"}}]
    assert [each["projected"]["sources"] for each in files] == [[{"secret": {"name": "gcs"}}]]
    assert template["spec"]["automountServiceAccountToken"] is False


def test_tolerations_say_what_they_mean() -> None:
    (template,) = all_templates("full", "job")

    assert template["spec"]["tolerations"] == [
        {"key": "amd.com/gpu", "operator": "Exists"},
        {"key": "team", "operator": "Equal", "value": "research", "effect": "NoSchedule"},
        {"operator": "Exists"},
    ]


def test_one_pod_is_spread_over_nothing() -> None:
    assert "topologySpreadConstraints" not in all_templates("small", "job")[0]["spec"]


# ---------------------------------------------------------------- what failures do


def test_a_job_tells_what_was_taken_away_what_was_stopped_and_what_is_a_mistake() -> None:
    spec = job_of(BACKENDS["job"].build(LARGE), "job")["spec"]

    taken, stopped, mistakes = spec["podFailurePolicy"]["rules"]
    assert taken == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert (stopped["action"], stopped["onExitCodes"]["values"]) == ("Ignore", [75])
    assert (mistakes["action"], mistakes["onExitCodes"]["values"]) == ("FailJob", [2, 126, 127, 130])
    # One fault may take down all 16 pods: each may fail three times.
    assert (spec["backoffLimitPerIndex"], spec["maxFailedIndexes"]) == (3, 0)
    assert "backoffLimit" not in spec


@pytest.mark.parametrize("backend", ["jobset", "trainjob"])
def test_a_gang_starts_again_as_a_whole_but_not_with_a_mistake(backend: str) -> None:
    objects = BACKENDS[backend].build(FULL)

    ((job,),) = [jobs for jobs in map(replicated_jobs_of, objects) if jobs]
    holder = objects[1]["spec"] if backend == "jobset" else objects[1]["spec"]["template"]["spec"]
    (rule,) = holder["failurePolicy"]["rules"]
    assert job["template"]["spec"]["backoffLimit"] == 0
    assert job["template"]["spec"]["activeDeadlineSeconds"] == 86400
    assert holder["failurePolicy"]["maxRestarts"] == 5
    assert rule["action"] == "FailJobSet"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy", "DeadlineExceeded"]


def test_a_pytorch_job_starts_again_what_saved_before_it_stopped() -> None:
    """Its ExitCode would take 75 for a failure of the job: what is below 128 is final there."""
    spec = job_of(BACKENDS["pytorchjob"].build(LARGE), "pytorchjob")["spec"]

    replicas = spec["pytorchReplicaSpecs"]
    assert {name: each["replicas"] for name, each in replicas.items()} == {"Master": 1, "Worker": 15}
    assert {each["restartPolicy"] for each in replicas.values()} == {"OnFailure"}
    assert all("restartPolicy" not in each["template"]["spec"] for each in replicas.values())
    # The operator fails a job when so many restarts are reached, not when they are passed.
    assert spec["runPolicy"]["backoffLimit"] == 3 * 16 + 1


def test_a_pytorch_job_of_one_node_has_no_workers() -> None:
    spec = job_of(BACKENDS["pytorchjob"].build(SMALL), "pytorchjob")["spec"]

    assert list(spec["pytorchReplicaSpecs"]) == ["Master"]


def test_a_train_job_runs_what_its_own_runtime_says() -> None:
    _, runtime, job = BACKENDS["trainjob"].build(LARGE)

    (replicated,) = replicated_jobs_of(runtime)
    assert job["spec"]["runtimeRef"]["kind"] == runtime["kind"]
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert job["spec"]["trainer"]["numNodes"] == runtime["spec"]["mlPolicy"]["numNodes"] == 16
    labels = replicated["template"]["metadata"]["labels"]
    assert labels["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"


def test_a_train_job_refuses_a_time_to_live_that_it_cannot_have() -> None:
    request = dataclasses.replace(SMALL, ttl_s=60)

    assert problems(request, BACKENDS["trainjob"]) == [
        "--ttl is 60; a TrainJob stays until it is deleted (metaloom jobs cancel): leave out --ttl, or "
        "choose another --backend"
    ]
    assert problems(request, BACKENDS["job"]) == []


# ---------------------------------------------------------------- names, owners, choice


@EVERY
@pytest.mark.parametrize("nodes", [1, 2, 10, 11, 101])
def test_a_name_may_be_as_long_as_the_longest_host_name_allows(backend: str, nodes: int) -> None:
    chosen = BACKENDS[backend]
    request = dataclasses.replace(SMALL, nodes=nodes, own_folders=nodes > 1)
    longest = 63 - len(chosen.longest_suffix(request))

    fits = dataclasses.replace(request, name="n" * longest)
    too_long = dataclasses.replace(request, name="n" * (longest + 1))

    assert problems(fits, chosen) == []
    (text,) = problems(too_long, chosen)
    assert f"has {longest + 1} letters; at most {longest} fit into a host name of 63" in text


@pytest.mark.parametrize(
    ("backend", "suffix"),
    [
        ("job", "-15"),
        ("jobset", "-node-0-15-xxxxx"),
        ("pytorchjob", "-worker-14"),
        ("trainjob", "-node-0-15-xxxxx"),
    ],
)
def test_what_a_cluster_puts_behind_a_name(backend: str, suffix: str) -> None:
    assert BACKENDS[backend].longest_suffix(LARGE) == suffix


def test_a_too_long_name_is_told_with_what_comes_behind_it() -> None:
    request = dataclasses.replace(SMALL, name="n" * 63)

    assert problems(request, BACKENDS["job"]) == [
        f"--name: '{'n' * 63}' has 63 letters; at most 61 fit into a host name of 63 once '-0' is put "
        "behind it"
    ]


def test_a_name_that_is_none_is_told_with_one_that_is() -> None:
    request = dataclasses.replace(SMALL, name="3 My_Run")

    assert problems(request, BACKENDS["job"]) == [
        "--name: '3 My_Run' is no name in Kubernetes: lower-case letters, digits and '-', beginning with a "
        "letter and not ending with '-'; did you mean my-run?"
    ]


def test_what_is_owned_is_deleted_with_its_owner_and_does_not_hold_it_up() -> None:
    _, _, job = BACKENDS["job"].build(SMALL)
    created = {**job, "metadata": {**job["metadata"], "uid": "1-2-3"}}

    assert owner_reference(created) == {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "name": "glyphs",
        "uid": "1-2-3",
        "controller": False,
        "blockOwnerDeletion": False,
    }


@pytest.mark.parametrize(("served", "name"), [({JOBS}, "job"), ({JOBS, JOB_SETS}, "jobset")])
def test_auto_takes_a_job_set_where_there_is_one(served: set[Resource], name: str) -> None:
    assert choose(lambda backend: backend.resource in served).name == name


def test_auto_takes_nothing_of_kubeflow_by_itself() -> None:
    assert choose(lambda backend: "kubeflow" in backend.resource.group).name == "job"


# ---------------------------------------------------------------- as a file


def test_a_recipe_is_a_block_that_can_be_read() -> None:
    text = to_yaml(BACKENDS["job"].build(SMALL))

    assert "  recipe.yaml: |\n" + "".join(f"    {line}\n" for line in RECIPE.splitlines()) in text


@hypothesis.settings(deadline=None)
@hypothesis.given(st.text())
def test_any_recipe_arrives_as_it_is(recipe: str) -> None:
    config_map, *_ = BACKENDS["job"].build(dataclasses.replace(SMALL, recipe=recipe))

    assert list(yaml.safe_load_all(to_yaml([config_map]))) == [config_map]


@pytest.mark.parametrize(
    "text",
    ["1e3", "0o17", "0x1F", "1_000", "12:30:00", "2026-01-02", "y", "N", "true", "null", "~", "", ".5", "+1"],
)
def test_texts_that_a_reader_of_yaml_may_take_for_something_else_are_quoted(text: str) -> None:
    assert to_yaml([{"value": text}]) == f"---\nvalue: '{text}'\n"


@pytest.mark.parametrize(
    "text", ["1Gi", "--run", "registry.example/team/image:1.0", "96.5Gi", "launcher.num_processes=8"]
)
def test_texts_that_are_nothing_else_are_not_quoted(text: str) -> None:
    assert to_yaml([{"value": text}]) == f"---\nvalue: {text}\n"


def _templates(request: JobRequest) -> list[dict[str, Any]]:
    return [each["spec"]["template"] for each in BACKENDS["job"].build(request) if each["kind"] == "Job"]


def test_the_run_folder_s_volume_is_the_innermost() -> None:
    request = dataclasses.replace(
        SMALL,
        run_folder="/a/b/c",
        volumes=(Volume("outer", "/a"), Volume("inner", "/a/b"), Volume("no", "/a/bc")),
    )

    assert request.volume_of_run == Volume("inner", "/a/b")


@EVERY
@EVERY_CASE
def test_the_pod_that_a_server_is_asked_for_is_one_of_the_job(backend: str, case: str) -> None:
    probe = probe_pod(CASES[case], BACKENDS[backend])

    (labels,) = {str(each["metadata"]["labels"]) for each in all_templates(case, backend)}
    assert str(probe["metadata"]["labels"]) == labels
    assert "kueue.x-k8s.io/queue-name" not in labels
    assert probe["spec"]["restartPolicy"] == "Never"
    for template in all_templates(case, backend):
        # A pod alone has no Service, nor anyone who starts it again.
        own = {"restartPolicy", "subdomain"}
        left, right = ({k: v for k, v in one["spec"].items() if k not in own} for one in (probe, template))
        assert left == right
