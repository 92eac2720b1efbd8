"""What ends a job and what costs it a restart, decided without a process."""

from pathlib import Path

import pytest

from metaloom.faults import Fault, FaultKind, Verdict, cause, judge, rank_fault
from metaloom.whereabouts import END, START, Failure, Whereabouts, last_failure, last_place


def fault(kind: FaultKind = "crash", place: str = "outer step 3", exit_code: int = 1) -> Fault:
    return Fault(kind, "a text", place, exit_code)


def test_what_a_rank_said_is_the_cause_before_what_its_partners_suffered() -> None:
    kinds: list[FaultKind] = ["lost_partner", "silence", "crash", "defect"]
    faults = [fault(kind) for kind in kinds]
    assert cause(faults).kind == "defect"
    assert cause(faults[:3]).kind == "crash"
    assert cause(faults[:2]).kind == "silence"
    # Of two that are alike, the first is.
    assert cause([fault(place="here"), fault(place="there")]).place == "here"


@pytest.mark.parametrize("kind", ["defect", "crash", "silence", "lost_partner"])
def test_a_fault_costs_a_restart_and_as_many_are_taken_as_allowed(kind: FaultKind) -> None:
    first = judge(fault(kind, "outer step 3"), None, max_restarts=2)
    second = judge(fault(kind, "outer step 5"), first, max_restarts=2)
    third = judge(fault(kind, "outer step 7"), second, max_restarts=2)
    assert [(each.is_end, each.num_restarts) for each in (first, second, third)] == [
        (False, 1),
        (False, 2),
        (True, 2),
    ]
    assert third.reason == "There were 2 restarts before, as many as launcher.max_restarts allows."
    assert judge(fault(kind), None, max_restarts=0) == Verdict(fault(kind), is_end=True, num_restarts=0)


def test_a_fault_at_the_place_of_the_one_before_ends_the_job() -> None:
    first = judge(fault(), None, max_restarts=3)
    again = judge(fault("lost_partner"), first, max_restarts=3)
    assert again.is_end
    assert again.reason == "It is the second fault in a row at outer step 3, so it is not tried again."
    between = judge(fault(place="outer step 4"), first, max_restarts=3)
    assert not judge(fault(), between, max_restarts=3).is_end


def test_a_mistake_is_not_tried_again_and_keeps_its_exit_code() -> None:
    verdict = judge(fault("mistake", exit_code=3), None, max_restarts=3)
    assert (verdict.is_end, verdict.reason, verdict.fault.exit_code) == (True, "", 3)


def test_a_host_that_leaves_costs_no_restart() -> None:
    before = judge(fault(), None, max_restarts=1)
    left = judge(Fault("departure", "stopped", "", 143), before, max_restarts=1)
    assert (left.is_end, left.num_restarts) == (False, 1)
    assert judge(fault(place="outer step 9"), left, max_restarts=1).is_end  # the one restart was taken


def test_a_verdict_survives_its_way_to_other_hosts() -> None:
    verdict = judge(fault("mistake", exit_code=4), None, max_restarts=3)
    assert Verdict.from_json(verdict.to_json().encode()) == verdict


def test_a_rank_is_named_with_its_place_and_its_end() -> None:
    killed = rank_fault(None, "", rank=5, place="outer step 3", exit_status="SIGKILL", output="logs/5")
    assert killed.text == "rank 5 was killed by SIGKILL at outer step 3; its output is in logs/5"
    ended = rank_fault(None, "", rank=5, place=START, exit_status=9, output="logs/5")
    assert ended.text == "rank 5 ended with exit code 9 at the start; its output is in logs/5"
    assert (killed.kind, ended.kind, ended.exit_code) == ("crash", "crash", 1)


def test_whereabouts_are_read_after_their_rank_is_gone(tmp_path: Path) -> None:
    assert (last_place(tmp_path), last_failure(tmp_path)) == (START, None)
    whereabouts = Whereabouts(tmp_path)
    assert last_place(tmp_path) == START
    whereabouts.enter("outer step 1000 of a long name")
    whereabouts.enter("outer step 7")
    assert last_place(tmp_path) == whereabouts.text == "outer step 7"
    whereabouts.record(Failure("defect", "a text\nof two lines"))
    assert last_failure(tmp_path) == Failure("defect", "a text\nof two lines")
    nowhere = Whereabouts()
    nowhere.enter(END)
    nowhere.record(Failure("defect", "not kept"))
    assert nowhere.text == END
