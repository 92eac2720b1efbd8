"""Starts the ranks of one host by torch elastic's rendezvous and processes: `python -m metaloom.agent ...`.

A job runs in rounds. In each, the agents of all hosts meet, agree on who runs which ranks, start them, and
watch them to their end. A fault ends the round: the agents agree on a verdict by the store they share, and
either meet for the next round, in which the ranks go on from the last checkpoint, or end, all with the same
message and exit code. A host that comes or leaves ends a round too.

torchrun's own agent is not used, since it tries a user's mistake again, counts restarts on each host
apart, exits with 1 whatever its workers say, tells one host's cause to no other, and waits for a host
that is cut off until its kernel gives up the connection, a quarter of an hour later.

What the agents say by the store:

    metaloom/digest, job       the recipe's digest, the folder of the job's logs: all hosts must agree
    metaloom/outcome           how the job ended
    <round>/plan               who is the first host, the round's number, the fault before
    <round>/beat/<host>        a number that changes every second, and where the host's first rank is
    <round>/verdict, done      what ended the round; on how many hosts all ranks have ended well
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousParameters,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from metaloom.errors import LaunchError, MetaloomError, RecipeError
from metaloom.faults import FAULT, Fault, Verdict, cause, judge
from metaloom.ranks import Ranks, Seats
from metaloom.whereabouts import START

POLL_S = 0.1
NEWS_S = 1.0  # how often an agent asks what the others say
SETTLE_S = 1.0  # how long a rank's cause may take to show after a partner's loss
VERDICT_S = 3.0  # how long an agent whose ranks lost a partner waits for the cause from another host
FAREWELL_S = 10.0  # how long the store stays for the others to read the outcome
SHARED_FOLDER_S = 90.0  # network file systems show a new folder to other hosts this late
CONNECT_S = 60.0
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

Outcome = Verdict | Literal["finished", "regroup"]
BROKEN = (RendezvousConnectionError, dist.DistError)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What this host is asked to do.

    Attributes:
        num_processes: ranks on this host.
        max_restarts: restarts that faults may cost.
        log_dir: where the ranks' output goes.
        worker_args: arguments of `metaloom.worker`.
        digest: of the recipe, which all hosts must share.
        endpoint: host and port where the hosts meet.
        address: of this host, for the others.
        may_serve: whether the endpoint is this machine's; the first agent to take its port serves the store.
        min_hosts, max_hosts: hosts to run on.
        wait_s: how long to wait for `min_hosts`.
        silence_s: how long a host may be silent before it counts as lost.
        num_lost: how often this agent has lost the store's host and started over.
    """

    num_processes: int
    max_restarts: int
    log_dir: Path
    worker_args: tuple[str, ...]
    digest: str
    endpoint: tuple[str, int]
    address: str
    may_serve: bool
    min_hosts: int
    max_hosts: int
    wait_s: float
    silence_s: float
    num_lost: int

    @property
    def where(self) -> str:
        """The endpoint, in words."""
        return f"{self.endpoint[0]}:{self.endpoint[1]}"


@dataclasses.dataclass(frozen=True)
class Round:
    """One round of the job as this host sees it.

    Attributes:
        store: what the agents say in this round.
        position: of this host among all; 0 serves the store.
        before: the verdict on the last fault, None before the first.
    """

    store: Store
    position: int
    num_hosts: int
    seats: Seats
    before: Verdict | None


class JobOver(Exception):
    """The job has ended while this host waited for the next round."""


def main() -> int:
    """Runs this host's part of the job to its end; returns the exit code of the job."""
    plan = _read_plan()
    logging.disable(logging.ERROR)  # torch elastic tells at length what is told here in a line
    # Each round gets a store of its own; else a host that joins late waits for one that is never told.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    for number in STOPPING:
        signal.signal(number, _raise_stopped)
    watch_parent(signal.SIGTERM)
    agent = Agent(plan)
    try:
        return agent.run()
    except MetaloomError as error:
        say(f"error: {error}")
        return error.exit_code
    except SignalException as stopped:
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)
        return agent.leave(stopped.sigval)


