"""What ends the work of a job's ranks, and what follows: a restart from the last checkpoint, or the end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Literal

from metaloom.whereabouts import FailureKind

# In the order in which they are blamed: what a rank said, ranks that were killed, a wish to stop, ranks and
# hosts that miss others. `departure`: a host leaves on purpose.
FaultKind = Literal["departure", "mistake", "defect", "crash", "stopped", "silence", "lost_partner"]
_BLAMED: dict[FaultKind, int] = {
    "departure": 0,
    "mistake": 1,
    "defect": 1,
    "crash": 2,
    "stopped": 3,
    "silence": 4,
    "lost_partner": 5,
}
FAULT = 1  # the exit code of what is no mistake of the user
# The exit code of a job that was asked to stop and would go on where it was: EX_TEMPFAIL of sysexits.h.
START_AGAIN = 75
NOT_SAVED = "not saved within"  # what a rank says that had too little time


@dataclasses.dataclass(frozen=True)
class Fault:
    """Something that ended the work of the ranks.

    Attributes:
        kind: what kind of thing it is.
        text: what to tell people; it names rank and step.
        place: where in the job it came, as `Whereabouts` has it.
        exit_code: of the job, should it end by this.
    """

    kind: FaultKind
    text: str
    place: str
    exit_code: int = FAULT


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What all hosts of a job do about a fault.

    Attributes:
        fault: the cause.
        is_end: whether the job ends by it; if not, the ranks start again from the last checkpoint.
        num_restarts: restarts so far that faults have cost, this one included.
        reason: why it ends, where that needs to be said.
    """

    fault: Fault
    is_end: bool
    num_restarts: int
    reason: str = ""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> Verdict:
        values = json.loads(text)
        return Verdict(**values | {"fault": Fault(**values["fault"])})


def cause(faults: Sequence[Fault]) -> Fault:
    """The fault that the others follow from, of those found together: by kind, then the first."""
    return min(faults, key=lambda fault: _BLAMED[fault.kind])


def judge(fault: Fault, before: Verdict | None, *, max_restarts: int) -> Verdict:
    """Whether a fault is worth a restart.

    A mistake of the user is not: it would come again; nor is a wish to stop. Nor is what comes a second time
    in a row at the same place. A host that leaves costs no restart.

    Args:
        before: the verdict of the fault before this one.
        max_restarts: restarts that a job may take.
    """
    num_restarts = 0 if before is None else before.num_restarts
    if fault.kind == "departure":
        return Verdict(fault, is_end=False, num_restarts=num_restarts)
    if fault.kind in ("mistake", "stopped") or max_restarts == 0:
        return Verdict(fault, is_end=True, num_restarts=num_restarts)
    if before is not None and before.fault.place == fault.place:  # a departure has no place
        reason = f"It is the second fault in a row at {fault.place}, so it is not tried again."
        return Verdict(fault, is_end=True, num_restarts=num_restarts, reason=reason)
    if num_restarts >= max_restarts:
        were = "was 1 restart" if num_restarts == 1 else f"were {num_restarts} restarts"
        reason = f"There {were} before, as many as launcher.max_restarts allows."
        return Verdict(fault, is_end=True, num_restarts=num_restarts, reason=reason)
    return Verdict(fault, is_end=False, num_restarts=num_restarts + 1)


def rank_fault(
    kind: FailureKind | None, text: str, *, rank: int, place: str, exit_status: int | str, output: str
) -> Fault:
    """The fault of one rank that ended by itself.

    Args:
        kind: of the failure that it recorded, with its `text`; None where it recorded none.
        exit_status: its exit code, or the name of the signal that ended it.
        output: where it wrote.
    """
    if kind is None:
        how = "was killed by" if isinstance(exit_status, str) else "ended with exit code"
        return Fault("crash", f"rank {rank} {how} {exit_status} at {place}; its output is in {output}", place)
    if kind in ("mistake", "stopped"):
        assert isinstance(exit_status, int)
        return Fault(kind, text, place, exit_status)
    said = f"rank {rank} at {place}: {text}"
    if kind == "lost_partner":
        return Fault("lost_partner", said, place)
    said += f"\nThis is a defect or a fault of rank {rank}; the traceback is in {output}"
    return Fault("defect", said, place)
