"""Which launchers there are."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from metaloom.errors import LaunchError

if TYPE_CHECKING:
    from metaloom.launchers.base import Launcher

# Where each one is: its module, and the class in it.
LAUNCHERS = {
    "local": "metaloom.launchers.local:Local",
    "slurm": "metaloom.launchers.slurm:Slurm",
    "deepspeed": "metaloom.launchers.deepspeed:DeepSpeed",
    "kubernetes": "metaloom.launchers.kubernetes:Kubernetes",
}


def launcher_class(name: str) -> type[Launcher]:
    """The launcher of a name.

    Raises:
        LaunchError: there is none.
    """
    if name not in LAUNCHERS:
        raise LaunchError(f"--launcher: there is no {name!r}; there are {', '.join(LAUNCHERS)}.")
    module, _, attribute = LAUNCHERS[name].partition(":")
    found: type[Launcher] = getattr(importlib.import_module(module), attribute)
    return found


def add_launcher_options(parser: argparse.ArgumentParser) -> dict[str, Sequence[argparse.Action]]:
    """Adds the options of every launcher to a command, in a group each; returns them by launcher."""
    added: dict[str, Sequence[argparse.Action]] = {}
    for name in LAUNCHERS:
        chosen = launcher_class(name)
        group = parser.add_argument_group(f"with --launcher {name}")
        added[name] = chosen.add_options(group)
    return added


def chosen_launcher(
    name: str, arguments: argparse.Namespace, added: dict[str, Sequence[argparse.Action]]
) -> Launcher:
    """The launcher of a name, with its own options as they were given.

    Args:
        added: what `add_launcher_options` has returned.

    Raises:
        LaunchError: there is none, or an option of another one was given.
    """
    chosen = launcher_class(name)
    foreign = [
        f"{action.option_strings[0]} is an option of the launcher {owner}, not of {name}"
        for owner, actions in added.items()
        if owner != name
        for action in actions
        if getattr(arguments, action.dest) != action.default
    ]
    if foreign:
        raise LaunchError(f"{'; '.join(foreign)}. Leave it out, or name the launcher with --launcher.")
    return chosen.from_arguments(arguments)
