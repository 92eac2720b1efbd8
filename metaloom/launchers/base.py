"""What all launchers share: what is to run, in options that none of them owns, and what each does with it.

    request = launcher.plan(submission)       pure: the text that --dry-run prints
    submitted = launcher.submit(submission)   sends it

A launcher is a frozen dataclass of its own options in one module, and one line of `launchers/table.py`.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from metaloom.credentials import HIDDEN, has_credentials, is_secret_name
from metaloom.errors import LaunchError
from metaloom.run_folder import RunFolder

if TYPE_CHECKING:
    import argparse

    from metaloom.recipe import Recipe

# The options of the command line that set these fields of a Submission.
OPTIONS = {
    "run": "--run",
    "nodes": "--nodes",
    "gpus_per_node": "--gpus-per-node",
    "ranks_per_node": "--ranks-per-node",
    "cpus_per_node": "--cpus-per-node",
    "memory_per_node": "--memory-per-node",
    "time_limit_s": "--time-limit",
    "queue": "--queue",
    "environment": "--env",
    "is_resumed": "--resume",
    "is_insisted": "--insist",
}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CLOCK = re.compile(r"(?:(?P<days>\d{1,5})-)?(?P<hours>\d{1,5}):(?P<minutes>\d\d)(?::(?P<seconds>\d\d))?")
_UNITS = re.compile(r"(?P<number>\d{1,9})\s?(?P<unit>s|m|min|h|d)")
_UNIT_S = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


@dataclasses.dataclass(frozen=True)
class Submission:
    """A job of training, whoever starts it.

    Attributes:
        recipe: with the overrides applied. Of `launcher.hosts` the launcher sets where and how many meet.
        source: the recipe's file, as the user has named it.
        overrides: `key=value` changes to that file, which `recipe` has already.
        name: of the job.
        folder: the absolute path of the folder in which the command was given: that of relative paths.
        run: the run's folder, as the job's hosts see it; None for one that the launcher chooses.
        nodes: hosts; None where it was not said.
        gpus_per_node: None where it was not said.
        ranks_per_node: processes on each host; None for one per GPU, or `launcher.num_processes` without.
        memory_per_node: a quantity, such as 64Gi or 500M.
        time_limit_s: after which the job is stopped.
        queue: the partition or queue in which the job waits.
        environment: variables that all ranks shall have, with their values; no secrets where these would be
            written down.
        is_resumed: whether a run that has started already is meant to go on.
        is_insisted: whether it is to go on with whatever changes the recipe has.
    """

    recipe: Recipe
    source: str
    name: str
    folder: str
    overrides: tuple[str, ...] = ()
    run: str | None = None
    nodes: int | None = None
    gpus_per_node: int | None = None
    ranks_per_node: int | None = None
    cpus_per_node: int | None = None
    memory_per_node: str | None = None
    time_limit_s: int | None = None
    queue: str | None = None
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    is_resumed: bool = False
    is_insisted: bool = False

    @property
    def train_options(self) -> list[str]:
        """Options of `metaloom train` for whoever starts it, beside those that name the run."""
        return ["--insist"] if self.is_insisted else []

    @property
    def num_nodes(self) -> int:
        return 1 if self.nodes is None else self.nodes

    @property
    def num_ranks(self) -> int:
        """Ranks of each host."""
        if self.ranks_per_node is not None:
            return self.ranks_per_node
        return self.gpus_per_node or self.recipe.launcher.num_processes


@dataclasses.dataclass(frozen=True)
class Submitted:
    """What has come of a submission.

    Attributes:
        name: by which the job is known where it runs.
        lines: what the user is told: that it waits or runs, and the next commands.
        exit_code: of the job, where `submit` has run it to its end; else 0.
    """

    name: str
    lines: tuple[str, ...] = ()
    exit_code: int = 0


@dataclasses.dataclass(frozen=True)
class Need:
    """Something that a launcher needs.

    Attributes:
        what: as a table shows it.
        is_there: on this machine, as far as can be seen without asking a cluster.
        advice: how to get it.
    """

    what: str
    is_there: bool
    advice: str


@dataclasses.dataclass(frozen=True)
class Launcher(ABC):
    """A way to start a job. The fields of a subclass are the options that it has beside those all share.

    Attributes:
        name: as `--launcher` and the table have it.
        summary: one line for tables.
        unused: fields of a Submission that it has no use for, each with what to do instead.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    unused: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def add_options(cls, group: argparse._ArgumentGroup) -> list[argparse.Action]:
        """Adds this launcher's own options to those of a command, each with a default that says "not given",
        and returns them: given with another launcher, they are errors (`table.chosen_launcher`)."""
        return []

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> Launcher:
        """The launcher with its own options as they were given."""
        return cls()

    @classmethod
    @abstractmethod
    def needs(cls) -> list[Need]:
        """What it needs. Nothing is started and no other machine asked."""

    @abstractmethod
    def plan(self, submission: Submission) -> str:
        """Exactly what `submit` would send or run. Pure, but for files that the options name.

        Raises:
            LaunchError: names all that is wrong with the submission.
        """

    @abstractmethod
    def submit(self, submission: Submission) -> Submitted:
        """Sends the job, or runs it to its end where nobody else would.

        Raises:
            LaunchError: the submission is wrong, or was refused.
        """

    def unused_options(self, submission: Submission) -> list[str]:
        """One line for each option that was given and has no effect here."""
        defaults = {field.name: field.default for field in dataclasses.fields(Submission)}
        defaults["environment"] = {}
        return [
            f"{OPTIONS[name]} has no effect with the launcher {self.name}: {advice}"
            for name, advice in self.unused.items()
            if getattr(submission, name) != defaults[name]
        ]


