"""A job that is asked to stop, by whatever and on whichever rank, loses no outer step, and says that it would
go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from metaloom.checkpoints.catalogue import Catalogue
from metaloom.evaluate import evaluate
from metaloom.faults import START_AGAIN
from metaloom.job import Place, Shutdown
from metaloom.recipe import load_recipe
from metaloom.run_folder import RunFolder
from tests.commands import (
    RECIPES,
    begun,
    changed,
    curve,
    end,
    rank_of,
    run_well,
    wait_for_step,
)
from tests.faults.test_resume import final_tensors
from tests.hosts import held
from tests.in_process import trained

SMOKE = RECIPES / "smoke.yaml"
STEPS = 12
RUN = (
    f"outer.num_steps={STEPS}",
    "outer.ema=0.9",
    "checkpoint={every_steps: null, every_minutes: null}",
    "validation.every_steps=4",
    "tracking=none",
)
# From the fifth outer step on, an inner step takes a quarter of a second on rank 1 alone.
SLOW = """
import os, time
if os.environ.get("RANK") == "1":
    from metaloom.datasets import EpisodeStream
    from metaloom.engine.unroll import Unroll
    reached = []
    def read(stream, read=EpisodeStream.__next__):
        step, episodes = read(stream)
        if step == int(os.environ["SLOW_FROM"]):
            reached.append(step)
        return step, episodes
    def slowly(unroll, *args, once=Unroll.scaled_support_gradient, **keywords):
        if reached:
            time.sleep(0.25)
        return once(unroll, *args, **keywords)
    EpisodeStream.__next__ = read
    Unroll.scaled_support_gradient = slowly
"""


@contextmanager
def started(*words: str | Path, run: Path) -> Iterator[subprocess.Popen[bytes]]:
    with begun("train", SMOKE, *words, "--run", run, cwd=run.parent) as process:
        yield process


@pytest.mark.parametrize(
    ("target", "sharding"),
    [
        pytest.param("command", "replicated", marks=pytest.mark.slow),
        pytest.param("rank 0", "replicated", marks=pytest.mark.slow),
        ("rank 1", "replicated"),
        ("rank 0", "sharded"),
    ],
)
def test_a_stopped_run_breaks_off_a_long_step_and_goes_on_as_if_it_had_not_been_stopped(
    tmp_path: Path, glyphs: Path, target: str, sharding: str
) -> None:
    words: tuple[str, ...] = (
        f"data.url={glyphs}",
        *RUN,
        "adaptation.num_steps=30",
        "adaptation.rule.lr=0.005",
    )
    if sharding == "sharded":
        # What is in shards is a backbone that tasks share: the head alone is fast.
        words = (
            *words,
            "adaptation.fast=head",
            "sharding=sharded",
            "memory.recompute_blocks=true",
            "algorithm.meta_parameters={backbone: true}",
        )
    whole = tmp_path / "whole"
    run_well("train", SMOKE, *words, "--run", whole, cwd=tmp_path)
    folder = tmp_path / "run"
    # Tasks of 60 passes each are left of the sixth step: minutes, of which nobody waits for more than one
    # inner step.
    with changed(tmp_path, SLOW, SLOW_FROM="5"), started(*words, run=folder) as process:
        wait_for_step(folder / "metrics.jsonl", 5, process)
        pid = process.pid if target == "command" else rank_of(process.pid, int(target[-1]))
        asked_s = time.monotonic()
        os.kill(pid, signal.SIGTERM)
        finished = end(process)
        took_s = time.monotonic() - asked_s
    assert finished.code == START_AGAIN, finished
    assert took_s < 25.0  # what the recipe grants by default, and clusters count on
    assert "saved after outer step 5" in finished.output
    assert finished.errors.endswith("stopped by SIGTERM\n")
    assert "Traceback" not in finished.output + finished.errors
    resumed = run_well("train", "--resume", folder, cwd=tmp_path)
    assert "resumed after outer step 5 of 12" in resumed
    assert curve(folder) == curve(whole)
    assert final_tensors(folder) == final_tensors(whole)


def test_a_run_that_waits_for_data_stops_too(tmp_path: Path, glyphs: Path) -> None:
    folder = tmp_path / "run"
    with held(tmp_path) as hold:
        hold.at(2)
        with started(f"data.url={glyphs}", *RUN, run=folder) as process:
            wait_for_step(folder / "metrics.jsonl", 2, process)
            process.terminate()
            finished = end(process)
    assert finished.code == START_AGAIN
    assert "saved after outer step 2" in finished.output
    assert "not saved" not in finished.errors


SLOW_VALIDATION = """
import os, time
if "RANK" in os.environ:
    from metaloom.engine.algorithms.maml import Maml
    def slowly(algorithm, *args, once=Maml.curve, **keywords):
        open(os.environ["VALIDATING"], "a").close()
        time.sleep(0.5)
        return once(algorithm, *args, **keywords)
    Maml.curve = slowly
