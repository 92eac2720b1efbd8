"""How a job is stopped from outside so that nothing is lost: all ranks break off at one place.

A rank that is asked to stop tells the others through the store. Every rank then says how many of the points
it has passed that all ranks pass, and nobody passes another one before the largest of these numbers is known:
all can come so far, since one has, and none has to come farther. There each rank raises `Stopped`.

A rank that waits for the others in a meeting, or for data, has passed what it passed before, and stops there.
Out of lockstep ranks are on their own between two meetings, and stop at once as well. Unless one has left the
meeting already: then all others will.
"""

from __future__ import annotations

import contextlib
import datetime
import threading
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from metaloom.engine.stopping import StopPoints
from metaloom.whereabouts import Whereabouts

POLL_S = 0.25
_LONGEST_NAP_S = 1e-3


class Stopped(BaseException):
    """The job was asked to stop, and every rank is at the same place. No `Exception`: nothing that mends
    faults is meant."""


class StopWatch(StopPoints):
    """Stops this rank where all others do.

    Args:
        connect: opens a connection of its own to a store that all ranks share, under names that no other job
            uses; None where this rank is the only one.
        is_lockstep: whether all ranks call `between_passes` as often as each other.
        whereabouts: told when this rank waits for the others.
        timeout: how long a rank waits in `meet` for the others.
        on_asked: called once, by a thread, when this rank knows that the job is to stop.
        wake: called once, by a thread, when all have agreed: sends the main thread a signal whose handler
            calls `interrupt`.

    Every rank must make one.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        is_lockstep: bool,
        connect: Callable[[], Store] | None,
        whereabouts: Whereabouts | None = None,
        timeout: datetime.timedelta = datetime.timedelta(minutes=30),
        on_asked: Callable[[], None] = lambda: None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        assert (connect is None) == (world_size == 1), "ranks agree through a store"
        self._rank = rank
        self._world_size = world_size
        self.is_lockstep = is_lockstep
        self._connect = connect
        self._on_asked = on_asked
        self._wake = wake
        self._whereabouts = whereabouts or Whereabouts()
        self._is_waiting = False
        self._lock = threading.Lock()
        self._num_passed = 0
        self._agreed = 0
        self._wish = ""  # why this rank was asked
        self._is_wished = threading.Event()
        self._is_asked = False  # from here on no point is passed before all have agreed
        self._is_decided = threading.Event()
        self._is_over = threading.Event()
        self._group = None if connect is None else dist.new_group(backend="gloo", timeout=timeout)
        self._thread = threading.Thread(target=self._watch, name="metaloom-stop", daemon=True)
        self._thread.start()

    def ask(self, reason: str) -> None:
        """Has the job stop; returns at once. A signal handler may call it.

        Args:
            reason: what asks, in words that follow "stopped by".
        """
        self._wish = self._wish or reason
        self._is_wished.set()

    @property
    def reason(self) -> str:
        """What has asked first, of all ranks, once that is known; else empty."""
        return self._wish if self._is_asked else ""

    def close(self) -> None:
        """From now on nothing is watched."""
        self._is_over.set()
        self._is_wished.set()
        self._thread.join()

    # ------------------------------------------------------------ what the job calls

    def between_passes(self) -> None:
        if self.is_lockstep:
            self._pass()
        elif self._is_asked:
            self._stop_unless_behind()

    def _pass(self) -> None:
        """One of the points that all ranks pass, in the same order.

        Raises:
            Stopped: all ranks stop here.
        """
        with self._lock:
            if not self._is_asked:
                self._num_passed += 1
                return
        self._stop_unless_behind()
        self._num_passed += 1

    def meet(self) -> None:
        if self._group is None:
            self._pass()
            return
        self._whereabouts.begin("waiting for the other ranks")
        # In a group of its own: gradients may be under way that other ranks send behind it.
        work = dist.all_reduce(torch.zeros(1, dtype=torch.uint8), group=self._group, async_op=True)
        assert work is not None
        nap_s = 1e-5
        while not work.is_completed():
            if self._is_decided.is_set():
                self._stop_unless_behind()
            time.sleep(nap_s)
            nap_s = min(_LONGEST_NAP_S, 1.5 * nap_s)
        work.wait()
        self._whereabouts.begin("exchanging with the other ranks")
        self._pass()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        if self._is_asked:
            self._stop_unless_behind()
        self._is_waiting = True
        try:
            yield
        finally:
            self._is_waiting = False

    def interrupt(self) -> None:
        """What the signal does that wakes the main thread while it waits: see `wake`.

        Raises:
            Stopped: it waits, and all ranks stop.
        """
        if self._is_waiting and self._is_decided.is_set() and self._num_passed >= self._agreed:
            self._is_waiting = False
            raise Stopped

    def _stop_unless_behind(self) -> None:
        self._is_decided.wait()
        if self._num_passed >= self._agreed:
            raise Stopped

    # ------------------------------------------------------------ what the ranks' threads tell each other

    def _watch(self) -> None:
        # A rank whose store is gone is told so by its collectives, and by its agent.
        with contextlib.suppress(dist.DistError):
            store = None if self._connect is None else self._connect()
            while not self._is_wished.wait(POLL_S):
                if store is not None and store.check(["reason"]):
                    break
            if self._is_over.is_set():
                return
            if store is not None:
                self._wish = store.compare_set("reason", "", self._wish).decode()
            with self._lock:
                self._is_asked = True
                self._agreed = self._num_passed
            self._on_asked()
            if store is not None:
                self._agreed = self._agree(store)
        if self._is_asked:
            # Also where the store is gone, and with it what could be agreed on: the job ends either way.
            self._is_decided.set()
            self._wake()

    def _agree(self, store: Store) -> int:
        """The largest number of points that any rank has passed."""
        store.set(f"passed/{self._rank}", str(self._num_passed))
        if self._rank == 0:
            keys = [f"passed/{rank}" for rank in range(self._world_size)]
            self._wait_for_keys(store, keys)
            store.set("agreed", str(max(int(number) for number in store.multi_get(keys))))
        self._wait_for_keys(store, ["agreed"])
        return int(store.get("agreed"))

    def _wait_for_keys(self, store: Store, keys: list[str]) -> None:
        # In steps, since `wait` has a timeout of its own and holds the connection.
        while not store.check(keys):
            if self._is_over.is_set():  # of a job that has ended meanwhile
                raise dist.DistStoreError("nobody is there any more")
            time.sleep(0.02)
