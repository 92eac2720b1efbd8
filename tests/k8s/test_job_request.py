"""Everything that is wrong with a request is told, at once and in words."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from metaloom.k8s.request import JobRequest, SecretFiles, Toleration, Volume, problems
from tests.k8s.job_requests import CASES, SMALL

DNS = "is no name in Kubernetes: lower-case letters, digits"
PAIR = dataclasses.replace(SMALL, nodes=2, own_folders=True)


@pytest.mark.parametrize("case", CASES)
def test_a_good_request_has_no_problems(case: str) -> None:
    assert problems(CASES[case]) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"namespace": "My Team"},
            f"--namespace: 'My Team' {DNS} and '-', beginning and ending with a letter or digit; did you "
            "mean my-team?",
        ),
        (
            {"priority_class": "High!"},
            f"--priority-class: 'High!' {DNS}, '-' and '.', each part beginning and ending with a letter or "
            "digit; did you mean high?",
        ),
        (
            {"service_account": "_"},
            f"--service-account: '_' {DNS}, '-' and '.', each part beginning and ending with a letter or "
            "digit",
        ),
        (
            {"queue": "-q"},
            f"--queue: '-q' {DNS} and '-', beginning and ending with a letter or digit; did you mean q?",
        ),
        (
            {"gpu_resource": "gpu"},
            "--gpu-resource: 'gpu' is no resource of devices: it has a domain, as nvidia.com/gpu has",
        ),
        (
            {"image": "Registry/My Image"},
            "--image: 'Registry/My Image' names no image; write REPOSITORY:TAG or REPOSITORY@sha256:DIGEST, "
            "the repository in lower case",
        ),
        (
            {"image_pull_policy": "Often"},
            "--image-pull-policy: 'Often' is none of Always, IfNotPresent, Never",
        ),
        ({"nodes": 0}, "--nodes is 0; it must be between 1 and 100000"),
        ({"gpus_per_node": -1}, "--gpus-per-node is -1; it must be between 0 and 1000"),
        ({"ranks_per_node": 0}, "--ranks-per-node is 0; it must be between 1 and 1000"),
        ({"max_restarts": -1}, "--max-restarts is -1; it must be between 0 and 21474"),
        ({"stop_within_s": 0.5}, "launcher.stop_within_s is 0.5; it must be between 1 and 100000"),
        ({"ttl_s": -1}, "--ttl is -1; it must be between 0 and 2147483647"),
        ({"active_deadline_s": 0}, "--time-limit is 0; it must be between 1 and 2147483647"),
        (
            {"gpus_per_node": 4, "ranks_per_node": 8},
            "--ranks-per-node is 8 with 4 GPUs; each rank needs one of its own: at most 4",
        ),
        (
            {"user_id": 0},
            "--user is 0; pods run as a user and a group that are not root: between 1 and 2147483647",
        ),
        (
            {"memory": "4 gigs"},
            "--memory-per-node: '4 gigs' is not a quantity: a number and its unit together, as in 500m, 4, "
            "512Mi or 4Gi; did you mean 4Gi?",
        ),
        ({"memory": "4m"}, "--memory-per-node: 4m is less than 1Mi; did you mean 4Mi?"),
        ({"memory": "64"}, "--memory-per-node: 64 is less than 1Mi"),
        ({"memory": "0"}, "--memory-per-node: 0 is less than 1Mi"),
        ({"cpus": "-1"}, "--cpus-per-node: -1 is less than 1m"),
        (
            {"memory": "4Gi", "shared_memory": "4097Mi"},
            "--shared-memory is 4097Mi, more than --memory-per-node 4Gi, of which it is a part",
        ),
        (
            {"node_selector": {"gpu": "H100 or A100"}},
            "--node-selector: 'H100 or A100' is no value of a label: at most 63 letters, digits, '-', '_' "
            "and '.', beginning and ending with a letter or digit",
        ),
        (
            {"spread_over": "rack/"},
            "--spread-over: 'rack/': a key has at most 63 letters, digits, '-', '_' and '.', beginning and "
            "ending with a letter or digit, after a domain and '/' where there is one",
        ),
        (
            {"tolerations": (Toleration.parse("gpu:Never"),)},
            "--toleration: 'Never' is no effect of a taint: NoSchedule, PreferNoSchedule, NoExecute",
        ),
        (
            {"tolerations": (Toleration("", "yes"),)},
            "--toleration: a value, 'yes', without a key; write KEY=VALUE:EFFECT",
        ),
        ({"rdma": ("rdma/hca", 0)}, "--rdma: 0 of rdma/hca; it must be between 1 and 1000"),
        (
            {"rdma": ("hca", 1)},
            "--rdma: 'hca' is no resource of devices: it has a domain, as nvidia.com/gpu has",
        ),
        (
            {"rdma": ("nvidia.com/gpu", 1)},
            "--rdma: nvidia.com/gpu is what --gpu-resource names; name the resource of the network cards",
        ),
        (
            {"env": {"2FAST": "1"}},
            "--env: '2FAST' is no name of a variable: letters, digits, '_', '-' and '.', not beginning with "
            "a digit",
        ),
        (
            {"env": {"METALOOM_HOST_INDEX": "1"}},
            "--env: METALOOM_HOST_INDEX is set by the cluster, for each pod",
        ),
        ({"env": {"A": "\0"}}, "--env: the value of A holds a zero byte"),
        (
            {"volumes": (Volume("data", "data"),)},
            "--volume data: 'data' is no path in a pod: it begins with '/' and names a folder",
        ),
        (
            {"volumes": (Volume("data", "/data/../x/"),)},
            "--volume data: '/data/../x/' is no plain path; did you mean /x?",
        ),
        (
            {"volumes": (Volume("data", "/a:b"),)},
            "--volume data: '/a:b': a path where something is mounted has no ':' and no control characters",
        ),
        (
            {"volumes": (Volume("data", "/etc"),)},
            "--volume data: /etc would cover /etc/metaloom, which a pod needs; choose another path",
        ),
        (
            {"volumes": (Volume("data", "/dev/shm/x"),)},
            "--volume data: /dev/shm/x would cover /dev/shm, which a pod needs; choose another path",
        ),
        (
            {"volumes": (Volume("data", "/tmp"),)},
            "--volume data: /tmp is every pod's own scratch folder; choose another path",
        ),
        (
            {"volumes": (Volume("data", "/x"),), "secret_files": (SecretFiles("key", "/x"),)},
            "--secret-files key: /x is where data is already",
        ),
        ({"run_folder": "runs"}, "--run: 'runs' is no path in a pod: it begins with '/' and names a folder"),
        (
            {"run_folder": "/etc/metaloom/run"},
            "--run: /etc/metaloom/run is where a pod has /etc/metaloom; choose another path",
        ),
        (
            {"secret_files": (SecretFiles("key", "/runs"),)},
            "--run: /runs/glyphs is where the secret key is, which is read only",
        ),
        (
            {"volumes": (Volume("runs", "/runs", is_read_only=True),)},
            "--run: /runs/glyphs is on the claim runs, mounted to read only; leave out ':ro'",
        ),
        (
            {"nodes": 2},
            "--run: /runs/glyphs is on each pod's own disk, and 2 pods are to see the same: mount a claim "
            "there (--volume CLAIM:PATH, one that many nodes may write)",
        ),
        (
            {"nodes": 2, "own_folders": True, "volumes": (Volume("runs", "/runs"),)},
            "--run: /runs/glyphs is on the claim runs, which all pods see, and each is to have its own; "
            "choose a path that is not on a claim",
        ),
        ({"recipe": " \n"}, "the recipe glyphs-maml is empty"),
        (
            {"recipe": "é" * 2**19 + "."},
            "the recipe glyphs-maml has 1,048,577 bytes; a ConfigMap holds at most 1,048,576: put what is "
            "large into files of the image or at a URL",
        ),
        ({"overrides": ("outer.steps",)}, "'outer.steps' changes nothing of a recipe: write key=value"),
        (
            {"overrides": ("launcher.num_processes=2",)},
            "'launcher.num_processes=2': launcher.num_processes is decided by --ranks-per-node",
        ),
        (
            {"overrides": ("launcher.hosts.wait_s=2",)},
            "'launcher.hosts.wait_s=2': launcher.hosts is decided by --nodes",
        ),
        (
            {"overrides": ("launcher.show_all_ranks=false",)},
            "'launcher.show_all_ranks=false': launcher.show_all_ranks is decided by this command, which "
            "sets it to true",
        ),
        ({"labels": {"metaloom/job": "other"}}, "--label: metaloom/job is set by metaloom"),
        (
            {"labels": {"team": "a b"}},
            "--label: 'a b' is no value of a label: at most 63 letters, digits, '-', '_' and '.', beginning "
            "and ending with a letter or digit",
        ),
        (
            {"annotations": {"a/b/c": ""}},
            "--annotation: 'a/b/c': what is before the '/' must be a domain, as in example.com/c",
        ),
        (
            {"annotations": {"a": "x" * 204800}},
            "--annotation: 204,801 bytes in all; at most 204,800 are allowed",
        ),
    ],
)
def test_a_mistake_is_told_with_its_option_and_what_to_do(changes: dict[str, Any], message: str) -> None:
    assert problems(dataclasses.replace(SMALL, **changes)) == [message]


@pytest.mark.parametrize(
    "image",
    ["metaloom", "metaloom:1.0", "r.io:5000/a/b_c:v1", f"r.io/a@sha256:{'0' * 64}", "localhost/a__b-c"],
)
def test_images_may_be_named_in_every_usual_way(image: str) -> None:
    assert problems(dataclasses.replace(SMALL, image=image)) == []


@pytest.mark.parametrize("image", ["", "metaloom:", "-x", "a//b", "a b", "a@sha256:xyz", "https://r.io/a"])
def test_what_names_no_image_is_refused(image: str) -> None:
    (message,) = problems(dataclasses.replace(SMALL, image=image))

    assert "names no image" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WANDB_API_KEY", "x"),
        ("HF_TOKEN", "x"),
        ("hf-token", "x"),
        ("MYPASSWORD", "x"),
        ("AWS_ACCESS_KEY_ID", "x"),
        ("SECRET_1", "x"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/somewhere/key.json"),
        ("STORE", "https://someone:password@example.com"),
    ],
)
def test_secrets_in_plain_variables_are_refused(name: str, value: str) -> None:
    assert problems(dataclasses.replace(SMALL, env={name: value})) == [
        f"--env: {name} reads like a secret, and everyone who may look at the job would see its value: put "
        f"it into a Secret (kubectl create secret generic NAME --from-literal={name}=...) and give "
        "--env-from-secret NAME"
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "false"),
        ("KEYBOARD", "us"),
        ("SECRETARY", "x"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/secrets/key.json"),
        ("MLFLOW_TRACKING_URI", "https://mlflow.example.com/?a=b"),
    ],
)
def test_variables_that_only_look_alike_or_say_where_a_secret_is_are_none(name: str, value: str) -> None:
    request = dataclasses.replace(SMALL, env={name: value}, secret_files=(SecretFiles("gcs", "/secrets"),))

    assert problems(request) == []


def test_a_secret_is_not_told_with_the_mistake() -> None:
    (message,) = problems(dataclasses.replace(SMALL, env={"HF_TOKEN": "hunter2"}))

    assert "hunter2" not in message


def test_all_mistakes_are_told_at_once() -> None:
    bad = JobRequest(
        name="x",
        namespace="A",
        image="",
        recipe="",
        recipe_name="r",
        run_folder="/",
        nodes=0,
        memory="much",
        env={"KEY": "1"},
        labels={"a b": ""},
    )

    options = [text.split(" ")[0].rstrip(":") for text in problems(bad)]

    assert options == [
        "--namespace",
        "--image",
        "--nodes",
        "--memory-per-node",
        "--env",
        "--run",
        "the",
        "--label",
    ]


@pytest.mark.parametrize(
    ("text", "toleration"),
    [
        ("gpu", Toleration("gpu")),
        ("gpu:NoExecute", Toleration("gpu", None, "NoExecute")),
        ("team=a", Toleration("team", "a")),
        ("team=a:NoSchedule", Toleration("team", "a", "NoSchedule")),
        ("team=", Toleration("team", "")),
        ("", Toleration("")),
    ],
)
def test_tolerations_are_read_as_kubectl_writes_taints(text: str, toleration: Toleration) -> None:
    assert Toleration.parse(text) == toleration


@pytest.mark.parametrize(
    ("text", "volume"),
    [
        ("runs:/runs", Volume("runs", "/runs")),
        ("data:/data:ro", Volume("data", "/data", is_read_only=True)),
        ("data:/data:rw", Volume("data", "/data")),
    ],
)
def test_volumes_are_read_as_docker_writes_them(text: str, volume: Volume) -> None:
    assert Volume.parse(text) == volume


@pytest.mark.parametrize("text", ["runs", "/runs", ":/runs", "runs:", "runs:/runs:x", "runs:/runs:"])
def test_what_names_no_volume_is_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match="names no volume: write CLAIM:/path or, to read only, CLAIM:/path:ro"
    ):
        Volume.parse(text)


def test_files_of_a_secret_are_named_with_their_folder() -> None:
    assert SecretFiles.parse("gcs:/secrets/gcs") == SecretFiles("gcs", "/secrets/gcs")
    with pytest.raises(ValueError, match="'gcs' names no files of a secret: write SECRET:/path"):
        SecretFiles.parse("gcs")


@pytest.mark.parametrize(("gpus", "ranks", "number"), [(0, None, 1), (8, None, 8), (8, 2, 2), (0, 3, 3)])
def test_there_is_a_rank_per_gpu_unless_another_number_is_asked_for(
    gpus: int, ranks: int | None, number: int
) -> None:
    request = dataclasses.replace(SMALL, gpus_per_node=gpus, ranks_per_node=ranks)

    assert request.num_ranks_per_node == number


def test_requests_and_manifests_load_neither_torch_nor_the_kubernetes_client() -> None:
    script = (
        "import sys, metaloom.k8s.manifests; "
        "print(sorted({'torch', 'kubernetes', 'pydantic', 'numpy'} & set(sys.modules)))"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )

    assert done.stdout == "[]\n"
