"""Worker processes of the episode stream: what they raise, how they are lost, that none is left behind."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from metaloom.datasets import EpisodeStream, drawn_ahead
from metaloom.errors import StreamError
from tests.commands import REPOSITORY, descendants, environment, words_of
from tests.sources import Failing, Numbers, OddError, same_episode, unpicklable

PATIENCE_S = 30.0


def own_workers() -> list[int]:
    """Data workers of this process; other tests may have servers running."""
    return [pid for pid in descendants(os.getpid()) if b"metaloom.datasets.worker_main" in words_of(pid)]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No test leaves a process, thread or descriptor."""
    gc.collect()
    descriptors = set(os.listdir("/proc/self/fd"))
    others = set(descendants(os.getpid()))
    yield
    assert set(descendants(os.getpid())) <= others
    assert [thread for thread in threading.enumerate() if thread.name == "metaloom-read-ahead"] == []
    assert set(os.listdir("/proc/self/fd")) == descriptors


def stream(source: Numbers, *, num_workers: int = 2) -> EpisodeStream:
    return EpisodeStream(
        source, tasks_per_step=2, rank=0, world_size=1, start_step=0, read_ahead=3, num_workers=num_workers
    )


def wait_until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.01)


def drawing(folder: Path) -> list[int]:
    """Processes that are stuck in drawing."""
    return sorted(int(path.stem) for path in folder.glob("*.drawing"))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_of_the_source_comes_as_it_is_after_the_steps_before_it(
    tmp_path: Path, num_workers: int
) -> None:
    with stream(Failing({5, 8}, "odd", tmp_path), num_workers=num_workers) as steps:
        assert [[e.number for e in next(steps)[1]] for _ in range(2)] == [[0, 1], [2, 3]]
        with pytest.raises(OddError, match="sample 'a/b' of episode 5 is broken") as caught:
            next(steps)
        assert caught.value.key == "a/b"
        with pytest.raises(StopIteration):
            next(steps)
    if num_workers:
        assert "in _fail" in str(caught.value.__cause__)


def test_an_error_of_the_system_keeps_its_number_and_file(tmp_path: Path) -> None:
    with (
        stream(Failing({0}, "system", tmp_path), num_workers=1) as steps,
        pytest.raises(FileNotFoundError, match="/there") as caught,
    ):
        next(steps)
    assert (caught.value.errno, caught.value.filename) == (2, "/there")


def test_an_error_that_cannot_be_sent_is_told_by_type_and_text(tmp_path: Path) -> None:
    with (
        stream(Failing({0}, "local", tmp_path), num_workers=1) as steps,
        pytest.raises(RuntimeError, match=r"tests\.sources\..*LocalError: local to 0"),
    ):
        next(steps)


def test_what_cannot_be_sent_back_is_an_error() -> None:
    with (
        drawn_ahead(unpicklable, [0], read_ahead=1, num_workers=1) as ahead,
        pytest.raises(AttributeError, match=r"[Cc]an't pickle"),
    ):
        next(ahead)


def test_a_source_that_cannot_be_sent_is_refused_at_once() -> None:
    with pytest.raises(
        StreamError,
        match=r"what draws each episode cannot be sent to a worker: .*lambda.*\. Make it picklable, or set "
        r"loading\.num_workers to 0\.",
    ):
        drawn_ahead(lambda number: number, range(3), read_ahead=1, num_workers=1)


