"""A worker: `python -m metaloom.datasets.worker_main DESCRIPTOR PARENT`, started by `WorkerProcess` alone.

It receives where to import from, then what to call, then one argument after the other, and answers each with
what the call gave or raised.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from metaloom.datasets import messages
from metaloom.datasets.messages import CarriedError, Packed
from metaloom.errors import StreamError
from metaloom.processes import end_with_parent

# Who sends these means the job, not this process, and the rank that started it decides when it ends.
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(descriptor: int, parent: int) -> None:
    """Draws what it is asked for until the other end of a socket is closed.

    Args:
        descriptor: of the socket, inherited.
        parent: the process id of the one that started this one.
    """
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(parent)
    os.set_inheritable(descriptor, False)
    with socket.socket(fileno=descriptor) as connection:
        try:
            sys.path[:] = messages.receive(connection)
            draw = _received_draw(connection)
            gc.freeze()  # modules and the source stay: no collection need look through them again
            while True:
                argument, *_ = messages.receive(connection)
                answer = _answer(draw, argument)
                if not _is_sent(connection, answer):
                    return
        except EOFError:
            return


def _received_draw(connection: socket.socket) -> Callable[[Any], Any]:
    try:
        draw: Callable[[Any], Any] = messages.receive(connection)
    except EOFError:
        raise
    except Exception as error:  # unpickling may call any code
        text = (
            f"a data worker cannot load what it is to draw from: {type(error).__name__}: {error}. Define it "
            f"in a module that can be imported, not in the main script, or set loading.num_workers to 0."
        )

        def refuse(argument: object) -> NoReturn:
            raise StreamError(text)

        return refuse
    return draw


def _answer(draw: Callable[[Any], Any], argument: object) -> Packed:
    try:
        return messages.packed((draw(argument),))
    except BaseException as error:  # whatever it is, the one that asked must hear of it
        return messages.packed(CarriedError.of(error))


def _is_sent(connection: socket.socket, answer: Packed) -> bool:
    """Whether the other end took the answer; False if it is closed."""
    try:
        messages.send(connection, answer)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
