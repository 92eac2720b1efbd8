"""What kubeconfig files say of contexts, read without the official client: its errors name no file."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from metaloom.errors import LaunchError

HINT = "set KUBECONFIG, or copy the cluster's kubeconfig to ~/.kube/config"


@dataclasses.dataclass(frozen=True)
class Context:
    """One way to a cluster.

    Attributes:
        paths: of the kubeconfig files, of which the first that says something counts.
        user: the name of the credentials, in messages.
        namespace: that the context names; else "default".
        proxy: that the cluster is to be reached through.
        has_provider: whether the user's credentials are of an `auth-provider`.
    """

    paths: tuple[Path, ...]
    name: str
    user: str
    namespace: str
    proxy: str | None
    has_provider: bool


def kubeconfig_paths(environment: Mapping[str, str]) -> tuple[Path, ...]:
    """The files of KUBECONFIG, else `~/.kube/config`; they need not be there."""
    named = environment.get("KUBECONFIG", "")
    if named:
        return tuple(Path(part).expanduser() for part in named.split(os.pathsep) if part)
    return (Path("~/.kube/config").expanduser(),)


def read_context(paths: tuple[Path, ...], name: str | None) -> Context:
    """The context of that name, else the current one.

    Raises:
        LaunchError: a file cannot be read or is no kubeconfig; there is no such context; none is current.
    """
    there = tuple(path for path in paths if path.exists())
    shown = os.pathsep.join(map(str, paths))
    if not there:
        raise LaunchError(f"there is no kubeconfig: {shown} does not exist; {HINT}.")
    configs = [_read(path) for path in there]
    contexts: dict[str, Any] = {}
    clusters: dict[str, Any] = {}
    users: dict[str, Any] = {}
    for path, config in zip(there, configs, strict=True):
        for kind, found in (("contexts", contexts), ("clusters", clusters), ("users", users)):
            for entry in _entries(config, kind, path):
                found.setdefault(entry["name"], entry.get(kind[:-1]) or {})
    if name is None:
        # The first file that names one decides, as for kubectl; releases of the client differ here.
        name = next((config["current-context"] for config in configs if config.get("current-context")), None)
    if name is None:
        raise LaunchError(
            f"{shown}: no context is current; choose one with `kubectl config use-context` or --context"
            f"{_listed(contexts)}."
        )
    if name not in contexts:
        meant = difflib.get_close_matches(name, contexts, n=1)
        hint = f"; did you mean {meant[0]!r}?" if meant else ""
        raise LaunchError(f"{shown}: there is no context {name!r}{_listed(contexts)}{hint}")
    context = contexts[name]
    cluster = clusters.get(str(context.get("cluster")))
    if not cluster or not cluster.get("server"):
        raise LaunchError(
            f"{shown}: context {name!r} is of cluster {context.get('cluster')!r}, which has no server there; "
            "write the cluster anew, with its `server`."
        )
    return Context(
        paths=there,
        name=name,
        user=str(context.get("user") or "none"),
        namespace=context.get("namespace") or "default",
        proxy=cluster.get("proxy-url"),
        has_provider="auth-provider" in users.get(str(context.get("user")), {}),
    )


def _listed(contexts: Mapping[str, Any]) -> str:
    return f" (there are: {', '.join(sorted(contexts))})" if contexts else " (there are none)"


def _read(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise LaunchError(f"kubeconfig {path} cannot be read: {reason}; {HINT}.") from None
    except yaml.YAMLError as error:
        # The problem alone: the text around it may hold a token.
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise LaunchError(f"kubeconfig {path} is no YAML{where}: mend it, or {HINT}.") from None
    if not isinstance(config, dict):
        what = "is empty" if config is None else "is no mapping"
        raise LaunchError(f"kubeconfig {path} {what}: it holds no contexts; {HINT}.")
    return config


def _entries(config: Mapping[str, Any], kind: str, path: Path) -> list[dict[str, Any]]:
    entries = config.get(kind) or []
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in entries
    ):
        raise LaunchError(f"kubeconfig {path}: {kind!r} has to be a list of entries with a `name`; {HINT}.")
    return entries
