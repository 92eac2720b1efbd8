"""What lies where in the folder of a run.

recipe.yaml          the recipe, with every default spelled out
run.json             what outlives one process: the tracking run's id, the training's status, the digest
                     of its data, changes of its recipe that a user has insisted on
deepspeed.json       the configuration that DeepSpeed was given, under sharding.kind = deepspeed_zero
metrics.jsonl        metrics by outer step
cosines.jsonl        cosines between the gradients of tasks or groups, where the combiner measures them
broken.jsonl         damaged samples that were passed over
checkpoints/         pretrain/, meta/, ordinary_*/: one folder of checkpoints each
train.lock, evaluate.lock   held by the command that works on the run
logs/                the ranks' standard error
mlflow.db, mlflow/   the tracking store, unless the recipe or the environment names a server
evaluation.json      results of the last evaluation; evaluation-recipe.yaml is what it was asked
report.html          the same as a page, with its pictures beside it
export/, adapted/    what was taken away: a folder for each format, and for each task adapted to
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metaloom.disk import Disk
from metaloom.errors import LaunchError
from metaloom.files import replace_file


@dataclasses.dataclass(frozen=True)
class Lock:
    """What keeps other commands out of a run's folder.

    Attributes:
        descriptor: the open file that holds it, which processes that inherit it hold too; None where this
            file system has no locks, or another command of the party holds it.
        is_own: whether this command is the one that works on the folder: writes what all others read.
    """

    descriptor: int | None
    is_own: bool


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The paths of one run."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def evaluation_recipe(self) -> Path:
        """The recipe of the last evaluation, which may differ from the run's in harmless keys."""
        return self.path / "evaluation-recipe.yaml"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def deepspeed(self) -> Path:
        """DeepSpeed's configuration as it was given for the meta-training."""
        return self.path / "deepspeed.json"

    @property
    def broken(self) -> Path:
        """Damaged samples that were passed over."""
        return self.path / "broken.jsonl"

    @property
    def cosines(self) -> Path:
        """Cosines between the gradients of tasks or groups, at validations."""
        return self.path / "cosines.jsonl"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def checkpoints(self, phase: str) -> Path:
        """The checkpoints of one phase: `pretrain`, `meta`, `ordinary_equal_data` ..."""
        return self.path / "checkpoints" / phase

    def facts(self) -> dict[str, Any]:
        """What `record` has kept; empty for a new run.

        Raises:
            LaunchError: it cannot be read.
        """
        path = self.path / "run.json"
        try:
            return _facts(path.read_bytes(), source=path)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise LaunchError(f"{path} cannot be read: {error.strerror or error}.") from error

    def record(self, disk: Disk | None = None, /, **facts: Any) -> None:
        """Keeps facts of the run, beside and over those kept before. One rank must call.

        Args:
            disk: of the job that does; None where it is to be done at once.
        """
        path = self.path / "run.json"
        if disk is None:
            replace_file(path, json.dumps(self.facts() | facts, indent=1))
        else:
            disk.replace(path, json.dumps(_facts(disk.read(path), source=path) | facts, indent=1))

    def create(self) -> None:
        """Makes the folder of a new run.

        Raises:
            LaunchError: there is a run already, or the folder cannot be written.
        """
        if self.has_started():
            raise LaunchError(
                f"{self.path} already holds a run. Continue it with `metaloom train --resume {self.path}`, "
                "or name another folder with --run."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Under a name of its own: the commands of two hosts may be here at once.
            tempfile.TemporaryFile(dir=self.path).close()
        except OSError as error:
            raise LaunchError(
                f"the run folder {self.path} cannot be written: {error.strerror or error}. "
                "Name another folder with --run."
            ) from error

    def forget_start(self) -> None:
        """Forgets what a start that was refused has recorded: its tracked run is not this one."""
        (self.path / "run.json").unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self, purpose: str, *, party: str = "") -> Iterator[Lock]:
        """While it lasts, no other command does the same with this run. What is left of one that was killed
        is no lock: the kernel takes it back.

        Args:
            purpose: what is done: `train`, `evaluate`.
            party: where several commands do it together, what they all meet at: they do not exclude each
                other. The first of them holds the lock.

        Raises:
            LaunchError: another command does it now.
        """
        path = self.path / f"{purpose}.lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise LaunchError(f"{path} cannot be written: {error.strerror or error}.") from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                if party and holder.endswith(f", at {party}"):
                    yield Lock(None, is_own=False)
                    return
                raise LaunchError(
                    f"{self.path}: another `metaloom {purpose}` works on this run ({holder}). Wait for its "
                    "end, or stop it; another run needs a folder of its own (--run)."
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                    raise
                yield Lock(None, is_own=True)
                return
            os.ftruncate(descriptor, 0)
            holder = f"process {os.getpid()} on {socket.gethostname()}" + (f", at {party}" if party else "")
            os.pwrite(descriptor, f"{holder}\n".encode(), 0)
            yield Lock(descriptor, is_own=True)
        finally:
            os.close(descriptor)

    def has_started(self) -> bool:
        """Whether a job has logged or saved anything here; one that was refused at its start has not."""
        metrics = self.path / "metrics.jsonl"
        has_metrics = metrics.is_file() and metrics.stat().st_size > 0
        return has_metrics or (self.path / "checkpoints").exists()

    def require(self) -> None:
        """Checks that there is a run.

        Raises:
            LaunchError: the folder holds none.
        """
        if not self.recipe.is_file():
            raise LaunchError(f"{self.path} holds no run: {self.recipe.name} is not there.")


def _facts(content: bytes, *, source: Path) -> dict[str, Any]:
    try:
        facts = json.loads(content or "{}")
    except ValueError as error:
        raise LaunchError(_damaged(source, str(error))) from None
    if not isinstance(facts, dict):
        raise LaunchError(_damaged(source, "it is no JSON object"))
    return facts


def _damaged(path: Path, reason: str) -> str:
    folder = path.parent
    return (
        f"{path} is damaged: {reason}. Restore it, or go on with the run in another folder, from its "
        f"checkpoints: metaloom train --resume {folder / 'checkpoints'} --run DIR (or what the recipe has as "
        "checkpoint.url)."
    )


def new_run_path(name: str) -> Path:
    """The first of runs/NAME, runs/NAME-2, runs/NAME-3 ... where no run has started."""
    path, number = Path("runs") / name, 1
    while RunFolder(path).has_started():
        number += 1
        path = Path("runs") / f"{name}-{number}"
    return path
