"""The folder that is written: there as a whole or not at all. Needs no torch."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from metaloom.errors import LaunchError
from metaloom.export.card import CARD


def require_free(folder: Path, *, replace: bool) -> None:
    """Passes where a folder can be written.

    Args:
        replace: whether an export that lies there may go.

    Raises:
        LaunchError: something is there that may not.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / CARD).is_file():
        raise LaunchError(f"{folder} is there, and is no export: name another place with --output.")
    if not replace:
        raise LaunchError(
            f"{folder} already holds an export: name another place with --output, or write over it with "
            "--replace."
        )


@contextlib.contextmanager
def new_folder(folder: Path, *, replace: bool) -> Iterator[Path]:
    """A folder beside the one that is asked for, which takes its place when all is written.

    Raises:
        LaunchError: the place is taken, or cannot be written.
    """
    require_free(folder, replace=replace)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError as error:
        raise LaunchError(f"{folder} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
