"""A way to an API server: its address, credentials and connections, as the official client has them.

That client's classes for objects are not used (nor loaded: they alone take more than a second).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metaloom.errors import LaunchError
from metaloom.k8s.kubeconfig import Context

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

# What the official client imports for users with an `auth-provider` (gcp, oidc) alone: half its time.
PROVIDERS = (
    "google",
    "google.auth",
    "google.auth.transport",
    "google.auth.transport.requests",
    "oauthlib",
    "oauthlib.oauth2",
    "requests_oauthlib",
)


@functools.cache
def _official(*, has_provider: bool) -> types.SimpleNamespace:
    """The parts of the official client that are used: for loading credentials, and making connections.

    Its `__init__` modules import a class for each kind of objects and each operation, 1-2 s. So its packages
    are entered without them, and left as they were: who imports `kubernetes` elsewhere gets all of it.

    Args:
        has_provider: whether the credentials are of an `auth-provider`.

    Raises:
        LaunchError: it is not installed.
    """
    spec = importlib.util.find_spec("kubernetes")
    if spec is None or spec.origin is None:
        raise LaunchError("the package kubernetes is not installed: pip install 'metaloom[kubernetes]'.")
    root = Path(spec.origin).parent
    replaced = () if has_provider else PROVIDERS

    def is_ours(name: str) -> bool:
        return name.partition(".")[0] == "kubernetes" or name in replaced

    before = {name: module for name, module in sys.modules.items() if is_ours(name)}
    for name in before:
        del sys.modules[name]
    try:
        for name in ("kubernetes", "kubernetes.client", "kubernetes.client.models", *replaced):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["kubernetes"].__path__ = [str(root)]
        client: Any = sys.modules["kubernetes.client"]
        client.__path__ = [str(root / "client")]
        if not has_provider:
            vars(sys.modules["requests_oauthlib"])["OAuth2Session"] = None
        client.Configuration = importlib.import_module("kubernetes.client.configuration").Configuration
        client.ApiClient = importlib.import_module("kubernetes.client.api_client").ApiClient
        return types.SimpleNamespace(
            config=importlib.import_module("kubernetes.config"),
            incluster=importlib.import_module("kubernetes.config.incluster_config"),
            Configuration=client.Configuration,
            RESTClientObject=importlib.import_module("kubernetes.client.rest").RESTClientObject,
        )
    finally:
        for name in [name for name in sys.modules if is_ours(name)]:
            del sys.modules[name]
        sys.modules.update(before)


class Access:
    """A way to a server: address, credentials and connections.

    Args:
        context: of a kubeconfig; None for the service account of the pod that this runs in.
    """

    def __init__(self, context: Context | None) -> None:
        self._official = _official(has_provider=context is not None and context.has_provider)
        self._context = context
        self._renewing = threading.Lock()
        self._configuration: Any = None
        self.pool: Any = None
        self.load()

    @property
    def server(self) -> str:
        return str(self._configuration.host)

    @property
    def user(self) -> str:
        return self._context.user if self._context else "service account of this pod"

    def load(self) -> None:
        """Reads the credentials, anew if they were read before.

        Raises:
            LaunchError: they cannot be read.
        """
        configuration = self._official.Configuration()
        # Each followed log keeps a connection.
        configuration.connection_pool_maxsize = 1024
        if self._context is None:
            self._load_service_account(configuration)
        else:
            self._load_kubeconfig(configuration, self._context)
        where = self._context.name if self._context else "service account"
        try:
            pool = self._official.RESTClientObject(configuration).pool_manager
        except (OSError, ValueError) as error:
            raise LaunchError(
                f"context {where!r}: no connection can be made with its certificates: {error}."
            ) from None
        if self.pool is not None:
            self.pool.clear()
        self._configuration, self.pool = configuration, pool

    def headers(self) -> dict[str, str]:
        """What authorizes a request; credentials that expire are renewed.

        Raises:
            LaunchError: they cannot be renewed.
        """
        with self._renewing, self._told():
            settings = self._configuration.auth_settings()
        return {auth["key"]: auth["value"] for auth in settings.values() if auth["value"]}

    def _load_kubeconfig(self, configuration: Any, context: Context) -> None:
        with self._told():
            self._official.config.load_kube_config(
                config_file=os.pathsep.join(map(str, context.paths)),
                context=context.name,
                client_configuration=configuration,
            )
        if context.proxy:
            configuration.proxy = context.proxy

    def _load_service_account(self, configuration: Any) -> None:
        with self._told():
            self._official.incluster.InClusterConfigLoader(
                token_filename=str(SERVICE_ACCOUNT / "token"), cert_filename=str(SERVICE_ACCOUNT / "ca.crt")
            ).load_and_set(configuration)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """What goes wrong with credentials in this context is one error; the client only logs some of it."""
        name = f"context {self._context.name!r}" if self._context else "the service account of this pod"
        where = f" of {os.pathsep.join(map(str, self._context.paths))}" if self._context else ""
        logged = _Logged()
        root = logging.getLogger()
        root.addHandler(logged)
        try:
            yield
        except LaunchError:
            raise
        except Exception as error:  # whatever it is, no request can be made
            logged.messages.append(str(error) or type(error).__name__)
        finally:
            root.removeHandler(logged)
        if logged.messages:
            raise LaunchError(
                f"{name}{where}: its credentials cannot be loaded: {'; '.join(logged.messages)}; log in to "
                "the cluster again, or mend the entry."
            )


def namespace_of_pod() -> str:
    """The namespace of the pod that this runs in."""
    own = SERVICE_ACCOUNT / "namespace"
    return own.read_text().strip() if own.exists() else "default"


class _Logged(logging.Handler):
    """Keeps errors that the official client logs where it should raise them."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "root" and record.thread == threading.get_ident():
            self.messages.append(" ".join(record.getMessage().split()))
