"""What every part of a running job shares: its recipe, its place, its data, and who is told."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from metaloom.broken_record import BrokenRecord
from metaloom.checkpoints.lease import Lease
from metaloom.datasets import SampleError
from metaloom.disk import Disk
from metaloom.engine.sharding.base import Sharding
from metaloom.engine.stopping import StopPoints
from metaloom.recipe import MLflowTracking, Recipe, flatten_recipe, plain_recipe, recipe_digest
from metaloom.run_folder import RunFolder
from metaloom.sources import Data, open_data
from metaloom.stopping import Stopped
from metaloom.tracking import FinishStatus, RunTracker, environment_facts, make_tracker
from metaloom.tracking.console import Console, make_console
from metaloom.whereabouts import Whereabouts


@dataclasses.dataclass
class Shutdown:
    """What a rank's signal handler and its job tell each other.

    Attributes:
        was_asked: the job was asked to stop, from outside.
        is_closing: the job is delivering its last records, which the agent shall not cut short that ends the
            ranks that are left when one has failed.
    """

    was_asked: bool = False
    is_closing: bool = False


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one rank runs.

    Attributes:
        folder: the run's folder, seen by all ranks.
        device: where this rank computes.
        tracking_uri: the MLflow store that the environment names, or None.
        shutdown: what a stop that comes from outside has led to.
        whereabouts: where the rank says where in the job it is.
        points: where the job may be stopped.
        job_id: a name that no other job has.
        round_number: how often the job has started its ranks again.
    """

    folder: RunFolder
    device: torch.device
    tracking_uri: str | None
    shutdown: Shutdown
    whereabouts: Whereabouts = dataclasses.field(default_factory=Whereabouts)
    points: StopPoints = dataclasses.field(default_factory=StopPoints)
    job_id: str = "alone"
    round_number: int = 0


@dataclasses.dataclass(frozen=True)
class Job:
    """A job on one rank, with its data opened and its tracker started.

    Attributes:
        origin: what it comes from, as plain JSON values: the recipe, the tracked run's id, the digest of the
            data, versions.
        disk: by which files of the run's folder are written.
        lease: without which checkpoints are not to be written; None where none is needed.
    """

    recipe: Recipe
    place: Place
    data: Data
    sharding: Sharding
    console: Console
    tracker: RunTracker
    origin: Mapping[str, Any]
    broken: BrokenRecord
    disk: Disk
    lease: Lease | None = None


@contextlib.contextmanager
def open_job(
    recipe: Recipe,
    place: Place,
    sharding: Sharding,
    *,
    is_training: bool,
    first_step: int | None,
    last_step: int = 0,
    lease: Lease | None = None,
) -> Iterator[Job]:
    """Opens the data, starts or continues the tracked run, and ends it with the right status.

    The status is that of the training: an evaluation leaves it as it was.

    Args:
        is_training: whether this job is the training.
        first_step: metrics and damaged samples of this step and later ones, left by a run that went on after
            its last checkpoint, are dropped; None drops none.
        last_step: outer steps that are done: changes that a user has just insisted on come after them.
        lease: without which checkpoints are not to be written; None where none is needed.

    Raises:
        MetaloomError: the data or a tracking store that was named cannot be used.
    """
    # Standard error goes to the run's logs: what a person should see is on standard output.
    console = make_console(rank=sharding.rank, error_stream=sys.stdout)
    disk = Disk(patience_minutes=recipe.checkpoint.patience_minutes, warn=console.warn, note=console.note)
    data = open_data(recipe)
    broken = BrokenRecord(
        place.folder.broken,
        max_broken=recipe.loading.max_broken,
        sharding=sharding,
        console=console,
        disk=disk,
        first_step=first_step,
    )
    tracking = recipe.tracking
    named = tracking if isinstance(tracking, MLflowTracking) else None
    tracker = make_tracker(
        "jsonl" if named is None else "mlflow",
        place.folder.path,
        rank=sharding.rank,
        uri=None if named is None else named.uri or place.tracking_uri,
        experiment="" if named is None else named.experiment,
        first_step=sys.maxsize if first_step is None else first_step,
        disk=disk,
        warn=console.warn,
    )
    facts = environment_facts()
    recorded = place.folder.facts()
    insisted = [dict(change) for change in recorded.get("insisted", [])]
    for change in insisted:
        if is_training and change["after_step"] is None:
            change["after_step"] = last_step
    run_id = tracker.start(
        run_name=place.folder.path.name,
        params=flatten_recipe(recipe),
        tags={
            **facts,
            "recipe_digest": recipe_digest(recipe),
            "data_digest": data.digest,
            "world_size": str(sharding.world_size),
            **({"insisted": insisted_in_words(insisted)} if insisted else {}),
        },
        resume_id=recorded.get("tracking_run_id"),
        # Whoever has lost the folder before its first checkpoint finds the tracked run by it.
        new_id=recorded.get("run"),
    )
    # What is left of a training that is killed before it can say anything.
    status: FinishStatus = "killed" if is_training else place.folder.facts().get("status", "killed")
    if sharding.rank == 0:
        more = {"insisted": insisted} if insisted else {}
        place.folder.record(disk, tracking_run_id=run_id, status=status, **more)
    try:
        origin = {
            "recipe": plain_recipe(recipe),
            "run": place.folder.facts().get("run"),
            "tracking_run_id": run_id,
            "data_digest": data.digest,
            "versions": facts,
            "world_size": sharding.world_size,
            "insisted": insisted,
        }
        yield Job(recipe, place, data, sharding, console, tracker, origin, broken, disk, lease)
        disk.wait(lambda: place.shutdown.was_asked)
        if is_training:
            status = "finished"
    except BaseException as error:
        disk.raise_nothing()
        if isinstance(error, SampleError):
            broken.end_with(error.all_broken)
        # A stopped rank may end in `Stopped`, in KeyboardInterrupt, or in a collective whose partner stopped
        # first.
        was_stopped = place.shutdown.was_asked or isinstance(error, Stopped)
        if is_training and not was_stopped:
            status = "failed"
        raise
    finally:
        place.shutdown.is_closing = True
        disk.raise_nothing()
        if sharding.rank == 0:
            place.folder.record(disk, status=status)
        disk.end()
        tracker.finish(status)
        data.close()


def insisted_in_words(insisted: Sequence[Mapping[str, Any]]) -> str:
    """The changes of a run's recipe that a user has insisted on, and after which outer steps: as `run.json`
    has them."""
    return "; ".join(
        f"{change['path']}: {change['old']} -> {change['new']} after outer step {change['after_step']}"
        for change in insisted
    )
