"""The process that adapts: `python -m metaloom.new_task REQUEST`, started by `metaloom adapt`."""

import sys

from metaloom.processes import code_of


def main() -> int:
    """Does what the arguments ask for; returns the exit code."""
    # Imported here, as torch takes its time, and an interrupt meanwhile is no fault.
    from metaloom.new_task.command import main as adapt

    return adapt(sys.argv[1])


if __name__ == "__main__":
    sys.exit(code_of(main))
