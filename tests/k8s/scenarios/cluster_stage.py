"""Scenarios on a cluster whose pods are real: which one and with what, options of pytest say."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from metaloom.k8s.client import Cluster
from metaloom.k8s.kubeconfig import kubeconfig_paths
from tests.k8s.fake_api import FakeCluster
from tests.k8s.fake_jobs import Pods

CLAIM_AT = "/checkpoints"
NOBODY = "metaloom-scenario-nobody"


@dataclasses.dataclass(frozen=True)
class Given:
    """What the options say of a cluster; None where one is not given.

    Attributes:
        image: with metaloom in it, torch for CPUs will do.
        url, claim: where the pods keep checkpoints, one of the two.
        submit: further options of every `metaloom submit`.
    """

    image: str | None
    namespace: str | None = None
    context: str | None = None
    url: str | None = None
    claim: str | None = None
    submit: str = ""

    @classmethod
    def by(cls, config: pytest.Config) -> Given:
        return cls(
            image=config.getoption("--k8s-image"),
            namespace=config.getoption("--k8s-namespace"),
            context=config.getoption("--k8s-context"),
            url=config.getoption("--k8s-checkpoints"),
            claim=config.getoption("--k8s-claim"),
            submit=config.getoption("--k8s-submit"),
        )

    def lack(self, environment: Mapping[str, str]) -> str:
        """What is missing for scenarios on a cluster; "" if nothing is."""
        lacks = []
        if self.image is None:
            lacks.append("an image with metaloom (--k8s-image IMG)")
        if (self.url is None) == (self.claim is None):
            lacks.append(
                "a place for checkpoints that two pods may write to at once (either --k8s-checkpoints URL or "
                "--k8s-claim CLAIM)"
            )
        is_inside = "KUBERNETES_SERVICE_HOST" in environment
        if not is_inside and not any(path.exists() for path in kubeconfig_paths(environment)):
            lacks.append("a kubeconfig (KUBECONFIG)")
        return f"scenarios on a cluster take {', and '.join(lacks)}" if lacks else ""


class ClusterStage:
    """A `Stage` with real pods."""

    pause_s = 0.3

    def __init__(self, given: Given, folder: Path) -> None:
        self._given = given
        self._folder = folder
        self._job = ""

    @property
    def options(self) -> tuple[str, ...]:
        given = self._given
        claim = () if given.claim is None else ("--volume", f"{given.claim}:{CLAIM_AT}")
        return ("--image", str(given.image), *claim, *shlex.split(given.submit))

    @property
    def where(self) -> tuple[str, ...]:
        pairs = (("--namespace", self._given.namespace), ("--context", self._given.context))
        return tuple(word for option, value in pairs if value is not None for word in (option, value))

    @property
    def missing_image(self) -> str:
        repository = str(self._given.image).partition("@")[0]
        folder, slash, name = repository.rpartition("/")
        return f"{folder}{slash}{name.partition(':')[0]}:there-is-none"

    def checkpoints(self, name: str) -> str:
        return f"{(self._given.url or CLAIM_AT).rstrip('/')}/{name}"

    def play(self, act: Callable[[FakeCluster, Pods], object]) -> None:
        """Nothing: the pods do it themselves."""

    def submitted(self, name: str) -> None:
        self._job = name

    def evict(self, node: int) -> None:
        with self._core() as (client, core):
            namespace = self._namespace()
            labels = f"metaloom/job={self._job},batch.kubernetes.io/job-completion-index={node}"
            found = core.list_namespaced_pod(namespace, label_selector=labels).items
            (name,) = [pod.metadata.name for pod in found if pod.status.phase == "Running"]
            metadata = client.V1ObjectMeta(name=name, namespace=namespace)
            core.create_namespaced_pod_eviction(name, namespace, client.V1Eviction(metadata=metadata))

    @contextlib.contextmanager
    def nobody(self) -> Iterator[None]:
        """By the token of a service account that no role is bound to."""
        namespace = self._namespace()
        with self._core() as (client, core):
            account = client.V1ServiceAccount(metadata=client.V1ObjectMeta(name=NOBODY))
            request = client.AuthenticationV1TokenRequest(
                spec=client.V1TokenRequestSpec(audiences=[], expiration_seconds=600)
            )
            try:
                core.create_namespaced_service_account(namespace, account)
            except client.ApiException as error:
                if error.status != 403:
                    raise
                pytest.skip(f"you may not make a service account in namespace {namespace}")
            try:
                token = core.create_namespaced_service_account_token(NOBODY, namespace, request).status.token
                kubeconfig = self._kubeconfig(core.api_client.configuration, token, namespace)
                with mock.patch.dict(os.environ, {"KUBECONFIG": str(kubeconfig)}):
                    yield
            finally:
                core.delete_namespaced_service_account(NOBODY, namespace)

    @contextlib.contextmanager
    def _core(self) -> Iterator[tuple[Any, Any]]:
        """The official client's module, and its calls of the core API."""
        from kubernetes import client, config

        made = client.Configuration()
        if any(path.exists() for path in kubeconfig_paths(os.environ)):
            # What the client takes by itself is that of when it was imported.
            files = os.pathsep.join(map(str, kubeconfig_paths(os.environ)))
            config.load_kube_config(files, context=self._given.context, client_configuration=made)
        else:
            config.load_incluster_config(client_configuration=made)
        with client.ApiClient(made) as api:
            yield client, client.CoreV1Api(api)

    def _namespace(self) -> str:
        with contextlib.closing(self._connected()) as cluster:
            return cluster.namespace

    def _connected(self) -> Cluster:
        return Cluster.connect(context=self._given.context, namespace=self._given.namespace)

    def _kubeconfig(self, configuration: Any, token: str, namespace: str) -> Path:
        """A kubeconfig of the same server and context for a user with that token."""
        server = {"server": configuration.host, "insecure-skip-tls-verify": not configuration.verify_ssl}
        if configuration.ssl_ca_cert and configuration.verify_ssl:
            server["certificate-authority"] = configuration.ssl_ca_cert
        if configuration.tls_server_name:
            server["tls-server-name"] = configuration.tls_server_name
        context = self._given.context or "nobody"
        path = self._folder / "nobody.kubeconfig"
        path.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": context,
                    "clusters": [{"name": "cluster", "cluster": server}],
                    "users": [{"name": "nobody", "user": {"token": token}}],
                    "contexts": [
                        {
                            "name": context,
                            "context": {"cluster": "cluster", "user": "nobody", "namespace": namespace},
                        }
                    ],
                }
            )
        )
        return path
