"""`metaloom submit`: a recipe as a job, on Kubernetes or by another launcher; without torch."""

from __future__ import annotations

import argparse
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from metaloom.arguments import add_command, add_overrides
from metaloom.errors import LaunchError

if TYPE_CHECKING:
    from metaloom.arguments import Commands
    from metaloom.launchers.base import Submission

EXAMPLES = """\
examples:
  metaloom submit recipe.yaml --nodes 4 --gpus-per-node 8 --image repository/metaloom:1 \\
      data.url=s3://bucket/data checkpoint.url=s3://bucket/runs/one --env-from-secret s3-credentials
  metaloom submit recipe.yaml --image repository/metaloom:1 --volume shared-claim:/runs --dry-run
  metaloom submit recipe.yaml ... --name one --resume          go on with a run whose job has ended
  metaloom submit recipe.yaml --launcher slurm --nodes 4 --gpus-per-node 8 --time-limit 12h --run /shared/one

A job goes on by itself after preemptions and lost nodes, from its last checkpoint, in the same tracked run.
Which launchers there are, and what they need: metaloom launchers. What becomes of a job on Kubernetes:
metaloom jobs.
"""
SUFFIX_LETTERS = "bcdfghjklmnpqrstvwxz2456789"  # as Kubernetes has them: no words come of them
SUFFIX_LENGTH = 5


def add_submit_command(commands: Commands, *, is_given: bool) -> None:
    """Adds the command to those of a parser.

    Args:
        is_given: whether it is the one to be parsed: else it has no options of launchers, which are imported
            for them.
    """
    from metaloom.launchers.table import LAUNCHERS, add_launcher_options

    submit = add_command(commands, "submit", "start a recipe as a job on a cluster", EXAMPLES)
    submit.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    add_overrides(submit)
    submit.add_argument(
        "--launcher",
        default="kubernetes",
        metavar="NAME",
        help=f"{', '.join(LAUNCHERS)} (default: kubernetes)",
    )
    submit.add_argument("--dry-run", action="store_true", help="print what would be sent, and send nothing")
    submit.add_argument(
        "--name", metavar="NAME", help="of the job (default: the recipe's, with letters that make it unique)"
    )
    submit.add_argument("--run", metavar="DIR", help="the run's folder, as the job's nodes see it")
    submit.add_argument("--nodes", type=int, metavar="N", help="(default: 1)")
    submit.add_argument("--gpus-per-node", type=int, metavar="N", help="(default: none)")
    submit.add_argument(
        "--ranks-per-node",
        type=int,
        metavar="N",
        help="processes (default: one for each GPU, or launcher.num_processes without)",
    )
    submit.add_argument("--cpus-per-node", type=int, metavar="N", help="processors")
    submit.add_argument("--memory-per-node", metavar="SIZE", help="such as 64Gi")
    submit.add_argument("--time-limit", metavar="TIME", help="such as 90m, 12h or 2d")
    submit.add_argument("--queue", metavar="NAME", help="a queue or partition in which the job waits")
    submit.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="a variable for all ranks, as it is here where it has no value; a secret never with one; may be "
        "given again",
    )
    submit.add_argument("--resume", action="store_true", help="go on with the run of that name or folder")
    submit.add_argument(
        "--insist",
        action="store_true",
        help="with --resume: go on also with changes that make it another run, as metaloom train --insist",
    )
    added = add_launcher_options(submit) if is_given else {}
    submit.set_defaults(run_command=lambda arguments: _submit(arguments, added))


def _submit(arguments: argparse.Namespace, added: dict[str, Sequence[argparse.Action]]) -> int:
    from metaloom.launchers.table import chosen_launcher

    launcher = chosen_launcher(arguments.launcher, arguments, added)
    submission = _submission(arguments)
    if arguments.dry_run:
        print(launcher.plan(submission), end="")
        return 0
    submitted = launcher.submit(submission)
    for line in submitted.lines:
        print(line)
    return submitted.exit_code


def _submission(arguments: argparse.Namespace) -> Submission:
    from metaloom.launchers.base import Submission, parse_environment, parse_time_limit
    from metaloom.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    known_by = arguments.name if arguments.launcher == "kubernetes" else arguments.run
    if arguments.resume and known_by is None:
        option = "--name" if arguments.launcher == "kubernetes" else "--run"
        raise LaunchError(f"--resume: say by {option} which run goes on.")
    if arguments.insist and not arguments.resume:
        raise LaunchError("--insist is for a run that goes on: give --resume too.")
    limit = arguments.time_limit
    return Submission(
        recipe=recipe,
        source=arguments.recipe,
        overrides=tuple(arguments.overrides),
        name=arguments.name or _new_name(recipe.name),
        folder=str(Path.cwd()),
        run=arguments.run,
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        ranks_per_node=arguments.ranks_per_node,
        cpus_per_node=arguments.cpus_per_node,
        memory_per_node=arguments.memory_per_node,
        time_limit_s=None if limit is None else parse_time_limit(limit),
        queue=arguments.queue,
        environment=parse_environment(arguments.env, os.environ),
        is_resumed=arguments.resume,
        is_insisted=arguments.insist,
    )


def _new_name(recipe_name: str) -> str:
    """The recipe's name as one of Kubernetes' objects, which no other job has."""
    plain = re.sub(r"[^a-z0-9]+", "-", recipe_name.lower()).strip("-")[:40].strip("-") or "run"
    if not plain[0].isalpha():
        plain = f"run-{plain}"
    return f"{plain}-{''.join(secrets.choice(SUFFIX_LETTERS) for _ in range(SUFFIX_LENGTH))}"