def test_a_source_that_a_worker_cannot_load_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("known_here_alone")
    module.Local = type("Local", (Numbers,), {"__module__": "known_here_alone"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "known_here_alone", module)
    with (
        stream(module.Local(), num_workers=1) as steps,
        pytest.raises(
            StreamError,
            match=r"a data worker cannot load what it is to draw from: ModuleNotFoundError: No module "
            r"named 'known_here_alone'\. Define it in a module that can be imported, not in the main script, "
            r"or set loading\.num_workers to 0\.",
        ),
    ):
        next(steps)


def test_a_worker_that_cannot_be_started_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with (
        stream(Numbers()) as steps,
        pytest.raises(
            StreamError,
            match=r"data worker 1 of 2 cannot be started: .*'/nowhere/python'\. Lower loading\.num_workers, "
            r"or set it to 0",
        ),
    ):
        next(steps)


def test_what_is_asked_for_is_small() -> None:
    with (
        drawn_ahead(len, ["a" * 5000], read_ahead=1, num_workers=1, noun="text") as ahead,
        pytest.raises(ValueError, match=r"text 'a+ takes 50\d\d bytes to ask a worker for; at most 4096"),
    ):
        next(ahead)


# ---------------------------------------------------------------- workers that are lost


def test_a_worker_that_is_killed_is_told_with_what_it_was_drawing(tmp_path: Path) -> None:
    with stream(Failing({5}, "stuck", tmp_path)) as steps:
        assert [next(steps)[0], next(steps)[0]] == [0, 1]
        wait_until(lambda: drawing(tmp_path))
        for pid in drawing(tmp_path):
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(
            StreamError,
            match=r"^data worker 2 of 2 \(process \d+\) was killed by SIGKILL \(the machine may be out of "
            r"memory\) before it had drawn episode 5\. Lower loading\.num_workers, or set it to 0, so that "
            r"the rank draws in a thread of its own\.$",
        ):
            next(steps)


def test_a_worker_that_is_killed_while_it_has_nothing_to_do_is_told_too(tmp_path: Path) -> None:
    noted = tmp_path / "numbers"
    with stream(Numbers(noted_in=noted), num_workers=1) as steps:
        wait_until(lambda: noted.exists() and len(noted.read_text().split()) == 6)
        (pid,) = own_workers()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(pid))
        # The last of the six is noted before it is sent: it may be lost with its step, the others may not.
        taken: list[int] = []
        with pytest.raises(
            StreamError, match=r"was killed by SIGKILL .* before it had drawn episode [5-7]\."
        ):
            taken.extend(step for step, _ in steps)
        assert taken in ([0, 1], [0, 1, 2])


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("exit", r"ended with exit code 3 \(why is in this rank's error output\)"),
        ("segfault", r"was killed by SIGSEGV"),
    ],
)
def test_how_a_worker_ended_is_told(tmp_path: Path, kind: str, how: str) -> None:
    with (
        stream(Failing({0}, kind, tmp_path), num_workers=1) as steps,
        pytest.raises(
            StreamError, match=rf"data worker 1 of 1 \(process \d+\) {how} before it had drawn episode 0\. "
        ),
    ):
        next(steps)


# ---------------------------------------------------------------- nothing is left


def test_workers_end_by_themselves_when_there_is_no_more_to_draw() -> None:
    with drawn_ahead(Numbers().episode, range(5), read_ahead=5, num_workers=2) as ahead:
        assert [episode.number for episode in ahead.take(5)] == list(range(5))
        wait_until(lambda: own_workers() == [])
        assert ahead.take(1) == []


def test_closing_while_workers_draw_ends_them(tmp_path: Path) -> None:
    steps = stream(Failing(range(100), "stuck", tmp_path))
    wait_until(lambda: len(drawing(tmp_path)) == 2)
    consumer = threading.Thread(target=lambda: list(steps))  # it waits, and has to be woken
    consumer.start()
    steps.close()
    consumer.join(PATIENCE_S)
    assert not consumer.is_alive()


def test_closing_while_workers_start_ends_them() -> None:
    for _ in range(3):
        stream(Numbers()).close()


def test_workers_end_with_a_parent_that_is_killed_even_if_they_are_stopped(tmp_path: Path) -> None:
    program = "import sys, tests.sources; tests.sources.wait_for_what_is_stuck(sys.argv[1])"
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=REPOSITORY, env=environment()
    )
    try:
        wait_until(lambda: len(drawing(tmp_path)) == 2)
        workers = drawing(tmp_path)
        assert sorted(descendants(parent.pid)) == workers
        os.kill(workers[0], signal.SIGSTOP)
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not any(is_alive(pid) for pid in workers))


def test_a_worker_ends_when_its_parent_closes_the_connection_and_says_nothing(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with stream(Numbers(), num_workers=1) as steps:
        next(steps)
        (pid,) = own_workers()
    assert not is_alive(pid)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_signals_to_all_processes_of_a_job_leave_workers_to_their_parent() -> None:
    with stream(Numbers(), num_workers=1) as steps:
        next(steps)
        (pid,) = own_workers()
        assert os.getpgid(pid) != os.getpgid(0)  # Ctrl-C in a terminal reaches the parent alone
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)
        assert [next(steps)[0] for _ in range(5)] == [1, 2, 3, 4, 5]
        assert own_workers() == [pid]


def test_workers_outlive_the_thread_that_made_the_stream() -> None:
    made: list[EpisodeStream] = []
    maker = threading.Thread(target=lambda: made.append(stream(Numbers())))
    maker.start()
    maker.join()
    with made[0] as steps:
        for expected in range(5):
            step, episodes = next(steps)
            assert step == expected
            assert all(same_episode(episode, Numbers().episode(episode.number)) for episode in episodes)


def test_an_error_in_the_block_ends_workers(tmp_path: Path) -> None:
    source = Failing(range(2, 100), "stuck", tmp_path)
    steps = stream(source)
    with pytest.raises(KeyError), steps:
        raise KeyError
    assert not any(is_alive(pid) for pid in drawing(tmp_path))
