"""Trainings that are killed at random moments, and go on: each has to end equal to the one that was not.

    make soak                                             50 seeds, and a table
    .venv/bin/python -m tests.faults.soak --seeds 3 17    some of them

A seed draws what is killed (a rank, the agent, the command, or all), by which signal, and when: at a moment
of the clock, or in the midst of saving a checkpoint, of which it draws the place too. A job that has not
started its ranks again by itself is resumed. Bit for bit equal have to be every logged metric, but for times,
and every tensor of the last checkpoint.

A seed has struck where it hit the job while that ran: a rank got to the place and killed itself, or by the
signal the job ended, or started its ranks again. By the clock none comes too late, since the job waits with
its last step until the signal is sent. A seed that does not strike is a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from metaloom.checkpoints.catalogue import Catalogue
from metaloom.datasets import make_dataset
from metaloom.faults import START_AGAIN
from tests.commands import (
    RECIPES,
    command,
    curve,
    descendants,
    digests,
    environment,
    kill_tree,
    rank_of,
    read_records,
)
from tests.hosts import held

STEPS = 24
RUN = (
    f"outer.num_steps={STEPS}",
    "outer.ema=0.9",
    "adaptation.rule.learned=per_tensor_per_step",
    "checkpoint.every_steps=3",
    "checkpoint.keep_last=3",
    "validation.every_steps=8",
    "tracking=none",
)
# Where a rank kills itself: as it copies the state, when a part of its file is written, when all files are
# and the manifest is not, and just after the manifest.
PLACES = ("staging", "upload", "before the manifest", "after the manifest")
KILLING = """
import os, signal
place, rank, number = os.environ["KILL_AT"].split(":")
if os.environ.get("RANK") == rank and not os.path.exists(os.environ["KILLED"]):
    from metaloom.checkpoints import folder, store
    seen = []
    def once(function, when):
        def wrapped(*args, **keywords):
            if not when(*args):
                return function(*args, **keywords)
            seen.append(1)
            if len(seen) < int(number):
                return function(*args, **keywords)
            if place == "after the manifest":
                function(*args, **keywords)
            open(os.environ["KILLED"], "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return wrapped
    always = lambda *args: True
    if place == "staging":
        store._staged = once(store._staged, always)
    elif place == "upload":
        def torn(file, name, fill, whole=folder.Folder.write_stream):
            class Half:
                def __init__(self, sink):
                    self.sink = sink
                def write(self, content):
                    self.sink.write(bytes(content)[: len(content) // 2])
                    seen.append(1)
                    if len(seen) >= 3 * int(number):
                        self.sink.flush()
                        open(os.environ["KILLED"], "w").close()
                        os.kill(os.getpid(), signal.SIGKILL)
                    self.sink.write(bytes(content)[len(content) // 2 :])
            return whole(file, name, lambda sink: fill(Half(sink)))
        folder.Folder.write_stream = torn
    else:
        is_manifest = lambda file, name, content: name.endswith("manifest.json")
        folder.Folder.write = once(folder.Folder.write, is_manifest)
"""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a seed does to a run.

    Attributes:
        what: is killed: `rank 0`, `rank 1`, `agent`, `command`, `all`.
        place: of saving at which a rank kills itself, as in `PLACES`; None for a moment of the clock.
        number: of the checkpoint in whose saving it does.
        step: after which the clock begins.
        delay_s: how long after.
        sent: the signal.
    """

    what: str
    place: str | None
    number: int
    step: int
    delay_s: float
    sent: signal.Signals

    def describe(self) -> str:
        if self.place is not None:
            return f"{self.what} kills itself: {self.place}, checkpoint {self.number}"
        return f"{self.sent.name} to {self.what} {self.delay_s * 1e3:.0f} ms after step {self.step}"


def plan_of(seed: int) -> Plan:
    """What a seed does: even ones by the clock, odd ones in the midst of saving."""
    draw = random.Random(seed)
    if seed % 2:
        place = PLACES[seed // 2 % len(PLACES)]
        rank = 0 if place.endswith("manifest") else draw.randrange(2)
        return Plan(f"rank {rank}", place, draw.randrange(1, 5), 0, 0.0, signal.SIGKILL)
    what = draw.choice(["rank 0", "rank 1", "agent", "command", "all"])
    sent = signal.SIGTERM if draw.random() < 0.25 and what != "all" else signal.SIGKILL
    return Plan(what, None, 0, draw.randrange(1, STEPS - 6), draw.uniform(0.0, 0.3), sent)


@dataclasses.dataclass(frozen=True)
class Disturbance:
    """What a seed has done to a run.

    Attributes:
        has_struck: whether the job was hit while it ran.
        num_resumed: how often it had to be resumed.
    """

    has_struck: bool
    num_resumed: int


def _words(data: Path, run: Path, more: Sequence[str]) -> list[str | Path]:
    return ["train", RECIPES / "smoke.yaml", f"data.url={data}", *RUN, *more, "--run", run]


def train(folder: Path, data: Path, run: Path, *more: str) -> None:
    """A training that nobody disturbs.

    Args:
        more: changes to its recipe.
    """
    words = _words(data, run, more)
    subprocess.run(command(*words), cwd=folder, env=environment(), check=True, stdout=subprocess.DEVNULL)


def disturbed(folder: Path, data: Path, run: Path, plan: Plan, *more: str) -> Disturbance:
    """A training to which a seed does what it does, resumed until it is done."""
    place = folder / f"{run.name}-struck"
    place.mkdir()
    words = _words(data, run, more)
    if plan.place is not None:
        killed = place / "killed"
        (place / "sitecustomize.py").write_text(KILLING)
        variables = environment() | {
            "PYTHONPATH": f"{place}:{environment()['PYTHONPATH']}",
            "KILL_AT": f"{plan.place}:{plan.what[-1]}:{plan.number}",
            "KILLED": str(killed),
        }
        code, _ = _ended(_started(command(*words), folder, variables))
        has_struck = killed.exists()
    else:
        variables = environment()
        with held(place) as hold:
            hold.at(STEPS - 1)
            process = _started(command(*words), folder, environment())
            _strike(process, run, plan)
            hold.at(STEPS)
            code, errors = _ended(process)
        has_struck = code != 0 or b"fault: " in errors
    num_resumed = 0
    while code != 0:
        assert num_resumed < 5, "it ends again and again"
        num_resumed += 1
        has_begun = (run / "metrics.jsonl").exists()
        again = command("train", "--resume", run) if has_begun else command(*words)
        code, _ = _ended(_started(again, folder, variables))
    return Disturbance(has_struck, num_resumed)


def _started(words: Sequence[str], folder: Path, variables: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        words,
        cwd=folder,
        env=variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def _ended(process: subprocess.Popen[bytes]) -> tuple[int, bytes]:
    """The code and the errors of a command, of which no process is left, as when a machine is taken away."""
    try:
        _, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        process.communicate()
        raise
    if process.returncode not in (0, START_AGAIN, -signal.SIGKILL) and b"error: " in errors:
        assert b"was killed by" in errors or b"SIGKILL" in errors, errors.decode()
    return process.returncode, errors


def _strike(process: subprocess.Popen[bytes], run: Path, plan: Plan) -> None:
    deadline = time.monotonic() + 120
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and any(r["step"] >= plan.step for r in read_records(metrics))):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(plan.delay_s)
    if plan.what == "all":
        kill_tree(process.pid)
    elif plan.what == "command":
        os.kill(process.pid, plan.sent)
    elif plan.what == "agent":
        (agent,) = [pid for pid in descendants(process.pid) if _is_agent(pid)]
        os.kill(agent, plan.sent)
    else:
        os.kill(rank_of(process.pid, int(plan.what[-1])), plan.sent)


def _is_agent(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"metaloom.agent" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def state_of(run: Path, checkpoints: str | None = None) -> dict[str, object]:
    """What has to be equal: metrics by step, and what the last checkpoint holds.

    Args:
        checkpoints: their URL; None for the run's folder.
    """
    root = f"{checkpoints or run / 'checkpoints'}/meta"
    catalogue = Catalogue(root)
    manifest = catalogue.manifest(catalogue.steps()[-1])
    return {
        "curve": curve(run),
        "step": manifest.step,
        "digests": digests(root),
        "scalars": _scalars(manifest.scalars),
    }


def _scalars(scalars: object) -> object:
    assert isinstance(scalars, dict)
    return {name: value for name, value in scalars.items() if name != "origin"}


def main() -> int:
    """Runs the seeds; 1 where one did not strike, or a run ended otherwise than the one that was not
    disturbed."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(50)))
    seeds: list[int] = parser.parse_args().seeds
    num_equal = num_struck = 0
    with tempfile.TemporaryDirectory(prefix="metaloom-soak-") as name:
        folder = Path(name)
        make_dataset("glyphs", folder / "glyphs", max_per_split=12)
        train(folder, folder / "glyphs", folder / "whole")
        whole = state_of(folder / "whole")
        print(f"{'seed':>4}  {'what':<62}  struck  resumed  seconds  equal", flush=True)
        for seed in seeds:
            begin, plan = time.monotonic(), plan_of(seed)
            done = disturbed(folder, folder / "glyphs", folder / f"seed-{seed}", plan)
            is_equal = state_of(folder / f"seed-{seed}") == whole
            num_equal += is_equal
            num_struck += done.has_struck
            struck, equal = ("yes" if is_so else "NO" for is_so in (done.has_struck, is_equal))
            print(
                f"{seed:>4}  {plan.describe():<62}  {struck:>6}  {done.num_resumed:>7}  "
                f"{time.monotonic() - begin:>7.1f}  {equal}",
                flush=True,
            )
    print(f"{num_struck} of {len(seeds)} struck")
    print(f"{num_equal} of {len(seeds)} ended equal, bit for bit")
    return int(min(num_equal, num_struck) < len(seeds))


if __name__ == "__main__":
    sys.exit(main())
