"""Where a run goes on from that was stopped since nothing moved any more."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from metaloom.checkpoints.store import CheckpointStore
from metaloom.engine.outer import SkippedTooOftenError


@contextlib.contextmanager
def naming_last_good(store: CheckpointStore, command: str) -> Iterator[None]:
    """In this context the error of a run that skips too many steps names the last good checkpoint.

    A step that is skipped moves nothing, so that the newest one is good, whenever it was written.

    Args:
        command: that goes on from it.

    Raises:
        SkippedTooOftenError: what was raised inside, with that.
    """
    try:
        yield
    except SkippedTooOftenError as error:
        newest = store.newest_folder()
        if newest is None:
            raise SkippedTooOftenError(f"{error} There is no checkpoint yet.") from error
        raise SkippedTooOftenError(
            f"{error} The last good checkpoint is {newest}: if it was data or a machine that were at fault, "
            f"mend them and go on from it by {command}"
        ) from error
