"""Hosts that meet: real stores and rendezvous, each host a thread of this process."""

import dataclasses
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from metaloom.errors import LaunchError, RecipeError
from metaloom.faults import Fault, Verdict
from metaloom.meeting import JobOver, Meeting, Round, Terms


@pytest.fixture
def terms(tmp_path: Path) -> Terms:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    return Terms(
        endpoint=("127.0.0.1", port),
        address="127.0.0.9",  # torch elastic sorts hosts by it
        may_serve=True,
        min_hosts=2,
        max_hosts=2,
        wait_s=20.0,
        silence_s=4.0,
        num_processes=3,
        stop_within_s=25.0,
        digest="abc",
        log_dir=tmp_path / "run" / "logs",
    )


def other(terms: Terms, digest: str = "abc", log_dir: Path | None = None, wait_s: float = 20.0) -> Terms:
    """The terms of a host that comes later."""
    return dataclasses.replace(
        terms,
        address="127.0.0.1",
        may_serve=False,
        digest=digest,
        log_dir=log_dir or terms.log_dir,
        wait_s=wait_s,
    )


def test_a_host_that_serves_does_not_look_for_itself_where_its_name_leads(terms: Terms) -> None:
    """A name may lead to the address that the host had before it was replaced."""
    gone = dataclasses.replace(terms, endpoint=("no-such-host.invalid", terms.endpoint[1]), min_hosts=1)
    meeting = Meeting(gone)
    assert meeting.serves
    assert Meeting(other(terms)).job == meeting.job


def meet(first: Meeting, second: Meeting, before: Verdict | None = None) -> tuple[Round, Round]:
    with ThreadPoolExecutor(2) as threads:
        mine = threads.submit(first.next_round, before)
        theirs = threads.submit(second.next_round, None)
        return mine.result(), theirs.result()


def test_hosts_agree_on_ranks_on_one_verdict_and_on_the_end(terms: Terms) -> None:
    first, second = Meeting(terms), Meeting(other(terms))
    assert (first.serves, second.serves, second.job) == (True, False, first.job)
    mine, theirs = meet(first, second)
    # Rank 0 is where the store is, whatever the addresses are.
    assert (mine.seats.first_rank, theirs.seats.first_rank) == (0, 3)
    assert mine.seats.world_size == theirs.seats.world_size == 6
    assert theirs.seats.store == terms.endpoint
    assert mine.seats.store == (terms.address, terms.endpoint[1])
    assert theirs.seats.describe() == "ranks 3 to 5"
    one = Verdict(Fault("crash", "one", "outer step 1"), is_end=False, num_restarts=1)
    two = Verdict(Fault("crash", "two", "outer step 1"), is_end=False, num_restarts=1)
    assert mine.verdict() is None
    assert (theirs.post(two), mine.post(one), mine.verdict()) == (two, two, two)
    # The next round is another one, in which a host that came late knows of the fault before.
    mine, theirs = meet(first, second, before=two)
    assert (mine.seats.round_number, theirs.seats.round_number) == (1, 1)
    assert (mine.verdict(), theirs.before) == (None, two)
    mine.say_done()
    assert not mine.all_are_done()
    theirs.say_done()
    assert mine.all_are_done()
    first.close(one)
    with pytest.raises(JobOver):
        second.next_round(None)
    assert second.outcome() == one
    second.close(one)
    first.wait_for_farewells(1)


def test_a_host_is_silent_when_its_beat_does_not_change(terms: Terms) -> None:
    first, second = Meeting(terms), Meeting(other(terms))
    mine, theirs = meet(first, second)

    def silent_after(beat: Callable[[], None]) -> list[tuple[int, str]]:
        found = []
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            mine.beat("outer step 5", "rank 0 at outer step 5")
            beat()
            silent = mine.silent_host(0.5)
            if silent is not None:
                found.append((silent[0].first_rank, silent[1]))
        return found

    assert silent_after(lambda: theirs.beat("outer step 4", "")) == []
    assert set(silent_after(lambda: None)) == {(3, "outer step 4")}
    first.close(None)
    assert second.outcome() is None
    second.close(None)


def test_a_host_of_another_job_is_refused(terms: Terms, tmp_path: Path) -> None:
    meeting = Meeting(terms)
    with pytest.raises(RecipeError, match=r"not that of the job at 127\.0\.0\.1:[0-9]+ \(digest abd here"):
        Meeting(other(terms, digest="abd"))
    with pytest.raises(LaunchError, match=r"elsewhere is not the folder that the host at 127\."):
        Meeting(other(terms, log_dir=tmp_path / "elsewhere" / "logs", wait_s=0.1))
    assert meeting.serves


def test_hosts_that_do_not_come_are_told_of(terms: Terms) -> None:
    with pytest.raises(LaunchError, match=r"nothing answers at 127\.0\.0\.1:[0-9]+ within 0\.1 s \("):
        Meeting(other(terms, wait_s=0.1))
    lonely = Meeting(dataclasses.replace(terms, wait_s=1.0))
    with pytest.raises(LaunchError, match=r"fewer than 2 hosts \(launcher.hosts.min_hosts\) have come"):
        lonely.next_round(None)


def test_a_machine_on_which_no_port_can_be_opened_says_so(terms: Terms) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        endpoint = ("127.0.0.1", taken.getsockname()[1])
        alone = dataclasses.replace(terms, endpoint=endpoint, min_hosts=1, max_hosts=1)
        with pytest.raises(LaunchError, match="this machine's ranks cannot be joined: "):
            Meeting(alone)


def test_ranks_follow_the_indices_of_hosts(terms: Terms) -> None:
    terms = dataclasses.replace(terms, min_hosts=3, max_hosts=3, index=2, address="127.0.0.3")
    first = Meeting(terms)
    indices = {"127.0.0.1": 1, "127.0.0.2": 0}
    others = [
        Meeting(dataclasses.replace(terms, may_serve=False, address=address, index=index))
        for address, index in indices.items()
    ]
    with ThreadPoolExecutor(3) as threads:
        rounds = list(threads.map(lambda meeting: meeting.next_round(None), [first, *others]))
    # Rank 0 is where the store is, and the others are in the order of their indices, not of their addresses.
    assert [each.seats.first_rank for each in rounds] == [0, 6, 3]
    first.close(None)
    for meeting in others:
        meeting.close(None)


def test_a_host_with_a_folder_of_its_own_makes_one_for_its_logs(terms: Terms, tmp_path: Path) -> None:
    first = Meeting(dataclasses.replace(terms, has_own_folder=True))
    own = dataclasses.replace(other(terms, log_dir=tmp_path / "own" / "logs"), has_own_folder=True)
    second = Meeting(own)
    assert (own.log_dir / second.job).is_dir()
    assert second.job == first.job
