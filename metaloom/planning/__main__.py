"""The process that makes a plan: `python -m metaloom.planning RECIPE REQUEST`, started by `metaloom plan`."""

import sys

from metaloom.processes import code_of


def main() -> int:
    """Does what the arguments ask for; returns the exit code."""
    # Imported here, as torch takes its time, and an interrupt meanwhile is no fault.
    from metaloom.planning.command import main as make_and_print

    return make_and_print()


if __name__ == "__main__":
    sys.exit(code_of(main))
