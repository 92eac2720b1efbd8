"""Runs that meet full disks, storages that fail, damaged files and clocks that jump, and end as those that do
not."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from metaloom.checkpoints.catalogue import Catalogue
from tests.commands import (
    RECIPES,
    begun,
    changed,
    curve,
    digests,
    end,
    run,
    run_well,
    wait_for_step,
    wait_until,
)
from tests.hosts import held
from tests.object_store import ObjectStore

SMOKE = RECIPES / "smoke.yaml"
RUN = (
    "outer.num_steps=12",
    "outer.ema=0.9",
    "checkpoint={every_steps: 2, keep_last: 9}",
    "validation.every_steps=6",
    "tracking=none",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, glyphs: Path) -> Path:
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    run_well("train", SMOKE, f"data.url={glyphs}", *RUN, "--run", folder / "run", cwd=folder)
    return folder / "run"


def assert_equal(folder: Path, whole: Path, root: str | Path | None = None) -> None:
    assert curve(folder) == curve(whole)
    assert digests(root or folder / "checkpoints" / "meta") == digests(whole / "checkpoints" / "meta")


# The disk of rank 1 is full until six files could not be written.
FULL = """
import errno, os
if os.environ.get("RANK") == "1":
    import metaloom.keeping
    from metaloom.checkpoints import folder
    metaloom.keeping.RETRY_S = 0.0
    failed = []
    def full(file, name, fill, write=folder.Folder.write_stream):
        if len(failed) < 6:
            def fill_up(sink, fill=fill):
                sink.write(b"some of it")
                failed.append(name)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(file, name, fill_up)
        return write(file, name, fill)
    folder.Folder.write_stream = full
elif "RANK" in os.environ:
    import metaloom.keeping
    metaloom.keeping.RETRY_S = 0.0
"""


def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_nothing_else(
    tmp_path: Path, glyphs: Path, whole: Path
) -> None:
    with changed(tmp_path, FULL):
        output = run_well("train", SMOKE, f"data.url={glyphs}", *RUN, "--run", tmp_path / "run", cwd=tmp_path)
    assert "the checkpoint cannot be written: " in output
    assert "No space left on device. Training goes on, and it is tried again, for up to 60 min" in output
    assert "checkpoints are written again: step-" in output
    assert_equal(tmp_path / "run", whole)
    # Nothing is left of what was not finished.
    folders = list((tmp_path / "run" / "checkpoints" / "meta").iterdir())
    assert all((folder / "manifest.json").exists() for folder in folders if any(folder.iterdir()))


def test_a_run_whose_checkpoints_cannot_be_written_for_too_long_ends_and_names_the_last(
    tmp_path: Path, glyphs: Path
) -> None:
    code = FULL.replace("len(failed) < 6", "name.startswith('step-00000002') is False")
    with changed(tmp_path, code):
        finished = run(
            "train",
            SMOKE,
            f"data.url={glyphs}",
            *RUN,
            "checkpoint.patience_minutes=1e-9",
            "--run",
            tmp_path / "run",
            cwd=tmp_path,
        )
    assert finished.code == 4, finished
    assert "No space left on device." in finished.errors
    assert "longer than checkpoint.patience_minutes. The last one is " in finished.errors
    assert "checkpoints/meta/step-00000002." in finished.errors
    assert "Traceback" not in finished.errors


# The disk under the run's folder is full on rank 0 for some steps: for records, and for checkpoints.
FULL_FOLDER = """
import errno, os
if "RANK" in os.environ:
    import metaloom.disk, metaloom.keeping
    metaloom.keeping.RETRY_S = metaloom.disk.RETRY_S = 0.1
if os.environ.get("RANK") == "0":
    from metaloom.tracking import jsonl
    step = [0]
    def refuse():
        if FIRST <= step[0] < LAST:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    def fsync(descriptor, fsync=os.fsync):
        refuse()
        fsync(descriptor)
    os.fsync = fsync
    class File:
        def __init__(self, file):
            self.file = file
            self.is_torn = False
        def __getattr__(self, name):
            return getattr(self.file, name)
        def write(self, content):
            self.is_torn = not self.is_torn
            if self.is_torn:
                return self.file.write(content[:20])
            refuse()
            return self.file.write(content)
    def start(lines, path, start=jsonl._Lines.__init__):
        start(lines, path)
        lines._file = File(lines._file)
    jsonl._Lines.__init__ = start
    def log(tracker, metrics, number, log=jsonl.JsonlTracker.log):
        step[0] = number
        log(tracker, metrics, number)
    jsonl.JsonlTracker.log = log