def refuse(problems: Sequence[str]) -> None:
    """Raises one LaunchError that tells all problems, if there are any."""
    if len(problems) == 1:
        raise LaunchError(problems[0])
    if problems:
        raise LaunchError("\n".join([f"{len(problems)} problems:", *(f"  {line}" for line in problems)]))


def size_problems(submission: Submission) -> list[str]:
    """What is wrong with the numbers of hosts, GPUs, processors and ranks."""
    least = {"nodes": 1, "gpus_per_node": 0, "ranks_per_node": 1, "cpus_per_node": 1, "time_limit_s": 1}
    return [
        f"{OPTIONS[name]} is {getattr(submission, name)}; it must be at least {minimum}."
        for name, minimum in least.items()
        if getattr(submission, name) is not None and getattr(submission, name) < minimum
    ]


def secrets_in(variables: Mapping[str, str]) -> list[str]:
    """The names of those variables that read like secrets; one that says in which file it is does not."""
    return [
        name
        for name, value in variables.items()
        if has_credentials(value) or (is_secret_name(name) and not _is_path(value))
    ]


def shown_variables(variables: Mapping[str, str]) -> list[str]:
    """Variables as `env` takes them, for people to read: without the values of secrets."""
    secrets = secrets_in(variables)
    return [f"{name}={HIDDEN if name in secrets else value}" for name, value in variables.items()]


def _is_path(value: str) -> bool:
    return value.startswith("/") and Path(value).exists()


def host_overrides(*, endpoint: str, num_hosts: int, num_ranks: int) -> list[str]:
    """The overrides with which a host's `metaloom train` takes its part in a job of several hosts, or of one
    whose command is given again to go on. What else the recipe has under `launcher.hosts` stays."""
    return [
        f"launcher.num_processes={num_ranks}",
        f"launcher.hosts.endpoint={endpoint}",
        f"launcher.hosts.num_hosts={num_hosts}",
    ]


def host_problems(submission: Submission, num_hosts: int) -> list[str]:
    """What the recipe says of hosts that cannot be with so many."""
    hosts = submission.recipe.launcher.hosts
    if hosts is not None and hosts.min_hosts is not None and hosts.min_hosts > num_hosts:
        return [f"launcher.hosts.min_hosts is {hosts.min_hosts}, but the job has {num_hosts} hosts."]
    return []


def metaloom_command() -> list[str]:
    """The words that start metaloom as this process runs it, for hosts that see the same files."""
    return [sys.executable, "-m", "metaloom.cli"]


def recipe_text(submission: Submission) -> str:
    """The recipe as a file that reads back equal, all that it extends and all overrides in it."""
    from metaloom.recipe import dump_recipe  # takes longer than all else: commands that need none are quick

    return dump_recipe(submission.recipe)


def run_path(submission: Submission) -> Path:
    """The absolute path of the run's folder, on a file system that the job's hosts share."""
    return Path(submission.folder, submission.run or f"runs/{submission.name}")


def check_run(submission: Submission, path: Path) -> None:
    """Checks that a run has started in a folder where it is meant to go on, and none where one is to begin.

    Raises:
        LaunchError: it is the other way round.
    """
    has_started = RunFolder(path).has_started()
    if has_started and not submission.is_resumed:
        raise LaunchError(
            f"{path} already holds a run. Go on with it by --resume, or name another folder with --run."
        )
    if submission.is_resumed and not has_started:
        raise LaunchError(f"--resume: no run has started in {path}. Leave --resume out, or name its folder.")


def shell_words(words: Sequence[str]) -> str:
    """The words as a POSIX shell reads them."""
    return " ".join(map(shlex.quote, words))


def parse_time_limit(text: str) -> int:
    """Seconds of a time limit: 90m, 12h, 2d, or as a clock shows it, 12:00:00, 1-12:00:00, 12:00 (hours and
    minutes).

    Raises:
        LaunchError: it is none.
    """
    units = _UNITS.fullmatch(text.strip())
    clock = _CLOCK.fullmatch(text.strip())
    total_s = 0
    if units is not None:
        total_s = int(units["number"]) * _UNIT_S[units["unit"]]
    elif clock is not None and int(clock["minutes"]) < 60 and int(clock["seconds"] or 0) < 60:
        hours = 24 * int(clock["days"] or 0) + int(clock["hours"])
        total_s = 3600 * hours + 60 * int(clock["minutes"]) + int(clock["seconds"] or 0)
    if total_s == 0:
        raise LaunchError(
            f"--time-limit: {text!r} is no time limit; write 90m, 12h or 2d, or hours, minutes and seconds "
            "as 12:00:00, with days before them as 2-12:00:00."
        )
    return total_s


def parse_environment(words: Sequence[str], present: Mapping[str, str]) -> dict[str, str]:
    """The variables that `--env NAME=VALUE` sets, and those that `--env NAME` passes on.

    Args:
        present: this process's environment.

    Raises:
        LaunchError: names all that cannot be set.
    """
    problems: list[str] = []
    variables: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if _NAME.fullmatch(name) is None:
            problems.append(f"--env: {name!r} is no name of a variable; write NAME=VALUE, or NAME.")
        elif not equals and name not in present:
            problems.append(f"--env {name}: it is not set here; set it, or write {name}=VALUE.")
        else:
            variables[name] = value if equals else present[name]
    refuse(problems)
    return variables
