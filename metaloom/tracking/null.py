"""The tracker of every rank but the first, and of runs that record nothing."""

import uuid
from collections.abc import Mapping
from pathlib import Path

from metaloom.tracking.base import FinishStatus, RunTracker


class NullTracker(RunTracker):
    """Records nothing; its run id is only a name."""

    def start(
        self,
        *,
        run_name: str,
        params: Mapping[str, str],
        tags: Mapping[str, str],
        resume_id: str | None,
        new_id: str | None = None,
    ) -> str:
        return resume_id or new_id or uuid.uuid4().hex

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def artifact(self, path: Path, folder: str = "") -> None:
        pass

    def flush(self, timeout_s: float) -> bool:
        return True

    def finish(self, status: FinishStatus) -> None:
        pass

    def describe(self) -> str:
        return "nowhere (tracking is off)"
