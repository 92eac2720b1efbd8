"""Events of a cluster in one form, whichever of its two APIs they come from."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from metaloom.k8s.wording import time_of


@dataclasses.dataclass(frozen=True)
class Happening:
    """An event: what was told of one object.

    Attributes:
        kind, name: of the object.
        at: when it was last told; None where the event has no time.
        num_times: how often it was told.
    """

    kind: str
    name: str
    reason: str
    message: str
    is_warning: bool
    at: datetime.datetime | None
    num_times: int = 1

    def is_after(self, moment: datetime.datetime | None) -> bool:
        """Whether it was told then or later; one without a time counts as new."""
        return self.at is None or moment is None or self.at >= moment


def happenings_of(name: str, events: Iterable[Mapping[str, Any]]) -> list[Happening]:
    """The events of a job and of all that was made for it, oldest first.

    Args:
        name: of the job: what was made for it has a name that begins with it, or, for Kueue, contains it.
        events: of `v1` or of `events.k8s.io/v1`.
    """
    found = [_read(event) for event in events]
    own = [one for one in found if _is_of(one, name)]
    return sorted(own, key=lambda one: one.at or datetime.datetime.min.replace(tzinfo=datetime.UTC))


def newest(happenings: Sequence[Happening], *reasons: str) -> Happening | None:
    """The last told of these reasons."""
    return next((one for one in reversed(happenings) if one.reason in reasons), None)


def _read(event: Mapping[str, Any]) -> Happening:
    about = event.get("involvedObject") or event.get("regarding") or {}
    series = event.get("series") or {}
    times = (
        series.get("lastObservedTime"),
        event.get("lastTimestamp"),
        event.get("deprecatedLastTimestamp"),
        event.get("eventTime"),
        event.get("firstTimestamp"),
        (event.get("metadata") or {}).get("creationTimestamp"),
    )
    return Happening(
        kind=about.get("kind") or "",
        name=about.get("name") or "",
        reason=event.get("reason") or "",
        message=(event.get("message") or event.get("note") or "").strip(),
        is_warning=event.get("type") == "Warning",
        at=next((moment for moment in map(time_of, times) if moment is not None), None),
        num_times=max(
            event.get("count") or 0, event.get("deprecatedCount") or 0, series.get("count") or 0, 1
        ),
    )


def _is_of(one: Happening, name: str) -> bool:
    if one.kind == "Workload":
        kind, _, rest = one.name.partition("-")
        return kind in ("job", "jobset", "pytorchjob", "trainjob") and rest.startswith(f"{name}-")
    return one.name == name or one.name.startswith(f"{name}-")
