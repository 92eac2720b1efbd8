"""Starts the ranks of one host by torch elastic's rendezvous and processes: `python -m metaloom.agent ...`.

A job runs in rounds. In each, the agents of all hosts meet, agree on who runs which ranks, start them, and
watch them to their end. A fault ends the round: the agents agree on a verdict, and either meet for the next
round, in which the ranks go on from the last checkpoint, or end, all with the same message and exit code. A
host that comes or leaves ends a round too.

torchrun's own agent is not used: it tries a user's mistake again, counts restarts on each host apart, exits
with 1 whatever its workers say, tells one host's cause to no other, and hangs on a host that is cut off.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Literal, NoReturn

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std

from metaloom.errors import MetaloomError
from metaloom.faults import FAULT, NOT_SAVED, START_AGAIN, Fault, Verdict, cause, judge
from metaloom.meeting import BROKEN, FAREWELL_S, POLL_S, JobOver, Meeting, Round, Terms
from metaloom.processes import watch_parent
from metaloom.ranks import STOP_S, Ranks

NEWS_S = 1.0  # how often an agent asks what the others say
SETTLE_S = 1.0  # how long a rank's cause may take to show after a partner's loss
VERDICT_S = 3.0  # how long an agent whose ranks lost a partner waits for the cause from another host
MARGIN_S = 5.0  # what an agent grants its ranks beyond the time that they have to stop
AT_ONCE_S = 2  # how long ranks have to end that are not to wait for anything
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

Outcome = Verdict | Literal["finished", "regroup"]


def main() -> int:
    """Runs this host's part of the job to its end; returns the exit code of the job."""
    arguments = _parse()
    logging.disable(logging.ERROR)  # torch elastic tells at length what is told here in a line
    # Torch elastic gives each round a store of its own then; else it never tells a host that joins late
    # which one to take, and that host waits in vain.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    _take_signals()
    watch_parent(signal.SIGTERM)
    agent = Agent(
        _terms(arguments),
        arguments.worker_args,
        max_restarts=arguments.max_restarts,
        num_lost=arguments.num_lost,
        shows_all_ranks=arguments.show_all_ranks,
    )
    try:
        return agent.run()
    except MetaloomError as error:
        say(f"error: {error}")
        return error.exit_code
    except SignalException as stopped:
        try:
            return agent.leave(stopped.sigval)
        except SignalException as again:
            for number in STOPPING:
                signal.signal(number, signal.SIG_IGN)
            return agent.leave_at_once(again.sigval)


