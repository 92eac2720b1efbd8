"""Files that are there as a whole or not at all, also after a kill or a power cut."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from pathlib import Path


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes a file, text as UTF-8. Readers, and whatever ends this process or the machine in between, find
    what was there before or all of the new content; on return the new content is on disk.

    Raises:
        OSError: it cannot be written; what was there before is.
    """
    # Two may write the same file at once: threads, or processes of two containers, whose ids may be the same.
    partial = path.with_name(f"{path.name}.{secrets.randbits(64)}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        # Half a file takes the room that a full disk lacks.
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Which names a folder holds is on disk, as far as its file system can say so."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Network file systems that keep their folders elsewhere know no such call.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
