"""How the hosts of a job meet, by torch elastic's rendezvous, and what their agents say to each other.

One agent serves a store, which all others reach. In it lie

    job, digest                the folder of the job's logs and the recipe's digest: all hosts must agree
    outcome, farewells         how the job ended, and how many hosts have read it
    <round>/plan               who is the first host, the round's number, the fault before
    <round>/beat/<host>        a number that changes every second, and where the host's ranks are
    <round>/leaving            the verdict of a host that leaves, whose ranks still have all others stop
    <round>/verdict, done      what ended the round; on how many hosts all ranks have ended well

and what torch elastic keeps there of the rendezvous. A call into a store whose host is cut off does not
return until the kernel gives up the connection, a quarter of an hour later: who uses it needs a watchman.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import pickle
import socket
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousGracefulExitError,
    RendezvousParameters,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from metaloom.errors import LaunchError, RecipeError
from metaloom.faults import Verdict
from metaloom.ranks import Seats
from metaloom.whereabouts import START

POLL_S = 0.1
CONNECT_S = 60.0
INDEX_S = 10.0  # how long hosts have to say their index, when they have met
FAREWELL_S = 10.0  # how long the store stays for the others to read the outcome
SHARED_FOLDER_S = 90.0  # network file systems show a new folder to other hosts this late

# What is raised where the store's host is gone.
BROKEN = (RendezvousConnectionError, dist.DistError)


@dataclasses.dataclass(frozen=True)
class Terms:
    """On what terms the hosts of a job meet.

    Attributes:
        endpoint: host and port where they do.
        address: of this host, for the others.
        may_serve: whether the endpoint is this machine's; the first agent to take its port serves the store.
        min_hosts, max_hosts: hosts to run on.
        wait_s: how long to wait for `min_hosts`.
        silence_s: how long a host may be silent before it counts as lost.
        num_processes: ranks on each host.
        digest: of the recipe, which all hosts must share.
        log_dir: where the ranks' output goes, on a file system that all hosts share.
        stop_within_s: how long ranks have to stop and save what they did.
        index: of this host: those with lower ones have lower ranks, but for the one that serves.
        has_own_folder: whether `log_dir` is this host's alone.
    """

    endpoint: tuple[str, int]
    address: str
    may_serve: bool
    min_hosts: int
    max_hosts: int
    wait_s: float
    silence_s: float
    num_processes: int
    digest: str
    log_dir: Path
    stop_within_s: float
    index: int = 0
    has_own_folder: bool = False

    @property
    def where(self) -> str:
        """The endpoint, in words."""
        return f"{self.endpoint[0]}:{self.endpoint[1]}"


class JobOver(Exception):
    """The job has ended while this host waited for the next round."""


class Round:
    """One round of a job: its hosts, and what their agents say in it.

    Attributes:
        position: of this host among all; 0 serves the store.
        before: the verdict on the last fault, None before the first.
    """

    def __init__(
        self, store: Store, position: int, num_hosts: int, seats: Seats, before: Verdict | None
    ) -> None:
        self.position = position
        self.num_hosts = num_hosts
        self.seats = seats
        self.before = before
        self._store = store
        self._num_beats = 0
        self._heard: dict[int, tuple[bytes, float]] = {}

    def beat(self, place: str, seen: str) -> None:
        """Tells the others that this host is there.

        Args:
            place: where its first rank is.
            seen: where each of its ranks is, and what it does there.
        """
        self._store.set(f"beat/{self.position}", f"{self._num_beats} {place}\n{seen}")
        self._num_beats += 1

    def silent_host(self, limit_s: float) -> tuple[Seats, str] | None:
        """The ranks of a host whose beat has not changed for so long, and where they were last heard of."""
        now = time.monotonic()
        for position in range(self.num_hosts):
            key = f"beat/{position}"
            beat = self._store.get(key) if self._store.check([key]) else b""
            last, since_s = self._heard.get(position, (None, now))
            if beat != last:
                self._heard[position] = beat, now
            elif now - since_s > limit_s:
                first_rank = position * self.seats.num_here
                seats = dataclasses.replace(self.seats, first_rank=first_rank)
                return seats, beat.decode().partition(" ")[2].partition("\n")[0] or START
        return None

    def seen_elsewhere(self) -> str:
        """What the other hosts said last of their ranks; empty where nothing was said."""
        keys = [f"beat/{position}" for position in range(self.num_hosts) if position != self.position]
        beats = [self._store.get(key).decode() for key in keys if self._store.check([key])]
        return "; ".join(filter(None, (beat.partition("\n")[2] for beat in beats)))

    def post(self, verdict: Verdict) -> Verdict:
        """The one verdict of the round: this one, unless another host was first."""
        return Verdict.from_json(self._store.compare_set("verdict", "", verdict.to_json()))

    def verdict(self) -> Verdict | None:
        """The verdict of the round, where a host has posted one."""
        return Verdict.from_json(self._store.get("verdict")) if self._store.check(["verdict"]) else None

    def announce(self, verdict: Verdict) -> None:
        """Says what will be the verdict once the ranks have stopped, since this host leaves."""
        self._store.compare_set("leaving", "", verdict.to_json())

    def announced(self) -> Verdict | None:
        """What a host has announced that leaves; None where none does."""
        return Verdict.from_json(self._store.get("leaving")) if self._store.check(["leaving"]) else None

    def say_done(self) -> None:
        """Tells the others that this host's ranks have all ended well."""
        self._store.add("done", 1)

    def all_are_done(self) -> bool:
        """Whether the ranks of all hosts have ended well."""
        return bool(self._store.add("done", 0) == self.num_hosts)


