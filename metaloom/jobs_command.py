"""`metaloom jobs list | status | logs | cancel | wait`: jobs on Kubernetes, without torch."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import re
import shlex
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from metaloom.arguments import add_command
from metaloom.errors import LaunchError

if TYPE_CHECKING:
    from metaloom.arguments import Commands
    from metaloom.k8s.client import Cluster
    from metaloom.k8s.gathering import Found, Gathering
    from metaloom.k8s.logs import LogLine
    from metaloom.k8s.status import Status

EXAMPLES = """\
examples:
  metaloom jobs list
  metaloom jobs status glyphs --watch
  metaloom jobs logs glyphs --follow                 of all ranks, until the job has ended
  metaloom jobs logs glyphs --rank 3 --tail 100
  metaloom jobs wait glyphs --timeout 12h && metaloom evaluate ...
  metaloom jobs cancel glyphs                        the run is saved, and its checkpoints stay

Ctrl-C ends the command and leaves the job running.

exit codes of wait: 0 done; 1 to 6 and 75 those of the run, where it has failed; 1 failed otherwise;
124 --timeout has passed, and the job goes on; 125 the command itself failed (no such job, or no more; no
cluster that answers; an option that there is not), so that the job's end is not known; 130 Ctrl-C, and the
job goes on
"""

TIMED_OUT = 124  # as timeout(1) has it
UNKNOWN = 125  # as there, where the command that waits fails by itself
INTERRUPTED = 130
RUN_CODES = (1, 2, 3, 4, 5, 6, 75)
POLL_S = 3.0
# A cluster that does not answer for so long is given up.
OUTAGE_S = 600.0
_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_SHORT_WORDS = 70


class UnknownEndError(LaunchError):
    """A failure of `wait` itself. A run has never its exit code."""

    exit_code = UNKNOWN


def add_jobs_commands(commands: Commands) -> None:
    """Adds the commands to those of a parser."""
    group = add_command(commands, "jobs", "list, watch, wait for or cancel jobs on Kubernetes", EXAMPLES)
    own = group.add_subparsers(title="commands", required=True, metavar="COMMAND")
    listing = add_command(own, "list", "say which jobs there are, and how they do", EXAMPLES)
    listing.add_argument("--json", action="store_true", help="print JSON in place of a table")
    listing.set_defaults(run_command=_list)
    status = add_command(own, "status", "tell what is going on with a job", EXAMPLES)
    status.add_argument("--json", action="store_true", help="print JSON in place of words")
    status.add_argument("--watch", action="store_true", help="go on telling, until the job has ended")
    status.set_defaults(run_command=_status)
    logs = add_command(own, "logs", "print what the ranks of a job print", EXAMPLES)
    logs.add_argument("--follow", action="store_true", help="go on, until the job has ended")
    logs.add_argument("--rank", type=int, metavar="R", help="of this rank alone")
    logs.add_argument("--tail", type=int, metavar="N", help="the last lines of each node alone")
    logs.add_argument("--since", metavar="DURATION", help="what is no older, such as 90s, 30m or 2h")
    logs.set_defaults(run_command=_logs)
    cancel = add_command(own, "cancel", "end a job: it saves, and its objects are deleted", EXAMPLES)
    cancel.add_argument(
        "--finished", action="store_true", help="also one that has ended: its objects and logs are deleted"
    )
    cancel.set_defaults(run_command=_cancel)
    wait = add_command(own, "wait", "wait until a job has ended", EXAMPLES)
    wait.add_argument("--timeout", metavar="DURATION", help="wait no longer, such as 90s, 30m or 12h")
    wait.set_defaults(run_command=_wait)
    for command in (status, logs, cancel, wait):
        command.add_argument("name", metavar="NAME", help="of the job, as submit and list print it")
    for command in (listing, status, logs, cancel, wait):
        command.add_argument("--namespace", "-n", metavar="NS", help="(default: that of the context)")
        command.add_argument("--context", metavar="NAME", help="of the kubeconfig (default: the current one)")


# ---------------------------------------------------------------- list


def _list(arguments: argparse.Namespace) -> int:
    with _connected(arguments) as (cluster, gathering):
        now = _now()
        statuses = gathering.statuses(gathering.jobs(), now)
        _tell_notes(gathering)
        if arguments.json:
            print(json.dumps([_plain(status) for status in statuses], indent=2))
            return 0
        if not statuses:
            print(f"no jobs of metaloom in {cluster.shown}")
            return 0
        from metaloom.tracking.console import format_table

        rows = [(one.name, _state(one), _nodes(one), _age(one, now), _progress(one)) for one in statuses]
        print(format_table(cluster.shown, ("name", "state", "nodes", "age", "progress"), rows))
    return 0


def _state(status: Status) -> str:
    """The state in few words."""
    if status.state == "running" and "nothing has been heard" not in status.headline:
        return "running"
    words = status.headline
    return words if len(words) <= _SHORT_WORDS else f"{words[: _SHORT_WORDS - 3]}..."


def _nodes(status: Status) -> str:
    running = sum(one.phase == "running" for one in status.nodes)
    return f"{running} of {status.num_nodes}"


def _age(status: Status, now: datetime.datetime) -> str:
    from metaloom.k8s.wording import duration_words

    return "" if status.created is None else duration_words((now - status.created).total_seconds())


def _progress(status: Status) -> str:
    progress = status.progress
    if progress is None or progress.step is None:
        return ""
    phase = "" if progress.phase == "meta-train" else f"{progress.phase} "
    of = "" if progress.total is None else f" of {progress.total}"
    _, _, left = status.headline.partition(", ")
    return f"{phase}{progress.step}{of}" + (f", {left}" if " left" in left else "")


# ---------------------------------------------------------------- status


def _status(arguments: argparse.Namespace) -> int:
    with _connected(arguments) as (_, gathering), _left_running(arguments, "status", "--watch"):
        if not arguments.watch:
            _, status = gathering.status(arguments.name, _now())
            _tell_notes(gathering)
            _print(arguments, status)
            return 0
        told: tuple[object, ...] = ()
        for status in _statuses(gathering, arguments.name):
            key = (status.state, status.details, status.nodes, status.progress and status.progress.step)
            if key != told:
                _tell_notes(gathering)
                _print(arguments, status)
                told = key
    return 0


def _print(arguments: argparse.Namespace, status: Status) -> None:
    if arguments.json:
        # One line for each where several follow each other.
        print(json.dumps(_plain(status), indent=None if arguments.watch else 2), flush=True)
        return
    print("\n".join(_lines(arguments, status)), flush=True)


def _lines(arguments: argparse.Namespace, status: Status) -> Iterator[str]:
    stamp = f"{_now():%H:%M:%S} " if arguments.watch else ""
    yield f"{stamp}{status.name}: {status.headline}"
    yield from (f"  {line}" for line in status.details)
    if status.nodes:
        from metaloom.tracking.console import format_table

        rows = [
            ("?" if one.index is None else str(one.index), one.machine or "-", one.words)
            for one in status.nodes
        ]
        table = format_table("", ("node", "machine", "state"), rows).splitlines()[1:]
        yield from (f"  {line}" for line in table)


def _plain(status: Status) -> dict[str, Any]:
    """A status as JSON has it: times as text."""

    def written(value: object) -> object:
        if isinstance(value, datetime.datetime):
            return value.astimezone(datetime.UTC).isoformat()
        if isinstance(value, dict):
            return {key: written(inner) for key, inner in value.items()}
        return [written(inner) for inner in value] if isinstance(value, list | tuple) else value

    plain = written(dataclasses.asdict(status))
    assert isinstance(plain, dict)
    return plain


# ---------------------------------------------------------------- wait


def _wait(arguments: argparse.Namespace) -> int:
    try:
        return _end_code(arguments)
    except LaunchError as error:
        raise UnknownEndError(str(error)) from error


def _end_code(arguments: argparse.Namespace) -> int:
    """Waits for the end of a job and tells how it ended; returns what that makes the exit code."""
    from metaloom.k8s.gathering import NoSuchJobError
    from metaloom.k8s.status import ENDED

    timeout_s = None if arguments.timeout is None else _seconds(arguments.timeout, "--timeout")
    with _connected(arguments) as (_, gathering), _left_running(arguments, "wait"):
        told: tuple[object, ...] = ()
        last: Status | None = None
        try:
            for last in _statuses(gathering, arguments.name, timeout_s=timeout_s):
                key = (last.state, last.is_stuck, last.headline if last.state != "running" else "")
                if key != told:
                    _tell_notes(gathering)
                    print(f"{_now():%H:%M:%S} {last.name}: {last.headline}", flush=True)
                    told = key
        except NoSuchJobError as error:
            if last is None:
                raise
            raise LaunchError(
                f"job {arguments.name!r} was deleted while it was waited for; before, it was {last.headline}"
            ) from error
        assert last is not None
        if last.state not in ENDED:
            print(
                f"{arguments.name} has not ended within {arguments.timeout} (--timeout), and goes on: "
                f"{last.headline}\nwait on with: {_again(arguments, 'wait')}",
                file=sys.stderr,
            )
            return TIMED_OUT
        for line in last.details:
            print(f"  {line}")
        if last.state == "done":
            return 0
        return last.exit_code if last.exit_code in RUN_CODES else 1


def _statuses(gathering: Gathering, name: str, *, timeout_s: float | None = None) -> Iterator[Status]:
    """The status of a job again and again, until it has ended or the time is over.

    A cluster that does not answer in between is waited for.
    """
    from metaloom.k8s.refusals import UnreachableError
    from metaloom.k8s.status import ENDED

    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    heard = None
    while True:
        try:
            _, status = gathering.status(name, _now())
        except UnreachableError as error:
            if heard is None or time.monotonic() - heard > OUTAGE_S:
                raise
            print(f"{error} Trying again.", file=sys.stderr, flush=True)
        else:
            heard = time.monotonic()
            yield status
            if status.state in ENDED:
                return
        left_s = POLL_S if deadline is None else min(POLL_S, deadline - time.monotonic())
        if left_s <= 0:
            return
        time.sleep(left_s)


# ---------------------------------------------------------------- logs


def _logs(arguments: argparse.Namespace) -> int:
    from metaloom.k8s.logs import merged
    from metaloom.k8s.wording import time_of

    if arguments.tail is not None and arguments.tail < 1:
        raise LaunchError(f"--tail is {arguments.tail}; it must be at least 1.")
    since = None
    if arguments.since is not None:
        since = _now() - datetime.timedelta(seconds=_seconds(arguments.since, "--since"))
    with _connected(arguments) as (cluster, gathering), _left_running(arguments, "logs", "--follow"):
        found = gathering.job(arguments.name)
        _check_rank(arguments.rank, found)
        lines = merged(
            cluster,
            found.labels,
            follow=arguments.follow,
            rank=arguments.rank,
            tail=arguments.tail,
            is_over=lambda: _is_over(gathering, arguments.name),
        )
        num_lines = 0
        # A generator: Ctrl-C in between its lines has to end its connections.
        with contextlib.closing(cast("Generator[LogLine, None, None]", lines)):
            for line in lines:
                at = None if since is None else time_of(line.timestamp)
                if since is None or at is None or at >= since:
                    print(line, flush=arguments.follow)
                    num_lines += 1
        _tell_end(arguments, gathering, num_lines)
    return 0


def _check_rank(rank: int | None, found: Found) -> None:
    from metaloom.k8s.top_state import read_top

    top = read_top(found.top)
    num_ranks = top.nodes * top.ranks_per_node
    if rank is not None and not 0 <= rank < num_ranks:
        ranks = "rank 0 alone" if num_ranks == 1 else f"ranks 0 to {num_ranks - 1}"
        raise LaunchError(f"--rank is {rank}; {found.name} has {ranks}.")


def _is_over(gathering: Gathering, name: str) -> bool:
    from metaloom.k8s.gathering import NoSuchJobError

    try:
        return gathering.job(name).is_over
    except NoSuchJobError:
        return True


def _tell_end(arguments: argparse.Namespace, gathering: Gathering, num_lines: int) -> None:
    """Says what became of a job that was followed, or why one has printed nothing."""
    from metaloom.k8s.gathering import NoSuchJobError

    if num_lines and not arguments.follow:
        return
    try:
        words = gathering.status(arguments.name, _now())[1].headline
    except NoSuchJobError:
        words = "deleted"
    nothing = "" if num_lines else "nothing was printed; "
    print(f"{arguments.name}: {nothing}{words}", file=sys.stderr)
    _tell_notes(gathering)


# ---------------------------------------------------------------- cancel


def _cancel(arguments: argparse.Namespace) -> int:
    from metaloom.k8s.gathering import NoSuchJobError
    from metaloom.k8s.status import ENDED

    with _connected(arguments) as (cluster, gathering):
        try:
            found, status = gathering.status(arguments.name, _now())
        except NoSuchJobError as error:
            print(f"nothing to cancel: {error}")
            return 0
        what = f"{found.resource.kind} {found.name} in {cluster.shown}"
        if status.state in ENDED and not arguments.finished:
            print(f"nothing to cancel: {found.name} has ended ({status.headline})")
            print(
                f"its objects and logs are kept; delete them with: {_again(arguments, 'cancel')} --finished"
            )
            return 0
        if found.top["metadata"].get("deletionTimestamp") is not None:
            print(f"{what} is being cancelled already ({status.headline})")
            return 0
        if not cluster.delete(found.resource, found.name):
            print(f"nothing to cancel: {what} has just gone")
            return 0
        others = _delete_rest(cluster, found)
        print(f"{'deleted' if status.state in ENDED else 'cancelled'}: {what}, and {_owned(status, others)}")
        if status.state not in ENDED and status.nodes:
            print(
                f"its ranks were told to stop (SIGTERM) and save, for which they have {_grace_s(found.top)} s"
            )
        _tell_notes(gathering)
    return 0


def _delete_rest(cluster: Cluster, found: Found) -> list[str]:
    """Deletes the services and config maps of a job that it does not own, and so would outlive it."""
    from metaloom.k8s.resources import CONFIG_MAPS, SERVICES, TRAIN_JOBS, TRAINING_RUNTIMES

    deleted = []
    runtimes = (TRAINING_RUNTIMES,) if found.resource == TRAIN_JOBS else ()
    for resource in (SERVICES, CONFIG_MAPS, *runtimes):
        for one in cluster.list(resource, labels=found.labels):
            meta = one["metadata"]
            if not meta.get("ownerReferences") and cluster.delete(resource, meta["name"]):
                deleted.append(f"{resource.kind} {meta['name']}")
    return deleted


def _owned(status: Status, others: Sequence[str]) -> str:
    from metaloom.k8s.wording import counted, listed

    parts = [counted(len(status.nodes), "pod")] if status.nodes else []
    return listed([*parts, *others]) if parts or others else "all it owns"


def _grace_s(top: dict[str, Any]) -> int:
    """How long its pods may take to end."""
    text = json.dumps(top.get("spec") or {})
    seconds = [int(found) for found in re.findall(r'"terminationGracePeriodSeconds": (\d+)', text)]
    return max(seconds, default=30)


# ---------------------------------------------------------------- parts


@contextlib.contextmanager
def _connected(arguments: argparse.Namespace) -> Iterator[tuple[Cluster, Gathering]]:
    from metaloom.k8s.client import Cluster
    from metaloom.k8s.gathering import Gathering

    cluster = Cluster.connect(context=arguments.context, namespace=arguments.namespace)
    try:
        yield cluster, Gathering(cluster)
    finally:
        cluster.close()


@contextlib.contextmanager
def _left_running(arguments: argparse.Namespace, *words: str) -> Iterator[None]:
    """Ctrl-C in this context ends the command, and says that the job goes on."""
    try:
        yield
    except KeyboardInterrupt:
        again = _again(arguments, *words)
        print(
            f"\ninterrupted: {arguments.name} goes on in the cluster. Come back with: {again}",
            file=sys.stderr,
        )
        raise SystemExit(INTERRUPTED) from None


def _again(arguments: argparse.Namespace, command: str, *options: str) -> str:
    """The command with which to come back."""
    words = ["metaloom", "jobs", command, arguments.name, *options]
    if arguments.namespace is not None:
        words += ["--namespace", arguments.namespace]
    if arguments.context is not None:
        words += ["--context", arguments.context]
    return shlex.join(words)


def _tell_notes(gathering: Gathering) -> None:
    for note in gathering.notes:
        print(f"note: {note}", file=sys.stderr)
    gathering.notes.clear()


def _seconds(text: str, option: str) -> float:
    found = _DURATION.fullmatch(text)
    if found is None or not text:
        raise LaunchError(f"{option} is {text!r}; it must be a duration such as 90s, 30m, 2h or 1h30m.")
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