"""


@pytest.mark.slow
def test_a_run_that_is_stopped_while_it_validates_repeats_the_validation_alone(
    tmp_path: Path, glyphs: Path
) -> None:
    words = (f"data.url={glyphs}", *RUN)
    run_well("train", SMOKE, *words, "--run", tmp_path / "whole", cwd=tmp_path)
    folder, mark = tmp_path / "run", tmp_path / "validating"
    with changed(tmp_path, SLOW_VALIDATION, VALIDATING=str(mark)), started(*words, run=folder) as process:
        wait_for_step(folder / "metrics.jsonl", 3, process)
        while not mark.exists():
            assert process.poll() is None
        process.terminate()
        finished = end(process)
    assert finished.code == START_AGAIN
    assert "saved after outer step 4" in finished.output
    assert [record["step"] for record in curve(folder)] == [1, 2, 3]
    run_well("train", "--resume", folder, cwd=tmp_path)
    assert curve(folder) == curve(tmp_path / "whole")
    assert final_tensors(folder) == final_tensors(tmp_path / "whole")


# Nobody comes to a point at which all could stop.
STUCK = """
import os, time
if "RANK" in os.environ:
    from metaloom.engine.outer import OuterOptimizer
    def stuck(outer, *args, update=OuterOptimizer.update, **keywords):
        while outer.step == 3:
            time.sleep(0.1)
        return update(outer, *args, **keywords)
    OuterOptimizer.update = stuck
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_stops_at_once(tmp_path: Path, glyphs: Path, sent: signal.Signals, code: int) -> None:
    folder, words = tmp_path / "run", (f"data.url={glyphs}", *RUN, "launcher.stop_within_s=1000")
    with changed(tmp_path, STUCK), started(*words, run=folder) as process:
        wait_for_step(folder / "metrics.jsonl", 3, process)
        process.send_signal(sent)
        assert process.stderr is not None
        first = process.stderr.readline().decode()
        process.send_signal(sent)
        finished = end(process)
    assert first == f"{sent.name}: stopping, with what was done saved; another signal stops at once\n"
    assert finished.errors == f"stopped by {sent.name}\n"
    assert finished.code == code


STALLED = """
import os, time
if "RANK" in os.environ:
    from metaloom.checkpoints.folder import Folder
    def stall(folder, name, fill):
        time.sleep(1000)
    Folder.write_stream = stall
"""


def test_a_run_that_cannot_be_saved_in_time_ends_all_the_same(tmp_path: Path, glyphs: Path) -> None:
    folder, long = tmp_path / "run", ("outer.num_steps=100000", "launcher.stop_within_s=2")
    with changed(tmp_path, STALLED), started(f"data.url={glyphs}", *RUN, *long, run=folder) as process:
        wait_for_step(folder / "metrics.jsonl", 3, process)
        process.terminate()
        finished = end(process)
    assert finished.code == START_AGAIN, finished
    assert "stopped by SIGTERM, and not saved within 2 s (launcher.stop_within_s)" in finished.errors
    assert "saved after" not in finished.output


