"""Checkpoints of one training: saved while it goes on, found, read at any number of ranks.

A checkpoint is written by all ranks: each its share of the tensors into a file of its own, then rank 0 the
manifest. What is saved is copied first, so training goes on meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from metaloom.checkpoints.catalogue import Catalogue, step_folder
from metaloom.checkpoints.folder import Folder, MissingFileError
from metaloom.checkpoints.lease import Lease, LostLeaseError
from metaloom.checkpoints.manifest import MANIFEST, DamagedError, Manifest, StoredFile, StoredTensor
from metaloom.checkpoints.retention import Retention
from metaloom.checkpoints.tensors import CheckpointReader, CheckpointWriter, dtype_of
from metaloom.errors import CheckpointError

T = TypeVar("T")
Rooms = Callable[[Manifest], dict[str, Tensor]]

# A rank whose file takes hours to write is no fault: a rank that ends breaks its connections at once, and
# one that hangs is noticed by those that train or wait on.
_WRITING_TIMEOUT = datetime.timedelta(days=1)
_ALIVE_S = 0.5  # how often ranks that wait for a checkpoint tell each other that they are there


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        step: outer steps done.
        tensors: by flat name.
        scalars: plain JSON values by name.
        metrics: numbers that were measured at this step.
    """

    step: int
    tensors: dict[str, Tensor]
    scalars: dict[str, Any]
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, without it."""
        return {
            name.removeprefix(prefix): value
            for name, value in self.tensors.items()
            if name.startswith(prefix)
        }


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How saving a checkpoint ended: the same on all ranks.

    Attributes:
        step: of the checkpoint.
        error: why it could not be written; None where it was.
        note: what went wrong after it was written, as old ones were deleted; on rank 0 alone.
        is_final: whether no further attempt can be better: another run has taken over.
    """

    step: int
    error: str | None = None
    note: str | None = None
    is_final: bool = False


