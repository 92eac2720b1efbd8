"""The client against a fake API server, over real sockets: what it does, and how it says what failed."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from metaloom.errors import LaunchError
from metaloom.k8s import access, client, watching
from metaloom.k8s.client import AlreadyExistsError, Cluster, RefusedError
from metaloom.k8s.resources import CONFIG_MAPS, JOB_SETS, JOBS, NAMESPACES, PODS, QUOTAS
from tests.k8s.fake_api import FakeCluster
from tests.k8s.jobs import LABELS, config_map, job, self_signed


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    monkeypatch.setattr(client, "PAUSES_S", (0.01, 0.01, 0.01))
    with FakeCluster(tmp_path) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        yield cluster


@pytest.fixture
def cluster(fake: FakeCluster) -> Iterator[Cluster]:
    with contextlib.closing(Cluster.connect()) as connected:
        yield connected


@contextlib.contextmanager
def refused(*words: str) -> Iterator[None]:
    """Everything in this context raises one message with all those words, and without the token."""
    with pytest.raises(LaunchError) as caught:
        yield
    message = str(caught.value)
    assert "planted-token" not in message
    for each in words:
        assert each in message


def write_config(fake: FakeCluster, change: Callable[[dict[str, Any]], object]) -> None:
    config = fake.config()
    change(config)
    fake.kubeconfig.write_text(json.dumps(config))


# Kubeconfigs.


def test_without_a_kubeconfig_the_message_says_where_one_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with refused(f"there is no kubeconfig: {tmp_path}/.kube/config does not exist; set KUBECONFIG, or copy"):
        Cluster.connect()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty: it holds no contexts"),
        (b"- a\n- b\n", "is no mapping: it holds no contexts"),
        (b"users:\n- token: 'planted-token\n", "is no YAML in line 3: mend it, or set KUBECONFIG"),
        (b"\xff\xfe\x00", "cannot be read: it is no text"),
        (b"contexts: 3\n", "'contexts' has to be a list of entries with a `name`"),
        (b"contexts: [{name: a, context: {cluster: b}}]\ncurrent-context: a\n", "has no server there"),
        (b"contexts: [{name: a, context: {}}]\n", "no context is current; choose one with `kubectl config"),
    ],
)
def test_a_kubeconfig_that_is_none_is_told_with_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, words: str
) -> None:
    path = tmp_path / "config"
    path.write_bytes(content)
    monkeypatch.setenv("KUBECONFIG", str(path))
    with refused(str(path), words):
        Cluster.connect()


def test_a_kubeconfig_that_cannot_be_read_is_told_with_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path))
    with refused(f"kubeconfig {tmp_path} cannot be read: Is a directory"):
        Cluster.connect()


def test_an_unknown_context_is_told_with_those_that_there_are(fake: FakeCluster) -> None:
    with refused("there is no context 'fakee' (there are: fake); did you mean 'fake'?"):
        Cluster.connect(context="fakee")


def test_the_first_file_that_names_a_current_context_decides(
    fake: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, last = tmp_path / "first", tmp_path / "last"
    first.write_text(json.dumps({"contexts": []}))
    write_config(fake, lambda config: config)
    last.write_text(
        json.dumps({"current-context": "another", "contexts": [{"name": "another", "context": {}}]})
    )
    monkeypatch.setenv("KUBECONFIG", f"{first}:{fake.kubeconfig}:{last}")
    with contextlib.closing(Cluster.connect()) as cluster:
        assert cluster.shown == f"namespace team of fake ({fake.url})"
        assert cluster.list(PODS) == []


def test_a_namespace_that_is_given_goes_before_that_of_the_context(fake: FakeCluster) -> None:
    with contextlib.closing(Cluster.connect(namespace="kube-system")) as cluster:
        assert cluster.namespace == "kube-system"
        assert cluster.shown == f"namespace kube-system of fake ({fake.url})"


def test_connecting_leaves_the_official_package_to_be_imported_whole(fake: FakeCluster) -> None:
    code = (
        "import sys; from metaloom.k8s.client import Cluster; from metaloom.k8s.resources import PODS\n"
        "cluster = Cluster.connect(); assert cluster.list(PODS) == []; cluster.close()\n"
        "assert not any(name.partition('.')[0] in ('kubernetes', 'torch') for name in sys.modules)\n"
        "import kubernetes; assert kubernetes.client.V1Pod and kubernetes.config.load_kube_config"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_token_of_an_auth_provider_is_used(fake: FakeCluster) -> None:
    fake.token = "eyJhbGciOiJub25lIn0.eyJleHAiOjk5OTk5OTk5OTl9.c2lnbmVk"
    provider = {"name": "oidc", "config": {"id-token": fake.token}}
    write_config(fake, lambda config: config["users"][0].update(user={"auth-provider": provider}))
    with contextlib.closing(Cluster.connect()) as cluster:
        assert cluster.list(PODS) == []


def test_without_the_official_package_the_message_says_what_to_install(
    fake: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    access._official.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refused("the package kubernetes is not installed: pip install 'metaloom[kubernetes]'."):
        Cluster.connect()


def plugin(fake: FakeCluster, tmp_path: Path, script: str) -> None:
    """The credentials come from a program."""
    program = tmp_path / "plugin"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    api = "client.authentication.k8s.io/v1"
    entry = {"apiVersion": api, "command": str(program), "interactiveMode": "Never"}
    write_config(fake, lambda config: config["users"][0].update(user={"exec": entry}))


def credential(token: str) -> str:
    api = "client.authentication.k8s.io/v1"
    return json.dumps({"apiVersion": api, "kind": "ExecCredential", "status": {"token": token}})


def test_a_plugin_of_the_kubeconfig_gives_the_token_and_is_asked_again_after_a_401(
    fake: FakeCluster, tmp_path: Path
) -> None:
    (tmp_path / "answer").write_text(credential(fake.token))
    plugin(fake, tmp_path, f"cat {tmp_path / 'answer'}")
    with contextlib.closing(Cluster.connect()) as cluster:
        assert cluster.list(PODS) == []
        fake.token = "the-next-token"
        (tmp_path / "answer").write_text(credential(fake.token))
        assert cluster.list(PODS) == []


def test_a_plugin_that_fails_is_told_in_its_own_words(fake: FakeCluster, tmp_path: Path) -> None:
    plugin(fake, tmp_path, "echo please log in with sso >&2; exit 3")
    with refused("context 'fake' of ", "its credentials cannot be loaded", "please log in with sso"):
        Cluster.connect()


def test_a_plugin_that_is_not_installed_is_told_by_name(fake: FakeCluster, tmp_path: Path) -> None:
    plugin(fake, tmp_path, "")
    (tmp_path / "plugin").unlink()
    with refused("its credentials cannot be loaded", str(tmp_path / "plugin"), "log in to the cluster again"):
        Cluster.connect()


def test_in_a_pod_the_service_account_is_used_over_tls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls, certificate = self_signed(tmp_path)
    account = tmp_path / "account"
    account.mkdir()
    with FakeCluster(tmp_path, tls=tls) as fake:
        (account / "token").write_text(fake.token)
        (account / "ca.crt").write_bytes(certificate.read_bytes())
        (account / "namespace").write_text("team")
        monkeypatch.setattr("metaloom.k8s.access.SERVICE_ACCOUNT", account)
        monkeypatch.delenv("KUBECONFIG", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", fake.url.rpartition(":")[2])
        with contextlib.closing(Cluster.connect()) as cluster:
            assert cluster.shown == f"namespace team of this pod's cluster ({fake.url})"
            assert cluster.list(PODS) == []


def test_in_a_pod_without_a_service_account_the_message_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metaloom.k8s.access.SERVICE_ACCOUNT", tmp_path)
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    with refused(
        "the service account of this pod: its credentials cannot be loaded: Service token file does"
    ):
        Cluster.connect()


# Connections.


def test_a_certificate_that_is_not_trusted_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls, certificate = self_signed(tmp_path)
    with FakeCluster(tmp_path, tls=tls) as fake:
        monkeypatch.setenv("KUBECONFIG", str(fake.kubeconfig))
        with (
            contextlib.closing(Cluster.connect()) as cluster,
            refused("the certificate of the server is not trusted", "`certificate-authority-data`"),
        ):
            cluster.list(PODS)
        write_config(
            fake,
            lambda config: config["clusters"][0]["cluster"].update(
                {"certificate-authority": str(certificate)}
            ),
        )
        with contextlib.closing(Cluster.connect()) as cluster:
            assert cluster.list(PODS) == []


def test_tls_to_a_port_that_speaks_none_is_told_as_that(fake: FakeCluster) -> None:
    write_config(
        fake,
        lambda config: config["clusters"][0]["cluster"].update(server=fake.url.replace("http:", "https:")),
    )
    with (
        contextlib.closing(Cluster.connect()) as cluster,
        refused("no TLS connection comes about", "the right port, and https or http"),
    ):
        cluster.list(PODS)


def test_a_server_that_is_down_is_told_after_a_few_tries(fake: FakeCluster) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        server = f"http://127.0.0.1:{unused.getsockname()[1]}"
    write_config(fake, lambda config: config["clusters"][0]["cluster"].update(server=server))
    with (
        contextlib.closing(Cluster.connect()) as cluster,
        refused(
            f"cannot list pods in namespace 'team' on fake ({server}): there is no connection to the server "
            "(Connection refused); look whether the cluster is up"
        ),
    ):
        cluster.list(PODS)


def test_a_name_that_is_not_known_is_told_as_that(fake: FakeCluster) -> None:
    write_config(
        fake, lambda config: config["clusters"][0]["cluster"].update(server="http://no-such-host.invalid")
    )
    with (
        contextlib.closing(Cluster.connect()) as cluster,
        refused("the name of the server is not known", "(http://no-such-host.invalid)", "VPN"),
    ):
        cluster.list(PODS)


def test_a_server_that_does_not_answer_is_told_as_that(
    fake: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "ANSWER_TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = f"http://127.0.0.1:{silent.getsockname()[1]}"
        write_config(fake, lambda config: config["clusters"][0]["cluster"].update(server=server))
        with (
            contextlib.closing(Cluster.connect()) as cluster,
            refused("the server does not answer in time", server),
        ):
            cluster.list(PODS)


def test_connections_that_are_reset_are_tried_again(fake: FakeCluster, cluster: Cluster) -> None:
    fake.reset(times=3)
    assert cluster.list(PODS) == []


def test_an_object_whose_answer_was_lost_is_found_to_be_made(fake: FakeCluster, cluster: Cluster) -> None:
    fake.reset(method="POST", is_done=True)
    assert cluster.create(CONFIG_MAPS, config_map("a"))["metadata"]["uid"]
    fake.reset(method="POST", is_done=True)
    fake.add(CONFIG_MAPS, config_map("b") | {"data": {"key": "of somebody else"}})
    with pytest.raises(AlreadyExistsError):
        cluster.create(CONFIG_MAPS, config_map("b"))


@pytest.mark.parametrize(("cpu", "is_found"), [("1", True), ("1001m", False)])
def test_an_object_whose_answer_was_lost_is_found_whatever_its_quantities_are_written_as(
    cpu: str, is_found: bool, fake: FakeCluster, cluster: Cluster
) -> None:
    sent, there = job(), job()
    for made, amounts, size in (
        (sent, {"cpu": "1000m", "memory": "1024Mi", "nvidia.com/gpu": "8"}, "0.5Gi"),
        (there, {"cpu": cpu, "memory": "1Gi", "nvidia.com/gpu": "8"}, "512Mi"),
    ):
        spec = made["spec"]["template"]["spec"]
        spec["containers"][0]["resources"] = {"requests": amounts, "limits": amounts}
        spec["volumes"] = [{"name": "shared-memory", "emptyDir": {"sizeLimit": size}}]
    fake.reset(method="POST")
    uid = fake.add(JOBS, there)["metadata"]["uid"]  # as the server has kept what was sent
    if is_found:
        assert cluster.create(JOBS, sent)["metadata"]["uid"] == uid
        return
    with pytest.raises(AlreadyExistsError):
        cluster.create(JOBS, sent)


# Refusals.


def test_an_expired_token_is_told_with_the_user_and_never_shown(fake: FakeCluster, cluster: Cluster) -> None:
    fake.token = "another"
    with refused(
        f"fake ({fake.url}) does not accept the credentials of user 'dev' (401, Unauthorized)",
        "has expired; log in to the cluster again",
    ):
        cluster.list(PODS)


def test_what_is_forbidden_is_told_with_verb_kind_namespace_and_user(
    fake: FakeCluster, cluster: Cluster
) -> None:
    fake.forbid("create", "jobs")
    with refused(
        f"user 'dev' may not create jobs in namespace 'team' of fake ({fake.url}): ask for a Role that has "
        "the verb 'create' for 'jobs', or name a namespace of your own with --namespace."
    ):
        cluster.create(JOBS, job())
    fake.forbid("get", "pods/log")
    fake.add(PODS, {"metadata": {"name": "a"}, "spec": {"containers": [{"name": "main"}]}})
    with refused("user 'dev' may not get pods/log in namespace 'team'"):
        cluster.log("a", container="main")


def test_a_namespace_that_is_not_there_is_told_with_how_to_make_it(fake: FakeCluster) -> None:
    with contextlib.closing(Cluster.connect(namespace="nowhere")) as cluster:
        with refused(f"there is no namespace 'nowhere' on fake ({fake.url}): make it (kubectl create"):
            cluster.create(CONFIG_MAPS, config_map("a"))
        assert cluster.get(NAMESPACES, "nowhere") is None


def test_a_kind_that_is_not_served_is_told_with_its_operator(fake: FakeCluster, cluster: Cluster) -> None:
    words = (
        f"fake ({fake.url}) serves no JobSet (jobsets.jobset.x-k8s.io of jobset.x-k8s.io/v1alpha2): its "
        "operator is not installed there"
    )
    with refused(words):
        cluster.list(JOB_SETS)
    with refused(words):
        cluster.get(JOB_SETS, "glyphs")
    with refused(words):
        cluster.create(JOB_SETS, {"metadata": {"name": "glyphs"}})


def test_a_quota_is_told_with_what_it_allows(fake: FakeCluster, cluster: Cluster) -> None:
    fake.add(QUOTAS, {"metadata": {"name": "gpus"}, "spec": {"hard": {"pods": "0"}}})
    pod = {"metadata": {"name": "a"}, "spec": {"containers": [{"name": "main", "image": "x"}]}}
    with refused("a quota of the namespace does not allow it", "exceeded quota: gpus, requested: pods=1"):
        cluster.create(PODS, pod)


def test_a_name_that_is_taken_is_an_error_of_its_own(fake: FakeCluster, cluster: Cluster) -> None:
    cluster.create(CONFIG_MAPS, config_map("a"))
    with pytest.raises(AlreadyExistsError, match="there is one of that name already; choose another name"):
        cluster.create(CONFIG_MAPS, config_map("a"))


def test_an_invalid_object_is_told_field_by_field(cluster: Cluster) -> None:
    with refused(
        "cannot create jobs.batch 'Glyphs' in namespace 'team' on fake",
        "the API server finds it invalid; mend these fields:\n",
        '\n  metadata.name: Invalid value: "Glyphs": a lowercase RFC 1123 subdomain',
        '\n  spec.template.spec.restartPolicy: Unsupported value: "Always": supported values:',
    ):
        cluster.create(JOBS, job("Glyphs", restart="Always"))


def test_a_quantity_that_cannot_be_read_is_told(cluster: Cluster) -> None:
    wrong = job()
    wrong["spec"]["template"]["spec"]["containers"][0]["resources"] = {"limits": {"memory": "4 gigs"}}
    with refused("the API server cannot read the request (quantities must match the regular expression"):
        cluster.create(JOBS, wrong)


@pytest.mark.parametrize(
    ("status", "told", "words"),
    [
        (409, "please apply your changes to the latest version", "it was changed meanwhile (please apply"),
        (403, 'violates PodSecurity "restricted:latest"', "it is forbidden (violates PodSecurity"),
        (403, "namespace team is being terminated", "the namespace is being deleted (namespace team is"),
        (422, "no causes are given", "mend these fields:\n  no causes are given"),
    ],
)
def test_other_refusals_have_the_words_of_the_server(
    fake: FakeCluster, cluster: Cluster, status: int, told: str, words: str
) -> None:
    fake.refuse(status, body=json.dumps({"kind": "Status", "reason": "Conflict", "message": told}))
    with refused("cannot create jobs.batch 'glyphs' in namespace 'team' on fake", words):
        cluster.create(JOBS, job())


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_tried_again_when_it_says_and_that_is_told_once(
    fake: FakeCluster,
    cluster: Cluster,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    status: int,
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(Cluster, "_pause", lambda self, seconds: pauses.append(seconds))
    fake.refuse(status, times=2, retry_after_s=7)
    fake.refuse(status, times=1, body="<html>busy</html>")
    assert cluster.list(PODS) == []
    assert pauses == [7, 7, 4]
    told = capsys.readouterr().err
    assert told == f"fake ({fake.url}) is busy ({status}): trying again, first in 7 s\n"


@pytest.mark.parametrize("status", [500, 502, 504])
def test_a_server_that_has_failed_is_asked_again_where_that_changes_nothing(
    fake: FakeCluster,
    cluster: Cluster,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    status: int,
) -> None:
    monkeypatch.setattr(Cluster, "_pause", lambda self, seconds: None)
    fake.refuse(status, times=2, body="etcdserver: leader changed")
    assert cluster.list(PODS) == []
    assert capsys.readouterr().err == f"fake ({fake.url}) has failed ({status}): trying again, first in 1 s\n"
    fake.refuse(status, body="etcdserver: leader changed")
    with pytest.raises(LaunchError):
        cluster.create(JOBS, job())


def test_a_namespace_may_be_looked_at_by_a_role_in_it(fake: FakeCluster, cluster: Cluster) -> None:
    assert cluster.may("get", NAMESPACES)
    fake.forbid("get", "namespaces", "team")  # as asked for that namespace, and not for all
    assert not cluster.may("get", NAMESPACES)


def test_a_server_that_stays_busy_is_told_after_a_while(
    fake: FakeCluster, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "PATIENCE_S", 0.0)
    fake.refuse(429, times=9, retry_after_s=100_000)
    with refused("the API server is too busy (429: the server is told to refuse this), also after waiting"):
        cluster.list(PODS)
    fake.refuse(503, times=1, body="no healthy upstream")
    with refused("the API server is too busy"):
        cluster.list(PODS)


@pytest.mark.parametrize("status", [200, 302, 400, 403, 404, 500])
def test_an_answer_that_is_no_json_is_told_with_how_it_begins(
    fake: FakeCluster, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(client, "PATIENCE_S", 0.0)
    fake.refuse(status, body="<html>\n <title>Sign in</title> " + "x" * 5000)
    with refused(
        f"what answered there is no Kubernetes API server ({status}, text/html, '<html> <title>Sign in",
        "look whether a proxy or a login page is in between",
    ):
        cluster.list(PODS)


def test_an_error_of_the_server_is_told_with_its_words(fake: FakeCluster, cluster: Cluster) -> None:
    fake.refuse(500)
    with refused("the API server answered 500 (the server is told to refuse this); try again later."):
        cluster.delete(JOBS, "glyphs")


# Objects.


def test_objects_are_made_read_and_deleted(fake: FakeCluster, cluster: Cluster) -> None:
    made = cluster.create(JOBS, job())
    assert made["metadata"]["namespace"] == "team"
    assert fake.requests[-1][2] == {"fieldValidation": "Strict"}
    cluster.patch(JOBS, "glyphs", {"metadata": {"labels": {"more": "yes"}}})
    assert fake.requests[-1][2] == {"fieldValidation": "Strict"}
    assert cluster.get(JOBS, "glyphs") == fake.get(JOBS, "glyphs")
    assert [pod["kind"] for pod in cluster.list(PODS, labels=LABELS)] == ["Pod", "Pod"]
    assert cluster.list(PODS, labels={"metaloom/job": "another"}) == []
    assert len(cluster.list(PODS, fields="status.phase=Pending")) == 2
    assert cluster.delete(JOBS, "glyphs") is True
    assert cluster.delete(JOBS, "glyphs") is False
    assert cluster.get(JOBS, "glyphs") is None
    assert fake.objects(PODS) == []


def test_a_dry_run_is_checked_and_makes_nothing(fake: FakeCluster, cluster: Cluster) -> None:
    cluster.create(JOBS, job(), dry_run=True)
    assert fake.objects(JOBS) == []
    with pytest.raises(RefusedError, match="finds it invalid"):
        cluster.create(JOBS, job("Glyphs"), dry_run=True)


def test_kinds_are_discovered_and_permissions_asked_for(fake: FakeCluster, cluster: Cluster) -> None:
    assert cluster.serves(JOBS)
    assert cluster.serves(PODS)
    assert not cluster.serves(JOB_SETS)
    fake.forbid("get", "pods/log", "team")
    assert cluster.may("create", JOBS)
    assert cluster.may("get", PODS)
    assert not cluster.may("get", PODS, subresource="log")


def test_only_an_api_server_can_say_that_it_has_no_such_kind(fake: FakeCluster, cluster: Cluster) -> None:
    for look in (cluster.serves, cluster.as_served):
        fake.refuse(404, body="<html>Not here</html>")
        with refused("what answered there is no Kubernetes API server (404, text/html, '<html>Not here"):
            look(JOB_SETS)
    fake.refuse(404)
    assert not cluster.serves(JOB_SETS)
    assert cluster.as_served(JOB_SETS) is None
    # That answer was kept; the proxy's were not.
    fake.kinds = (*fake.kinds, JOB_SETS)
    assert not cluster.serves(JOB_SETS)


def test_a_list_is_read_page_by_page_and_anew_when_its_pages_expire(
    fake: FakeCluster, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "PAGE_SIZE", 2)
    names = [f"map-{i}" for i in range(5)]
    for name in names:
        fake.add(CONFIG_MAPS, config_map(name))
    fake.requests.clear()
    assert [obj["metadata"]["name"] for obj in cluster.list(CONFIG_MAPS)] == names
    assert len(fake.requests) == 3
    fake.expire_pages_after(1)
    assert [obj["metadata"]["name"] for obj in cluster.list(CONFIG_MAPS)] == names


# Watches.


def told(event: tuple[str, dict[str, Any]]) -> tuple[str, str]:
    return event[0], event[1]["metadata"]["name"]


def watches(fake: FakeCluster) -> list[dict[str, str]]:
    return [query for _, _, query in list(fake.requests) if "watch" in query]


def test_a_watch_begins_with_what_is_there_and_tells_what_becomes_of_it(
    fake: FakeCluster, cluster: Cluster
) -> None:
    fake.add(CONFIG_MAPS, config_map("a", color="red"))
    fake.add(CONFIG_MAPS, config_map("b", color="blue"))
    with contextlib.closing(cluster.watch(CONFIG_MAPS, labels={"color": "red"})) as events:
        assert told(next(events)) == ("ADDED", "a")
        fake.add(CONFIG_MAPS, config_map("c", color="red"))
        assert told(next(events)) == ("ADDED", "c")
        fake.edit(CONFIG_MAPS, "c", lambda obj: obj["data"].update(key="new"))
        assert told(next(events)) == ("MODIFIED", "c")
        fake.edit(CONFIG_MAPS, "c", lambda obj: obj["metadata"]["labels"].update(color="blue"))
        assert told(next(events)) == ("DELETED", "c")
        fake.delete(CONFIG_MAPS, "a")
        # A deletion is two changes: it is marked first.
        assert [told(next(events)) for _ in range(2)] == [("MODIFIED", "a"), ("DELETED", "a")]


def test_a_watch_goes_on_after_its_connection_breaks(fake: FakeCluster, cluster: Cluster) -> None:
    with contextlib.closing(cluster.watch(CONFIG_MAPS)) as events:
        for i in range(4):
            fake.add(CONFIG_MAPS, config_map(f"map-{i}"))
            assert told(next(events)) == ("ADDED", f"map-{i}")
            fake.close_streams()
    assert len(watches(fake)) == 3


@pytest.mark.parametrize("as_status", [False, True])
def test_a_watch_whose_version_is_forgotten_tells_only_what_changed(
    fake: FakeCluster, cluster: Cluster, as_status: bool
) -> None:
    fake.gone_as_status = as_status
    for name in ("kept", "edited", "deleted", "replaced"):
        fake.add(CONFIG_MAPS, config_map(name))
    with contextlib.closing(cluster.watch(CONFIG_MAPS)) as events:
        assert len([next(events) for _ in range(4)]) == 4
        fake.edit(CONFIG_MAPS, "edited", lambda obj: obj["data"].update(key="new"))
        fake.delete(CONFIG_MAPS, "deleted")
        fake.delete(CONFIG_MAPS, "replaced")
        fake.add(CONFIG_MAPS, config_map("replaced"))
        fake.expire_versions()
        found = [told(next(events)) for _ in range(4)]
        assert set(found[:2]) == {("DELETED", "deleted"), ("DELETED", "replaced")}
        assert set(found[2:]) == {("MODIFIED", "edited"), ("ADDED", "replaced")}
        fake.add(CONFIG_MAPS, config_map("last"))
        assert told(next(events)) == ("ADDED", "last")


def test_a_watch_goes_on_from_the_bookmark_that_the_servers_timeout_ends_with(
    fake: FakeCluster, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "WATCH_S", 1)
    fake.add(CONFIG_MAPS, config_map("a"))
    with contextlib.closing(cluster.watch(CONFIG_MAPS)) as events:
        assert told(next(events)) == ("ADDED", "a")
        waiting = threading.Timer(0.0, lambda: fake.wait(lambda: len(watches(fake)) > 1))
        first = fake.store.version
        fake.add(PODS, {"metadata": {"name": "not-watched"}, "spec": {"containers": []}})
        waiting.start()

        def add_later() -> None:
            waiting.join()
            fake.add(CONFIG_MAPS, config_map("b"))

        adding = threading.Thread(target=add_later)
        adding.start()
        assert told(next(events)) == ("ADDED", "b")
        adding.join()
    assert watches(fake)[0]["resourceVersion"] == str(first)
    assert int(watches(fake)[1]["resourceVersion"]) > first


def test_a_watch_is_opened_again_where_the_server_is_busy(
    fake: FakeCluster, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(cluster.watch(CONFIG_MAPS)) as events:
        fake.add(CONFIG_MAPS, config_map("a"))
        assert told(next(events)) == ("ADDED", "a")
        fake.refuse(429, times=2, retry_after_s=0)
        fake.close_streams()
        fake.add(CONFIG_MAPS, config_map("b"))
        assert told(next(events)) == ("ADDED", "b")


def test_a_watch_outlasts_an_outage_longer_than_a_few_tries(
    fake: FakeCluster, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.closing(cluster.watch(CONFIG_MAPS)) as events:
        fake.add(CONFIG_MAPS, config_map("a"))
        assert told(next(events)) == ("ADDED", "a")
        fake.reset(times=20)
        fake.close_streams()
        fake.add(CONFIG_MAPS, config_map("b"))
        assert told(next(events)) == ("ADDED", "b")
    shown = capsys.readouterr().err
    assert re.fullmatch(r"fake \(\S+\) cannot be reached \(Connection reset by peer\): trying again\n", shown)


def test_a_patient_cluster_waits_for_a_server_that_is_away_until_it_is_closed(
    fake: FakeCluster, cluster: Cluster
) -> None:
    fake.reset(times=20)
    assert cluster.patient().list(PODS) == []
    fake.reset(times=10_000)
    patient = cluster.patient()
    closing = threading.Timer(0.3, patient.close)
    closing.start()
    with refused("there is no connection to the server (Connection reset by peer)"):
        patient.list(PODS)
    closing.join()


def test_a_watch_ends_at_its_time(cluster: Cluster) -> None:
    assert list(cluster.watch(CONFIG_MAPS, timeout_s=0.2)) == []


def test_a_watch_that_becomes_forbidden_is_told(fake: FakeCluster, cluster: Cluster) -> None:
    events = cluster.watch(CONFIG_MAPS)
    fake.add(CONFIG_MAPS, config_map("a"))
    next(events)
    fake.forbid("watch", "configmaps")
    fake.close_streams()
    with refused("user 'dev' may not watch configmaps in namespace 'team'"):
        next(events)


def test_a_watch_that_is_answered_by_something_else_is_told(fake: FakeCluster, cluster: Cluster) -> None:
    events = cluster.watch(CONFIG_MAPS)
    fake.add(CONFIG_MAPS, config_map("a"))
    next(events)
    fake.refuse(200, body="<html>Sign in</html>")
    fake.close_streams()
    with refused("what answered there is no Kubernetes API server", "<html>Sign in</html>"):
        next(events)


def test_a_watch_is_closed_under_the_thread_that_waits_for_it(fake: FakeCluster, cluster: Cluster) -> None:
    events = cluster.watch(CONFIG_MAPS)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(events))
    thread.start()
    fake.wait(lambda: watches(fake))
    events.close()
    thread.join(10)
    assert not thread.is_alive()
    assert found == []


# Logs.


@pytest.fixture
def running(fake: FakeCluster, cluster: Cluster) -> str:
    """A pod that runs."""
    cluster.create(JOBS, job(nodes=1))
    fake.pods("glyphs").run()
    return fake.pods("glyphs").name(0)


def test_a_log_comes_line_by_line_however_it_is_cut_into_chunks(
    fake: FakeCluster, cluster: Cluster, running: str
) -> None:
    pods = fake.pods("glyphs")
    fake.log_chunk_bytes = 1
    pods.log(0, "één", "", "50 %\r", "x" * 1000)
    assert list(cluster.log(running, container="metaloom")) == ["één", "", "50 %", "x" * 1000]
    assert list(cluster.log(running, container="metaloom", tail=1)) == ["x" * 1000]


def test_a_log_is_followed_until_the_container_ends(
    fake: FakeCluster, cluster: Cluster, running: str
) -> None:
    pods = fake.pods("glyphs")
    lines = cluster.log(running, container="metaloom", follow=True)
    for text in ("a", "b"):
        pods.log(0, text)
        assert next(lines) == text
    pods.succeed()
    assert list(lines) == []


def test_a_log_that_breaks_off_is_no_log_that_ends(fake: FakeCluster, cluster: Cluster, running: str) -> None:
    lines = cluster.log(running, container="metaloom", follow=True)
    fake.pods("glyphs").log(0, "a")
    assert next(lines) == "a"
    fake.close_streams()
    with refused(f"the log of pod '{running}' on fake ({fake.url}) broke off: "):
        next(lines)


def test_a_log_has_times_and_that_of_the_container_before(fake: FakeCluster, cluster: Cluster) -> None:
    cluster.create(JOBS, job(nodes=1, restart="OnFailure"))
    pods = fake.pods("glyphs")
    pods.run()
    pods.log(0, "before", at_ns=1_800_000_000_000_000_001)
    pods.fail(0)
    pods.log(0, "after", at_ns=1_800_000_100_000_000_000)
    name = pods.name(0)
    assert list(cluster.log(name, container="metaloom", previous=True)) == ["before"]
    stamped = ["2027-01-15T08:01:40.000000000Z after"]
    assert list(cluster.log(name, container="metaloom", timestamps=True)) == stamped
    later = cluster.log(name, container="metaloom", since_time="2027-01-15T08:01:41Z")
    assert list(later) == []


def test_a_container_that_has_not_started_has_no_log(fake: FakeCluster, cluster: Cluster) -> None:
    cluster.create(JOBS, job(nodes=1))
    with pytest.raises(RefusedError, match="is waiting to start: ContainerCreating") as caught:
        cluster.log(fake.pods("glyphs").name(0), container="metaloom")
    assert caught.value.status == 400
    with pytest.raises(RefusedError, match=r"there is no pods 'gone' in namespace 'team' on fake") as caught:
        cluster.log("gone", container="metaloom")
    assert caught.value.status == 404
