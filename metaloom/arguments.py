"""How the commands of the command line are declared."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_command(commands: Commands, name: str, purpose: str, examples: str) -> argparse.ArgumentParser:
    """The parser of a new command, whose help ends with examples."""
    return commands.add_parser(
        name,
        help=purpose,
        description=purpose[0].upper() + purpose[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Adds the changes to a recipe that follow its name."""
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the recipe, such as outer.num_steps=50"
    )
