"""What a person sees of a run: progress bars on a terminal, few plain lines anywhere else.

    with console.phase("meta-train", total=400, unit="step") as phase:
        phase.advance(1, loss=1.25, accuracy=0.5)

A stream that is no terminal (a file, a pipe, a cluster's log) gets one line when a phase starts, then
one whenever ten seconds and five percent have both passed, and one at the end; never a control character.
"""

import math
import re
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TextIO

from rich import box
from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from metaloom.disk import PASSING

LINE_INTERVAL_S = 10.0
LINE_FRACTION = 0.05

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def format_value(name: str, value: float) -> str:
    """A metric for people: accuracies (0 to 1) in percent, others with four significant digits."""
    if name.endswith("accuracy") and math.isfinite(value):
        return f"{100 * value:.1f} %"
    return f"{value:.4g}"


def format_duration(seconds: float) -> str:
    """Seconds as 4.2 s, 3 min 20 s or 2 h 05 min."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest_s:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table as plain text: padded columns, a rule under the head, no line ever folded."""
    widths = [max(len(line[index]) for line in (columns, *rows)) for index in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()

    return "\n".join([title, line(columns), line(["-" * width for width in widths]), *map(line, rows)])


def _printable(text: str) -> str:
    """The text without control characters, which could come from a file name or a server."""
    return _CONTROL.sub("", text)


def _write_lines(stream: TextIO, text: str) -> None:
    lines = "".join(f"{line}\n" for line in _printable(text).splitlines())
    encoding = stream.encoding or "utf-8"
    try:
        # A log in ASCII shows "?" for a "±" rather than end the run.
        stream.write(lines.encode(encoding, "replace").decode(encoding))
        stream.flush()
    except OSError as error:
        # On a full disk it stays in the stream's buffer, up to the next line.
        if error.errno not in PASSING:
            raise


class Phase:
    """A stretch of work with a count and its newest metrics; made by `Console.phase`."""

    def __init__(
        self, name: str, total: int | None, unit: str, num_done: int, changed: "Callable[[Phase], None]"
    ) -> None:
        self.name = _printable(name)
        self.total = total
        self.unit = unit
        self.num_done = num_done
        self.values: dict[str, float] = {}
        self._changed = changed

    def advance(self, count: int = 1, **values: float) -> None:
        """Counts `count` more units and shows the newest values under their names."""
        self.num_done += count
        self.values.update(values)
        self._changed(self)

    def count_words(self) -> str:
        """The count so far: `120 of 400 steps`."""
        plural = "" if (self.total or self.num_done) == 1 else "s"
        total = "" if self.total is None else f" of {self.total}"
        return f"{self.num_done}{total} {self.unit}{plural}"

    def value_words(self) -> str:
        """The newest values: `loss 1.25, accuracy 50.0 %`."""
        return ", ".join(f"{name} {format_value(name, value)}" for name, value in self.values.items())


class Console(ABC):
    """Where a command tells a person what it does. `note` and `warn` may be called from any thread."""

    @abstractmethod
    def phase(
        self, name: str, total: int | None, unit: str = "step", *, num_done: int = 0
    ) -> AbstractContextManager[Phase]:
        """A context manager that shows the progress of one phase; phases may be nested.

        Args:
            name: "pretrain", "meta-train", "evaluate" ...
            total: units of work, or None when it is not known.
            unit: singular of what is counted.
            num_done: units that an earlier process has done; they do not count as fast ones.
        """

    @abstractmethod
    def note(self, text: str) -> None:
        """Tells something worth knowing; not shown when quiet."""

    @abstractmethod
    def warn(self, text: str) -> None:
        """Tells something that a person should look at; always shown."""

    @abstractmethod
    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Shows a result; the first column holds names, the others numbers. Shown when quiet, too."""


class LineConsole(Console):
    """Plain lines: results and progress to `stream`, warnings to `error_stream`.

    Args:
        clock: seconds that only grow.
    """

    def __init__(
        self,
        stream: TextIO,
        error_stream: TextIO,
        *,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._error_stream = error_stream
        self._quiet = quiet
        self._clock = clock
        self._depth = 0
        self._lock = threading.Lock()

    def _write(self, stream: TextIO, text: str) -> None:
        with self._lock:
            _write_lines(stream, text)

    @contextmanager
    def phase(
        self, name: str, total: int | None, unit: str = "step", *, num_done: int = 0
    ) -> Iterator[Phase]:
        started_s = last_s = self._clock()
        last_count = num_done

        def show(phase: Phase) -> None:
            nonlocal last_s, last_count
            now_s = self._clock()
            count = phase.num_done - last_count
            is_due = now_s - last_s >= LINE_INTERVAL_S and count >= LINE_FRACTION * (total or 0)
            if self._quiet or not is_due or phase.num_done == total:
                return
            last_s, last_count = now_s, phase.num_done
            left = ""
            if total is not None and phase.num_done > num_done:
                left_s = (now_s - started_s) * (total - phase.num_done) / (phase.num_done - num_done)
                left = f"{format_duration(left_s)} left"
            self._show_phase(phase, phase.count_words(), phase.value_words(), left)

        phase = Phase(name, total, unit, num_done, show)
        if self._depth == 0 and total is not None:
            self._show_phase(phase, f"{total} {unit}{'' if total == 1 else 's'}", "", "")
        self._depth += 1
        state = "stopped after"
        try:
            yield phase
            state = "done:"
        finally:
            self._depth -= 1
            took = format_duration(self._clock() - started_s)
            self._show_phase(phase, f"{state} {phase.count_words()} in {took}", phase.value_words(), "")

    def _show_phase(self, phase: Phase, *parts: str) -> None:
        if not self._quiet:
            self._write(self._stream, f"{phase.name}: " + ", ".join(part for part in parts if part))

    def note(self, text: str) -> None:
        if not self._quiet:
            self._write(self._stream, text)

    def warn(self, text: str) -> None:
        self._write(self._error_stream, f"warning: {text}")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self._write(self._stream, format_table(title, columns, rows))


class TerminalConsole(Console):
    """Bars that move, on a terminal; NO_COLOR and the width of the terminal are honoured by rich.

    Nested phases have bars of their own below, which go when the phase ends.
    """

    def __init__(self, stream: TextIO, *, quiet: bool = False) -> None:
        self._rich = RichConsole(file=stream, highlight=False, markup=False, emoji=False)
        self._quiet = quiet
        self._progress: Progress | None = None

    def _make_progress(self) -> Progress:
        def text(field: str, column: Column) -> TextColumn:
            return TextColumn(field, markup=False, table_column=column)

        return Progress(
            text("{task.description}", Column(no_wrap=True, overflow="ellipsis", min_width=8)),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            text("{task.fields[count]}", Column(no_wrap=True, justify="right")),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True, table_column=Column(no_wrap=True)),
            text("{task.fields[values]}", Column(no_wrap=True, overflow="ellipsis", ratio=2)),
            console=self._rich,
            expand=True,
            refresh_per_second=5,
        )

    @contextmanager
    def phase(
        self, name: str, total: int | None, unit: str = "step", *, num_done: int = 0
    ) -> Iterator[Phase]:
        if self._quiet:
            yield Phase(name, total, unit, num_done, lambda phase: None)
            return
        is_outermost = self._progress is None
        if self._progress is None:
            self._progress = self._make_progress()
            self._progress.start()
        progress = self._progress
        task: TaskID

        of = f"/{'?' if total is None else total} {unit}s"

        def show(phase: Phase) -> None:
            count = f"{phase.num_done}{of}"
            progress.update(task, completed=phase.num_done, count=count, values=phase.value_words())

        phase = Phase(name, total, unit, num_done, show)
        task = progress.add_task(
            phase.name, total=total, completed=num_done, count=f"{num_done}{of}", values=""
        )
        try:
            yield phase
        finally:
            if is_outermost:
                progress.stop()
                self._progress = None
            else:
                progress.remove_task(task)

    def note(self, text: str) -> None:
        if not self._quiet:
            self._rich.print(Text(_printable(text)))

    def warn(self, text: str) -> None:
        self._rich.print(Text("warning: ", style="bold yellow") + Text(_printable(text), style="default"))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(title=Text(_printable(title), style="bold"), title_justify="left", box=box.SIMPLE_HEAD)
        for index, column in enumerate(columns):
            # On a narrow terminal names are broken between words, and lines at its edge; nothing is cut.
            cells = [row[index] for row in rows]
            whole = column.split() + (cells if index else [word for cell in cells for word in cell.split()])
            table.add_column(
                Text(_printable(column)),
                justify="left" if index == 0 else "right",
                min_width=max(len(part) for part in whole),
            )
        for row in rows:
            table.add_row(*(Text(_printable(cell)) for cell in row))
        self._rich.print(table, crop=False)


class WarningConsole(Console):
    """The console of the ranks that show nothing of their own: warnings only, marked with the rank."""

    def __init__(self, error_stream: TextIO, rank: int) -> None:
        self._error_stream = error_stream
        self._rank = rank

    @contextmanager
    def phase(
        self, name: str, total: int | None, unit: str = "step", *, num_done: int = 0
    ) -> Iterator[Phase]:
        yield Phase(name, total, unit, num_done, lambda phase: None)

    def note(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        _write_lines(self._error_stream, f"rank {self._rank}: warning: {text}")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        pass


def make_console(
    *, rank: int = 0, quiet: bool = False, stream: TextIO | None = None, error_stream: TextIO | None = None
) -> Console:
    """The console of one rank: bars on a terminal, lines elsewhere; other ranks than 0 only warn.

    Args:
        rank: of this process; its warnings are marked with it where it is not 0.
        quiet: show warnings and tables only.
        stream: standard output if None.
        error_stream: standard error if None.
    """
    stream = stream or sys.stdout
    error_stream = error_stream or sys.stderr
    if rank != 0:
        return WarningConsole(error_stream, rank)
    is_unicode = (stream.encoding or "").lower().replace("-", "").startswith("utf")
    if stream.isatty() and is_unicode and not RichConsole(file=stream).is_dumb_terminal:
        return TerminalConsole(stream, quiet=quiet)
    return LineConsole(stream, error_stream, quiet=quiet)
