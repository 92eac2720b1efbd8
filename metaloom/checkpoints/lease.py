"""Who may write checkpoints to a URL: one run at a time.

The run that may keeps a small file there, and changes it every few seconds. Another run that finds the file
watches it: where it changes, its owner lives, and the other run is refused; where it does not, its owner is
dead, and nothing of it is left to be cleared away. No clocks are compared, so none has to be right.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import socket
import threading
from pathlib import Path

from metaloom.checkpoints.folder import Folder, MissingFileError
from metaloom.errors import CheckpointError

PERIOD_S = 5.0  # how often the owner says that it lives
WATCHED_PERIODS = 4  # for how long another run watches
SETTLE_S = 1.0  # between the writing of a lease and its reading: two runs may come at once


class LostLeaseError(CheckpointError):
    """Another run has, or has taken, the right to write."""


@dataclasses.dataclass(frozen=True)
class Holder:
    """A process that holds, or held, a lease.

    Attributes:
        owner: a name that no other job has.
        term: how often the job has started its ranks again: a rank of an earlier term that still runs, cut
            off from the others, has lost the lease.
        about: what people call the run.
        host: where the process runs.
        kernel: the boot of the machine and the namespace of the process id, which together say whose ids
            those are.
        pid: the process id.
        started: when the process was started, as the kernel counts: ids are used again.
        beat: changes while the owner lives.
    """

    owner: str
    term: int
    about: str
    host: str
    kernel: str
    pid: int
    started: str
    beat: str

    def is_dead(self) -> bool:
        """Whether the process is one of this machine, and gone. Of other machines nothing is known."""
        return self.kernel == _kernel() != "" and _started(self.pid) != self.started


class Lease:
    """The right to write checkpoints under a URL.

    Args:
        owner: a name that no other job has.
        term: how often the job has started its ranks again.
        about: what people call the run, for the message that refuses another one.
        period_s: how often the file is changed.
        name: what the lease is for: there may be several in a folder.
    """

    def __init__(
        self,
        folder: Folder,
        *,
        owner: str,
        about: str,
        term: int = 0,
        period_s: float = PERIOD_S,
        name: str = "lease",
    ) -> None:
        self._folder = folder
        self._file = f"{name}.json"
        self._period_s = period_s
        self._own = Holder(
            owner, term, about, socket.gethostname(), _kernel(), os.getpid(), _started(os.getpid()), ""
        )
        self._is_released = threading.Event()
        self._renewing: threading.Thread | None = None

    def acquire(self) -> None:
        """Takes the lease. Where its last owner was killed on another machine, that takes some 20 seconds.

        Raises:
            LostLeaseError: another run has it.
            CheckpointError: the storage cannot be used.
        """
        found = self._read()
        if found is not None and not self._follows(found) and not found.is_dead():
            for _ in range(WATCHED_PERIODS):
                self._is_released.wait(self._period_s)
                again = self._read()
                if again is not None and again.owner == found.owner and again.beat == found.beat:
                    continue
                if again is not None:
                    raise self._refusal(again)
                break  # it has ended meanwhile
        self._write()
        if found is None or not self._follows(found):
            self._is_released.wait(SETTLE_S)
            self.require()
        self._renewing = threading.Thread(target=self._renew, name="metaloom-lease", daemon=True)
        self._renewing.start()

    def require(self) -> None:
        """Checks that the lease is still this run's.

        Raises:
            LostLeaseError: another run has taken it.
            CheckpointError: the storage cannot be read.
        """
        found = self._read()
        if found is None or not self._is_own(found):
            raise self._refusal(found)

    def release(self) -> None:
        """Gives the lease back.

        Raises:
            CheckpointError: the storage cannot be written.
        """
        self._is_released.set()
        if self._renewing is not None:
            self._renewing.join(self._period_s)  # it may wait for a storage that is down
        found = self._read()
        if found is not None and self._is_own(found):
            self._folder.remove([self._file])

    def _renew(self) -> None:
        while not self._is_released.wait(self._period_s):
            try:
                found = self._read()
                if found is not None and not self._is_own(found):
                    return  # `require` will say so
                self._write()
            except CheckpointError:
                continue  # a storage that is down refuses others as well

    def _is_own(self, found: Holder) -> bool:
        return (found.owner, found.term) == (self._own.owner, self._own.term)

    def _follows(self, found: Holder) -> bool:
        """Whether a lease is of this job, of no later term."""
        return found.owner == self._own.owner and found.term <= self._own.term

    def _read(self) -> Holder | None:
        try:
            content = self._folder.read(self._file)
        except MissingFileError:
            return None
        try:
            return Holder(**json.loads(content))
        except (ValueError, TypeError):
            return None  # of no run that could go on

    def _write(self) -> None:
        holder = dataclasses.replace(self._own, beat=secrets.token_hex(8))
        self._folder.write(self._file, json.dumps(dataclasses.asdict(holder)).encode())

    def _refusal(self, found: Holder | None) -> LostLeaseError:
        who = "nobody, since the file is gone"
        if found is not None:
            who = f"{found.about}, process {found.pid} on {found.host}"
        return LostLeaseError(
            f"{self._folder.shown}: another run works here ({who}). Wait for its end or stop it, or give "
            "this run a place of its own (checkpoint.url)."
        )


def _kernel() -> str:
    """Which kernel's process ids are meant, and in which namespace; empty where Linux does not say so."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process was started, in ticks of its kernel; empty where there is no such process."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fields = status.rpartition(")")[2].split()  # a process's name may hold spaces
    return "" if fields[0] == "Z" else fields[19]
