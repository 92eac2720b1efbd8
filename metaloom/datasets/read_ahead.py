"""Things drawn ahead, in the background, and given in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Generic

from metaloom.datasets.workers import A, Drawer, OwnThread, R, WorkerProcess, packed_draw


class ReadAhead(Iterator[R], Generic[A, R]):
    """`draw(argument)` for each of a sequence of arguments, in order, drawn before they are asked for.

    An argument belongs to one of the drawers, each of which has a thread. An error in drawing is raised after
    all that comes before it in order, and ends the sequence. Close it, or use it in a `with` block, to end
    threads and drawers.

    Args:
        drawers: which draw.
        arguments: what of, perhaps without end.
        limit: the most that is drawn, or being drawn, and not taken.
        drawer_of: the drawer of an argument, by its place in the sequence and by itself.
    """

    def __init__(
        self,
        drawers: Sequence[Drawer[A, R]],
        arguments: Iterable[A],
        *,
        limit: int,
        drawer_of: Callable[[int, A], int],
    ) -> None:
        self._drawers = drawers
        self._arguments = iter(arguments)
        self._limit = limit
        self._drawer_of = drawer_of
        self._waiting: list[deque[tuple[int, A]]] = [deque() for _ in drawers]  # not begun, by drawer
        self._drawn: dict[int, R] = {}  # and not taken, by place
        self._errors: dict[int, BaseException] = {}
        self._num_dealt = 0
        self._num_taken = 0
        self._num_in_order = 0  # the first place whose thing is not drawn
        self._is_all_dealt = False  # no argument will be dealt any more
        self._is_finished = False  # nothing will be given any more
        self._changed = threading.Condition()
        self._deal()
        self._threads = [
            threading.Thread(target=self._draw, args=pair, name="metaloom-read-ahead", daemon=True)
            for pair in enumerate(drawers)
        ]
        for thread in self._threads:
            thread.start()

    def __next__(self) -> R:
        taken = self.take(1)
        if not taken:
            raise StopIteration
        return taken[0]

    def take(self, count: int) -> list[R]:
        """The next `count`, together; fewer where the sequence ends or is closed.

        Raises:
            ValueError: so many are never there at a time.
            BaseException: what drawing one of them raised.
        """
        if count > self._limit:
            raise ValueError(
                f"{count} were asked for at a time, of which at most {self._limit} are kept ready"
            )
        with self._changed:
            self._changed.wait_for(lambda: self._is_settled(count))
            if self._is_finished:
                return []
            stop = min(self._num_taken + count, self._num_dealt)
            if self._num_in_order < stop:
                error = self._errors[self._num_in_order]
                self._finish()
                raise error
            taken = [self._drawn.pop(place) for place in range(self._num_taken, stop)]
            self._num_taken = stop
            self._deal()
            self._changed.notify_all()
            return taken

    def close(self) -> None:
        """Ends threads, drawers and the sequence; may be called again, and while another thread waits."""
        with self._changed:
            self._finish()
        for drawer in self._drawers:
            drawer.stop()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> ReadAhead[A, R]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _is_settled(self, count: int) -> bool:
        """Whether the next `count`, or an error among them, are there."""
        stop = min(self._num_taken + count, self._num_dealt)
        return self._is_finished or self._num_in_order >= stop or self._num_in_order in self._errors

    def _finish(self) -> None:
        self._is_finished = True
        self._drawn.clear()
        self._errors.clear()
        self._changed.notify_all()

    def _deal(self) -> None:
        """Hands out arguments, as many as may now be drawn."""
        while not self._is_all_dealt and self._num_dealt < self._num_taken + self._limit:
            try:
                argument = next(self._arguments)
            except StopIteration:
                self._is_all_dealt = True
                return
            self._waiting[self._drawer_of(self._num_dealt, argument)].append((self._num_dealt, argument))
            self._num_dealt += 1

    def _draw(self, index: int, drawer: Drawer[A, R]) -> None:
        """What the thread of a drawer does."""
        asked: deque[int] = deque()
        try:
            while not self._is_finished:
                if len(asked) < drawer.max_asked and (job := self._next_job(index, may_wait=not asked)):
                    place, argument = job
                    try:
                        drawer.ask(argument)
                    except BaseException as error:  # whatever it is, the consumer must hear of it
                        self._add_error(place, error)
                    else:
                        asked.append(place)
                elif asked:
                    place = asked.popleft()
                    try:
                        drawn = drawer.answer()
                    except BaseException as error:  # likewise
                        self._add_error(place, error)
                        return  # what else was asked for comes after the error
                    self._add(place, drawn)
                else:
                    return
        finally:
            drawer.end()

    def _next_job(self, index: int, *, may_wait: bool) -> tuple[int, A] | None:
        """The next place and argument of a drawer; None if there is none now, or will be none."""
        waiting = self._waiting[index]
        with self._changed:
            if may_wait:
                self._changed.wait_for(lambda: waiting or self._is_all_dealt or self._is_finished)
            return waiting.popleft() if waiting and not self._is_finished else None

    def _add(self, place: int, drawn: R) -> None:
        with self._changed:
            if self._is_finished:
                return
            self._drawn[place] = drawn
            while self._num_in_order in self._drawn:
                self._num_in_order += 1
            self._changed.notify_all()

    def _add_error(self, place: int, error: BaseException) -> None:
        with self._changed:
            if self._is_finished:
                return
            self._errors[place] = error
            # What comes after it will never be given; what comes before will.
            self._is_all_dealt = True
            for waiting in self._waiting:
                while waiting and waiting[-1][0] > place:
                    waiting.pop()
            self._changed.notify_all()


def drawn_ahead(
    draw: Callable[[A], R],
    arguments: Iterable[A],
    *,
    read_ahead: int,
    num_workers: int = 0,
    drawer_of: Callable[[int, A], int] | None = None,
    noun: str = "episode",
) -> ReadAhead[A, R]:
    """`draw(argument)` for each of `arguments`, in order and the same for any number of workers.

    Args:
        draw: a pure function, such as `source.episode` of a source. With workers it is pickled, and sent to
            each of them once.
        arguments: such as numbers of episodes; may be without end. With workers each is sent to one of them.
        read_ahead: the most that are drawn, or being drawn, and not taken.
        num_workers: processes that draw; with 0 a thread of this process does.
        drawer_of: the worker (0 to `num_workers` - 1) of an argument, by its place in the sequence and by
            itself; None deals them out in turn.
        noun: what an argument stands for, in messages.

    Raises:
        StreamError: there are to be workers, and `draw` cannot be pickled.
    """
    if read_ahead < 1:
        raise ValueError(f"read_ahead is {read_ahead}; it must be at least 1")
    if num_workers < 0:
        raise ValueError(f"num_workers is {num_workers}; it must be at least 0")
    if num_workers == 0:
        return ReadAhead([OwnThread(draw)], arguments, limit=read_ahead, drawer_of=lambda place, argument: 0)
    message = packed_draw(draw, noun=noun)
    drawers: list[Drawer[A, R]] = [
        WorkerProcess(message, name=f"data worker {number} of {num_workers}", noun=noun)
        for number in range(1, num_workers + 1)
    ]
    if drawer_of is None:
        return ReadAhead(
            drawers, arguments, limit=read_ahead, drawer_of=lambda place, argument: place % num_workers
        )
    return ReadAhead(drawers, arguments, limit=read_ahead, drawer_of=drawer_of)
