"""The process that adapts: `python -m metaloom.new_task REQUEST`, started by `metaloom adapt`."""

import sys


def main() -> int:
    """Does what the argument asks for; returns the exit code."""
    try:
        # Imported here, as torch takes its time, and an interrupt meanwhile is no fault.
        from metaloom.new_task.command import main as adapt

        return adapt(sys.argv[1])
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
