"""A batch script for Slurm, which stops in time, and puts the job back into the queue until it is done."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from metaloom.errors import LaunchError
from metaloom.launchers.base import (
    OPTIONS,
    Launcher,
    Need,
    Submission,
    Submitted,
    check_run,
    host_overrides,
    host_problems,
    metaloom_command,
    recipe_text,
    refuse,
    run_path,
    secrets_in,
    shell_words,
    size_problems,
)

if TYPE_CHECKING:
    import argparse

# Beside the time that the recipe gives ranks to stop: the agent's margin, and the ends of its processes.
STOP_MARGIN_S = 35
SIGNAL_EARLY_S = 60  # by so much Slurm may send a signal before it is due
MAX_SIGNAL_S = 65535
MAX_FAULTS = 3
PLAIN = re.compile(r"[\w@+=:,./\[\]*&|()-]+", re.ASCII)
MEMORY = re.compile(r"(\d+(?:\.\d+)?)([KMGT]i?)")
MEMORY_BYTES = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}

HEAD = """\
set -euo pipefail

# Slurm sends SIGTERM to the commands on the hosts: before the time limit, and when the job is preempted or
# cancelled. They save and end. It is not passed on from here, since a second one would end them at once, and
# srun makes a SIGKILL of it: this shell has to outlive them and do what their exit code asks for.
trap : TERM
"""

START = """\
# On the first host, at a port that other jobs are unlikely to have.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
endpoint=${hosts%%$'\\n'*}:$((20000 + SLURM_JOB_ID % 10000))

echo "metaloom: start $((${SLURM_RESTART_COUNT:-0} + 1)) of job $SLURM_JOB_ID, hosts meet at $endpoint"
code=0
"""

# The exit codes of `metaloom train`.
END = """\
again() {
  # Slurm decides about a job that it has cancelled, or is taking away: that one does not run any more.
  if [[ " $(scontrol show job --oneliner "$SLURM_JOB_ID" || true) " != *" JobState=RUNNING "* ]]; then
    echo "metaloom: Slurm has ended the job, so it is not put back into the queue from here"
  elif scontrol requeue "$SLURM_JOB_ID"; then
    echo "metaloom: the job is back in the queue and will go on from its last checkpoint"
  else
    echo "metaloom: the job could not be put back into the queue: submit it again with --resume"
  fi
}

case $code in
  0)
    rm -f "$faults" "$recipe"
    echo "metaloom: done"
    ;;
  75)
    echo "metaloom: stopped and saved"
    again
    ;;
  2 | 3 | 4 | 5 | 6)
    echo "metaloom: exit code $code: trying again would not help, see above"
    ;;
  129 | 130)
    echo "metaloom: interrupted"
    ;;
  *)
    count=$(($(cat "$faults" 2>/dev/null || echo 0) + 1))
    echo "$count" >"$faults"
    if ((count > max_faults)); then
      echo "metaloom: exit code $code, fault $count of the job: given up"
    else
      echo "metaloom: exit code $code, fault $count of at most $max_faults"
      again
    fi
    ;;