def whole_tensor(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Room for all of a tensor."""
    return torch.empty(shape, dtype=dtype)


def rooms_by(room: Callable[[str, torch.Size, torch.dtype], Tensor]) -> Rooms:
    """Where all tensors of a checkpoint are read to, given where one is, by name, shape and dtype: for a
    `DTensor` of the whole's shape a rank reads its part alone."""

    def rooms(manifest: Manifest) -> dict[str, Tensor]:
        return {
            name: room(name, torch.Size(tensor.shape), dtype_of(tensor))
            for name, tensor in manifest.tensors.items()
        }

    return rooms


class CheckpointStore:
    """Saves, finds and loads the checkpoints under one path or URL.

    Args:
        root: the path or URL; made on the first save.
        retention: which checkpoints stay when one was saved; that one does in any case.
        lease: without which nothing is committed; None where something else sees to it that nobody else
            writes here.
        timeout: how long a rank may be silent while the others wait for a checkpoint; writing may take
            longer.
    """

    def __init__(
        self,
        root: str | Path | Folder,
        *,
        retention: Retention | None = None,
        lease: Lease | None = None,
        timeout: datetime.timedelta = dist.default_pg_timeout,
    ) -> None:
        self.catalogue = Catalogue(root)
        self._retention = retention or Retention()
        self._lease = lease
        self._timeout = timeout
        self._group: dist.ProcessGroup | None = None  # of the threads that write
        self._waiting_group: dist.ProcessGroup | None = None  # of those that wait for them
        self._saving: _Saving | None = None

    @property
    def shown(self) -> str:
        """The path or URL as messages may have it."""
        return self.catalogue.folder.shown

    # ------------------------------------------------------------ saving

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint, and deletes those that are not kept. Every rank must call, with the same
        tensors, or with its shards of them (`DTensor`).

        Raises:
            CheckpointError: it cannot be written; the cause is named. What was there before still is.
        """
        self.start_saving(checkpoint)
        outcome = self.wait()
        assert outcome is not None
        if outcome.error is not None:
            raise CheckpointError(outcome.error)

    def start_saving(
        self, checkpoint: Checkpoint, *, before_commit: Callable[[], object] | None = None
    ) -> None:
        """Copies a checkpoint and begins to write it in the background. Every rank must call, with the same
        tensors, or with its shards of them (`DTensor`), after the outcome of the one before was taken.

        Args:
            before_commit: what rank 0 does in the background before the checkpoint counts.
        """
        assert self._saving is None, "the outcome of the last checkpoint was not taken"
        if dist.is_initialized() and self._group is None:
            # Their collectives must not come between those of training.
            self._waiting_group = dist.new_group(backend="gloo", timeout=self._timeout)
            # Making a group waits for all ranks, too.
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
            dist.distributed_c10d._set_pg_timeout(_WRITING_TIMEOUT, self._group)
        staged = dataclasses.replace(checkpoint, tensors=_staged(checkpoint.tensors))
        self._saving = _Saving(staged, lambda staged: self._write(staged, before_commit))

    @property
    def step_being_saved(self) -> int | None:
        """The step whose outcome was not taken yet."""
        return None if self._saving is None else self._saving.step

    def outcome(self) -> Outcome | None:
        """How the last save ended, once; None while it goes on, and where there is none."""
        return self.outcome_within(0.0)

    def outcome_within(self, timeout_s: float) -> Outcome | None:
        """How the last save ended, once; None where there is none, or it takes longer. For each rank by
        itself."""
        if self._saving is None:
            return None
        self._saving.join(timeout_s)
        if self._saving.is_alive():
            return None
        outcome, self._saving = self._saving.outcome, None
        assert outcome is not None
        return outcome

    def wait(self) -> Outcome | None:
        """How the last save ended, once, when it has on all ranks; None where there is none, or it was told.
        Every rank must call.

        Raises:
            RuntimeError: a rank is gone, or was silent for longer than the timeout.
        """
        outcome: Outcome | None = None
        while True:
            outcome = outcome or self.outcome_within(_ALIVE_S)
            num_writing = torch.tensor(int(self._saving is not None))
            if self._waiting_group is not None:
                dist.all_reduce(num_writing, group=self._waiting_group)
            if not num_writing:
                return outcome

    def _write(self, checkpoint: Checkpoint, before_commit: Callable[[], object] | None) -> Outcome:
        notes: list[str] = []

        def commit(tensors: dict[str, StoredTensor], files: dict[str, StoredFile]) -> None:
            if before_commit is not None:
                before_commit()
            if self._lease is not None:
                self._lease.require()
            manifest = Manifest(checkpoint.step, checkpoint.metrics, checkpoint.scalars, tensors, files)
            folder = self.catalogue.folder
            folder.write(f"{step_folder(checkpoint.step)}/{MANIFEST}", manifest.to_bytes())
            folder.sync()  # before older ones go
            try:
                self._tidy(manifest.step)
            except CheckpointError as error:
                notes.append(f"old checkpoints could not be deleted: {error}")

        writer = CheckpointWriter(self.catalogue.folder, checkpoint.step, commit)
        try:
            with _one_process_is_intended():
                save(
                    dict(checkpoint.tensors),
                    storage_writer=writer,
                    process_group=self._group,
                    no_dist=self._group is None,
                )
        except (Exception, CheckpointException) as error:  # the latter is no `Exception`
            if not dist.is_initialized() or dist.get_rank() == 0:
                # Files that nobody will read take the room that a full disk lacks.
                with contextlib.suppress(CheckpointError):
                    self._remove_attempt(checkpoint.step, writer.attempt)
            where = f"{self.shown}/{step_folder(checkpoint.step)}"
            is_final = isinstance(error, CheckpointException) and any(
                isinstance(fault, LostLeaseError) for fault, _ in error.failures.values()
            )
            text = f"{where}: the checkpoint cannot be written: {_cause(error)}"
            return Outcome(checkpoint.step, text, is_final=is_final)
        return Outcome(checkpoint.step, note=notes[0] if notes else None)

    def _tidy(self, step: int) -> None:
        """Deletes what an earlier checkpoint of the same step has left, and those that are not kept."""
        self._remove_unlisted(step)
        self.catalogue.prune(self._retention, keep=frozenset({step}))

    def _remove_attempt(self, step: int, attempt: str) -> None:
        """Deletes the files of an attempt at writing a step that has failed, and no others."""
        # A partner may be lost after the manifest was written: then the attempt has not failed.
        with contextlib.suppress(MissingFileError):
            if any(name.startswith(f"{attempt}-") for name in self.catalogue.manifest(step).files):
                return
        prefix = f"{step_folder(step)}/{attempt}-"
        found = [name for name in self.catalogue.folder.sizes() if attempt and name.startswith(prefix)]
        self.catalogue.folder.remove(found)

    def _remove_unlisted(self, step: int) -> None:
        """Deletes the files of a step that its manifest does not list, where it has one."""
        folder = step_folder(step)
        try:
            listed = {*self.catalogue.manifest(step).files, MANIFEST}
        except MissingFileError:
            listed = set()
        found = [name for name in self.catalogue.folder.sizes() if name.startswith(f"{folder}/")]
        self.catalogue.folder.remove([name for name in found if name.rpartition("/")[2] not in listed])

    def remove_remains(self) -> None:
        """Deletes what a killed run has left of checkpoints that it was writing. Every rank must call.

        Raises:
            CheckpointError: something cannot be deleted.
        """
        from_rank_0(self.catalogue.remove_remains)

    def clear(self) -> None:
        """Deletes all checkpoints. Every rank must call.

        Raises:
            CheckpointError: something cannot be deleted.
        """

        def remove_all() -> None:
            for listing in self.catalogue.listings():
                self.catalogue.remove(listing.step)

        from_rank_0(remove_all)

    # ------------------------------------------------------------ loading

    def steps(self) -> list[int]:
        """Steps of the checkpoints that were committed, in rising order."""
        return self.catalogue.steps()

    def newest_folder(self) -> str | None:
        """The path or URL of the newest checkpoint that is complete; None where there is none."""
        steps = self.steps()
        return f"{self.shown}/{step_folder(steps[-1])}" if steps else None

    def load_newest(self, on_skip: Callable[[str], None], rooms: Rooms | None = None) -> Checkpoint | None:
        """The newest valid checkpoint, the same one on every rank; None where there is no checkpoint. Every
        rank must call.

        Args:
            on_skip: called on rank 0 with one line for each checkpoint that was passed over.
            rooms: where the tensors are read to, given the manifest; it may raise a `CheckpointError` where
                that is of another model. None reads all of every tensor.

        Raises:
            CheckpointError: there are checkpoints, and none of them is valid; or they cannot be read, which
                may pass.
        """
        rooms = rooms or rooms_by(whole_tensor)
        found = self._newest(on_skip, lambda manifest: self._read(manifest, rooms(manifest)))
        if found is None:
            return None
        manifest, tensors = found
        return Checkpoint(manifest.step, tensors, dict(manifest.scalars), dict(manifest.metrics))

    def load(self, step: int, rooms: Rooms | None = None) -> Checkpoint:
        """The checkpoint of one step; arguments are those of `load_newest`. For each rank by itself.

        Raises:
            CheckpointError: it is missing, incomplete, of another format version, its bytes are not those
                that were written, or they cannot be read.
        """
        manifest = self.catalogue.manifest(step)
        self.catalogue.require_sizes(manifest)
        tensors = self._read(manifest, (rooms or rooms_by(whole_tensor))(manifest))
        return Checkpoint(step, tensors, dict(manifest.scalars), dict(manifest.metrics))

    def _newest(
        self, on_skip: Callable[[str], None], read: Callable[[Manifest], T]
    ) -> tuple[Manifest, T] | None:
        listings = from_rank_0(
            lambda: [listing for listing in self.catalogue.listings() if listing.is_committed]
        )
        for listing in reversed(listings):

            def manifest_of(step: int = listing.step, sizes: Mapping[str, int] = listing.sizes) -> Manifest:
                manifest = self.catalogue.manifest(step)
                self.catalogue.require_sizes(manifest, sizes)
                return manifest

            try:
                manifest = from_rank_0(manifest_of)
                return manifest, _on_all_ranks(lambda manifest=manifest: read(manifest))  # type: ignore[misc]
            except (DamagedError, MissingFileError) as error:
                if not dist.is_initialized() or dist.get_rank() == 0:
                    on_skip(f"skipped a checkpoint: {error}")
        if listings:
            raise CheckpointError(
                f"{self.shown}: none of the {len(listings)} checkpoints is valid, so a run that went on from "
                "them would begin anew. `metaloom checkpoints verify` says what is wrong with each. "
                "Restore one of them, or delete the folder to start from the beginning."
            )
        return None

    def _read(self, manifest: Manifest, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        try:
            with _one_process_is_intended():
                load(tensors, storage_reader=CheckpointReader(self.catalogue, manifest), no_dist=True)
        except CheckpointException as error:
            (fault,) = (fault for fault, _ in error.failures.values())
            if isinstance(fault, CheckpointError):
                raise fault from None
            where = f"{self.shown}/{step_folder(manifest.step)}"
            raise CheckpointError(f"{where}: the tensors cannot be read: {fault}.") from fault
        return tensors


class _Saving:
    """A checkpoint that is being written by a thread.

    The thread is a daemon: a process that has to end does not wait for a storage that does not answer.
    """

    def __init__(self, checkpoint: Checkpoint, write: Callable[[Checkpoint], Outcome]) -> None:
        self.step = checkpoint.step
        self.outcome: Outcome | None = None
        self._error: BaseException | None = None

        def run() -> None:
            try:
                self.outcome = write(checkpoint)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="metaloom-checkpoint", daemon=True)
        self._thread.start()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def join(self, timeout_s: float | None) -> None:
        self._thread.join(timeout_s)
        if self._error is not None:
            raise self._error


def require_same_tensors(
    expected: Mapping[str, Tensor], found: Mapping[str, StoredTensor], *, source: str
) -> None:
    """Checks that a checkpoint belongs to this model, before any of its tensors is read.

    Raises:
        CheckpointError: names, shapes or dtypes differ; all differences are listed at once.
    """
    problems = [f"  {name}: in the model, not in the checkpoint" for name in expected if name not in found]
    problems += [f"  {name}: in the checkpoint, not in the model" for name in found if name not in expected]
    for name, value in expected.items():
        if name not in found:
            continue
        there = found[name]
        if tuple(there.shape) != tuple(value.shape):
            problems.append(
                f"  {name}: shape {list(there.shape)} in the checkpoint, {list(value.shape)} in the model"
            )
        elif dtype_of(there) != value.dtype:
            here = str(value.dtype).removeprefix("torch.")
            problems.append(f"  {name}: {there.dtype} in the checkpoint, {here} in the model")
    if problems:
        raise CheckpointError(
            f"{source} belongs to another model ({len(problems)} differences):\n" + "\n".join(problems)
        )


def _staged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the host's memory of what this rank writes: its shards, and its share of what all ranks have
    whole."""
    own = _own_share(tensors)
    return {name: tensors[name].detach().to("cpu", copy=True) for name in own}


def _own_share(tensors: Mapping[str, Tensor]) -> Sequence[str]:
    """The names of the tensors that this rank writes: of those that all ranks have, as many bytes as any."""
    if not dist.is_initialized():
        return list(tensors)
    whole = [name for name, value in tensors.items() if not isinstance(value, DTensor)]
    num_bytes = [0] * dist.get_world_size()
    writers: dict[str, int] = {}
    for name in sorted(whole, key=lambda name: (-tensors[name].nbytes, name)):
        writers[name] = min(range(len(num_bytes)), key=lambda rank: (num_bytes[rank], rank))
        num_bytes[writers[name]] += tensors[name].nbytes
    return [name for name in tensors if writers.get(name, dist.get_rank()) == dist.get_rank()]


def from_rank_0(make: Callable[[], T]) -> T:
    """What rank 0 makes, or the error that it meets, on all ranks. Every rank must call."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return make()
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = make()
        except CheckpointError as error:
            told[1] = error
    dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise told[1]
    made: T = told[0]
    return made


def _on_all_ranks(make: Callable[[], T]) -> T:
    """What each rank makes; or, on all ranks, the error of the first that meets one: what may pass before
    damage. Every rank must call."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return make()
    made: T | None = None
    met: CheckpointError | None = None
    try:
        made = make()
    except CheckpointError as error:
        met = error
    errors: list[CheckpointError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, met)
    there = [error for error in errors if error is not None]
    if there:
        raise min(there, key=lambda error: isinstance(error, DamagedError))
    return made  # type: ignore[return-value]


def _cause(error: BaseException) -> str:
    """What went wrong, in a line. Torch wraps the ranks' faults in an exception that is no `Exception`,
    and prints it with their tracebacks."""
    if not isinstance(error, CheckpointException):
        return f"{type(error).__name__}: {error}"
    faults = sorted(error.failures.items())
    # The others follow from what rank 0 met.
    said = [str(fault) if isinstance(fault, CheckpointError) else repr(fault) for _, (fault, _) in faults]
    return "; ".join(dict.fromkeys(said))


@contextlib.contextmanager
def _one_process_is_intended() -> Iterator[None]:
    """Silences torch's warning that no process group is there: every rank reads by itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is (disabled|unavailable)", UserWarning)
        yield
