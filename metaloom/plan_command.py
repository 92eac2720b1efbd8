"""`metaloom plan`: what a recipe takes on 1 to 1024 ranks."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from metaloom.arguments import add_command, add_overrides
from metaloom.errors import LaunchError
from metaloom.planning.hardware import DEVICES, HERE, LINKS
from metaloom.planning.request import DEFAULT_RANKS, Request, check_comparison, checked, ranks_in
from metaloom.starting import write_recipe

if TYPE_CHECKING:
    from metaloom.arguments import Commands

EXAMPLES = """\
examples:
  metaloom plan recipes/stdlib-lora.yaml                          on H100s, 1 to 1024 of them
  metaloom plan recipes/stdlib-lora.yaml --ranks 16 --hardware a100-80 --link hdr
  metaloom plan recipes/glyphs-maml.yaml --hardware here --ranks 1-8
  metaloom plan recipes/stdlib-lora.yaml outer.micro_batch=1 --json > plan.json

An outer step of the recipe is run on tensors without data, and what it would hold, compute and send is
counted; nothing is trained, and no data set is needed. What an estimate rests on: docs/scaling.md.
"""


def add_plan_command(commands: Commands) -> None:
    """Adds the command to those of a parser."""
    plan = add_command(
        commands,
        "plan",
        "say what a recipe takes on 1 to 1024 ranks: memory, communication, time",
        EXAMPLES,
    )
    plan.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    add_overrides(plan)
    plan.add_argument(
        "--ranks",
        default=DEFAULT_RANKS,
        metavar="N",
        help=f"numbers of ranks: 8, or 1,8,64, or 1-64 for powers of two (default: {DEFAULT_RANKS})",
    )
    plan.add_argument(
        "--hardware",
        default="h100",
        metavar="NAME",
        help=f"{', '.join(DEVICES)}, or {HERE} for this machine, measured (default: h100)",
    )
    plan.add_argument(
        "--link", default="ndr", metavar="NAME", help=f"between nodes: {', '.join(LINKS)} (default: ndr)"
    )
    plan.add_argument(
        "--gpus-per-node",
        type=int,
        metavar="N",
        help=f"ranks of one node (default: 8; with --hardware {HERE} launcher.num_processes)",
    )
    plan.add_argument(
        "--compare", action="store_true", help="the same with weights in shards, also where they fit whole"
    )
    plan.add_argument("--json", action="store_true", help="print JSON in place of tables")
    plan.set_defaults(run_command=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    from metaloom.recipe import load_recipe

    request = checked(
        Request(
            hardware=arguments.hardware,
            link=arguments.link,
            ranks=ranks_in(arguments.ranks),
            devices_per_node=arguments.gpus_per_node,
            compare=arguments.compare,
            as_json=arguments.json,
        )
    )
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    check_comparison(request, recipe)
    with tempfile.TemporaryDirectory(prefix="metaloom-plan-") as folder:
        path = Path(folder) / "recipe.yaml"
        write_recipe(recipe, path)
        words = [str(path), json.dumps(dataclasses.asdict(request))]
        code = subprocess.run([sys.executable, "-m", "metaloom.planning", *words]).returncode
    if code < 0:
        raise LaunchError(f"the process that makes the plan was ended by signal {-code}; start it again.")
    return code
