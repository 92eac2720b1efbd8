"""Which addresses this machine has, and how it reaches another one."""

from __future__ import annotations

import array
import fcntl
import ipaddress
import socket
import struct
import sys
import time
from pathlib import Path

from metaloom.errors import LaunchError

SIOCGIFCONF = 0x8912
NAME_BYTES, ENTRY_BYTES = 16, 40  # of `struct ifreq` on Linux
RETRY_S = 1.0


def resolve(host: str, *, timeout_s: float) -> str:
    """The address of a host by its name; waits for names that are not known yet, as in a starting cluster.

    Raises:
        LaunchError: the name is still not known.
    """
    deadline = time.monotonic() + timeout_s
    is_told = False
    while True:
        try:
            return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
        except OSError as error:
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"launcher.hosts.endpoint: the name {host} is not known here after {timeout_s:g} s "
                    f"({error.strerror or error}). Name a host that this one can look up, or its address."
                ) from error
        if not is_told:
            print(f"waiting for the name {host}, for up to {timeout_s:g} s", file=sys.stderr, flush=True)
            is_told = True
        time.sleep(RETRY_S)


def is_here(address: str) -> bool:
    """Whether an address is one of this machine's, in this network namespace."""
    with socket.socket(_family(address), socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def address_towards(address: str) -> str:
    """This machine's address on the way to another one: what that one can answer to.

    Raises:
        LaunchError: there is no way.
    """
    with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # nothing is sent
        except OSError as error:
            raise LaunchError(
                f"launcher.hosts.endpoint: {address} cannot be reached from here: {error.strerror or error}. "
                "Check this host's network, or name an address that all hosts reach."
            ) from error
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The name of the network interface that has an address; None where that cannot be told."""
    if not sys.platform.startswith("linux"):
        return None
    wanted = ipaddress.ip_address(address)
    for name, found in _addresses():
        # The loopback interface has all of 127.0.0.0/8.
        if found == wanted or (found.is_loopback and wanted.is_loopback and found.version == wanted.version):
            return name
    return None


def _addresses() -> list[tuple[str, ipaddress.IPv4Address | ipaddress.IPv6Address]]:
    """Every address of this machine, with its interface's name."""
    return [*_ipv4_addresses(), *_ipv6_addresses()]


def _ipv4_addresses() -> list[tuple[str, ipaddress.IPv4Address]]:
    room = array.array("B", bytes(256 * ENTRY_BYTES))
    start, length = room.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        filled = fcntl.ioctl(probe.fileno(), SIOCGIFCONF, struct.pack("iL", length, start))
    num_bytes = struct.unpack("iL", filled)[0]
    entries = [room[at : at + ENTRY_BYTES].tobytes() for at in range(0, num_bytes, ENTRY_BYTES)]
    return [
        (
            entry[:NAME_BYTES].partition(b"\0")[0].decode(),
            ipaddress.IPv4Address(entry[NAME_BYTES + 4 : NAME_BYTES + 8]),
        )
        for entry in entries
    ]


def _ipv6_addresses() -> list[tuple[str, ipaddress.IPv6Address]]:
    try:
        lines = Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines()
    except OSError:  # a kernel without IPv6
        return []
    return [(line.split()[5], ipaddress.IPv6Address(bytes.fromhex(line.split()[0]))) for line in lines]


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
