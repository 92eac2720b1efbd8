"""One command at a time works on a run."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator

from metaloom.checkpoints.folder import Folder
from metaloom.checkpoints.lease import Lease
from metaloom.run_folder import Lock, RunFolder


@contextlib.contextmanager
def working_alone(folder: RunFolder, purpose: str, *, party: str = "") -> Iterator[Lock]:
    """While it lasts, no other command does the same with the run, also where the file system has no locks.

    Args:
        purpose: what is done: `train`, `evaluate`.
        party: as in `RunFolder.locked`.

    Raises:
        MetaloomError: another command does it now.
    """
    with folder.locked(purpose, party=party) as lock:
        if lock.descriptor is not None or not lock.is_own:
            yield lock
            return
        with leased(str(folder.path), purpose):
            yield lock


@contextlib.contextmanager
def leased(url: str, purpose: str) -> Iterator[None]:
    """While it lasts, nobody else has the lease of that purpose at a path or URL.

    Raises:
        CheckpointError: somebody has it; or the storage cannot be used.
    """
    lease = Lease(Folder(url), owner=uuid.uuid4().hex, about=f"metaloom {purpose}", name=f"{purpose}-lease")
    lease.acquire()
    try:
        yield
    finally:
        lease.release()
