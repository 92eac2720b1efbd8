"""The process that writes an export: `python -m metaloom.export REQUEST`, started by `metaloom export`."""

import sys

from metaloom.processes import code_of


def main() -> int:
    """Does what the arguments ask for; returns the exit code."""
    # Imported here, as torch takes its time, and an interrupt meanwhile is no fault.
    from metaloom.export.command import main as write

    return write(sys.argv[1])


if __name__ == "__main__":
    sys.exit(code_of(main))
