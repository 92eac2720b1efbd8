"""How a command finds its place among the hosts of a job, and what it starts there."""

from pathlib import Path

import pytest

from metaloom.errors import LaunchError
from metaloom.launchers.local import ALONE, Standing, agent_command, agent_environment, standing
from metaloom.launchers.network import address_towards, interface_of, is_here, resolve
from metaloom.recipe.machine import Hosts, LocalLauncher

HOSTS = Hosts(endpoint="127.0.0.1:29400", num_hosts=3, wait_s=1.0)


def test_a_machine_knows_its_own_addresses() -> None:
    assert is_here("127.0.0.1")
    assert not is_here("192.0.2.1")  # kept for documentation: nobody has it
    assert address_towards("127.0.0.7") in ("127.0.0.1", "127.0.0.7")
    assert interface_of("127.0.0.7") == interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None
    assert resolve("127.0.0.1", timeout_s=0) == "127.0.0.1"


def test_names_and_addresses_that_lead_nowhere_are_told() -> None:
    with pytest.raises(LaunchError, match=r"the name no-host\.invalid is not known here after 0 s"):
        resolve("no-host.invalid", timeout_s=0)
    with pytest.raises(LaunchError, match=r"255\.255\.255\.255 cannot be reached from here: "):
        address_towards("255.255.255.255")


def test_the_same_recipe_stands_for_the_first_host_where_the_endpoint_is() -> None:
    assert standing(LocalLauncher()) == ALONE
    assert standing(LocalLauncher(hosts=HOSTS)) == Standing(
        "127.0.0.1", is_first=True, endpoint=HOSTS.endpoint
    )


def test_all_hosts_start_the_same_agent_but_for_who_serves_and_their_addresses() -> None:
    launcher = LocalLauncher(num_processes=8, max_restarts=5, hosts=HOSTS)

    def command(here: Standing) -> list[str]:
        return agent_command(["train", "run"], launcher, here, log_dir=Path("run/logs"), digest="abc")

    first, second = (
        command(Standing("10.0.0.1", is_first=True)),
        command(Standing("10.0.0.2", is_first=False)),
    )
    assert set(first) - set(second) == {"--address=10.0.0.1", "--may-serve"}
    assert set(second) - set(first) == {"--address=10.0.0.2"}
    assert {"--endpoint=127.0.0.1:29400", "--min-hosts=3", "--max-hosts=3", "--max-restarts=5"} < set(first)
    assert second[-2:] == ["train", "run"]


def test_the_interface_of_gloo_is_derived_and_what_is_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert agent_environment(LocalLauncher(), ALONE)["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert agent_environment(LocalLauncher(), ALONE)["GLOO_SOCKET_IFNAME"] == "ib0"


def test_a_host_with_an_index_does_not_trust_names_for_who_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a host was replaced, names may lead to where the former one was, and addresses be another's."""
    hosts = Hosts(endpoint="one-0.one:29400", num_hosts=2)
    launcher = LocalLauncher(num_processes=1, hosts=hosts)
    found = {"here": "127.0.0.1", "elsewhere": "192.0.2.1"}
    for at, index, is_first in (("elsewhere", 0, True), ("here", 1, False)):
        monkeypatch.setenv("METALOOM_HOST_INDEX", str(index))
        monkeypatch.setattr("metaloom.launchers.local.resolve", lambda name, timeout_s, at=at: found[at])
        monkeypatch.setattr("metaloom.launchers.local.address_towards", lambda address: "127.0.0.1")
        here = standing(launcher)
        assert (here.is_first, here.index) == (is_first, index)
    monkeypatch.setenv("METALOOM_HOST_INDEX", "first")
    with pytest.raises(LaunchError, match="METALOOM_HOST_INDEX=first in the environment is no number"):
        standing(launcher)