class Agent:
    """One host's part in a job.

    Args:
        terms: on which the hosts meet.
        worker_args: arguments of `metaloom.worker`.
        max_restarts: restarts that faults may cost.
        num_lost: how often this agent has lost the store's host and started anew.
        shows_all_ranks: whether it prints what its ranks print, each line after its rank.
    """

    def __init__(
        self,
        terms: Terms,
        worker_args: list[str],
        *,
        max_restarts: int,
        num_lost: int,
        shows_all_ranks: bool,
    ) -> None:
        self._terms = terms
        self._shows_all_ranks = shows_all_ranks
        self._worker_args = worker_args
        self._max_restarts = max_restarts
        self._num_lost = num_lost
        self._meeting: Meeting | None = None
        self._round: Round | None = None
        self._ranks: Ranks | None = None
        self._is_done = False
        self._farewell_text = ""
        self._exit_code: int | None = None  # of a job that has ended, which nothing shall start anew
        self._watchman = Watchman(self._start_anew)
        self._starting_anew = threading.Lock()

    def run(self) -> int:
        """Runs rounds until the job has ended; returns its exit code.

        Raises:
            MetaloomError: the hosts do not come together.
        """
        terms = self._terms
        try:
            self._watchman.expect_within(terms.wait_s + terms.silence_s)
            self._meeting = meeting = Meeting(terms)
            if meeting.serves:
                self._watchman.retire()  # a store of this process always answers
            logs = self._logs(meeting)
            before: Verdict | None = None
            while True:
                self._watchman.expect_within(terms.wait_s + terms.silence_s)
                try:
                    self._round = current = meeting.next_round(before)
                except JobOver:
                    return self._end(meeting, meeting.outcome())
                self._start_ranks(current, logs, meeting.job)
                outcome = self._watch(meeting, current)
                if outcome == "finished":
                    return self._end(meeting, None)
                before = current.before
                if outcome != "regroup":
                    if outcome.is_end:
                        return self._end(meeting, outcome)
                    self._tell_restart(outcome)
                    before = outcome
                self._stop_ranks()
        except BROKEN:
            if self._is_done:
                return 0  # so were the others, and the store's host is gone
            self._start_anew()

    def leave(self, number: signal.Signals) -> int:
        """Ends this host's part, since a signal asks for it; returns the exit code.

        Its ranks have all others stop and save what they did; another signal ends them at once. SIGINT is a
        person's wish, and ends the job on all hosts; on one that only waits to join, it does not. By another
        signal this host leaves: the others go on if they are enough and the store's host is among them.
        """
        code = START_AGAIN if number == signal.SIGTERM else 128 + int(number)
        self._exit_code = code
        verdict, num_others = self._farewell(number, code)
        if self._ranks is not None:
            say(f"{number.name}: stopping, with what was done saved; another signal stops at once")
            if verdict is not None and self._round is not None and num_others:
                with contextlib.suppress(*BROKEN):
                    self._round.announce(verdict)
            self._wait_for_stop(self._ranks, number)
        return self._leave(verdict, num_others, code)

    def leave_at_once(self, number: signal.Signals) -> int:
        """As `leave`, without waiting for anything to be saved."""
        code = 128 + int(number)
        self._exit_code = code
        verdict, num_others = self._farewell(number, code)
        self._stop_ranks(AT_ONCE_S)
        return self._leave(verdict, num_others, code)

    def _farewell(self, number: signal.Signals, code: int) -> tuple[Verdict | None, int]:
        """What the departure means for the others, None where they need not know of it; and how many they
        are."""
        meeting, current = self._meeting, self._round
        self._watchman.expect_within(FAREWELL_S)
        num_others, is_in = 0, False
        if meeting is not None:
            with contextlib.suppress(*BROKEN):
                num_others, is_in = meeting.attendance()
        if current is not None:
            num_others, is_in = max(num_others, current.num_hosts - 1), True
        text = f"stopped by {number.name}" + (f" on {self._terms.address}" if num_others else "")
        self._watchman.expect_nothing()
        fault = Fault("departure", text, "", code)
        verdict = None if current is None else self._judge(fault, current)
        if (number == signal.SIGINT and is_in) or (meeting is not None and meeting.serves):
            verdict = Verdict(fault, is_end=True, num_restarts=0)
        self._farewell_text = text
        return verdict, num_others

    def _wait_for_stop(self, ranks: Ranks, number: signal.Signals) -> None:
        """Waits until the ranks have saved what they did and ended, for as long as they may take."""
        ranks.ask(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
        deadline = time.monotonic() + self._terms.stop_within_s + MARGIN_S
        next_news = 0.0
        while len(ranks.exit_statuses()) < ranks.seats.num_here and time.monotonic() < deadline:
            time.sleep(POLL_S)
            if self._round is not None and self._round.num_hosts > 1 and time.monotonic() >= next_news:
                with contextlib.suppress(*BROKEN):
                    self._round.beat(ranks.places()[0], ranks.seen())
                next_news = time.monotonic() + NEWS_S
        for fault in ranks.faults():
            if fault.kind == "stopped" and NOT_SAVED in fault.text:
                self._farewell_text = fault.text

    def _leave(self, verdict: Verdict | None, num_others: int, code: int) -> int:
        meeting, current = self._meeting, self._round
        self._watchman.expect_within(FAREWELL_S)
        if meeting is not None and num_others and verdict is not None:
            with contextlib.suppress(*BROKEN):
                if current is not None:
                    current.post(verdict)
                if verdict.is_end:
                    meeting.close(verdict)
        say(self._farewell_text)
        self._stop_ranks()
        if meeting is not None and meeting.serves:
            meeting.wait_for_farewells(num_others)
        return code

    # ------------------------------------------------------------ one round

    def _logs(self, meeting: Meeting) -> DefaultLogsSpecs:
        """Where the ranks' output goes: rank 0's standard output is the command's, all else to files; or all
        to files, and from there to the command's."""
        folder = self._terms.log_dir / (meeting.job if self._terms.max_hosts > 1 else "")
        redirects = dict.fromkeys(range(self._terms.num_processes), Std.ALL)
        if self._shows_all_ranks:
            return DefaultLogsSpecs(str(folder), redirects=redirects, tee=redirects)
        if meeting.serves:
            redirects[0] = Std.ERR
        return DefaultLogsSpecs(str(folder), redirects=redirects)

    def _start_ranks(self, current: Round, logs: DefaultLogsSpecs, job: str) -> None:
        self._watchman.expect_nothing()
        self._is_done = False
        name = job if self._terms.max_hosts == 1 else self._terms.address
        self._ranks = Ranks(current.seats, name, job, self._worker_args, logs)
        _take_signals()  # torch elastic has put its own in their place
        if self._terms.max_hosts > 1:
            hosts = f"{current.num_hosts} host" + ("s" if current.num_hosts > 1 else "")
            elsewhere = f"; progress is shown on {self._terms.endpoint[0]}" if current.position else ""
            seats = current.seats
            print(f"{seats.describe()} of {seats.world_size} here, on {hosts}{elsewhere}", flush=True)

    def _watch(self, meeting: Meeting, current: Round) -> Outcome:
        """Waits for the end of the round."""
        assert self._ranks is not None
        next_news = 0.0
        while True:
            time.sleep(POLL_S)
            statuses = self._ranks.exit_statuses()
            if any(status != 0 for status in statuses.values()):
                return self._settle(current, self._ranks)
            if len(statuses) == current.seats.num_here and not self._is_done:
                self._is_done = True
                current.say_done()
            if time.monotonic() >= next_news:
                self._watchman.expect_within(self._terms.silence_s)
                news = self._news(meeting, current, self._ranks)
                if news is not None:
                    return news
                next_news = time.monotonic() + NEWS_S

    def _settle(self, current: Round, ranks: Ranks) -> Verdict:
        """The verdict on a fault that has shown on this host."""
        deadline = time.monotonic() + SETTLE_S
        while cause(ranks.faults()).kind == "lost_partner" and time.monotonic() < deadline:
            time.sleep(POLL_S)
        fault = cause(ranks.faults())
        if fault.kind == "lost_partner" and current.num_hosts > 1:
            deadline = time.monotonic() + VERDICT_S
            while current.verdict() is None and time.monotonic() < deadline:
                time.sleep(POLL_S)
            elsewhere = current.seen_elsewhere()
            if elsewhere:
                fault = dataclasses.replace(fault, text=f"{fault.text}; on other hosts: {elsewhere}")
        if fault.kind == "stopped":
            # All ranks have stopped; a host that leaves has said whether the others go on.
            announced = current.announced()
            if announced is not None:
                return current.post(announced)
        return current.post(self._judge(fault, current))

    def _news(self, meeting: Meeting, current: Round, ranks: Ranks) -> Outcome | None:
        """What the other hosts say, after telling them that this one is there."""
        here = ranks.places()[0]
        current.beat(here, ranks.seen())
        verdict = current.verdict()
        if verdict is not None:
            return verdict
        if current.all_are_done():
            return "finished"
        if meeting.is_over():
            return meeting.outcome() or "finished"
        silent = current.silent_host(self._terms.silence_s) if meeting.serves else None
        if silent is not None:
            seats, place = silent
            text = (
                f"the host of {seats.describe()} has been silent for {self._terms.silence_s:g} s "
                f"(launcher.hosts.silence_s): it is down, or cut off from {self._terms.where}. It was last "
                f"heard of at {place}; rank 0 is at {here}"
            )
            return current.post(self._judge(Fault("silence", text, here), current))
        return "regroup" if meeting.has_newcomers() else None

    def _judge(self, fault: Fault, current: Round) -> Verdict:
        return judge(fault, current.before, max_restarts=self._max_restarts)

    def _tell_restart(self, verdict: Verdict) -> None:
        if verdict.fault.kind == "departure":
            say(f"{verdict.fault.text}; going on from the last checkpoint")
            return
        count = f"restart {verdict.num_restarts} of {self._max_restarts}"
        say(f"fault: {verdict.fault.text}\n{count}, from the last checkpoint")

    def _stop_ranks(self, within_s: int = STOP_S) -> None:
        self._watchman.expect_nothing()
        if self._ranks is not None:
            self._ranks.stop(within_s)
            self._ranks = None

    # ------------------------------------------------------------ ending

    def _end(self, meeting: Meeting, verdict: Verdict | None) -> int:
        """Tells the others and people how the job ended (None: well); returns its exit code."""
        self._exit_code = 0 if verdict is None else verdict.fault.exit_code
        if verdict is not None:
            prefix = "" if verdict.fault.kind in ("departure", "stopped") else "error: "
            say(f"{prefix}{verdict.fault.text}" + (f"\n{verdict.reason}" if verdict.reason else ""))
        self._watchman.expect_within(FAREWELL_S)
        with contextlib.suppress(*BROKEN):
            meeting.close(verdict)
        self._stop_ranks()
        if meeting.serves and self._round is not None:
            is_one_lost = verdict is not None and verdict.fault.kind == "silence"
            meeting.wait_for_farewells(self._round.num_hosts - 1 - is_one_lost)
        return self._exit_code

    def _start_anew(self) -> NoReturn:
        """Ends this host's ranks, since the store's host is gone or cut off, and starts this agent anew.

        Called by the watchman too, while the main thread is caught in a call that does not return: so
        this process is replaced by another.
        """
        with self._starting_anew:
            ranks, current = self._ranks, self._round
            if self._exit_code is not None:
                if ranks is not None:
                    ranks.stop()
                os._exit(self._exit_code)
            where = self._terms.where
            text = f"{where} does not answer any more: that host is down, or this one is cut off from it"
            if ranks is not None and current is not None:
                first = current.seats.first_rank
                places = [f"rank {first + index} was at {at}" for index, at in enumerate(ranks.places())]
                text += f"; {', '.join(places)}"
            is_end = self._num_lost >= self._max_restarts
            count = f"restart {self._num_lost + 1} of {self._max_restarts}"
            say(f"error: {text}" if is_end else f"fault: {text}\n{count}, when it is back")
            if ranks is not None:
                ranks.stop()
            if is_end:
                os._exit(FAULT)
            arguments = [word for word in sys.argv[1:] if not word.startswith("--num-lost=")]
            words = [f"--num-lost={self._num_lost + 1}", *arguments]
            os.execv(sys.executable, [sys.executable, "-m", "metaloom.agent", *words])


class Watchman:
    """Acts in place of the main thread when that waits for too long for an answer."""

    def __init__(self, act: Callable[[], NoReturn]) -> None:
        self._act = act
        self._deadline = math.inf
        self._is_retired = False
        threading.Thread(target=self._watch, daemon=True).start()

    def expect_within(self, seconds: float) -> None:
        """From now on, the next call of this object must come within so many seconds."""
        self._deadline = time.monotonic() + seconds

    def expect_nothing(self) -> None:
        """The main thread is busy with what does not depend on others."""
        self._deadline = math.inf

    def retire(self) -> None:
        """Stops watching."""
        self._is_retired = True

    def _watch(self) -> None:
        while not self._is_retired:
            if time.monotonic() > self._deadline:
                self._act()
            time.sleep(POLL_S)


def say(text: str) -> None:
    """Tells people of a fault."""
    print(text, file=sys.stderr, flush=True)


def _take_signals() -> None:
    for number in STOPPING:
        signal.signal(number, _raise_stopped)


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    raise SignalException(f"signal {number}", signal.Signals(number))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m metaloom.agent")
    parser.add_argument("--num-processes", type=int, required=True, help="ranks on this host")
    parser.add_argument("--max-restarts", type=int, required=True, help="restarts that faults may cost")
    parser.add_argument("--log-dir", type=Path, required=True, help="where the ranks' output goes")
    parser.add_argument("--digest", required=True, help="of the recipe, which all hosts must share")
    parser.add_argument("--endpoint", default="127.0.0.1:0", help="HOST:PORT where the hosts meet")
    parser.add_argument("--address", default="127.0.0.1", help="of this host, for the others")
    parser.add_argument("--may-serve", action="store_true", help="the endpoint is this machine's")
    parser.add_argument("--min-hosts", type=int, default=1, help="hosts without which the job waits")
    parser.add_argument("--max-hosts", type=int, default=1, help="hosts that the job runs on at most")
    parser.add_argument("--wait-s", type=float, default=600.0, help="how long to wait for min-hosts")
    parser.add_argument("--silence-s", type=float, default=60.0, help="when a host counts as lost")
    parser.add_argument("--stop-within-s", type=float, default=25.0, help="how long ranks take to stop")
    parser.add_argument("--index", type=int, default=0, help="of this host, by which ranks are given out")
    parser.add_argument("--own-folders", action="store_true", help="each host has a run folder of its own")
    parser.add_argument("--show-all-ranks", action="store_true", help="print what all ranks print")
    parser.add_argument("--num-lost", type=int, default=0, help="set by the agent itself")
    parser.add_argument("worker_args", nargs=argparse.REMAINDER, help="arguments of metaloom.worker")
    return parser.parse_args()


def _terms(arguments: argparse.Namespace) -> Terms:
    host, _, port = arguments.endpoint.rpartition(":")
    return Terms(
        endpoint=(host.strip("[]"), int(port)),
        address=arguments.address,
        may_serve=arguments.may_serve,
        min_hosts=arguments.min_hosts,
        max_hosts=arguments.max_hosts,
        wait_s=arguments.wait_s,
        silence_s=arguments.silence_s,
        num_processes=arguments.num_processes,
        digest=arguments.digest,
        log_dir=arguments.log_dir,
        stop_within_s=arguments.stop_within_s,
        index=arguments.index,
        has_own_folder=arguments.own_folders,
    )


if __name__ == "__main__":
    sys.exit(main())