esac
exit "$code"
"""


@dataclasses.dataclass(frozen=True)
class Slurm(Launcher):
    """`sbatch` of a script that starts `metaloom train` on each host by `srun`.

    Attributes:
        sbatch: further options, each as sbatch takes it: `--exclude=node3`.
        max_faults: how often the job goes back into the queue after a fault; after a preemption or at its
            time limit it always does.
    """

    name: ClassVar[str] = "slurm"
    summary: ClassVar[str] = "a batch job of Slurm, back in the queue after a preemption or its time limit"

    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    sbatch: tuple[str, ...] = ()
    max_faults: int = MAX_FAULTS

    @classmethod
    def add_options(cls, group: argparse._ArgumentGroup) -> list[argparse.Action]:
        return [
            group.add_argument("--account", metavar="NAME", help="whom the job is charged to"),
            group.add_argument("--qos", metavar="NAME", help="quality of service"),
            group.add_argument("--constraint", metavar="FEATURES", help="features that the nodes must have"),
            group.add_argument(
                "--sbatch",
                action="append",
                default=[],
                metavar="OPTION",
                help="a further option of sbatch, such as --sbatch=--exclude=node3; may be given again",
            ),
            group.add_argument(
                "--max-faults",
                type=int,
                metavar="N",
                help=f"how often the job is tried again after faults (default: {MAX_FAULTS}); "
                "preemptions and time limits do not count",
            ),
        ]

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> Slurm:
        return cls(
            account=arguments.account,
            qos=arguments.qos,
            constraint=arguments.constraint,
            sbatch=tuple(arguments.sbatch),
            max_faults=MAX_FAULTS if arguments.max_faults is None else arguments.max_faults,
        )

    @classmethod
    def needs(cls) -> list[Need]:
        return [
            Need(
                "the command sbatch",
                shutil.which("sbatch") is not None,
                "submit from a login node of the cluster, or load its Slurm module",
            )
        ]

    def plan(self, submission: Submission) -> str:
        """The batch script."""
        refuse(self._problems(submission))
        run = run_path(submission)
        # Slurm opens the log before the script runs, and this shell writes the others: so not in the run's
        # folder, which a job that is refused shall not have touched.
        beside = f"{run.parent}/{submission.name}"
        options = "\n".join(f"#SBATCH {option}" for option in self._options(submission, f"{beside}-%j.log"))
        variables = [f"export {name}={shlex.quote(value)}" for name, value in submission.environment.items()]
        own = [
            f'recipe={shlex.quote(beside)}"-$SLURM_JOB_ID.yaml"',
            f'faults={shlex.quote(beside)}"-$SLURM_JOB_ID.faults"',
            f"max_faults={self.max_faults}",
        ]
        recipe = recipe_text(submission)
        mark = "END_OF_RECIPE"
        while mark in recipe:
            mark += "_"
        return "\n".join(
            [
                "#!/bin/bash",
                options,
                HEAD,
                *variables,
                *own,
                f"cat >\"$recipe\" <<'{mark}'\n{recipe}{mark}\n",
                START + self._srun(submission, run),
                END,
            ]
        )

    def submit(self, submission: Submission) -> Submitted:
        script = self.plan(submission)
        run = run_path(submission)
        check_run(submission, run)
        (need,) = self.needs()
        if not need.is_there:
            raise LaunchError(f"sbatch is not on the PATH here: {need.advice}. --dry-run prints the script.")
        try:
            # Slurm fails a job without a word where it cannot write the log.
            run.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LaunchError(
                f"{run.parent} cannot be made: {error.strerror or error}. Name another folder with --run."
            ) from error
        done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True)
        number = done.stdout.strip().partition(";")[0]
        if done.returncode != 0 or not number.isdigit():
            said = (done.stderr.strip() or done.stdout.strip()).replace("sbatch: error: ", "")
            raise LaunchError(f"sbatch refused the job: {said or f'exit code {done.returncode}'}")
        log = f"{run.parent}/{submission.name}-{number}.log"
        return Submitted(
            number,
            (
                f"submitted {submission.name} as Slurm job {number}; the run's folder is {run}",
                f"  squeue --job {number}              where it stands",
                f"  scontrol show job {number}         why it waits",
                f"  tail -F {shell_words([log])}",
                f"  scancel {number}                   save and end",
            ),
        )

    def _options(self, submission: Submission, log: str) -> list[str]:
        """The script's own options of sbatch."""
        values: dict[str, object] = {
            "job-name": submission.name,
            "output": log,
            "open-mode": "append",
            "chdir": submission.folder,
            "nodes": submission.num_nodes,
            "ntasks-per-node": 1,
            "cpus-per-task": _num_cpus(submission),
            "gpus-per-node": submission.gpus_per_node or None,
            "mem": _memory(submission.memory_per_node),
            "time": _clock(submission.time_limit_s),
            "partition": submission.queue,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "signal": f"TERM@{_signal_s(submission)}",
        }
        return [
            *(f"--{name}={value}" for name, value in values.items() if value is not None),
            "--requeue",
            *self.sbatch,
        ]

    def _srun(self, submission: Submission, run: Path) -> str:
        """Starts the command on each host; one that ends does not end the others, which know what to do."""
        num_nodes = submission.num_nodes
        srun = [
            "srun",
            f"--nodes={num_nodes}",
            f"--ntasks={num_nodes}",
            "--ntasks-per-node=1",
            f"--cpus-per-task={_num_cpus(submission)}",
            "--kill-on-bad-exit=0",
            "--wait=0",
        ]
        overrides = host_overrides(endpoint="", num_hosts=num_nodes, num_ranks=submission.num_ranks)
        words = [f'"{word}$endpoint"' if word.endswith("=") else shlex.quote(word) for word in overrides]
        words = [*submission.train_options, *words]
        lines = [
            shell_words(srun),
            f'{shell_words([*metaloom_command(), "train"])} "$recipe" --run {shlex.quote(str(run))}',
            f"{' '.join(words)} || code=$?",
        ]
        return " \\\n  ".join(lines) + "\n"

    def _problems(self, submission: Submission) -> list[str]:
        """What is wrong with the options, all of it."""
        problems = self.unused_options(submission) + size_problems(submission)
        problems += host_problems(submission, submission.num_nodes)
        for name in ("account", "qos", "constraint"):
            value = getattr(self, name)
            if value is not None and PLAIN.fullmatch(value) is None:
                problems.append(
                    f"--{name}: {value!r} cannot stand in a batch script; leave out blanks and quotes."
                )
        if submission.queue is not None and PLAIN.fullmatch(submission.queue) is None:
            problems.append(f"--queue: {submission.queue!r} is no name of a partition.")
        for option in self.sbatch:
            if not option.startswith("-") or "\n" in option:
                problems.append(f"--sbatch: {option!r} is no option of sbatch; write it as --exclude=node3.")
        for what, path in (("the folder", submission.folder), ("--run", str(run_path(submission)))):
            if PLAIN.fullmatch(path) is None:
                problems.append(
                    f"{what}: Slurm cannot take a path with blanks, quotes or other special characters: "
                    f"{path!r}. Use another one."
                )
        if PLAIN.fullmatch(submission.name) is None or "/" in submission.name:
            problems.append(f"--name: {submission.name!r} is no name of a Slurm job and its files.")
        for name in secrets_in(submission.environment):
            problems.append(
                f"--env: {name} reads like a secret, and the batch script, which Slurm keeps and shows, "
                f"would hold its value. Set it in the environment of this command, and leave --env {name} "
                "out: sbatch passes the environment on, unless its option --export says otherwise."
            )
        if self.max_faults < 0:
            problems.append(f"--max-faults is {self.max_faults}; it must be at least 0.")
        if submission.memory_per_node is not None and _memory(submission.memory_per_node) is None:
            problems.append(
                f"{OPTIONS['memory_per_node']}: {submission.memory_per_node!r} is no amount of memory; "
                "write it as 64Gi or 500M."
            )
        return problems + _time_problems(submission)