"""


def test_a_run_folder_whose_disk_is_full_for_a_while_lacks_nothing_in_the_end(
    tmp_path: Path, glyphs: Path, whole: Path
) -> None:
    with changed(tmp_path, FULL_FOLDER.replace("FIRST", "3").replace("LAST", "9")):
        output = run_well("train", SMOKE, f"data.url={glyphs}", *RUN, "--run", tmp_path / "run", cwd=tmp_path)
    assert "metrics.jsonl cannot be written: No space left on device. The job goes on" in output
    assert "the run's folder is written again: nothing is lost" in output
    assert "checkpoints are written again: step-" in output
    assert_equal(tmp_path / "run", whole)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["status"], facts["checkpoint"]["step"]) == ("finished", 12)


def test_a_run_whose_records_cannot_be_written_for_too_long_ends_with_the_cause(
    tmp_path: Path, glyphs: Path
) -> None:
    words = (*RUN, "checkpoint={every_steps: 9, patience_minutes: 1e-9}", "--run", tmp_path / "run")
    with changed(tmp_path, FULL_FOLDER.replace("FIRST", "3").replace("LAST", "99")):
        finished = run("train", SMOKE, f"data.url={glyphs}", *words, cwd=tmp_path)
    assert finished.code == 4, finished
    assert "metrics.jsonl cannot be written: No space left on device. So it has been" in finished.errors
    assert re.search(r"Lost is: of \S+/metrics.jsonl [0-9]+ lines", finished.output)
    assert "Traceback" not in finished.errors


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The folder of a disk of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        subprocess.run(words, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a disk cannot be mounted here: {error}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


IMPATIENT = """
    import metaloom.disk, metaloom.keeping
    metaloom.keeping.RETRY_S = metaloom.disk.RETRY_S = 0.2
"""


@pytest.mark.mount
def test_a_disk_that_is_really_full_for_a_while_changes_nothing(
    tmp_path: Path, glyphs: Path, small_disk: Path
) -> None:
    few = ("outer.num_steps=40", "validation.every_steps=20", "launcher.num_processes=1")
    words = ("train", SMOKE, f"data.url={glyphs}", *RUN, *few)
    run_well(*words, "--run", tmp_path / "whole", cwd=tmp_path)
    folder, filler = small_disk / "run", small_disk / "filler"
    with held(tmp_path, IMPATIENT) as hold:
        hold.at(3)
        with begun(*words, "--run", folder, cwd=tmp_path) as process:
            wait_for_step(folder / "metrics.jsonl", 3, process)
            wait_until(lambda: Catalogue(folder / "checkpoints" / "meta").steps() == [2])
            with filler.open("wb", buffering=0) as file:
                assert 2**20 < file.write(bytes(2**22)) < 2**22  # all that there is
            hold.at(40)  # the record's last page has room for some of it
            time.sleep(10.0)  # steps go on, and the last checkpoint waits
            assert process.poll() is None
            filler.unlink()
            finished = end(process)
    assert finished.code == 0, finished
    assert "metrics.jsonl cannot be written: No space left on device" in finished.output + finished.errors
    assert "fault:" not in finished.errors
    assert_equal(folder, tmp_path / "whole")


# Rank 1 does something as it comes to the checkpoint of a step, or writes its file of it.
AT_A_CHECKPOINT = """
import os, signal, time
if os.environ.get("RANK") == "1":
    from metaloom.checkpoints import folder, store
    def at_the_start(self, checkpoint, start=store.CheckpointStore.start_saving, **keywords):
        if checkpoint.step == {step}:
            {act}
        start(self, checkpoint, **keywords)
    def in_the_midst(self, name, fill, write=folder.Folder.write_stream):
        if name.startswith("step-{step:08}"):
            {act}
        return write(self, name, fill)
    if "{place}" == "start":
        store.CheckpointStore.start_saving = at_the_start
    else:
        folder.Folder.write_stream = in_the_midst
"""


@pytest.mark.parametrize(
    ("step", "place"), [(2, "start"), pytest.param(12, "start", marks=pytest.mark.slow), (12, "midst")]
)
def test_a_rank_that_hangs_over_a_checkpoint_is_noticed(
    step: int, place: str, tmp_path: Path, glyphs: Path
) -> None:
    hangs = AT_A_CHECKPOINT.format(step=step, place=place, act="os.kill(os.getpid(), signal.SIGSTOP)")
    limits = ("launcher.timeout_s=3", "launcher.max_restarts=0")
    with changed(tmp_path, hangs):
        finished = run(
            "train", SMOKE, f"data.url={glyphs}", *RUN, *limits, "--run", tmp_path / "run", cwd=tmp_path
        )
    assert finished.code == 1, finished
    assert f"error: rank 0 at outer step {step}: a collective failed, since another rank" in finished.errors
    assert re.search(rf"rank 1 at outer step {step}, writing (a|the last) checkpoint", finished.errors)


def test_a_rank_may_take_its_time_to_write_its_file(tmp_path: Path, glyphs: Path, whole: Path) -> None:
    lingers = AT_A_CHECKPOINT.format(step=12, place="midst", act="time.sleep(7)")
    with changed(tmp_path, lingers):
        run_well(
            "train",
            SMOKE,
            f"data.url={glyphs}",
            *RUN,
            "launcher.timeout_s=3",
            "--run",
            tmp_path / "run",
            cwd=tmp_path,
        )
    assert_equal(tmp_path / "run", whole)


class Proxy(BaseHTTPRequestHandler):
    """What stands between a run and its object store: passes requests on, unless it is told to refuse those
    that write, or to let them wait."""

    protocol_version = "HTTP/1.1"
    target = ""
    mode = "pass"
    num_refused = 0

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Quiet."""

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if Proxy.mode != "pass" and self.command in ("PUT", "POST"):
            Proxy.num_refused += 1
            if Proxy.mode == "stall":
                time.sleep(1.5)
            self._answer(500, {}, b"<Error><Code>InternalError</Code></Error>")
            return
        connection = http.client.HTTPConnection(urlsplit(Proxy.target).netloc)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        self._answer(answer.status, dict(answer.headers), content)

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        length = str(len(content))
        for name, value in headers.items():
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            elif name.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = _pass  # noqa: N815
    do_PUT = _pass  # noqa: N815
    do_POST = _pass  # noqa: N815
    do_DELETE = _pass  # noqa: N815
    do_HEAD = _pass  # noqa: N815


