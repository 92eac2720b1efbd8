"""What every tracker promises to the training loop."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

FinishStatus = Literal["finished", "failed", "killed"]

RESERVED_METRIC_NAMES = frozenset({"step", "time_s"})


@dataclass(frozen=True)
class MetricRecord:
    """The metrics of one `log` call.

    `time_s` is Unix time in seconds, to the millisecond. Names may carry a phase before a
    slash (`pretrain/loss`). The learning curve of the report shows those that carry none and end in
    `loss`, `accuracy` or `bits_per_byte`, with or without `_after`: `loss_after`, `validation_loss`.
    """

    step: int
    time_s: float
    metrics: Mapping[str, float]


class RunTracker(ABC):
    """Records one run: its parameters, its metrics over the outer steps, its files.

    One process of a run (rank 0) owns the tracker and calls it from one thread, in the order
    `start`, then any of `log`, `artifact`, `flush`, then `finish`. Nothing after a successful
    `start` raises because of a store that is slow or down.
    """

    @abstractmethod
    def start(
        self,
        *,
        run_name: str,
        params: Mapping[str, str],
        tags: Mapping[str, str],
        resume_id: str | None,
        new_id: str | None = None,
    ) -> str:
        """The id of the run, to be saved in checkpoints and given back as `resume_id`.

        Args:
            run_name: what people call the run.
            params: flat recipe, dotted path to value. Secrets are masked (see redaction.py).
            tags: free facts, such as those of `environment_facts`.
            resume_id: None for a new run; otherwise the id that an earlier `start` returned,
                and the run is continued under the same id.
            new_id: the id of a new run; None for one that no other run has. Where the store has a run
                of that id, it is that one.

        Raises:
            TrackingError: a store that the user named cannot be used.
        """

    @abstractmethod
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Records metrics of outer step `step`; returns at once.

        NaN and infinities are allowed: a run that diverges is worth seeing.

        Raises:
            ValueError: a metric is called `step` or `time_s`.
        """

    @abstractmethod
    def artifact(self, path: Path, folder: str = "") -> None:
        """Hands over a file of the run, to be kept under `folder` of its artifacts.

        The file must stay as it is until `flush` or `finish` returns.
        """

    @abstractmethod
    def flush(self, timeout_s: float) -> bool:
        """True if everything handed over so far was delivered within `timeout_s`; it is not waited for where
        the store does not answer. May be called in any thread."""

    @abstractmethod
    def finish(self, status: FinishStatus) -> None:
        """Delivers what is left within a bounded time, and gives back threads and files."""

    @abstractmethod
    def describe(self) -> str:
        """Where the records are, in words for people, never with credentials."""
