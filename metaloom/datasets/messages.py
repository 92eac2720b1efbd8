"""Messages between a process and a worker that it has started: pickles, with arrays sent from where they lie.

Both ends are this program's own, joined by a pair of sockets without a name: unpickling is safe there, and
nowhere else.

A message is a header (bytes of the pickle, number of buffers; uint64 each), the length of each buffer
(uint64), the pickle, the buffers. A buffer is the memory of an array (pickle protocol 5); it is received into
the memory in which the array then stays.
"""

from __future__ import annotations

import pickle
import socket
import struct
import traceback
from dataclasses import dataclass
from typing import Any

import numpy as np

Packed = list[memoryview]

_HEADER = struct.Struct("=QQ")
_MAX_PARTS = 1024  # of one sendmsg: IOV_MAX of Linux


def packed(value: object) -> Packed:
    """The parts of the message that holds a value. They refer to the memory of its arrays.

    Raises:
        Exception: whatever pickling the value raises.
    """
    found: list[pickle.PickleBuffer] = []
    body = pickle.dumps(value, protocol=5, buffer_callback=found.append)
    buffers = [buffer.raw() for buffer in found]
    lengths = struct.pack(f"={len(buffers)}Q", *(buffer.nbytes for buffer in buffers))
    head = _HEADER.pack(len(body), len(buffers)) + lengths
    return [memoryview(head + body), *(buffer for buffer in buffers if buffer.nbytes)]


def send(connection: socket.socket, parts: Packed) -> None:
    """Sends a message as a whole.

    Raises:
        OSError: the other end is gone.
    """
    start, skipped = 0, 0  # the first part that is not wholly sent, and how much of it is sent
    while start < len(parts):
        first = parts[start][skipped:]
        skipped += connection.sendmsg([first, *parts[start + 1 : start + _MAX_PARTS]])
        while start < len(parts) and skipped >= parts[start].nbytes:
            skipped -= parts[start].nbytes
            start += 1


def receive(connection: socket.socket) -> Any:
    """The value of the next message; arrays in it can be written to if they could be where they were sent.

    Raises:
        EOFError: the other end is closed or gone.
        Exception: whatever unpickling the value raises; the message is taken in all the same.
    """
    num_bytes, num_buffers = _HEADER.unpack(_exactly(connection, _HEADER.size))
    lengths = struct.unpack(f"={num_buffers}Q", _exactly(connection, 8 * num_buffers))
    body = _exactly(connection, num_bytes)
    buffers = [_exactly(connection, length) for length in lengths]
    return pickle.loads(body, buffers=buffers)


def _exactly(connection: socket.socket, length: int) -> memoryview:
    # Memory of numpy's is not filled with zeros first, as a bytearray's is.
    memory = np.empty(length, np.uint8).data
    num_read = 0
    while num_read < length:
        try:
            count = connection.recv_into(memory[num_read:], 0, socket.MSG_WAITALL)
        except ConnectionError as error:
            raise EOFError("the other end is gone") from error
        if count == 0:
            raise EOFError("the other end is closed")
        num_read += count
    return memory


class WorkerTraceback(Exception):
    """Where in a worker an error was raised: the cause of the error that its parent raises."""


@dataclass(frozen=True)
class CarriedError:
    """An error on its way to another process, as it was: its type, text and attributes.

    Attributes:
        error: the error; or its type, arguments and attributes, where its own pickle does not give it back,
            as of one whose constructor takes other arguments than it hands on; or None.
        description: its type and text.
        trace: its traceback, as text.
    """

    error: BaseException | tuple[type[BaseException], tuple[Any, ...], dict[str, Any]] | None
    description: str
    trace: str

    @classmethod
    def of(cls, error: BaseException) -> CarriedError:
        kind = type(error)
        description = f"{kind.__module__}.{kind.__qualname__}: {error}"
        trace = "".join(traceback.format_exception(error))
        for form in (error, (kind, error.args, error.__dict__)):
            try:
                again = _restored(pickle.loads(pickle.dumps(form)))
            except Exception:  # pickling may call any code; the next form is tried
                continue
            if type(again) is kind and str(again) == str(error):
                return cls(form, description, trace)
        return cls(None, description, trace)

    def restored(self) -> BaseException:
        """The error; a RuntimeError with its description if it is of a type that cannot be sent."""
        error = RuntimeError(self.description) if self.error is None else _restored(self.error)
        error.__cause__ = WorkerTraceback(f"in a data worker:\n{self.trace}")
        return error


def _restored(
    form: BaseException | tuple[type[BaseException], tuple[Any, ...], dict[str, Any]],
) -> BaseException:
    if isinstance(form, BaseException):
        return form
    kind, arguments, attributes = form
    error = kind.__new__(kind, *arguments)  # the constructor is not called: it may take other arguments
    error.__dict__.update(attributes)
    return error
