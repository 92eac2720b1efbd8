"""The process that makes a plan: `python -m metaloom.planning RECIPE REQUEST`, started by `metaloom plan`."""

import os
import sys


def main() -> int:
    """Prints the plan that the arguments ask for; returns the exit code."""
    try:
        # Imported here, as torch takes its time, and an interrupt meanwhile is no fault.
        from metaloom.planning.command import main as make_and_print

        code = make_and_print()
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