class Agent:
    """One host's part in a job."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._round: Round | None = None
        self._before: Verdict | None = None
        self._num_rounds = 0
        self._ranks: Ranks | None = None
        self._is_done = False
        self._contact = Contact(self._lose_contact)
        self._losing = threading.Lock()

    def run(self) -> int:
        """Runs rounds until the job has ended; returns its exit code.

        Raises:
            MetaloomError: the hosts do not come together.
        """
        try:
            self._connect()
            while True:
                try:
                    self._round = self._meet()
                except JobOver:
                    return self._end(self._stored_outcome())
                self._work()
                outcome = self._watch(self._round)
                if outcome == "finished":
                    return self._end(None)
                if outcome != "regroup":
                    if outcome.is_end:
                        return self._end(outcome)
                    self._tell_restart(outcome)
                self._stop_ranks(signal.SIGTERM)
        except BROKEN:
            if self._is_done:
                return 0  # the store's host was done too, and is gone
            self._lose_contact()

    def leave(self, number: signal.Signals) -> int:
        """Ends this host's part, since a signal asks for it; returns the exit code.

        SIGINT is a person's wish, and ends the job on all hosts; by another signal this host leaves,
        and the others go on if they are enough and the store's host is among them.
        """
        self._contact.expect_within(FAREWELL_S)
        current = self._round
        is_last = current is None or current.num_hosts == 1
        text = f"stopped by {number.name}" + ("" if is_last else f" on {self._plan.address}")
        code = 128 + int(number)
        if current is not None and not is_last:
            ends_all = number == signal.SIGINT or current.position == 0
            fault = Fault("departure", text, "", code)
            verdict = Verdict(fault, is_end=True, num_restarts=0)
            if not ends_all:
                verdict = judge(fault, current.before, max_restarts=self._plan.max_restarts)
            with contextlib.suppress(*BROKEN):
                self._post(current, verdict)
                if ends_all:
                    self._close(verdict, current)
        say(text)
        self._contact.expect_nothing()
        self._stop_ranks(signal.SIGINT)  # its ranks take SIGTERM for the loss of a partner
        if current is not None and current.position == 0:
            self._wait_for_farewells(current)
        return code

    # ------------------------------------------------------------ meeting

    def _connect(self) -> None:
        """Joins the store and checks that this host belongs to the job."""
        plan = self._plan
        store = self._serve() if plan.may_serve else None
        self._serves = store is not None
        if store is None:
            self._contact.start()
            self._contact.expect_within(plan.wait_s + plan.silence_s)
            store = self._reach()
        self._store = store
        self._board = PrefixStore("metaloom", store)
        if self._serves:
            self._job = uuid.uuid4().hex
            if plan.max_hosts > 1:
                _make_folder(plan.log_dir / self._job)
            self._board.set("job", self._job)
            self._board.set("digest", plan.digest)
        else:
            self._require_same_job()
        several = plan.max_hosts > 1
        # Rank 0 is on the host that serves the store: its standard output is the command's.
        redirects = dict.fromkeys(range(plan.num_processes), Std.ALL)
        if self._serves:
            redirects[0] = Std.ERR
        self._logs = DefaultLogsSpecs(
            str(plan.log_dir / self._job if several else plan.log_dir), redirects=redirects
        )
        self._log_name = plan.address if several else self._job
        self._handler = self._make_handler()

    def _serve(self) -> TCPStore | None:
        """The store, served from here; None where another agent of this machine serves it."""
        try:
            return _tcp_store(self._plan.endpoint, is_master=True)
        except dist.DistError:
            return None

    def _reach(self) -> TCPStore:
        """The store of another host, as soon as it is there."""
        plan = self._plan
        deadline = time.monotonic() + plan.wait_s
        is_told = False
        while True:
            try:
                socket.create_connection(plan.endpoint, timeout=2.0).close()
                return _tcp_store(plan.endpoint, is_master=False)
            except (OSError, dist.DistError) as error:
                if time.monotonic() > deadline:
                    reason = error.strerror if isinstance(error, OSError) else "it is no rendezvous"
                    raise LaunchError(
                        f"nothing answers at {plan.where} since {plan.wait_s:g} s ({reason or error}). Start "
                        "the same command on the host that launcher.hosts.endpoint names, and let the other "
                        "hosts reach that port."
                    ) from error
            if not is_told:
                say(f"waiting for {plan.where}, for up to {plan.wait_s:g} s")
                is_told = True
            time.sleep(0.5)

    def _require_same_job(self) -> None:
        plan = self._plan
        digest = _read(self._board, "digest").decode()
        if digest != plan.digest:
            raise RecipeError(
                f"this host's recipe is not that of the job at {plan.where} (digest {plan.digest[:12]} here, "
                f"{digest[:12]} there). Start the same command on every host; another job needs another port."
            )
        self._job = _read(self._board, "job").decode()
        folder = plan.log_dir / self._job
        deadline = time.monotonic() + min(SHARED_FOLDER_S, plan.wait_s)
        while not folder.is_dir():
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"{plan.log_dir.parent} is not the folder that the host at {plan.where} sees: a run's "
                    "folder has to lie on a file system that all hosts share. Name one with --run."
                )
            time.sleep(POLL_S)

    def _make_handler(self) -> RendezvousHandler:
        plan = self._plan
        interval = max(1, min(5, int(plan.silence_s / 4)))
        parameters = RendezvousParameters(
            backend="c10d",
            endpoint=plan.where,
            run_id="metaloom",
            min_nodes=plan.min_hosts,
            max_nodes=plan.max_hosts,
            local_addr=plan.address,
            join_timeout=math.ceil(plan.wait_s),
            # Who has not come back by then counts as lost, and may join later.
            last_call_timeout=math.ceil(plan.silence_s),
            keep_alive_interval=interval,
            keep_alive_max_attempt=max(2, math.ceil(plan.silence_s / interval)),
        )
        backend = C10dRendezvousBackend(self._store, "metaloom")
        return create_handler(self._store, backend, parameters)

    def _meet(self) -> Round:
        """Waits for the other hosts, and agrees with them on who runs which ranks."""
        plan = self._plan
        self._contact.expect_within(plan.wait_s + plan.silence_s)
        try:
            met = self._handler.next_rendezvous()
        except (RendezvousClosedError, RendezvousGracefulExitError):
            raise JobOver from None
        except RendezvousTimeoutError:
            raise LaunchError(
                f"fewer than {plan.min_hosts} hosts (launcher.hosts.min_hosts) have come to {plan.where} "
                f"within {plan.wait_s:g} s (launcher.hosts.wait_s). Start the same command on every host, "
                "or lower min_hosts."
            ) from None
        if self._serves:
            before = None if self._before is None else self._before.to_json()
            said: dict[str, Any] = {"number": self._num_rounds, "first": met.rank, "before": before}
            met.store.set("plan", json.dumps(said))
            self._num_rounds += 1
        else:
            said = json.loads(_read(met.store, "plan"))
            self._before = None if said["before"] is None else Verdict.from_json(said["before"])
        position = 0 if self._serves else met.rank + (met.rank < said["first"])
        host, port = plan.endpoint
        seats = Seats(
            round_number=said["number"],
            first_rank=position * plan.num_processes,
            num_here=plan.num_processes,
            world_size=met.world_size * plan.num_processes,
            store=(host, self._store.port if self._serves else port),
        )
        self._beats: dict[int, tuple[bytes, float]] = {}
        return Round(met.store, position, met.world_size, seats, self._before)

    # ------------------------------------------------------------ working

    def _work(self) -> None:
        """Starts this host's ranks."""
        current = self._round
        assert current is not None
        self._is_done = False
        self._contact.expect_nothing()
        self._ranks = Ranks(current.seats, self._log_name, self._plan.worker_args, self._logs)
        for number in STOPPING:  # torch elastic has put its own in their place
            signal.signal(number, _raise_stopped)
        if self._plan.max_hosts > 1:
            elsewhere = "" if current.position == 0 else f"; progress is shown on {self._plan.endpoint[0]}"
            seats = current.seats
            hosts = f"{current.num_hosts} host" + ("s" if current.num_hosts > 1 else "")
            print(f"{seats.describe()} of {seats.world_size} here, on {hosts}{elsewhere}", flush=True)

    def _watch(self, current: Round) -> Outcome:
        """Waits for the end of the round."""
        assert self._ranks is not None
        num_beats, next_news = 0, 0.0
        while True:
            time.sleep(POLL_S)
            statuses = self._ranks.exit_statuses()
            if any(status != 0 for status in statuses.values()):
                return self._settle(current)
            if len(statuses) == current.seats.num_here and not self._is_done:
                self._is_done = True
                current.store.add("done", 1)
            if time.monotonic() >= next_news:
                self._contact.expect_within(self._plan.silence_s)
                news = self._news(current, num_beats)
                if news is not None:
                    return news
                num_beats, next_news = num_beats + 1, time.monotonic() + NEWS_S

    def _settle(self, current: Round) -> Outcome:
        """The verdict on a fault that has shown on this host."""
        assert self._ranks is not None
        deadline = time.monotonic() + SETTLE_S
        while cause(self._ranks.faults()).kind == "lost_partner" and time.monotonic() < deadline:
            time.sleep(POLL_S)
        fault = cause(self._ranks.faults())
        if fault.kind == "lost_partner" and current.num_hosts > 1:
            deadline = time.monotonic() + VERDICT_S
            while not current.store.check(["verdict"]) and time.monotonic() < deadline:
                time.sleep(POLL_S)
        return self._post(current, judge(fault, current.before, max_restarts=self._plan.max_restarts))

    def _news(self, current: Round, num_beats: int) -> Outcome | None:
        """What the other hosts say, after telling them that this one is there."""
        assert self._ranks is not None
        current.store.set(f"beat/{current.position}", f"{num_beats} {self._ranks.places()[0]}")
        if current.store.check(["verdict"]):
            return Verdict.from_json(current.store.get("verdict"))
        if current.store.add("done", 0) == current.num_hosts:
            return "finished"
        if current.position == 0:
            fault = self._silent_host(current)
            if fault is not None:
                return self._post(current, judge(fault, current.before, max_restarts=self._plan.max_restarts))
        return "regroup" if self._handler.num_nodes_waiting() > 0 else None

    def _silent_host(self, current: Round) -> Fault | None:
        """A host whose beat has not changed for too long, if there is one."""
        now, plan = time.monotonic(), self._plan
        for position in range(1, current.num_hosts):
            key = f"beat/{position}"
            beat = current.store.get(key) if current.store.check([key]) else b""
            last, since_s = self._beats.get(position, (None, now))
            if beat != last:
                self._beats[position] = beat, now
            elif now - since_s > plan.silence_s:
                assert self._ranks is not None
                first = position * plan.num_processes
                ranks = dataclasses.replace(current.seats, first_rank=first).describe()
                place = self._ranks.places()[0]
                return Fault(
                    "silence",
                    f"the host of {ranks} has been silent for {plan.silence_s:g} s "
                    f"(launcher.hosts.silence_s): it is down, or cut off from {plan.where}. It was last "
                    f"heard of at {beat.decode().partition(' ')[2] or START}; rank 0 is at {place}",
                    place,
                )
        return None

    def _post(self, current: Round, verdict: Verdict) -> Verdict:
        """The one verdict of the round: this one, unless another host was first."""
        stored = current.store.compare_set("verdict", "", verdict.to_json())
        return Verdict.from_json(stored)

    def _tell_restart(self, verdict: Verdict) -> None:
        self._before = verdict
        if verdict.fault.kind == "departure":
            say(f"{verdict.fault.text}; going on from the last checkpoint")
        else:
            say(
                f"fault: {verdict.fault.text}\nrestart {verdict.num_restarts} of "
                f"{self._plan.max_restarts}, from the last checkpoint"
            )

    # ------------------------------------------------------------ ending

    def _end(self, verdict: Verdict | None) -> int:
        """Tells the others and people how the job ended (None: well); returns its exit code."""
        current = self._round
        self._contact.expect_within(FAREWELL_S)
        if current is not None:
            with contextlib.suppress(*BROKEN):
                self._close(verdict, current)
        self._contact.expect_nothing()
        if verdict is not None:
            prefix = "" if verdict.fault.kind == "departure" else "error: "
            say(f"{prefix}{verdict.fault.text}" + (f"\n{verdict.reason}" if verdict.reason else ""))
        self._stop_ranks(signal.SIGTERM)
        if current is not None and current.position == 0:
            self._wait_for_farewells(current)
        return 0 if verdict is None else verdict.fault.exit_code

    def _close(self, verdict: Verdict | None, current: Round) -> None:
        self._board.set("outcome", "" if verdict is None else verdict.to_json())
        self._handler.shutdown()
        if current.position > 0:
            self._board.add("farewells", 1)

    def _stored_outcome(self) -> Verdict | None:
        said = _read(self._board, "outcome")
        return Verdict.from_json(said) if said else None

    def _wait_for_farewells(self, current: Round) -> None:
        deadline = time.monotonic() + FAREWELL_S
        while self._board.add("farewells", 0) < current.num_hosts - 1 and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def _stop_ranks(self, number: signal.Signals) -> None:
        self._contact.expect_nothing()
        if self._ranks is not None:
            self._ranks.stop(number)
            self._ranks = None

    def _lose_contact(self) -> NoReturn:
        """Ends this host's ranks, since the store's host is gone or cut off, and starts this agent anew.

        Called from a thread of its own: a call into the store of a host that is cut off does not return.
        """
        with self._losing:
            plan, ranks, current = self._plan, self._ranks, self._round
            text = f"{plan.where} does not answer any more: that host is down, or this one is cut off from it"
            if ranks is not None and current is not None:
                first = current.seats.first_rank
                places = [
                    f"rank {first + index} was at {place}" for index, place in enumerate(ranks.places())
                ]
                text += f"; {', '.join(places)}"
            if plan.num_lost >= plan.max_restarts:
                say(f"error: {text}")
            else:
                say(f"fault: {text}\nrestart {plan.num_lost + 1} of {plan.max_restarts}, when it is back")
            if ranks is not None:
                ranks.stop(signal.SIGTERM)
            if plan.num_lost >= plan.max_restarts:
                os._exit(FAULT)
            arguments = [word for word in sys.argv[1:] if not word.startswith("--num-lost=")]
            words = [sys.executable, "-m", "metaloom.agent", f"--num-lost={plan.num_lost + 1}", *arguments]
            os.execv(sys.executable, words)