class Meeting:
    """A job's hosts, as one of them meets the others.

    Attributes:
        serves: whether the store is served from here. Rank 0 runs where it is.
        job: the job's name, the same on all hosts and new each time that it is started.

    Raises:
        MetaloomError: the store cannot be reached, or belongs to another job.
    """

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        served = _serve(terms) if terms.may_serve else None
        self.serves = served is not None
        self._store = _reach(terms) if served is None else served
        self._board = PrefixStore("metaloom", self._store)
        if self.serves:
            self.job = uuid.uuid4().hex
            self._open_job()
        else:
            self.job = self._join_job()
        self._backend = C10dRendezvousBackend(self._store, "metaloom")
        self._handler = create_handler(self._store, self._backend, _parameters(terms))
        self._num_rounds = 0

    def next_round(self, before: Verdict | None) -> Round:
        """Waits for the other hosts, and agrees with them on who runs which ranks.

        Args:
            before: the verdict on the last fault, as this host knows it; that of the first host counts.

        Raises:
            JobOver: the job has ended meanwhile.
            LaunchError: too few hosts have come.
        """
        terms = self._terms
        try:
            met = self._handler.next_rendezvous()
        except (RendezvousClosedError, RendezvousGracefulExitError):
            raise JobOver from None
        except RendezvousTimeoutError:
            raise LaunchError(
                f"fewer than {terms.min_hosts} hosts (launcher.hosts.min_hosts) have come to {terms.where} "
                f"within {terms.wait_s:g} s (launcher.hosts.wait_s). Start the same command on every host, "
                "or lower min_hosts."
            ) from None
        met.store.set(f"index/{met.rank}", str(terms.index))
        if self.serves:
            said = None if before is None else before.to_json()
            plan: dict[str, Any] = {
                "number": self._num_rounds,
                "order": _in_order(met.store, first=met.rank, num_hosts=met.world_size),
                "before": said,
            }
            met.store.set("plan", json.dumps(plan))
            self._num_rounds += 1
        else:
            plan = json.loads(_read(met.store, "plan", is_over=self.is_over))
            before = None if plan["before"] is None else Verdict.from_json(plan["before"])
        position = plan["order"].index(met.rank)
        seats = Seats(
            round_number=plan["number"],
            first_rank=position * terms.num_processes,
            num_here=terms.num_processes,
            world_size=met.world_size * terms.num_processes,
            store=(terms.address, self._store.port) if self.serves else terms.endpoint,
        )
        return Round(met.store, position, met.world_size, seats, before)

    def has_newcomers(self) -> bool:
        """Whether hosts wait to join, or to meet again."""
        return bool(self._handler.num_nodes_waiting() > 0)

    def attendance(self) -> tuple[int, bool]:
        """How many other hosts are there, running the job, or waiting for more or for the next round; and
        whether this one is in the round. It may be, and not know yet."""
        stored = self._backend.get_state()  # the handler's own may be a second old
        if stored is None:
            return 0, False
        state, this = pickle.loads(stored[0]), self._handler._this_node
        return len((state.participants.keys() | state.wait_list) - {this}), this in state.participants

    def close(self, verdict: Verdict | None) -> None:
        """Ends the job for all hosts: well where there is no verdict."""
        self._board.set("outcome", "" if verdict is None else verdict.to_json())
        self._handler.shutdown()
        if not self.serves:
            self._board.add("farewells", 1)

    def is_over(self) -> bool:
        """Whether a host has ended the job."""
        return bool(self._board.check(["outcome"]))

    def outcome(self) -> Verdict | None:
        """What `close` was given, on whichever host."""
        said = _read(self._board, "outcome")
        return Verdict.from_json(said) if said else None

    def wait_for_farewells(self, num_hosts: int) -> None:
        """Returns when so many other hosts have read the outcome, or `FAREWELL_S` have passed."""
        deadline = time.monotonic() + FAREWELL_S
        while self._board.add("farewells", 0) < num_hosts and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def _open_job(self) -> None:
        if self._terms.max_hosts > 1:
            self._make_log_folder(self.job)
        self._board.set("job", self.job)
        self._board.set("digest", self._terms.digest)

    def _make_log_folder(self, job: str) -> None:
        folder = self._terms.log_dir / job
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LaunchError(f"{folder} cannot be made: {error.strerror or error}.") from error

    def _join_job(self) -> str:
        """The name of the job, once it is clear that this host belongs to it."""
        terms = self._terms
        digest = _read(self._board, "digest").decode()
        if digest != terms.digest:
            raise RecipeError(
                f"this host's recipe is not that of the job at {terms.where} (digest {terms.digest[:12]} "
                f"here, {digest[:12]} there). Start the same command on every host; another job needs "
                "another port."
            )
        job = _read(self._board, "job").decode()
        if terms.has_own_folder:
            self._make_log_folder(job)
            return job
        deadline = time.monotonic() + min(SHARED_FOLDER_S, terms.wait_s)
        while not (terms.log_dir / job).is_dir():
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"{terms.log_dir.parent} is not the folder that the host at {terms.where} sees: a run's "
                    "folder has to lie on a file system that all hosts share. Name one with --run; or let "
                    "each have its own (launcher.hosts.own_folders)."
                )
            time.sleep(POLL_S)
        return job


