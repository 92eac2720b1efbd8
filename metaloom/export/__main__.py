"""The process that writes an export: `python -m metaloom.export REQUEST`, started by `metaloom export`."""

import sys


def main() -> int:
    """Writes what the argument asks for; returns the exit code."""
    try:
        # Imported here, as torch takes its time, and an interrupt meanwhile is no fault.
        from metaloom.export.command import main as make

        return make(sys.argv[1])
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
