"""Packing that is killed or interrupted: one message, no process left, nothing that looks finished."""

import io
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metaloom.datasets import Index
from tests.commands import command, descendants, environment, kill_tree, run, words_of

NUM_IMAGES = 256


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Images that take about a minute to pack, since they are made large."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3)).astype(np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    for number in range(NUM_IMAGES):
        path = tmp_path / "images" / f"class-{number % 4}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.getvalue())
    return tmp_path / "images"


@pytest.fixture
def packing(images: Path, tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """The command, with two processes at work."""
    words = ("data", "pack", "images", images, "out", "--image-size", "800", "--processes", "2")
    process = subprocess.Popen(
        command(*words),
        cwd=tmp_path,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield process
    if process.poll() is None:
        kill_tree(process.pid)
    process.communicate()


def workers_of(process: "subprocess.Popen[str]") -> list[int]:
    """The two processes, once they are there and at work."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        found = [pid for pid in descendants(process.pid) if b"spawn_main" in words_of(pid)]
        if len(found) == 2 and all(threads_of(pid) >= 2 for pid in found):
            return found
        time.sleep(0.02)
    pytest.fail("no two processes within 60 s")


def threads_of(pid: int) -> int:
    """A process at work has a thread that watches the one that started it."""
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


def require_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(words_of(pid) for pid in pids):
        assert time.monotonic() < deadline, f"of {pids} some are left"
        time.sleep(0.02)


def pack_again(images: Path, cwd: Path) -> None:
    """The same command, on fewer images: it starts anew, and says nothing of what was there."""
    for number in range(8, NUM_IMAGES):
        (images / f"class-{number % 4}" / f"{number}.jpg").unlink()
    done = run("data", "pack", "images", images, "out", "--image-size", "8", cwd=cwd)
    assert done.code == 0, done.errors
    index = Index.load(cwd / "out")
    assert {file.name for file in (cwd / "out").glob("*.tar*")} == {shard.name for shard in index.shards}
    assert index.split("train").num_samples == 8


def test_a_killed_worker_ends_the_command_with_one_message(
    packing: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    workers = workers_of(packing)
    os.kill(workers[0], signal.SIGKILL)
    _, errors = packing.communicate(timeout=60)
    assert packing.returncode == 3
    assert errors.startswith(
        "error: a process that makes samples was ended from outside, perhaps for lack of"
    )
    assert "Traceback" not in errors
    require_gone(workers)
    assert not (tmp_path / "out" / "index.json").exists()


def test_after_a_kill_of_the_command_no_process_is_left_and_it_can_be_run_again(
    packing: "subprocess.Popen[str]", images: Path, tmp_path: Path
) -> None:
    workers = workers_of(packing)
    packing.kill()
    packing.wait()
    require_gone(workers)
    assert not (tmp_path / "out" / "index.json").exists()
    pack_again(images, tmp_path)


def test_an_interrupt_ends_the_command_and_its_processes_without_a_traceback(
    packing: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    workers = workers_of(packing)
    os.killpg(packing.pid, signal.SIGINT)  # as a terminal sends it: to all of them
    _, errors = packing.communicate(timeout=60)
    assert packing.returncode == 130
    assert errors == "interrupted\n"
    require_gone(workers)
    assert not (tmp_path / "out" / "index.json").exists()
