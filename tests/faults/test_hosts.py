"""Several hosts: the same command on each. Here each "host" is an agent of its own on this machine."""

import os
import pickle
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend

from tests.commands import RECIPES, changed, curve, digests, rank_of, run_well
from tests.hosts import Host, free_port, held

SMOKE = RECIPES / "smoke.yaml"
RUN = ("precision.compute=float64", "tracking=none", "outer.num_steps=12", "checkpoint.every_steps=2")
STEPS = 12
STOPPING = "stopping, with what was done saved; another signal stops at once"


def hosts(*, min_hosts: int) -> tuple[str, str]:
    endpoint = f"endpoint: '127.0.0.1:{free_port()}', num_hosts: 2, min_hosts: {min_hosts}"
    return "launcher.num_processes=1", f"launcher.hosts={{{endpoint}, silence_s: 4, wait_s: 120}}"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def test_a_job_goes_on_without_a_host_that_leaves_and_with_it_when_it_is_back(
    tmp_path: Path, glyphs: Path, stack: ExitStack
) -> None:
    words: tuple[str | Path, ...] = (f"data.url={glyphs}", *RUN)
    run_well("train", SMOKE, *words, "launcher.num_processes=1", "--run", tmp_path / "whole", cwd=tmp_path)
    folder = tmp_path / "run"
    words = (*words, *hosts(min_hosts=1), "--run", folder)
    hold = stack.enter_context(held(tmp_path))
    first = Host(tmp_path, "first", *words)
    stack.callback(first.close)
    first.wait_for_store(folder)  # on one machine, the first to come serves it
    second = Host(tmp_path, "second", *words)
    stack.callback(second.close)
    first.wait_for("rank 0 of 2 here, on 2 hosts\n")
    second.wait_for("rank 1 of 2 here, on 2 hosts; progress is shown on 127.0.0.1\n")
    hold.at(4)
    first.wait_for_step(folder / "metrics.jsonl", 4)
    second.process.terminate()
    assert second.end() == 75
    hold.at(8)
    first.wait_for("rank 0 of 1 here, on 1 host\n")
    first.wait_for_step(folder / "metrics.jsonl", 8)
    # One that is told to leave is not counted as a fault.
    assert first.errors == "stopped by SIGTERM on 127.0.0.1; going on from the last checkpoint\n"
    again = Host(tmp_path, "again", *words)
    stack.callback(again.close)
    again.wait_for("rank 1 of 2 here, on 2 hosts")
    hold.at(STEPS)
    assert (first.end(), again.end()) == (0, 0), first.errors + again.errors
    assert "resumed after outer step 8 of 12" in first.output
    assert "meta-train" in first.output
    assert "meta-train" not in second.output + again.output
    assert len(curve(folder)) == STEPS
    for ours, theirs in zip(curve(folder), curve(tmp_path / "whole"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-7)  # sums over tasks are added in another order


def two_hosts(folder: Path, stack: ExitStack, *words: str | Path) -> tuple[Host, Host]:
    """Two hosts whose ranks run: rank 0 on the first of them."""
    words = (*words, *hosts(min_hosts=2), "--run", folder / "run")
    first = Host(folder, "first", *words)
    stack.callback(first.close)
    first.wait_for_store(folder / "run")
    second = Host(folder, "second", *words)
    stack.callback(second.close)
    second.wait_for("rank 1 of 2 here, on 2 hosts")
    return first, second


def test_sigterm_to_a_rank_saves_and_ends_the_job_on_all_hosts_and_it_goes_on_equal(
    tmp_path: Path, glyphs: Path, stack: ExitStack
) -> None:
    words, folder = (f"data.url={glyphs}", *RUN), tmp_path / "run"
    run_well("train", SMOKE, *words, "--run", tmp_path / "whole", cwd=tmp_path)  # two ranks as well
    with held(tmp_path) as hold:
        first, second = two_hosts(tmp_path, stack, *words)
        hold.at(5)
        first.wait_for_step(folder / "metrics.jsonl", 5)
        os.kill(rank_of(second.process.pid, 1), signal.SIGTERM)
        assert (first.end(), second.end()) == (75, 75)
    assert "saved after outer step 5" in first.output
    assert first.errors == second.errors == "stopped by SIGTERM\n"
    here = ("launcher.hosts=null", "launcher.num_processes=2")
    assert "resumed after outer step 5 of 12" in run_well("train", "--resume", folder, *here, cwd=tmp_path)
    assert curve(folder) == curve(tmp_path / "whole")
    assert digests(folder / "checkpoints" / "meta") == digests(tmp_path / "whole" / "checkpoints" / "meta")


def test_a_rank_that_hangs_on_another_host_is_told_by_where_it_was_last_seen(
    tmp_path: Path, glyphs: Path, stack: ExitStack
) -> None:
    limits = ("launcher.timeout_s=3", "launcher.max_restarts=0")
    hold = stack.enter_context(held(tmp_path))
    both = two_hosts(tmp_path, stack, f"data.url={glyphs}", *RUN, *limits)
    hold.at(2)
    hold.wait_for(rank=1, step=2)
    os.kill(rank_of(both[1].process.pid, 1), signal.SIGSTOP)
    hold.at(STEPS)
    assert [host.end() for host in both] == [1, 1]
    for host in both:
        assert host.errors.startswith(
            "error: rank 0 at outer step 3: a collective failed, since another rank"
        )
        assert "(last seen: rank 0 at outer step 3, " in host.errors
        assert host.errors.endswith("; on other hosts: rank 1 at outer step 3, reading its tasks\n")


FAULTY = """
import os
if os.environ.get("RANK") == "1":
    from metaloom.datasets import EpisodeStream
    from metaloom.errors import StreamError
    def fail(stream):
        raise StreamError("the sample of rank 1 is broken")
    EpisodeStream.__next__ = fail
"""


def test_all_hosts_end_with_the_message_and_the_code_of_the_one_that_failed(
    tmp_path: Path, glyphs: Path, stack: ExitStack
) -> None:
    stack.enter_context(changed(tmp_path, FAULTY))
    words = (f"data.url={glyphs}", *RUN, *hosts(min_hosts=2), "--run", tmp_path / "run")
    both = [Host(tmp_path, name, *words) for name in ("first", "second")]
    for host in both:
        stack.callback(host.close)
    for host in both:
        assert host.end() == 3
        assert host.errors == "error: the sample of rank 1 is broken\n"


def test_ctrl_c_on_one_host_ends_the_job_on_all(tmp_path: Path, glyphs: Path, stack: ExitStack) -> None:
    words = (f"data.url={glyphs}", *RUN, *hosts(min_hosts=2), "--run", tmp_path / "run")
    hold = stack.enter_context(held(tmp_path))
    both = [Host(tmp_path, name, *words) for name in ("first", "second")]
    for host in both:
        stack.callback(host.close)
    hold.at(1)
    both[0].wait_for("of 2 here, on 2 hosts")
    both[1].process.send_signal(signal.SIGINT)
    assert [host.end() for host in both] == [130, 130]
    assert both[0].errors == "stopped by SIGINT on 127.0.0.1\n"
    assert both[1].errors == f"SIGINT: {STOPPING}\nstopped by SIGINT on 127.0.0.1\n"


UNAWARE = """
import sys, time
if sys.argv[0] == "-m" and "metaloom.agent" in sys.orig_argv:
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
    def meet_and_wait(handler, meet=DynamicRendezvousHandler.next_rendezvous):
        met = meet(handler)
        time.sleep(600)
        return met
    DynamicRendezvousHandler.next_rendezvous = meet_and_wait
"""


def test_ctrl_c_on_a_host_that_does_not_know_yet_that_all_are_there(
    tmp_path: Path, glyphs: Path, stack: ExitStack
) -> None:
    words = (f"data.url={glyphs}", *RUN, *hosts(min_hosts=2), "--run", tmp_path / "run")
    first = Host(tmp_path, "first", *words)
    stack.callback(first.close)
    first.wait_for_store(tmp_path / "run")
    stack.enter_context(changed(tmp_path, UNAWARE))
    second = Host(tmp_path, "second", *words)
    stack.callback(second.close)
    first.wait_for("of 2 here, on 2 hosts")
    second.process.send_signal(signal.SIGINT)
    assert [host.end() for host in (first, second)] == [130, 130]
    assert [host.errors for host in (first, second)] == ["stopped by SIGINT on 127.0.0.1\n"] * 2
    assert second.output == ""


def wait_until_two_have_come(port: int) -> None:
    """To the rendezvous, where they wait for a third."""
    store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    backend = C10dRendezvousBackend(store, "metaloom")
    deadline = time.monotonic() + 120.0
    while time.monotonic() < deadline:
        found = backend.get_state()
        if found is not None and len(pickle.loads(found[0]).participants) == 2:
            return
        time.sleep(0.05)
    pytest.fail("the second host has not come")


def test_ctrl_c_on_a_host_ends_the_job_also_for_those_that_wait_for_more_with_it(
    tmp_path: Path, glyphs: Path, stack: ExitStack
) -> None:
    port = free_port()
    terms = f"{{endpoint: '127.0.0.1:{port}', num_hosts: 3, min_hosts: 2, silence_s: 60, wait_s: 120}}"
    launcher = ("launcher.num_processes=1", f"launcher.hosts={terms}")
    words = (f"data.url={glyphs}", *RUN, *launcher, "--run", tmp_path / "run")
    first = Host(tmp_path, "first", *words)
    stack.callback(first.close)
    first.wait_for_store(tmp_path / "run")
    second = Host(tmp_path, "second", *words)
    stack.callback(second.close)
    wait_until_two_have_come(port)
    first.process.send_signal(signal.SIGINT)
    assert [host.end() for host in (first, second)] == [130, 130]
    assert [host.errors for host in (first, second)] == ["stopped by SIGINT on 127.0.0.1\n"] * 2
