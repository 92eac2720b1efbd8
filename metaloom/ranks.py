"""The ranks of one host, as processes of `metaloom.worker` that torch elastic starts and stops."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing import LogsSpecs, PContext, start_processes

from metaloom.faults import Fault, rank_fault
from metaloom.processes import END_NOW
from metaloom.whereabouts import last_failure, last_place, last_seen

STOP_S = 30  # how long ranks have to end when they are told to


@dataclasses.dataclass(frozen=True)
class Seats:
    """Which ranks of a job run on this host, in one round of it.

    Attributes:
        round_number: rounds before this one: every restart and every change of hosts begins one.
        first_rank: the first rank here; the others follow on it.
        num_here: ranks here.
        world_size: ranks on all hosts.
        store: host and port of the store by which the ranks find each other.
    """

    round_number: int
    first_rank: int
    num_here: int
    world_size: int
    store: tuple[str, int]

    def describe(self) -> str:
        """The ranks here: `rank 0`, `ranks 2 to 3`."""
        last = self.first_rank + self.num_here - 1
        return f"rank {last}" if self.num_here == 1 else f"ranks {self.first_rank} to {last}"

    def environment(self, local_rank: int, name: str, job: str) -> dict[str, str]:
        """The variables of one rank, mostly named as torch elastic names them.

        Args:
            name: of the folder of the ranks' logs.
            job: a name that no other job has.
        """
        return {
            "RANK": str(self.first_rank + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.num_here),
            "MASTER_ADDR": self.store[0],
            "MASTER_PORT": str(self.store[1]),
            "TORCHELASTIC_RUN_ID": name,
            "METALOOM_JOB": job,
            "TORCHELASTIC_RESTART_COUNT": str(self.round_number),
        }


class Ranks:
    """The processes of one host in one round.

    Args:
        name: names the folder of their logs.
        job: a name that no other job has.
        worker_args: arguments of `metaloom.worker`.
    """

    def __init__(
        self, seats: Seats, name: str, job: str, worker_args: Sequence[str], logs: LogsSpecs
    ) -> None:
        self.seats = seats
        local_ranks = range(seats.num_here)
        self._folder = Path(tempfile.mkdtemp(prefix="metaloom-ranks-"))
        self._folders = [self._folder / str(local_rank) for local_rank in local_ranks]
        for folder in self._folders:
            folder.mkdir()
        self._processes: PContext = start_processes(
            name="metaloom",
            entrypoint=sys.executable,
            args={
                local_rank: ("-m", "metaloom.worker", "--whereabouts", str(folder), *worker_args)
                for local_rank, folder in enumerate(self._folders)
            },
            envs={local_rank: seats.environment(local_rank, name, job) for local_rank in local_ranks},
            logs_specs=logs,
            # Of lines that an agent shows beside its own.
            log_line_prefixes={local: f"[rank {seats.first_rank + local}] " for local in local_ranks},
        )

    def places(self) -> list[str]:
        """Where in the job each rank is, or was last."""
        return [last_place(folder) for folder in self._folders]

    def seen(self) -> str:
        """Where each rank is, or was last, and what it does there, in words."""
        ranks = enumerate(self._folders, self.seats.first_rank)
        return "; ".join(f"rank {rank} at {last_seen(folder)}" for rank, folder in ranks)

    def exit_statuses(self) -> dict[int, int | str]:
        """Of those ranks that have ended, by local rank: the exit code, or the name of the signal."""
        statuses: dict[int, int | str] = {}
        for local_rank, pid in self._processes.pids().items():
            # The process is left to be collected by `stop`.
            ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None:
                was_killed = ended.si_code != os.CLD_EXITED
                statuses[local_rank] = signal.Signals(ended.si_status).name if was_killed else ended.si_status
        return statuses

    def faults(self) -> list[Fault]:
        """Why ranks have ended that did not end well, the first ranks first."""
        statuses, places = self.exit_statuses(), self.places()
        faults = []
        for local_rank, status in statuses.items():
            if status == 0:
                continue
            failure = last_failure(self._folders[local_rank])
            kind, text = (None, "") if failure is None else (failure.kind, failure.text)
            if kind == "lost_partner":
                text += f" (last seen: {self.seen()})"
            faults.append(
                rank_fault(
                    kind,
                    text,
                    rank=self.seats.first_rank + local_rank,
                    place=places[local_rank],
                    exit_status=status,
                    output=self._output(local_rank),
                )
            )
        return faults

    def ask(self, number: signal.Signals) -> None:
        """Sends a signal to the ranks that still run."""
        for local_rank, pid in self._processes.pids().items():
            if local_rank not in self.exit_statuses():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def stop(self, within_s: int = STOP_S) -> None:
        """Ends the ranks that still run, after so long by SIGKILL, and tidies up."""
        for pid in self._processes.pids().values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGCONT)  # one that was stopped cannot end before it goes on
        self._processes.close(END_NOW, within_s)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _output(self, local_rank: int) -> str:
        return str(Path(self._processes.stderrs[local_rank]).parent)