class Contact:
    """Notices that the main thread waits for too long for an answer, and acts in its place."""

    def __init__(self, on_silence: Callable[[], NoReturn]) -> None:
        self._on_silence = on_silence
        self._deadline = math.inf

    def start(self) -> None:
        """Begins to watch."""
        threading.Thread(target=self._watch, daemon=True).start()

    def expect_within(self, seconds: float) -> None:
        """From now on, the next call of this class must come within so many seconds."""
        self._deadline = time.monotonic() + seconds

    def expect_nothing(self) -> None:
        """The main thread is busy with what does not depend on others."""
        self._deadline = math.inf

    def _watch(self) -> None:
        while time.monotonic() < self._deadline:
            time.sleep(POLL_S)
        self._on_silence()


def say(text: str) -> None:
    """Tells people of a fault."""
    print(text, file=sys.stderr, flush=True)


def watch_parent(number: signal.Signals) -> None:
    """Sends this process a signal when the one that started it is gone, killed for instance."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()


def _tcp_store(endpoint: tuple[str, int], *, is_master: bool) -> TCPStore:
    return TCPStore(
        *endpoint,
        is_master=is_master,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=CONNECT_S),
    )


def _read(store: Store, key: str) -> bytes:
    """A value that another agent writes. Waits for it in steps, as `get` would hold up the heartbeat."""
    deadline = time.monotonic() + CONNECT_S
    while not store.check([key]):
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"no {key} within {CONNECT_S:g} s")
        time.sleep(POLL_S)
    value: bytes = store.get(key)
    return value


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise LaunchError(f"{path} cannot be made: {error.strerror or error}.") from error


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    raise SignalException(f"signal {number}", signal.Signals(number))


def _read_plan() -> Plan:
    parser = argparse.ArgumentParser(prog="python -m metaloom.agent")
    parser.add_argument("--num-processes", type=int, required=True)
    parser.add_argument("--max-restarts", type=int, required=True)
    parser.add_argument("--log-dir", type=Path, required=True)
    parser.add_argument("--digest", default="", help="of the recipe, which all hosts must share")
    parser.add_argument("--endpoint", default="127.0.0.1:0", help="HOST:PORT where the hosts meet")
    parser.add_argument("--address", default="127.0.0.1", help="of this host, for the others")
    parser.add_argument("--may-serve", action="store_true", help="the endpoint is this machine's")
    parser.add_argument("--min-hosts", type=int, default=1)
    parser.add_argument("--max-hosts", type=int, default=1)
    parser.add_argument("--wait-s", type=float, default=600.0)
    parser.add_argument("--silence-s", type=float, default=60.0)
    parser.add_argument("--num-lost", type=int, default=0, help="set by the agent itself")
    parser.add_argument("worker_args", nargs=argparse.REMAINDER, help="arguments of metaloom.worker")
    arguments = vars(parser.parse_args())
    host, _, port = arguments.pop("endpoint").rpartition(":")
    arguments["endpoint"] = (host.strip("[]"), int(port))
    arguments["worker_args"] = tuple(arguments["worker_args"])
    return Plan(**arguments)


if __name__ == "__main__":
    sys.exit(main())
