"""Processes that end when the one that started them does."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
END_NOW = signal.SIGUSR2  # by which an agent ends ranks that have lost a partner; nobody else sends it


def watch_parent(number: signal.Signals) -> None:
    """Sends this process a signal when the one that started it is gone, killed for instance."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()


def end_with_parent(parent: int) -> None:
    """Has this process killed as soon as the one that started it is gone.

    Linux sees to it, at once, also where this process is stopped or busy; elsewhere `watch_parent` does. For
    Linux the parent is the *thread* that started this process, which has to stay as long as the process.

    Args:
        parent: the parent's process id, as the parent knows it: it may be gone already.

    Raises:
        OSError: Linux refuses the call.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"prctl(PR_SET_PDEATHSIG): {os.strerror(number)}")
    else:
        watch_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def code_of(main: Callable[[], int]) -> int:
    """The exit code of a process that does `main`: 130 for Ctrl-C; 0 where the reader of a pipe has seen
    enough."""
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Nothing more can be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code
