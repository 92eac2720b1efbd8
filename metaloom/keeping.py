"""Where a run's checkpoints are, and when one is written while a training goes on."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from metaloom.checkpoints.catalogue import step_folder
from metaloom.checkpoints.folder import Folder
from metaloom.checkpoints.lease import Lease
from metaloom.checkpoints.manifest import Manifest
from metaloom.checkpoints.store import Checkpoint, CheckpointStore, Outcome, Rooms, from_rank_0, rooms_by
from metaloom.engine.outer import parameter_of
from metaloom.engine.sharding.base import Sharding
from metaloom.errors import CheckpointError
from metaloom.job import Job, Place
from metaloom.recipe import Recipe
from metaloom.run_folder import RunFolder
from metaloom.stopping import Stopped

RETRY_S = 15.0  # between two attempts at writing checkpoints that cannot be written
DELIVERED_WITHIN_S = 5.0  # how long a checkpoint waits for the tracking store to have the steps before it
LATE_S = 1.0  # how long training waits for a checkpoint to be written before the next one is put off


def checkpoint_root(recipe: Recipe, folder: RunFolder, phase: str) -> str | Path:
    """Where the checkpoints of a phase are: `pretrain`, `meta`, `ordinary_equal_data` ..."""
    url = recipe.checkpoint.url
    return folder.checkpoints(phase) if url is None else f"{url.rstrip('/')}/{phase}"


def held_rooms(sharding: Sharding) -> Rooms:
    """Where a rank reads the tensors of a checkpoint of `OuterOptimizer`, by their names there."""

    def room(key: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return sharding.room_for(parameter_of(key), shape, dtype)

    return rooms_by(room)


@contextlib.contextmanager
def writing_alone(recipe: Recipe, place: Place, purpose: str) -> Iterator[Lease | None]:
    """While it lasts, no other job of this purpose writes checkpoints where this one does. Every rank must
    call.

    In a run's own folder the command that has started it sees to that.

    Args:
        purpose: `train` or `evaluate`, which write checkpoints of other phases.

    Raises:
        CheckpointError: another run does; or the storage cannot be used.
    """
    url = recipe.checkpoint.url
    if url is None:
        yield None
        return
    lease = Lease(
        Folder(url),
        owner=place.job_id,
        term=place.round_number,
        about=f"the run in {place.folder.path}",
        name=f"{purpose}-lease",
    )
    from_rank_0(lease.acquire)
    try:
        yield lease
    finally:
        if not dist.is_initialized() or dist.get_rank() == 0:
            with contextlib.suppress(CheckpointError):  # it ends by itself when nobody renews it
                lease.release()


class Keeper:
    """Writes the checkpoints of one training while it goes on: when they are due, again where that fails.

    A run goes on though they cannot be written, for as long as the recipe says; the last one has to be.
    Rank 0 decides, and every rank has to call the same methods at the same steps.

    Args:
        last_step: of the checkpoint that the training goes on from; None where there is none.
        noun: what a step of it is called, with `{}` where its number comes.
        is_recorded: whether the run's folder says that there was a checkpoint: without it the run does not go
            on then.

    Attributes:
        store: as given.
    """

    def __init__(
        self, job: Job, store: CheckpointStore, *, last_step: int | None, noun: str, is_recorded: bool = False
    ) -> None:
        self._noun = noun
        self._is_recorded = is_recorded
        self._is_stopping = False
        self._job = job
        self.store = store
        self._settings = job.recipe.checkpoint
        self._saved_step = last_step
        self._saved_s = time.monotonic()  # when the last one was begun
        self._is_late = False  # one was due while another was still being written
        self._failing_since_s: float | None = None
        self._failed_s = 0.0
        self._waited_s = 0.0

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after a step: by steps, by rank 0's clock, or since one is missing. One
        is put off to a later step where the one before takes long to be written."""
        self._take(self.store.outcome())
        settings, now_s = self._settings, time.monotonic()
        is_due = settings.every_steps is not None and step % settings.every_steps == 0
        if settings.every_minutes is not None:
            is_due |= now_s - self._saved_s >= 60.0 * settings.every_minutes
        if self._failing_since_s is not None:
            is_due |= now_s - self._failed_s >= RETRY_S
        is_due |= self._is_late
        if is_due and self._failing_since_s is None:
            # Rather that than another step than the recipe says: most are written in less.
            self._take(self.store.outcome_within(LATE_S))
            self._waited_s += time.monotonic() - now_s
        self._is_late = is_due and self.store.step_being_saved is not None
        flag = torch.tensor([is_due and not self._is_late])
        if dist.is_initialized():
            dist.broadcast(flag, src=0)
        return bool(flag.item())

    def save(self, checkpoint: Checkpoint) -> None:
        """Begins to write a checkpoint; training waits until it is copied, and for one that is still being
        written."""
        begin_s = time.monotonic()
        self._settle()
        self._start(checkpoint)
        self._saved_s = time.monotonic()
        self._waited_s += self._saved_s - begin_s

    def save_last(self, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint, and returns when it is written.

        Raises:
            CheckpointError: it could not be written for as long as the recipe allows.
        """
        while True:
            self._settle()
            if self._saved_step == checkpoint.step:
                return
            self._start(checkpoint)
            outcome = self.store.wait()
            assert outcome is not None
            self._take(outcome)
            if outcome.error is None:
                return
            time.sleep(RETRY_S)

    @contextlib.contextmanager
    def saving_when_stopped(self, checkpoint: Callable[[], Checkpoint]) -> Iterator[None]:
        """In this context a training that is stopped from outside is saved first, unless it has done nothing
        yet. Time is short, so it is not tried again.

        Args:
            checkpoint: the training as it is.
        """
        try:
            yield
        except Stopped:
            self._job.place.whereabouts.enter("the checkpoint of a stop")
            self._is_stopping = True
            self._job.disk.raise_nothing()
            now = checkpoint()
            self._settle()
            if self._saved_step != now.step and now.step > 0:
                self._start(now)
                self._settle()
            if self._saved_step == now.step:
                self._job.console.note(f"saved after {self._noun.format(now.step)}")
            raise

    def waited_s(self) -> float:
        """How long training has waited for checkpoints since this was asked last, in seconds."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def _start(self, checkpoint: Checkpoint) -> None:
        """Begins to write a checkpoint.

        One that lies elsewhere than the run's folder may outlive it, and the run then goes on from there: so
        the tracker has to have the records of the steps before, but of a stop, when time is short, and which
        the end of the tracker follows.
        """
        is_elsewhere = self._settings.url is not None and not self._is_stopping
        flush = functools.partial(self._job.tracker.flush, DELIVERED_WITHIN_S)
        self.store.start_saving(checkpoint, before_commit=flush if is_elsewhere else None)

    def _settle(self) -> None:
        """Waits for the checkpoint that is being written."""
        self._take(self.store.wait())

    def _take(self, outcome: Outcome | None) -> None:
        if outcome is None:
            return
        console, now_s = self._job.console, time.monotonic()
        if outcome.note is not None:
            console.warn(outcome.note)
        if outcome.error is None:
            self._saved_step = outcome.step
            if self._failing_since_s is not None:
                console.note(f"checkpoints are written again: {step_folder(outcome.step)}")
            self._failing_since_s = None
            if self._is_recorded and self._job.sharding.rank == 0:
                facts = {"root": self.store.shown, "step": outcome.step}
                self._job.place.folder.record(self._job.disk, checkpoint=facts)
            return
        if self._is_stopping:
            console.warn(f"{outcome.error} The run goes on from the checkpoint before.")
            return
        if outcome.is_final:
            raise CheckpointError(outcome.error)
        if self._failing_since_s is None:
            self._failing_since_s = now_s
            console.warn(
                f"{outcome.error} Training goes on, and it is tried again, for up to "
                f"{self._settings.patience_minutes:g} min (checkpoint.patience_minutes)."
            )
        self._failed_s = now_s
        gives_up = now_s - self._failing_since_s > 60.0 * self._settings.patience_minutes
        if self._job.sharding.rank == 0 and gives_up:
            last = "There is no checkpoint yet."
            if self._saved_step is not None:
                last = f"The last one is {self.store.shown}/{step_folder(self._saved_step)}."
            raise CheckpointError(
                f"{outcome.error} So it has been for {(now_s - self._failing_since_s) / 60:.0f} min, longer "
                f"than checkpoint.patience_minutes. {last}"
            )


def require_own(folder: RunFolder, facts: Mapping[str, Any], manifest: Manifest, *, shown: str) -> None:
    """Checks that a checkpoint is of the run in a folder, before the run goes on from it.

    Args:
        facts: of the folder, as rank 0 has it.
        shown: where the checkpoint is, for the message.

    Raises:
        CheckpointError: it is another run's.
    """
    theirs, ours = manifest.scalars["origin"]["run"], facts.get("run")
    if theirs != ours:
        raise CheckpointError(
            f"{shown} holds checkpoints of another run than the one in {folder.path}. Give this run another "
            f"checkpoint.url; or go on with that one: metaloom train --resume {shown.rpartition('/')[0]} "
            "--run DIR."
        )


def require_recorded(facts: Mapping[str, Any], newest: Checkpoint | None) -> None:
    """Checks that a run whose checkpoints are gone does not begin anew unnoticed.

    Args:
        facts: of the run's folder, as rank 0 has it.
        newest: the newest checkpoint; None where there is none.

    Raises:
        CheckpointError: the run has had a checkpoint, and there is none.
    """
    recorded = facts.get("checkpoint")
    if newest is None and recorded is not None:
        raise CheckpointError(
            f"{recorded['root']} has held a checkpoint of step {recorded['step']} of this run, and there is "
            "none where checkpoint.url, or else the run folder, says now. Restore it, or name the place "
            "where it is; or start a new run, in another folder."
        )
