"""The process that writes an export: `python -m metaloom.export REQUEST`, started by `metaloom export`."""

import os
import sys


def main() -> int:
    """Writes what the argument asks for; returns the exit code."""
    try:
        # Imported here, as torch takes its time, and an interrupt meanwhile is no fault.
        from metaloom.export.command import main as make

        code = make(sys.argv[1])
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of a pipe has seen enough; nothing more can be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


if __name__ == "__main__":
    sys.exit(main())