@pytest.fixture
def proxy(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The object store behind a proxy, to this process and its children."""
    Proxy.target, Proxy.mode, Proxy.num_refused = s3.endpoint, "pass", 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        yield
        server.shutdown()
        thread.join()


QUICK = """
import os
if "RANK" in os.environ:
    import metaloom.keeping
    from metaloom.checkpoints import folder
    from metaloom.datasets.connection import Persistence
    metaloom.keeping.RETRY_S = 0.5
    folder.PERSISTENCE = Persistence(num_attempts=2, backoff_s=0.01, max_backoff_s=0.02, timeout_s=1.0)
    folder.Folder.__init__.__defaults__ = (folder.PERSISTENCE,)
"""


@pytest.mark.usefixtures("proxy")
@pytest.mark.parametrize("mode", ["refuse", pytest.param("stall", marks=pytest.mark.slow)])
def test_an_object_store_that_fails_for_a_while_neither_stops_nor_changes_a_run(
    tmp_path: Path, glyphs: Path, whole: Path, s3: ObjectStore, mode: str
) -> None:
    url = f"{s3.new_bucket()}/run"
    words = ("train", SMOKE, f"data.url={glyphs}", *RUN, f"checkpoint.url={url}", "--run", tmp_path / "run")
    with held(tmp_path, QUICK) as hold:
        hold.at(3)
        with begun(*words, cwd=tmp_path) as process:
            wait_for_step(tmp_path / "run" / "metrics.jsonl", 3, process)
            wait_until(lambda: Catalogue(f"{url}/meta").steps() == [2])
            Proxy.mode = mode
            hold.at(9)
            wait_for_step(tmp_path / "run" / "metrics.jsonl", 9, process)  # training goes on
            wait_until(lambda: Proxy.num_refused >= 8)  # a save has failed for good by then
            Proxy.mode = "pass"
            hold.at(12)
            finished = end(process)
    assert finished.code == 0, finished
    assert "Training goes on, and it is tried again" in finished.output + finished.errors
    assert "checkpoints are written again" in finished.output + finished.errors
    assert_equal(tmp_path / "run", whole, f"{url}/meta")


@pytest.mark.parametrize(
    "damage", ["truncated", "flipped", pytest.param("no manifest", marks=pytest.mark.slow)]
)
def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(
    tmp_path: Path, glyphs: Path, whole: Path, damage: str
) -> None:
    folder = tmp_path / "run"
    with held(tmp_path) as hold:
        hold.at(7)
        with begun("train", SMOKE, f"data.url={glyphs}", *RUN, "--run", folder, cwd=tmp_path) as process:
            wait_for_step(folder / "metrics.jsonl", 7, process)
            wait_until(lambda: 6 in Catalogue(folder / "checkpoints" / "meta").steps())
    newest = folder / "checkpoints" / "meta" / "step-00000006"
    shard = max(newest.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    if damage == "truncated":
        os.truncate(shard, len(content) - 3)
    elif damage == "flipped":
        content[-1] ^= 4
        shard.write_bytes(content)
    else:
        (newest / "manifest.json").unlink()
    output = run_well("train", "--resume", folder, cwd=tmp_path)
    assert "resumed after outer step 4 of 12" in output
    if damage != "no manifest":  # then it is not known that there was one
        assert f"skipped a checkpoint: {shard}" in output
    assert_equal(folder, whole)


# The clock of the machine goes back and forth by days, between any two looks at it.
JUMPS = """
import random, time
real, jumps = time.time, random.Random(0)
time.time = lambda: real() + jumps.choice([-3, -1, 0, 1, 3]) * 86400
"""


def test_clocks_that_jump_change_nothing(tmp_path: Path, glyphs: Path, whole: Path) -> None:
    folder = tmp_path / "run"
    with changed(tmp_path, JUMPS):
        with begun("train", SMOKE, f"data.url={glyphs}", *RUN, "--run", folder, cwd=tmp_path) as process:
            wait_for_step(folder / "metrics.jsonl", 4, process)
            process.terminate()
            assert end(process).code == 75
        run_well("train", "--resume", folder, cwd=tmp_path)
    assert_equal(folder, whole)
