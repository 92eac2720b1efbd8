"""What the launcher `deepspeed` starts over ssh on each host: `python -m metaloom.launchers.far_end`.

It says that it is there, and reads from its standard input one line of JSON: what to run. Each line after it
is the name of a signal for that command. Where the input ends first, since the launcher is gone or cut off,
the command gets SIGTERM: it saves and ends, and nothing is left behind. Variables come in this way too, and
not in the command line of ssh, where all users of both machines could read them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import IO

HERE = b"metaloom: ready for its part of a job\n"
SIGNALS = {"INT": signal.SIGINT, "TERM": signal.SIGTERM, "HUP": signal.SIGHUP}


def main() -> int:
    """Runs the command to its end; returns its exit code, 128 and its number for a signal's."""
    sys.stdout.buffer.write(HERE)
    sys.stdout.flush()
    # Not sys.stdin: the interpreter would want its lock at the end, which the listening thread holds.
    lines = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    line = lines.readline()
    if not line:
        return 0  # the launcher did not reach all hosts
    request = json.loads(line)
    with tempfile.TemporaryDirectory(prefix="metaloom-recipe-") as folder:
        recipe = Path(folder, "recipe.yaml")
        recipe.write_text(request["recipe"], encoding="utf-8")
        words = [str(recipe) if word is None else word for word in request["words"]]
        return _run(words, os.environ | request["environment"], lines)


def _run(words: list[str], environment: dict[str, str], lines: IO[str]) -> int:
    for number in SIGNALS.values():
        signal.signal(number, signal.SIG_DFL)  # one that is ignored here would be ignored by the command too
    command = subprocess.Popen(
        words, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )

    def pass_on(number: int, frame: FrameType | None) -> None:
        command.send_signal(number)

    for number in SIGNALS.values():
        signal.signal(number, pass_on)
    assert command.stdout is not None
    assert command.stderr is not None
    pumps = [
        threading.Thread(target=_pump, args=(command.stdout, sys.stdout.buffer)),
        threading.Thread(target=_pump, args=(command.stderr, sys.stderr.buffer)),
    ]
    for pump in pumps:
        pump.start()
    threading.Thread(target=_listen, args=(command, lines), daemon=True).start()
    code = command.wait()
    for pump in pumps:
        pump.join()
    return code if code >= 0 else 128 - code


def _listen(command: subprocess.Popen[bytes], lines: IO[str]) -> None:
    for line in lines:
        command.send_signal(SIGNALS[line.strip()])
    command.send_signal(signal.SIGTERM)


def _pump(source: IO[bytes], target: IO[bytes]) -> None:
    """Hands on what the command prints. It goes on without a reader, who may be cut off: a command that could
    not print would not save either."""
    with source:
        for line in source:
            with contextlib.suppress(OSError):
                target.write(line)
                target.flush()


if __name__ == "__main__":
    sys.exit(main())
