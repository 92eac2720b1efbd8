"""What people see: few plain lines in a pipe, bars in a (pseudo) terminal."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from metaloom.tracking.console import (
    LineConsole,
    TerminalConsole,
    format_duration,
    format_table,
    format_value,
    make_console,
)

PROGRAM = """
import sys
from metaloom.tracking.console import make_console
console = make_console(quiet="--quiet" in sys.argv)
console.note("records in [bold]a\\x1b[31mfile\\x07")
with console.phase("meta-train", total=40, unit="step") as phase:
    for step in range(40):
        phase.advance(1, loss=1 / (step + 1), accuracy=step / 40)
        if step == 20:
            with console.phase("evaluate", total=2, unit="episode") as inner:
                inner.advance(2, accuracy=0.5)
            console.warn("the server is down")
rows = [["meta-trained", "93.1 ± 0.4 %"], ["random init", "20.0 ± 0.4 %"]]
console.table("Result", ["method", "step 5"], rows)
"""


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Lines:
    """A line console on strings."""

    def __init__(self) -> None:
        self.out, self.err, self.clock = io.StringIO(), io.StringIO(), Clock()
        self.console = LineConsole(self.out, self.err, clock=self.clock)

    def lines(self) -> list[str]:
        return self.out.getvalue().splitlines()


def run_in_pipe(*arguments: str, environment: Mapping[str, str] | None = None) -> tuple[bytes, bytes]:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, check=True, env={**os.environ, **(environment or {})})
    return done.stdout, done.stderr


def run_in_terminal(*arguments: str, columns: int = 80, **environment: str) -> str:
    """What the program writes to a pseudo-terminal of `columns` columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")
    }
    received = bytearray()

    def read() -> None:
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:  # Linux: the other end is closed
                return
            if not data:
                return
            received.extend(data)

    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**inherited, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", **environment},
    )
    os.close(theirs)
    reader = threading.Thread(target=read)
    reader.start()
    assert process.wait(60) == 0, received.decode()
    reader.join(60)
    os.close(ours)
    return received.decode()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_a_pipe_gets_few_lines_and_no_control_characters() -> None:
    out, err = run_in_pipe()
    assert re.search(rb"[\x00-\x09\x0b-\x1f\x7f]", out + err) is None
    lines = out.decode().splitlines()
    assert lines[0] == "records in [bold]a[31mfile"
    assert lines[1] == "meta-train: 40 steps"
    assert re.fullmatch(r"evaluate: done: 2 of 2 episodes in \d+\.\d s, accuracy 50\.0 %", lines[2])
    assert re.fullmatch(
        r"meta-train: done: 40 of 40 steps in \d+\.\d s, loss 0\.025, accuracy 97\.5 %", lines[3]
    )
    assert lines[4:] == [
        "Result",
        "method        step 5",
        "------------  ------------",
        "meta-trained  93.1 ± 0.4 %",
        "random init   20.0 ± 0.4 %",
    ]
    assert err == b"warning: the server is down\n"


def test_a_pipe_in_ascii_gets_question_marks_instead_of_an_error() -> None:
    out, _ = run_in_pipe(environment={"PYTHONIOENCODING": "ascii"})
    assert b"meta-trained  93.1 ? 0.4 %" in out


def test_quiet_leaves_warnings_and_tables() -> None:
    out, err = run_in_pipe("--quiet")
    assert out.decode().splitlines()[0] == "Result"
    assert err == b"warning: the server is down\n"


@pytest.mark.parametrize("columns", [80, 120, 30])
def test_a_terminal_gets_bars_that_stay_on_one_line(columns: int) -> None:
    text = run_in_terminal(columns=columns)
    assert "\x1b[" in text
    assert "━" in text
    frames = [line.rstrip() for line in re.split(r"[\r\n]+", plain(text))]
    assert max(len(frame) for frame in frames) <= columns
    if columns >= 80:
        assert any(
            re.search(r"meta-train ━+ 40/40 steps .*loss 0\.025, accuracy 97\.5 %", frame) for frame in frames
        )
        assert "warning: the server is down" in frames
        assert any(re.search(r"meta-trained +93\.1 ± 0\.4 %", frame) for frame in frames)
        assert "records in [bold]a[31mfile" in frames


def test_no_color_takes_the_colours_from_a_terminal_but_not_the_bars() -> None:
    text = run_in_terminal(NO_COLOR="1")
    assert re.search(r"\x1b\[[0-9;]*3[0-9](;|m)", text) is None
    assert re.search(r"\x1b\[[0-9;]*3[0-9](;|m)", run_in_terminal()) is not None
    assert "40/40 steps" in plain(text)


