"""What the last lines of a run's log tell: progress, when it was last heard of, restarts, the error."""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Sequence

from metaloom.k8s.wording import time_of

_STAMPED = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\S*) ?(.*)", re.DOTALL)
_RANK = re.compile(r"\[rank (\d+)\] ?")
_STEP = re.compile(r"([\w -]+): (?:(done:|stopped after) )?(\d+)(?: of (\d+))? steps?\b(.*)")
_RESUMED = re.compile(r"resumed after outer step (\d+) of (\d+)")
_LEFT = re.compile(r"((?:\d+ h )?(?:\d+ min)?(?: ?[\d.]+ s)?) left$")
_UNITS = re.compile(r"([\d.]+) (h|min|s)")
_UNIT_S = {"h": 3600.0, "min": 60.0, "s": 1.0}
_RESTART = re.compile(r"restart (\d+) of (\d+), ")
NUM_ERROR_LINES = 12

# A run tells of itself whenever 10 s and 5 % of its steps have both passed; what is longer silent than
# several such intervals, or than the start of a run may take, is worth a look.
TOLD_S = 10.0
TOLD_SHARE = 0.05
NUM_INTERVALS = 3
PATIENCE_S = 600.0


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a phase of a run has come.

    Attributes:
        phase: `pretrain` or `meta-train`.
        step: steps done; None where the phase has begun and told of none yet.
        left_s: seconds to its end, as of `told_at`.
        told_at: when the line was written; None where the log has no times.
        eta: when it ends if it goes on like this.
        is_ended: whether the phase is over.
    """

    phase: str
    step: int | None
    total: int | None
    left_s: float | None = None
    told_at: datetime.datetime | None = None
    eta: datetime.datetime | None = None
    is_ended: bool = False


@dataclasses.dataclass(frozen=True)
class Heartbeat:
    """What the last lines of a log tell.

    Attributes:
        progress: by the newest line that tells of steps.
        heard_at: when the newest line was written.
        fault: the newest that the run goes on after; "" for none.
        restart: the newest restart inside the pods, and how many there may be.
        is_restarting: whether nothing has been told since that restart.
        error: the lines of the error that ended the run.
        num_lines: lines in all.
    """

    progress: Progress | None = None
    heard_at: datetime.datetime | None = None
    fault: str = ""
    restart: tuple[int, int] | None = None
    is_restarting: bool = False
    error: tuple[str, ...] = ()
    num_lines: int = 0


def read_heartbeat(lines: Sequence[str]) -> Heartbeat:
    """What the last lines of the log of the node of rank 0 tell.

    Args:
        lines: oldest first, each with or without the time at which it was written (RFC 3339).
    """
    beat = Heartbeat(num_lines=len(lines))
    is_error = False
    for line in lines:
        at, rank, text = _parts(line)
        if at is not None:
            beat = dataclasses.replace(beat, heard_at=at)
        if text.startswith("error: "):
            beat, is_error = dataclasses.replace(beat, error=(text.removeprefix("error: "),)), True
            continue
        if is_error and text and rank is None and len(beat.error) < NUM_ERROR_LINES:
            beat = dataclasses.replace(beat, error=(*beat.error, text))
            continue
        if text.startswith("fault: "):
            beat = dataclasses.replace(beat, fault=text.removeprefix("fault: "))
            continue
        restart = _RESTART.match(text)
        if restart is not None:
            numbers = (int(restart[1]), int(restart[2]))
            beat = dataclasses.replace(beat, restart=numbers, is_restarting=True)
        progress = _progress(text, at, beat.progress) if rank in (None, 0) else None
        if progress is not None:
            beat = dataclasses.replace(beat, progress=progress, is_restarting=False, error=())
            is_error = False
    return beat


def allowed_silence_s(progress: Progress | None) -> float:
    """How long a run that goes well may say nothing."""
    if progress is None or progress.left_s is None or progress.total is None or progress.step is None:
        return PATIENCE_S
    step_s = progress.left_s / max(1, progress.total - progress.step)
    interval_s = max(TOLD_S, TOLD_SHARE * progress.total * step_s, step_s)
    return max(PATIENCE_S, NUM_INTERVALS * interval_s)


def _parts(line: str) -> tuple[datetime.datetime | None, int | None, str]:
    """When a line was written, by which rank, and what it says."""
    stamped = _STAMPED.fullmatch(line)
    at = None if stamped is None else time_of(stamped[1])
    text = line if stamped is None or at is None else stamped[2]
    by = _RANK.match(text)
    return at, None if by is None else int(by[1]), (text if by is None else text[by.end() :]).rstrip()


def _progress(text: str, at: datetime.datetime | None, before: Progress | None) -> Progress | None:
    """What a line tells of steps; None if nothing."""
    resumed = _RESUMED.fullmatch(text)
    if resumed is not None:
        return Progress("meta-train", int(resumed[1]), int(resumed[2]), told_at=at)
    found = _STEP.match(text)
    if found is None:
        return None
    phase, end, number, total, rest = found.groups()
    if end is not None:
        known = before.total if before is not None and before.phase == phase else None
        of = int(total) if total is not None else int(number) if end == "done:" else known
        return Progress(phase, int(number), of, told_at=at, is_ended=True)
    if total is None:
        # The line with which a phase begins; one that goes on has said before after which step.
        step = before.step if before is not None and _is_resumed(before, phase, int(number)) else None
        return Progress(phase, step, int(number), told_at=at)
    left = _LEFT.search(rest)
    left_s = None if left is None else sum(float(n) * _UNIT_S[unit] for n, unit in _UNITS.findall(left[1]))
    eta = None if at is None or left_s is None else at + datetime.timedelta(seconds=left_s)
    return Progress(phase, int(number), int(total), left_s, at, eta)


def _is_resumed(before: Progress, phase: str, total: int) -> bool:
    return before.phase == phase and before.total == total and before.left_s is None and not before.is_ended
