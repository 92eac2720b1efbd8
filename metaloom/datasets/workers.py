"""What draws things in the background: the thread that asks itself, or a process of its own."""

from __future__ import annotations

import abc
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import ClassVar, Generic, TypeVar, cast

from metaloom.datasets import messages
from metaloom.datasets.messages import CarriedError, Packed
from metaloom.errors import StreamError

A = TypeVar("A")  # what is asked for, such as the number of an episode
R = TypeVar("R")  # what is drawn

GRACE_S = 1.0  # how long a worker may take to end by itself
MAX_ASKED_BYTES = 4096  # so that requests never fill a socket's buffer, where both ends would wait
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
# Memory of one episode is used again for the next, and not given back to the system and asked for anew.
_KEPT_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(1 << 25)}
_ADVICE = "Lower loading.num_workers, or set it to 0, so that the rank draws in a thread of its own."


class Drawer(abc.ABC, Generic[A, R]):
    """Draws one thing after the other, in the order in which it is asked for them.

    One thread asks, takes the answers and ends it; any thread may stop it.
    """

    max_asked: ClassVar[int]  # how many may be asked for before the first is answered

    @abc.abstractmethod
    def ask(self, argument: A) -> None:
        """Asks for one more."""

    @abc.abstractmethod
    def answer(self) -> R:
        """What was asked for first, of that which is not answered yet.

        Raises:
            StreamError: what draws is gone.
            BaseException: whatever drawing it raised.
        """

    @abc.abstractmethod
    def stop(self) -> None:
        """Has a call that waits for another process return soon, by an error."""

    @abc.abstractmethod
    def end(self) -> None:
        """Gives back what the drawer holds. Nothing may be asked for after."""


class OwnThread(Drawer[A, R]):
    """Draws in the thread that takes the answers."""

    max_asked = 1

    def __init__(self, draw: Callable[[A], R]) -> None:
        self._draw = draw
        self._asked: deque[A] = deque()

    def ask(self, argument: A) -> None:
        self._asked.append(argument)

    def answer(self) -> R:
        return self._draw(self._asked.popleft())

    def stop(self) -> None:
        """There is none to wait for."""

    def end(self) -> None:
        """There is nothing to give back."""


class WorkerProcess(Drawer[A, R]):
    """Draws in a process of its own, which is started when it is first asked for something.

    It is a command, `python -m metaloom.datasets.worker_main`: a process spawned by multiprocessing would
    import the main module again, and torch with it; one made by fork would share locks and network clients.
    It ends when this process does, in whatever way. It also ends with the thread that first asked, which
    therefore has to stay.

    Args:
        draw: the message that holds a picklable function, as of `packed_draw`.
        name: in messages.
        noun: what an argument stands for, in messages.
    """

    # The next is there as soon as one is drawn, and an answer that is late does not keep the worker waiting.
    max_asked = 4

    def __init__(self, draw: Packed, *, name: str, noun: str) -> None:
        self._draw: Packed | None = draw
        self._name = name
        self._noun = noun
        self._asked: deque[A] = deque()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._is_stopped = False
        self._lock = threading.Lock()  # of the connection's coming and going

    @property
    def pid(self) -> int | None:
        """The process's id; None before it is started."""
        return None if self._process is None else self._process.pid

    def ask(self, argument: A) -> None:
        request = messages.packed((argument,))
        num_bytes = sum(part.nbytes for part in request)
        if num_bytes > MAX_ASKED_BYTES:
            raise ValueError(
                f"{self._noun} {argument!r:.40} takes {num_bytes} bytes to ask a worker for; at most "
                f"{MAX_ASKED_BYTES} can be sent: let what draws hold what is large."
            )
        if self._process is None:
            self._start()
        self._asked.append(argument)
        self._send(request)

    def answer(self) -> R:
        assert self._connection is not None, "nothing was asked for"
        argument = self._asked.popleft()
        try:
            answer = messages.receive(self._connection)
        except EOFError:
            raise self._loss(argument) from None
        if isinstance(answer, CarriedError):
            raise answer.restored()
        return cast(R, answer[0])

    def stop(self) -> None:
        with self._lock:
            self._is_stopped = True
            if self._connection is not None:
                _shut(self._connection)

    def end(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
        if self._process is not None:
            self._ended(self._process)

    def _start(self) -> None:
        own, theirs = socket.socketpair()
        with self._lock:
            self._connection = own
            if self._is_stopped:
                _shut(own)
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "metaloom.datasets.worker_main",
                        str(theirs.fileno()),
                        str(os.getpid()),
                    ],
                    env=os.environ | _ONE_THREAD | _KEPT_MEMORY,
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # what a decoder prints is not the job's output
                    pass_fds=(theirs.fileno(),),
                    process_group=0,  # Ctrl-C is for the parent alone, which ends its workers
                )
            except OSError as error:
                raise StreamError(f"{self._name} cannot be started: {error}. {_ADVICE}") from error
        # Modules that this process can import, its worker can too.
        self._send(messages.packed(sys.path))
        assert self._draw is not None, "started twice"
        self._send(self._draw)
        self._draw = None

    def _send(self, message: Packed) -> None:
        assert self._connection is not None, "not started"
        # That the worker is gone shows when it does not answer.
        with contextlib.suppress(OSError):
            messages.send(self._connection, message)

    def _loss(self, argument: A) -> StreamError:
        assert self._process is not None, "not started"
        code = self._ended(self._process)
        how = f"ended with exit code {code} (why is in this rank's error output)"
        if code < 0:
            names = {number.value: number.name for number in signal.Signals}
            how = f"was killed by {names.get(-code, f'signal {-code}')}"
        if code == -signal.SIGKILL:
            how += " (the machine may be out of memory)"
        return StreamError(
            f"{self._name} (process {self._process.pid}) {how} before it had drawn {self._noun} "
            f"{argument!r}. {_ADVICE}"
        )

    @staticmethod
    def _ended(process: subprocess.Popen[bytes]) -> int:
        """The exit code of a worker that has lost its connection; one that goes on for long is killed."""
        try:
            return process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def packed_draw(draw: Callable[[A], R], *, noun: str) -> Packed:
    """The message that tells a worker what it shall do for every argument.

    Raises:
        StreamError: the function, or the object that it is a method of, cannot be pickled.
    """
    try:
        return messages.packed(draw)
    except Exception as error:  # pickling may call any code
        raise StreamError(
            f"what draws each {noun} cannot be sent to a worker: {type(error).__name__}: {error}. Make it "
            f"picklable, or set loading.num_workers to 0."
        ) from error


def _shut(connection: socket.socket) -> None:
    # The other end may be gone, which some systems make an error.
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