def test_a_dumb_terminal_gets_lines() -> None:
    assert "meta-train: 40 steps" in run_in_terminal(TERM="dumb")


def test_a_quiet_terminal_shows_the_table_and_warnings_only() -> None:
    text = plain(run_in_terminal("--quiet"))
    assert "━" not in text
    assert "records in" not in text
    assert "warning: the server is down" in text
    assert "93.1 ± 0.4 %" in text


def test_a_table_wider_than_the_terminal_loses_no_number() -> None:
    shown = io.StringIO()
    console = TerminalConsole(shown)
    console._rich.width = 30
    cells = [f"{number} GiB" for number in range(100, 108)]
    console.table("memory", ["ranks", *(f"part {number}" for number in range(8))], [["1024", *cells]])
    assert all(cell in shown.getvalue() for cell in ("1024", "ranks", *cells))


def test_lines_wait_for_ten_seconds_and_five_percent() -> None:
    lines = Lines()
    with lines.console.phase("meta-train", total=1000) as phase:
        for _ in range(200):  # 0.1 s a step: 10 s pass first at 100 steps
            lines.clock.now_s += 0.1
            phase.advance(1, loss=2.0)
        for _ in range(60):  # 10 s a step: 5 % pass only every 50 steps
            lines.clock.now_s += 10
            phase.advance(1, loss=1.0)
    shown = [
        int(match.group(1)) for line in lines.lines() if (match := re.match(r"meta-train: (\d+) of", line))
    ]
    assert shown[0] in (100, 101)  # 100 * 0.1 is not quite 10 in floating point
    assert len(shown) == 3
    assert shown[2] - shown[1] >= 50
    assert re.fullmatch(r"meta-train: 10\d of 1000 steps, loss 2, 1 min \d\d s left", lines.lines()[1])
    assert lines.lines()[-1] == "meta-train: done: 260 of 1000 steps in 10 min 20 s, loss 1"


def test_work_of_an_earlier_process_does_not_shorten_the_time_that_is_left() -> None:
    lines = Lines()
    with lines.console.phase("meta-train", total=100, num_done=90) as phase:
        lines.clock.now_s += 20
        phase.advance(5)
    assert lines.lines()[1] == "meta-train: 95 of 100 steps, 20.0 s left"


def test_a_phase_of_unknown_length_shows_its_count() -> None:
    lines = Lines()
    with lines.console.phase("index", total=None, unit="file") as phase:
        phase.advance(5)
        lines.clock.now_s += 11
        phase.advance(2)
    assert lines.lines() == ["index: 7 files", "index: done: 7 files in 11.0 s"]


def test_a_phase_left_by_an_error_says_how_far_it_came() -> None:
    lines = Lines()

    def fail() -> None:
        with lines.console.phase("meta-train", total=3) as phase:
            phase.advance(1)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert lines.lines()[-1] == "meta-train: stopped after 1 of 3 steps in 0.0 s"


def test_other_ranks_only_warn_and_say_who_they_are() -> None:
    out, err = io.StringIO(), io.StringIO()
    console = make_console(rank=3, stream=out, error_stream=err)
    with console.phase("meta-train", total=1) as phase:
        phase.advance(1)
    console.note("not shown")
    console.table("Result", ["a"], [["b"]])
    console.warn("a shard is missing")
    assert out.getvalue() == ""
    assert err.getvalue() == "rank 3: warning: a shard is missing\n"


def test_strings_and_files_are_no_terminals(tmp_path: Path) -> None:
    assert isinstance(make_console(stream=io.StringIO()), LineConsole)
    with (tmp_path / "log").open("w") as file:
        assert isinstance(make_console(stream=file), LineConsole)
        assert not isinstance(make_console(stream=file), TerminalConsole)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.99, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.9, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_read_as_people_say_them(seconds: float, words: str) -> None:
    assert format_duration(seconds) == words


def test_values_read_as_people_say_them() -> None:
    assert format_value("validation_accuracy", 0.931) == "93.1 %"
    assert format_value("loss", 0.123456) == "0.1235"
    assert format_value("accuracy", float("nan")) == "nan"


def test_a_table_without_rows_is_its_head() -> None:
    assert format_table("Jobs", ["name", "state"], []) == "Jobs\nname  state\n----  -----"