# Each step of ordinary training leaves a letter in a file; the fourth, and those after it, wait a little.
ORDINARY = """
import os, time
if "RANK" in os.environ:
    import metaloom.ordinary
    def counted(*args, once=metaloom.ordinary.ordinary_gradient, **keywords):
        with open(os.environ["COUNTED"], "a") as file:
            file.write("x")
            if file.tell() >= 4:
                time.sleep(0.2)
        return once(*args, **keywords)
    metaloom.ordinary.ordinary_gradient = counted
"""


@pytest.mark.usefixtures("alone")
def test_an_evaluation_that_is_stopped_while_a_baseline_trains_goes_on_with_it(
    tmp_path: Path, glyphs: Path
) -> None:
    words = (
        f"data.url={glyphs}",
        "tracking=none",
        "launcher.num_processes=1",
        "validation.every_steps=null",
        "evaluation.baselines=[ordinary_equal_data]",
        "evaluation.ordinary.batch_size=8",
    )
    recipe, folder, counted = load_recipe(SMOKE, words), tmp_path / "run", tmp_path / "counted"
    trained(recipe, folder)
    shutil.copytree(folder, tmp_path / "whole")
    evaluate(recipe, Place(RunFolder(tmp_path / "whole"), torch.device("cpu"), None, Shutdown()))
    with changed(tmp_path, ORDINARY, COUNTED=str(counted)):
        with begun("evaluate", folder, cwd=tmp_path) as process:
            while not counted.exists() or counted.stat().st_size < 4:
                assert process.poll() is None
                time.sleep(0.01)
            process.terminate()
            finished = end(process)
        num_done = counted.stat().st_size
        assert finished.code == START_AGAIN, finished
        assert finished.errors.endswith("stopped by SIGTERM\n")
        assert "saved after step " in finished.output
        assert not (folder / "evaluation.json").exists()
        run_well("evaluate", folder, cwd=tmp_path)
    ours, theirs = (json.loads((run / "evaluation.json").read_text()) for run in (folder, tmp_path / "whole"))
    assert ours == theirs
    # No step of it was done twice.
    num_steps = Catalogue(folder / "checkpoints" / "ordinary_equal_data").steps()[-1]
    assert num_done < num_steps
    assert counted.stat().st_size == num_steps


def test_a_notice_in_a_file_stops_the_run(tmp_path: Path, glyphs: Path) -> None:
    folder, notice = tmp_path / "run", tmp_path / "notice"
    words = (f"launcher.notice={{file: '{notice}', every_s: 0.2}}", "outer.num_steps=100000")
    with started(f"data.url={glyphs}", *RUN, *words, run=folder) as process:
        wait_for_step(folder / "metrics.jsonl", 3, process)
        notice.touch()
        finished = end(process)
    assert finished.code == START_AGAIN
    assert finished.errors == f"stopped by a notice: {notice} is there\n"
    assert "saved after outer step" in finished.output


class Metadata(BaseHTTPRequestHandler):
    """What a cloud tells a machine of itself."""

    is_preempted = threading.Event()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Quiet."""

    def do_GET(self) -> None:
        is_asked_well = self.headers["Metadata-Flavor"] == "Google" and self.path == "/preempted"
        body = b"TRUE" if self.is_preempted.is_set() else b"FALSE"
        self.send_response(200 if is_asked_well else 403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.mark.slow
def test_a_notice_at_a_url_stops_the_run(tmp_path: Path, glyphs: Path) -> None:
    folder = tmp_path / "run"
    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}/preempted"
        section = f"url: '{url}', pattern: TRUE, header: 'Metadata-Flavor: Google', every_s: 0.2"
        words = (f"launcher.notice={{{section.replace('TRUE', chr(39) + 'TRUE' + chr(39))}}}",)
        try:
            with started(f"data.url={glyphs}", *RUN, *words, "outer.num_steps=100000", run=folder) as process:
                wait_for_step(folder / "metrics.jsonl", 20, process)
                Metadata.is_preempted.set()
                finished = end(process)
        finally:
            server.shutdown()
            thread.join()
    assert finished.code == START_AGAIN
    assert finished.errors == f"stopped by a notice: {url} says 'TRUE'\n"
