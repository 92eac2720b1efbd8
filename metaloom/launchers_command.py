"""`metaloom launchers`, without torch and without asking any cluster."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

from metaloom.arguments import add_command

if TYPE_CHECKING:
    from metaloom.arguments import Commands

EXAMPLES = """\
examples:
  metaloom launchers
  metaloom launchers --json

One of them is named by `metaloom submit --launcher NAME`.
"""


def add_launchers_command(commands: Commands) -> None:
    """Adds the command to those of a parser."""
    command = add_command(
        commands, "launchers", "list the ways to start a job, and what each needs", EXAMPLES
    )
    command.add_argument("--json", action="store_true", help="print JSON in place of a table")
    command.set_defaults(run_command=_launchers)


def _launchers(arguments: argparse.Namespace) -> int:
    from metaloom.launchers.table import LAUNCHERS, launcher_class

    found = {name: launcher_class(name) for name in LAUNCHERS}
    needs = {name: launcher.needs() for name, launcher in found.items()}
    if arguments.json:
        rows = [
            {
                "name": name,
                "summary": launcher.summary,
                "needs": [dataclasses.asdict(need) for need in needs[name]],
            }
            for name, launcher in found.items()
        ]
        print(json.dumps(rows, indent=2))
        return 0
    from metaloom.tracking.console import format_table

    cells = [
        (
            name if index == 0 else "",
            launcher.summary if index == 0 else "",
            need.what,
            "yes" if need.is_there else f"no: {need.advice}",
        )
        for name, launcher in found.items()
        for index, need in enumerate(needs[name])
    ]
    print(format_table("launchers", ("launcher", "where a job runs", "needs", "there"), cells))
    return 0
