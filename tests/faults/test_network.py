"""Several hosts with networks of their own: namespaces that a test makes, joined by a cable that it cuts."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.commands import ADDED, RECIPES, curve, digests, run_well
from tests.hosts import Host, held

pytestmark = pytest.mark.netns
STEPS = 12
RUN = (
    "precision.compute=float64",
    "tracking=none",
    f"outer.num_steps={STEPS}",
    "checkpoint.every_steps=2",
    "launcher.num_processes=1",
)
SILENCE_S = 4
# Silence, ranks that wait in a collective and are given 5 s to notice, and a machine that has much to do.
LIMIT_S = SILENCE_S + 60
# Within a second of the cut, a rank has begun the next step or has not.
ON_THE_FIRST = "{}: the host of rank 1 has been silent for 4 s .*; rank 0 is at outer step {}\\n"
ON_THE_SECOND = "{}: 10.213.0.1:29400 does not answer any more: .*; rank 1 was at outer step {}\n"


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@dataclass(frozen=True)
class Network:
    """Two network namespaces, each a host with an address, and the cable between them."""

    names: tuple[str, str]
    addresses: tuple[str, str] = ("10.213.0.1", "10.213.0.2")

    def make(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        first, second = self.names
        ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for name, address in zip(self.names, self.addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")

    def cut(self) -> None:
        ip("-n", self.names[1], "link", "set", "cable", "down")

    def mend(self) -> None:
        ip("-n", self.names[1], "link", "set", "cable", "up")

    def remove(self) -> None:
        for name in self.names:
            listed = subprocess.run(
                ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
            )
            for pid in listed.stdout.split():
                os.kill(int(pid), 9)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def host(self, folder: Path, index: int, *words: str | Path, shown: str | None = None) -> Host:
        """The command on one of the hosts."""
        within = ("ip", "netns", "exec", self.names[index])
        return Host(folder, shown or f"host-{index}", *words, within=within)

    @property
    def launcher(self) -> str:
        """The section of the recipe, the same for both."""
        endpoint = f"endpoint: '{self.addresses[0]}:29400', num_hosts: 2, min_hosts: 1"
        return f"launcher.hosts={{{endpoint}, silence_s: {SILENCE_S}, wait_s: 120}}"


@pytest.fixture
def network() -> Iterator[Network]:
    if shutil.which("ip") is None:
        pytest.skip("the command ip (iproute2) is not here")
    made = Network((f"metaloom-{os.getpid()}-0", f"metaloom-{os.getpid()}-1"))
    try:
        try:
            made.make()
        except OSError as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield made
    finally:
        made.remove()


@pytest.mark.slow
def test_a_host_that_is_cut_off_says_where_it_was_and_comes_back_by_itself(
    tmp_path: Path, glyphs: Path, network: Network
) -> None:
    words: tuple[str | Path, ...] = (f"data.url={glyphs}", *RUN)
    run_well("train", RECIPES / "smoke.yaml", *words, "--run", tmp_path / "whole", cwd=tmp_path)
    folder, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    words = (*words, network.launcher, "launcher.max_restarts=1", "--run", folder)
    with ExitStack() as stack:
        hold = stack.enter_context(held(tmp_path))
        first, second = (network.host(tmp_path, index, *words) for index in (0, 1))
        stack.callback(first.close)
        stack.callback(second.close)
        first.wait_for("rank 0 of 2 here, on 2 hosts\n")
        second.wait_for("rank 1 of 2 here, on 2 hosts; progress is shown on 10.213.0.1\n")
        hold.at(5)
        first.wait_for_step(metrics, 5)
        network.cut()
        hold.at(9)
        first.wait_for("restart 1 of 1, from the last checkpoint", LIMIT_S)
        second.wait_for("restart 1 of 1, when it is back", LIMIT_S)
        assert re.search(ON_THE_FIRST.format("fault", "[56]"), first.errors)
        assert re.search(ON_THE_SECOND.format("fault", "[56]"), second.errors)
        # The first goes on alone, and with the second when it is there again.
        first.wait_for("rank 0 of 1 here, on 1 host\n")
        first.wait_for_step(metrics, 9)
        network.mend()
        first.wait_for("rank 0 of 2 here, on 2 hosts\n", times=2)
        hold.at(11)
        first.wait_for_step(metrics, 11)
        # There was one restart: now both end.
        network.cut()
        assert [first.end(LIMIT_S), second.end(LIMIT_S)] == [1, 1], first.errors + second.errors
        assert re.search(ON_THE_FIRST.format("error", "1[12]"), first.errors)
        assert "There was 1 restart before, as many as launcher.max_restarts allows." in first.errors
        assert re.search(ON_THE_SECOND.format("error", "1[12]"), second.errors)
    # And a person goes on with it on one host.
    run_well("train", "--resume", folder, "launcher.hosts=null", cwd=tmp_path)
    assert len(curve(folder)) == STEPS
    for ours, theirs in zip(curve(folder), curve(tmp_path / "whole"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-7)  # sums over tasks are added in another order


def test_a_job_survives_the_loss_of_each_host_with_its_folder(
    tmp_path: Path, glyphs: Path, network: Network
) -> None:
    """As clusters replace what is lost: each host has a folder of its own, which goes with it, and then its
    command is given again."""
    words: tuple[str, ...] = (f"data.url={glyphs}", *RUN)
    whole = (*words, "launcher.num_processes=2", f"checkpoint.url={(tmp_path / 'whole').as_uri()}")
    run_well("train", RECIPES / "smoke.yaml", *whole, "--run", tmp_path / "whole-run", cwd=tmp_path)
    endpoint = f"endpoint: '{network.addresses[0]}:29400', num_hosts: 2"
    words = (
        *words,
        f"checkpoint.url={(tmp_path / 'checkpoints').as_uri()}",
        f"launcher.hosts={{{endpoint}, silence_s: {SILENCE_S}, wait_s: 120, own_folders: true}}",
        "--run-id",
        "one",
    )
    folders = tmp_path / "folders"
    with ExitStack() as stack:
        hold = stack.enter_context(held(tmp_path))

        def host(index: int, name: str) -> Host:
            ADDED["METALOOM_HOST_INDEX"] = str(index)
            made = network.host(tmp_path, index, *words, "--run", folders / name, shown=name)
            del ADDED["METALOOM_HOST_INDEX"]
            stack.callback(made.close)
            return made

        first, second = host(0, "first"), host(1, "second")
        first.wait_for("rank 0 of 2 here, on 2 hosts\n")
        hold.at(3)
        first.wait_for_step(folders / "first" / "metrics.jsonl", 3)
        second.kill()
        shutil.rmtree(folders / "second")
        again = host(1, "second-again")
        again.wait_for("rank 1 of 2 here, on 2 hosts")
        hold.at(5)
        first.wait_for_step(folders / "first" / "metrics.jsonl", 5)
        # Where the hosts meet, with the run's own folder.
        first.kill()
        shutil.rmtree(folders / "first")
        last = host(0, "first-again")
        last.wait_for("rank 0 of 2 here, on 2 hosts\n")
        hold.at(STEPS)
        assert (last.end(), again.end()) == (0, 0), last.errors + again.errors
    assert "resumed after outer step 4 of 12" in last.output
    assert digests(tmp_path / "checkpoints" / "meta") == digests(tmp_path / "whole" / "meta")
    assert not (folders / "second-again" / "metrics.jsonl").exists()
    assert curve(folders / "first-again") == curve(tmp_path / "whole-run")[4:]
