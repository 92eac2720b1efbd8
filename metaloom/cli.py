"""The command line: `metaloom train | evaluate | check | plan | submit | jobs | launchers | export | adapt |
data | checkpoints | recipe`.

Everything that can be checked is checked here, before any process is started and without importing torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from metaloom import __version__
from metaloom.adapt_command import add_adapt_command
from metaloom.check_command import add_check_command
from metaloom.checkpoints_command import add_checkpoint_commands
from metaloom.data_command import add_data_commands
from metaloom.errors import MetaloomError
from metaloom.evaluate_command import add_evaluate_command
from metaloom.export_command import add_export_command
from metaloom.jobs_command import UNKNOWN, add_jobs_commands
from metaloom.launchers_command import add_launchers_command
from metaloom.plan_command import add_plan_command
from metaloom.recipe_command import add_recipe_commands
from metaloom.submit_command import add_submit_command
from metaloom.train_command import add_train_command

EXAMPLES = """\
examples:
  metaloom data make glyphs data/glyphs        write a built-in data set as shards
  metaloom train recipes/glyphs-maml.yaml      meta-train
  metaloom evaluate runs/glyphs-maml           adapt to tasks never seen, beside baselines

exit codes: 0 done, 1 a fault of a process, 2 recipe, 3 data, 4 checkpoint, 5 launch or run folder,
6 tracking store, 75 stopped from outside and saved (start it again to go on), 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    try:
        return int(arguments.run_command(arguments))
    except MetaloomError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe has seen enough; nothing more can be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments; key=value may stand anywhere, also behind options, where argparse alone refuses it."""
    parser = _parser(words)
    try:
        arguments, rest = parser.parse_known_args(words)
        unknown = [word for word in rest if word.startswith("-") or "=" not in word]
        if unknown or (rest and "overrides" not in arguments):
            parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    except SystemExit as ended:
        # argparse ends with 2, which is the end of a run as well.
        if ended.code and list(words[:2]) == ["jobs", "wait"]:
            raise SystemExit(UNKNOWN) from None
        raise
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of a command's words; others have no part of it that takes long to make."""
    parser = argparse.ArgumentParser(
        prog="metaloom",
        description="Meta-training with exact hypergradients.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"metaloom {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    add_train_command(commands)
    add_evaluate_command(commands)
    add_check_command(commands)
    add_plan_command(commands)
    add_submit_command(commands, is_given=list(words[:1]) == ["submit"])
    add_jobs_commands(commands)
    add_launchers_command(commands)
    add_export_command(commands)
    add_adapt_command(commands)
    add_data_commands(commands)
    add_checkpoint_commands(commands)
    add_recipe_commands(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