def _serve(terms: Terms) -> TCPStore | None:
    """The store, served from here; None where another agent of this machine serves it."""
    # It listens at every address, and this host connects to its own: the endpoint's name may lead to where it
    # was before it was replaced, for as long as that is remembered.
    try:
        return _tcp_store((terms.address, terms.endpoint[1]), is_master=True)
    except dist.DistError as error:
        if terms.max_hosts == 1:
            raise LaunchError(f"this machine's ranks cannot be joined: {error}.") from error
        return None


def _reach(terms: Terms) -> TCPStore:
    """The store of another agent, as soon as it is there.

    Raises:
        LaunchError: it is not there within `wait_s`.
    """
    deadline = time.monotonic() + terms.wait_s
    is_told = False
    while True:
        try:
            # Torch's own attempts print each failure.
            socket.create_connection(terms.endpoint, timeout=2.0).close()
            return _tcp_store(terms.endpoint, is_master=False)
        except (OSError, dist.DistError) as error:
            if time.monotonic() > deadline:
                reason = (error.strerror or error) if isinstance(error, OSError) else "it is no rendezvous"
                raise LaunchError(
                    f"nothing answers at {terms.where} within {terms.wait_s:g} s ({reason}). Start the same "
                    "command on the host that launcher.hosts.endpoint names, and let the others reach "
                    "that port."
                ) from error
        if not is_told:
            print(f"waiting for {terms.where}, for up to {terms.wait_s:g} s", file=sys.stderr, flush=True)
            is_told = True
        time.sleep(0.5)


def _tcp_store(endpoint: tuple[str, int], *, is_master: bool) -> TCPStore:
    return TCPStore(
        *endpoint,
        is_master=is_master,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=CONNECT_S),
    )


def _parameters(terms: Terms) -> RendezvousParameters:
    interval = max(1, min(5, int(terms.silence_s / 4)))
    return RendezvousParameters(
        backend="c10d",
        endpoint=terms.where,
        run_id="metaloom",
        min_nodes=terms.min_hosts,
        max_nodes=terms.max_hosts,
        local_addr=terms.address,
        join_timeout=math.ceil(terms.wait_s),
        # Who has not come back by then counts as lost, and may join later.
        last_call_timeout=math.ceil(terms.silence_s),
        keep_alive_interval=interval,
        keep_alive_max_attempt=max(2, math.ceil(terms.silence_s / interval)),
    )


def _in_order(store: Store, *, first: int, num_hosts: int) -> list[int]:
    """The hosts as the rendezvous numbers them, in the order of their ranks: by their indices, after the one
    that serves. One that says nothing is lost already, which its silence will tell: it comes last."""
    keys = [f"index/{host}" for host in range(num_hosts)]
    deadline = time.monotonic() + INDEX_S
    while not store.check(keys) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    indices = [int(store.get(key)) if store.check([key]) else num_hosts for key in keys]
    return sorted(range(num_hosts), key=lambda host: (host != first, indices[host], host))


def _read(store: Store, key: str, *, is_over: Callable[[], bool] = lambda: False) -> bytes:
    """A value that another agent writes. Waits for it in steps, as `get` would hold up the heartbeat.

    Raises:
        JobOver: there is none, and the job has ended.
    """
    deadline = time.monotonic() + CONNECT_S
    while not store.check([key]):
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"no {key} within {CONNECT_S:g} s")
        if is_over():
            raise JobOver
        time.sleep(POLL_S)
    value: bytes = store.get(key)
    return value