def _num_cpus(submission: Submission) -> int:
    """Processors of a host: as asked for, or one for each thread and each process that reads data.

    A job that asks for one task a node and nothing else would get a single processor.
    """
    if submission.cpus_per_node is not None:
        return submission.cpus_per_node
    recipe = submission.recipe
    return submission.num_ranks * (recipe.launcher.threads_per_process + max(1, recipe.loading.num_workers))


def _signal_s(submission: Submission) -> int:
    return math.ceil(submission.recipe.launcher.stop_within_s) + STOP_MARGIN_S


def _time_problems(submission: Submission) -> list[str]:
    signal_s = _signal_s(submission)
    if signal_s > MAX_SIGNAL_S:
        return [
            f"launcher.stop_within_s is {submission.recipe.launcher.stop_within_s:g}; Slurm signals a job at "
            f"most {MAX_SIGNAL_S} s before its end, so it must be at most {MAX_SIGNAL_S - STOP_MARGIN_S}."
        ]
    limit_s = submission.time_limit_s
    if limit_s is not None and 0 < limit_s <= signal_s + SIGNAL_EARLY_S:
        return [
            f"{OPTIONS['time_limit_s']} is {limit_s} s, but a job is asked to stop up to "
            f"{signal_s + SIGNAL_EARLY_S} s before its time limit (launcher.stop_within_s and what Slurm "
            "takes): it would never get anywhere."
        ]
    return []


def _clock(limit_s: int | None) -> str | None:
    """A time limit as Slurm writes it: days-hours:minutes:seconds."""
    if limit_s is None:
        return None
    minutes, seconds = divmod(limit_s, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours // 24}-{hours % 24:02d}:{minutes:02d}:{seconds:02d}"


def _memory(quantity: str | None) -> str | None:
    """A quantity in MiB, rounded up, as Slurm takes it; None where it is none."""
    found = MEMORY.fullmatch(quantity or "")
    if found is None:
        return None
    return f"{math.ceil(float(found[1]) * MEMORY_BYTES[found[2]] / 2**20)}M"
