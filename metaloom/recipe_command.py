"""`metaloom recipe check | show | schema`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from metaloom.arguments import add_command, add_overrides
from metaloom.starting import check_data

if TYPE_CHECKING:
    from metaloom.arguments import Commands

EXAMPLES = """\
examples:
  metaloom recipe check recipes/glyphs-maml.yaml data.n_way=10
  metaloom recipe show recipes/glyphs-maml.yaml          every key, defaults spelled out
  metaloom recipe schema > recipe.schema.json            for editors
"""


def add_recipe_commands(commands: Commands) -> None:
    """Adds the commands to those of a parser."""
    recipe = add_command(commands, "recipe", "check, show or describe recipes", EXAMPLES)
    recipe_commands = recipe.add_subparsers(title="commands", required=True, metavar="COMMAND")
    values = add_command(
        recipe_commands,
        "check",
        "check a recipe's values and data, and start nothing (the hypergradient: metaloom check)",
        EXAMPLES,
    )
    show = add_command(recipe_commands, "show", "print a recipe with every default spelled out", EXAMPLES)
    for command, function in ((values, _check), (show, _show)):
        command.add_argument("recipe", metavar="RECIPE", help="a YAML file")
        add_overrides(command)
        command.set_defaults(run_command=function)
    schema = add_command(recipe_commands, "schema", "print the JSON schema of recipes", EXAMPLES)
    schema.set_defaults(run_command=_schema)


def _check(arguments: argparse.Namespace) -> int:
    from metaloom.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    check_data(recipe)
    print(f"{arguments.recipe}: no mistakes found")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from metaloom.recipe import dump_recipe, load_recipe

    print(dump_recipe(load_recipe(arguments.recipe, arguments.overrides)), end="")
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    from metaloom.recipe import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0
