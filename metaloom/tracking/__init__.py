"""Where a run's records go: JSON lines always, an MLflow store when asked."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from metaloom.disk import Disk
from metaloom.tracking.base import FinishStatus, MetricRecord, RunTracker
from metaloom.tracking.environment import environment_facts
from metaloom.tracking.jsonl import JsonlTracker, read_metrics
from metaloom.tracking.mlflow import MlflowTracker
from metaloom.tracking.null import NullTracker
from metaloom.tracking.redaction import mask_secrets, strip_credentials

METRICS_FILE = "metrics.jsonl"

TrackerKind = Literal["none", "jsonl", "mlflow"]

__all__ = [
    "METRICS_FILE",
    "FinishStatus",
    "JsonlTracker",
    "MetricRecord",
    "MlflowTracker",
    "NullTracker",
    "RunTracker",
    "TrackerKind",
    "environment_facts",
    "make_tracker",
    "mask_secrets",
    "read_metrics",
    "strip_credentials",
]


def make_tracker(
    kind: TrackerKind,
    run_folder: Path,
    *,
    rank: int,
    uri: str | None = None,
    experiment: str = "metaloom",
    first_step: int = 0,
    disk: Disk | None = None,
    warn: Callable[[str], None] | None = None,
) -> RunTracker:
    """The tracker of one rank: the real one on rank 0, one that records nothing elsewhere.

    Args:
        kind: "jsonl" writes metrics.jsonl into the run folder; "mlflow" does so too and delivers
            from there to an MLflow store; "none" records nothing.
        run_folder: folder of the run.
        uri: MLflow tracking URI; None for an sqlite store of its own in the run folder.
        experiment: MLflow experiment, made when it is missing.
        first_step: see `JsonlTracker`.
        disk: see `JsonlTracker`.
        warn: shows a warning to people, from any thread; the `metaloom.tracking` logger if None.
    """
    if kind == "none" or rank != 0:
        return NullTracker()
    metrics_path = run_folder / METRICS_FILE
    if kind == "jsonl":
        return JsonlTracker(metrics_path, first_step=first_step, disk=disk)
    return MlflowTracker(
        uri, experiment, journal_path=metrics_path, first_step=first_step, disk=disk, warn=warn
    )
