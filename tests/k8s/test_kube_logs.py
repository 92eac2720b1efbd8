"""The logs of all pods as one stream, against a fake API server: nothing is lost, nothing is told twice."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from metaloom.errors import LaunchError
from metaloom.k8s import client, logs
from metaloom.k8s.client import Cluster
from metaloom.k8s.logs import LogLine, merged
from metaloom.k8s.resources import JOBS, PODS
from tests.k8s.fake_api import FakeCluster
from tests.k8s.jobs import LABELS, job

SECOND = 10**9
BEGIN = 1_800_000_000 * SECOND


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    monkeypatch.setattr(client, "PAUSES_S", (0.01, 0.01, 0.01))
    monkeypatch.setattr(logs, "ASK_S", 0.05)
    with FakeCluster(tmp_path) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        yield cluster


@pytest.fixture
def cluster(fake: FakeCluster) -> Iterator[Cluster]:
    with contextlib.closing(Cluster.connect()) as connected:
        yield connected


def is_over(fake: FakeCluster) -> bool:
    """Whether the Job has ended, as its conditions say."""
    return bool({"Complete", "Failed"} & set(fake.conditions(JOBS, "glyphs")))


@contextlib.contextmanager
def followed(
    fake: FakeCluster, cluster: Cluster, *, rank: int | None = None, tail: int | None = None
) -> Iterator[Iterator[LogLine]]:
    lines = merged(cluster, LABELS, follow=True, rank=rank, tail=tail, is_over=lambda: is_over(fake))
    with contextlib.closing(lines):  # type: ignore[type-var]
        yield lines


def texts(lines: Iterator[LogLine], number: int) -> list[str]:
    """The next lines, sorted: those of several pods come as they come."""
    return sorted(str(next(lines)) for _ in range(number))


def test_lines_that_are_there_come_in_the_order_of_their_times_with_rank_or_node(
    fake: FakeCluster, cluster: Cluster
) -> None:
    cluster.create(JOBS, job())
    pods = fake.pods("glyphs")
    pods.run()
    pods.log(0, "[rank 0] first", at_ns=BEGIN)
    pods.log(1, "[rank 9] second", at_ns=BEGIN + 1)
    pods.log(0, "of the agent", at_ns=BEGIN + 2)
    pods.log(1, "[rank 8]", at_ns=BEGIN + SECOND)
    found = list(merged(cluster, LABELS))
    assert [str(line) for line in found] == [
        "[rank 0] first",
        "[rank 9] second",
        "[node 0] of the agent",
        "[rank 8] ",
    ]
    assert found[1] == LogLine(1, 9, "second", "2027-01-15T08:00:00.000000001Z")


def test_one_rank_is_read_from_whatever_pods_hold_it(fake: FakeCluster, cluster: Cluster) -> None:
    cluster.create(JOBS, job())
    pods = fake.pods("glyphs")
    pods.run()
    pods.log(0, "[rank 1] a", "[rank 0] b", "of the agent", "[rank 1] c")
    pods.log(1, "[rank 1] d", "[rank 10] e")
    assert [line.text for line in merged(cluster, LABELS, rank=1)] == ["a", "c", "d"]
    assert [line.text for line in merged(cluster, LABELS, rank=1, tail=1)] == ["c", "d"]
    assert [line.text for line in merged(cluster, LABELS, tail=1)] == ["c", "e"]


def test_pods_that_have_not_started_have_no_lines_yet(fake: FakeCluster, cluster: Cluster) -> None:
    cluster.create(JOBS, job())
    assert list(merged(cluster, LABELS)) == []


def test_following_goes_on_from_what_was_there_until_the_job_is_over(
    fake: FakeCluster, cluster: Cluster
) -> None:
    cluster.create(JOBS, job())
    pods = fake.pods("glyphs")
    pods.run()
    pods.log(0, "a", "b")
    with followed(fake, cluster, tail=1) as lines:
        assert str(next(lines)) == "[node 0] b"
        pods.log(1, "c")
        assert str(next(lines)) == "[node 1] c"
        pods.log(0, "d")
        pods.succeed()
        assert [str(line) for line in lines] == ["[node 0] d"]


def test_following_with_no_lines_of_before_tells_new_ones_alone(fake: FakeCluster, cluster: Cluster) -> None:
    cluster.create(JOBS, job(nodes=1))
    pods = fake.pods("glyphs")
    pods.run()
    pods.log(0, "old")
    with followed(fake, cluster, tail=0) as lines:
        found: list[str] = []
        reading = threading.Thread(target=lambda: found.extend(line.text for line in lines))
        reading.start()
        fake.wait(lambda: any("follow" in query for _, _, query in list(fake.requests)))
        pods.log(0, "new")
        pods.succeed()
        reading.join()
    assert found == ["new"]


def test_pods_that_start_late_are_waited_for(fake: FakeCluster, cluster: Cluster) -> None:
    cluster.create(JOBS, job())
    pods = fake.pods("glyphs")
    with followed(fake, cluster) as lines:

        def start() -> None:
            fake.wait(lambda: [path for _, path, _ in list(fake.requests) if path.endswith("/log")])
            pods.run()
            pods.log(1, "late")

        starting = threading.Thread(target=start)
        starting.start()
        assert str(next(lines)) == "[node 1] late"
        starting.join()


def test_a_replacement_is_picked_up(fake: FakeCluster, cluster: Cluster) -> None:
    cluster.create(JOBS, job())
    pods = fake.pods("glyphs")
    pods.run()
    with followed(fake, cluster, rank=3) as lines:
        for i in range(3):
            pods.log(1, f"[rank 3] start {i}", f"[rank 2] start {i}")
            assert str(next(lines)) == f"[rank 3] start {i}"
            pods.preempt(1)
            pods.run(1)
        pods.log(1, "[rank 3] the last")
        pods.succeed()
        assert [str(line) for line in lines] == ["[rank 3] the last"]


def test_a_container_that_starts_again_is_read_to_its_end_and_on(fake: FakeCluster, cluster: Cluster) -> None:
    cluster.create(JOBS, job(nodes=1, restart="OnFailure"))
    pods = fake.pods("glyphs")
    pods.run()
    pods.log(0, "a")
    with followed(fake, cluster) as lines:
        assert next(lines).text == "a"
        pods.log(0, "b")
        assert next(lines).text == "b"
        # Between these two no reader can come.
        with fake.store.changed:
            fake.close_streams()
            pods.log(0, "the last words")
            pods.fail(0)
            pods.log(0, "c")
        assert [next(lines).text for _ in range(2)] == ["the last words", "c"]
        pods.succeed()
        assert list(lines) == []


def test_what_a_container_wrote_before_it_started_again_is_told_too(
    fake: FakeCluster, cluster: Cluster
) -> None:
    cluster.create(JOBS, job(nodes=1, restart="OnFailure"))
    pods = fake.pods("glyphs")
    pods.run()
    pods.log(0, "before")
    pods.fail(0)
    pods.log(0, "after")
    assert [line.text for line in merged(cluster, LABELS)] == ["before", "after"]


@pytest.mark.parametrize("follow", [False, True])
def test_a_log_that_breaks_off_is_resumed_without_loss_or_repetition(
    fake: FakeCluster, cluster: Cluster, follow: bool
) -> None:
    cluster.create(JOBS, job(nodes=1))
    pods = fake.pods("glyphs")
    pods.run()
    # Several lines have one time, and are the same text.
    wanted = [(BEGIN + i // 3 * SECOND // 5, f"line {i // 2}") for i in range(60)]
    for at_ns, text in wanted:
        pods.log(0, text, at_ns=at_ns)
    if not follow:
        pods.succeed()
    fake.log_chunk_bytes = 7
    found = []
    with contextlib.closing(merged(cluster, LABELS, follow=follow)) as lines:  # type: ignore[type-var]
        for i, line in enumerate(lines):
            found.append(line.text)
            if i % 7 == 3:
                fake.close_streams()
            if len(found) == len(wanted) and follow:
                pods.succeed()
    assert found == [text for _, text in wanted]


def test_nothing_of_many_pods_is_lost_or_told_twice_while_everything_breaks(
    fake: FakeCluster, cluster: Cluster
) -> None:
    chance = random.Random(0)
    cluster.create(JOBS, job(nodes=6))
    pods = fake.pods("glyphs")
    pods.run()
    pods.log(0, "begin")
    fake.log_chunk_bytes = 50

    def write() -> None:
        for i in range(200):
            for node in range(6):
                pods.log(node, f"[rank {node}] {i}")
            if i % 10 == 5:
                fake.close_streams()
            if i % 40 == 7:
                fake.reset(times=3)
                fake.expire_versions()
            if i in (50, 120):
                pods.fail(chance.randrange(6))
                pods.run()
        pods.succeed()

    writing = threading.Thread(target=write)
    with followed(fake, cluster) as lines:
        assert next(lines).text == "begin"
        writing.start()
        found = [str(line) for line in lines]
        writing.join()
    assert sorted(found) == sorted(f"[rank {node}] {i}" for node in range(6) for i in range(200))
    for node in range(6):
        own = [int(line.split()[2]) for line in found if line.startswith(f"[rank {node}]")]
        assert len(own) == 200


def test_a_pod_that_is_deleted_while_it_is_read_is_no_error(fake: FakeCluster, cluster: Cluster) -> None:
    cluster.create(JOBS, job(backoffLimit=0))
    pods = fake.pods("glyphs")
    pods.run()
    pods.log(0, "a")
    pods.log(1, "b")
    with followed(fake, cluster) as lines:
        assert texts(lines, 2) == ["[node 0] a", "[node 1] b"]
        # The sibling is deleted, logs and all.
        pods.out_of_memory(1)
        assert list(lines) == []
    assert len(fake.objects(PODS)) == 1


def test_following_ends_when_the_job_is_deleted(fake: FakeCluster, cluster: Cluster) -> None:
    cluster.create(JOBS, job())
    pods = fake.pods("glyphs")
    pods.run()
    pods.log(0, "a")
    lines = merged(cluster, LABELS, follow=True)
    assert next(lines).text == "a"
    cluster.delete(JOBS, "glyphs")
    assert list(lines) == []


def test_a_log_that_was_partly_rotated_away_goes_on_with_what_there_is(
    fake: FakeCluster, cluster: Cluster
) -> None:
    cluster.create(JOBS, job(nodes=1))
    pods = fake.pods("glyphs")
    pods.run()
    for i in range(6):
        pods.log(0, f"line {i}", at_ns=BEGIN + i * SECOND)
    with followed(fake, cluster) as lines:
        assert [next(lines).text for _ in range(6)] == [f"line {i}" for i in range(6)]
        with fake.store.changed:
            fake.close_streams()
            for i in range(6, 10):
                pods.log(0, f"line {i}", at_ns=BEGIN + i * SECOND)
            pods.rotate_log(0, keep=2)
        assert [next(lines).text for _ in range(2)] == ["line 8", "line 9"]
        pods.succeed()
        assert list(lines) == []


def test_a_job_that_ends_with_pods_that_never_started_is_over(fake: FakeCluster, cluster: Cluster) -> None:
    cluster.create(JOBS, job())
    pods = fake.pods("glyphs")
    pods.run(0)
    pods.image_error(1)
    pods.log(0, "a")
    ended = threading.Event()
    lines = merged(cluster, LABELS, follow=True, is_over=ended.is_set)
    assert next(lines).text == "a"
    pods.succeed(0)
    ended.set()
    assert list(lines) == []


def test_an_outage_is_waited_for_and_told_once(
    fake: FakeCluster, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.create(JOBS, job())
    pods = fake.pods("glyphs")
    pods.run()
    pods.log(0, "a")
    with followed(fake, cluster) as lines:
        assert next(lines).text == "a"
        fake.reset(times=30)
        fake.close_streams()
        pods.log(1, "b")
        assert next(lines).text == "b"
        pods.succeed()
        assert list(lines) == []
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_machine_that_does_not_answer_ends_neither_following_nor_reading(
    fake: FakeCluster, cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "PAUSE_S", 0.01)
    cluster.create(JOBS, job())
    pods = fake.pods("glyphs")
    pods.run()
    pods.log(0, "a")
    pods.log(1, "b")
    silent = f"/pods/{pods.name(1)}/log"
    fake.refuse(500, times=3, path=silent)
    with followed(fake, cluster) as lines:
        assert {next(lines).text, next(lines).text} == {"a", "b"}
        fake.refuse(500, times=1000, path=silent)
        fake.close_streams()
        pods.log(0, "c")
        assert next(lines).text == "c"
        pods.succeed()
        assert list(lines) == []
    told = f"note: cannot read the log of pods {pods.name(1)!r} in namespace 'team' on fake ("
    assert capsys.readouterr().err.startswith(told)


def test_what_ends_following_for_good_is_an_error(fake: FakeCluster, cluster: Cluster) -> None:
    cluster.create(JOBS, job())
    pods = fake.pods("glyphs")
    pods.run()
    pods.log(0, "a")
    with followed(fake, cluster) as lines:
        assert next(lines).text == "a"
        fake.forbid("get", "pods/log")
        fake.close_streams()
        with pytest.raises(LaunchError, match="user 'dev' may not get pods/log in namespace 'team'"):
            next(lines)


def test_words_of_the_node_in_place_of_a_log_are_told_once(fake: FakeCluster, cluster: Cluster) -> None:
    cluster.create(JOBS, job(nodes=1))
    fake.pods("glyphs").run()
    words = "unable to retrieve container logs for containerd://abc"
    fake.refuse(200, times=3, path="/log", body=words + "\n")
    lines = merged(cluster, LABELS, follow=True)
    assert str(next(lines)) == f"[node 0] {words}"
    fake.pods("glyphs").succeed()
    assert list(lines) == []


def test_ctrl_c_leaves_no_thread_and_no_connection(fake: FakeCluster, cluster: Cluster) -> None:
    cluster.create(JOBS, job(nodes=3))
    pods = fake.pods("glyphs")
    pods.run()
    pods.log(0, "a")
    before = set(threading.enumerate())
    lines = merged(cluster, LABELS, follow=True)
    assert next(lines).text == "a"
    pods.log(1, "b")
    assert next(lines).text == "b"
    fake.wait(lambda: len([query for _, _, query in list(fake.requests) if "follow" in query]) == 3)
    with pytest.raises(KeyboardInterrupt):
        lines.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    # The threads of the fake server's connections end with those.
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
        fake.close_streams()
    left = [thread for thread in set(threading.enumerate()) - before if "process_request" not in thread.name]
    assert left == []


def test_a_consumer_that_is_slow_holds_the_readers_up(
    fake: FakeCluster, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "NUM_WAITING", 10)
    cluster.create(JOBS, job(nodes=2))
    pods = fake.pods("glyphs")
    pods.run()
    with followed(fake, cluster) as lines:
        pods.log(0, "first")
        assert next(lines).text == "first"
        pods.log(0, *(f"{i}" for i in range(500)))
        pods.log(1, *(f"{i}" for i in range(500)))
        pods.succeed()
        found = [(line.node, line.text) for line in lines]
    for node in (0, 1):
        assert [text for index, text in found if index == node] == [f"{i}" for i in range(500)]
