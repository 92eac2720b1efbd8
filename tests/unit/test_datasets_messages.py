"""Messages between processes: what arrives is what was sent."""

import pickle
import socket
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from metaloom.datasets import messages
from metaloom.datasets.messages import CarriedError


@pytest.fixture(scope="module")
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def carried(ends: tuple[socket.socket, socket.socket], value: object) -> object:
    sender = threading.Thread(target=lambda: messages.send(ends[0], messages.packed(value)))
    sender.start()
    received: object = messages.receive(ends[1])
    sender.join()
    return received


@given(
    values=st.lists(
        arrays.arrays(
            dtype=st.sampled_from(["f4", "i8", "u1", "?", "f2", "U3"]),
            shape=arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
        ),
        max_size=4,
    ),
    step=st.sampled_from([1, 2, -1]),
    is_fortran=st.booleans(),
    can_be_written_to=st.booleans(),
)
def test_arrays_arrive_as_they_are(
    ends: tuple[socket.socket, socket.socket],
    values: list[NDArray[np.generic]],
    step: int,
    is_fortran: bool,
    can_be_written_to: bool,
) -> None:
    sent = [value[::step] if value.ndim else value for value in values]
    sent = [np.asfortranarray(value) if is_fortran else value for value in sent]
    for value in sent:
        value.flags.writeable = can_be_written_to
    received = carried(ends, sent)
    assert isinstance(received, list)
    for before, after in zip(sent, received, strict=True):
        assert (after.dtype, after.shape) == (before.dtype, before.shape)
        assert after.tobytes() == before.tobytes()
        assert after.flags.writeable or not can_be_written_to


def test_a_message_larger_than_any_buffer_of_more_parts_than_one_call_takes_arrives(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    rng = np.random.default_rng(0)
    large = rng.integers(0, 256, 5_000_001, np.uint8)
    small = [rng.integers(0, 256, size, np.uint8) for size in range(2500)]
    received = carried(ends, {"large": large, "small": small, "text": "é"})
    assert isinstance(received, dict)
    assert np.array_equal(received["large"], large)
    assert all(np.array_equal(a, b) for a, b in zip(received["small"], small, strict=True))
    assert received["text"] == "é"


def test_arrays_are_sent_from_where_they_lie() -> None:
    array = np.zeros(1000)
    head, body = messages.packed([array])
    assert np.shares_memory(np.frombuffer(body, np.uint8), array)
    assert head.nbytes < 500


@pytest.mark.parametrize("num_bytes", [0, 10, 40, 500])
def test_an_end_that_closes_between_or_within_messages_is_an_end_of_file(num_bytes: int) -> None:
    one, other = socket.socketpair()
    with one, other:
        one.send(b"".join(messages.packed([np.zeros(100)]))[:num_bytes])
        one.close()
        with pytest.raises(EOFError, match="the other end is closed"):
            messages.receive(other)


def test_an_end_that_is_gone_with_unread_messages_is_an_end_of_file() -> None:
    one, other = socket.socketpair()
    with one, other:
        other.send(b"never read")
        one.close()
        with pytest.raises(EOFError, match="the other end is"):
            messages.receive(other)


class Narrow(socket.socket):
    """Takes a few bytes at a time, as a socket may when a signal comes."""

    def sendmsg(self, buffers: Any, *rest: Any) -> int:
        return super().sendmsg([b"".join(map(bytes, buffers))[:7]])


def test_what_a_call_does_not_send_is_sent_by_the_next() -> None:
    one, other = socket.socketpair()
    value = [np.arange(20), np.arange(3.0), np.zeros(0)]
    with one, other, Narrow(fileno=one.detach()) as narrow:
        messages.send(narrow, messages.packed(value))
        received = messages.receive(other)
    assert all(np.array_equal(a, b) for a, b in zip(received, value, strict=True))


class WrappingError(ValueError):
    """Made again from its arguments, it has another text."""

    def __init__(self, text: str) -> None:
        super().__init__(f"a wrapped {text}")


class TwoWordsError(ValueError):
    def __init__(self, first: str, *, second: str) -> None:
        super().__init__(f"{first} {second}")
        self.second = second


class OtherTextError(ValueError):
    """Its text is neither in its arguments nor its attributes."""

    def __init__(self) -> None:
        self.words = (word for word in ["lost"])

    def __str__(self) -> str:
        return "a text of its own"


@pytest.mark.parametrize(
    "error",
    [
        ValueError("wrong", 3),
        KeyError("a"),
        OSError(28, "No space left on device", "/a/file"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        WrappingError("text"),
        TwoWordsError("here", second="there"),
        SystemExit(3),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_keep_type_text_and_attributes(error: BaseException) -> None:
    error.add_note("a note")
    again = pickle.loads(pickle.dumps(CarriedError.of(error))).restored()
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.__dict__ == error.__dict__


def test_an_error_that_cannot_be_carried_is_told_by_type_and_text() -> None:
    again = pickle.loads(pickle.dumps(CarriedError.of(OtherTextError()))).restored()
    assert type(again) is RuntimeError
    assert str(again).endswith("OtherTextError: a text of its own")
