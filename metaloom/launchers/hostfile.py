"""Hosts and their slots, from a hostfile as DeepSpeed has it, `HOST slots=N` on each line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path

from metaloom.errors import LaunchError
from metaloom.launchers.base import refuse

Slots = dict[str, list[int]]  # the numbers of the slots of each host, in the order of the file

_LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*(?:#.*)?")
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # none that ssh takes for an option


def read_hostfile(path: Path) -> Slots:
    """The slots of every host.

    Raises:
        LaunchError: the file cannot be read, or names every line that is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise LaunchError(f"--hostfile {path}: it cannot be read: {why}.") from error
    problems: list[str] = []
    slots: Slots = {}
    places: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        found = _LINE.fullmatch(text)
        place = f"--hostfile {path}, line {number}: "
        if found is None:
            problems.append(f"{place}{text!r} is not of the form HOST slots=N.")
        elif _HOST.fullmatch(found[1]) is None:
            problems.append(
                f"{place}{found[1]!r} is no name or IPv4 address of a host; a user name or port belongs into "
                "~/.ssh/config."
            )
        elif found[1] in places:
            problems.append(f"{place}{found[1]} is in line {places[found[1]]} already.")
        elif not 0 < int(found[2]) <= 1024:
            problems.append(f"{place}slots={found[2]}; a host has 1 to 1024 slots, one for each rank.")
        else:
            slots[found[1]] = list(range(int(found[2])))
            places[found[1]] = number
    if not slots and not problems:
        problems.append(f"--hostfile {path}: it names no host; write a line HOST slots=N for each.")
    refuse(problems)
    return slots


def included(slots: Slots, words: str) -> Slots:
    """The slots that `--include` names: HOST[:SLOT,SLOT ...][@HOST ...]; all of a host's where none is named.

    Raises:
        LaunchError: names every host and slot that is not there.
    """
    chosen = _chosen(slots, words, "--include")
    return {host: chosen[host] for host in slots if host in chosen}


def excluded(slots: Slots, words: str) -> Slots:
    """The slots that `--exclude` leaves, in the same form.

    Raises:
        LaunchError: names every host and slot that is not there, or nothing is left.
    """
    chosen = _chosen(slots, words, "--exclude")
    left = {
        host: [slot for slot in numbers if slot not in chosen.get(host, [])]
        for host, numbers in slots.items()
    }
    left = {host: numbers for host, numbers in left.items() if numbers}
    if not left:
        raise LaunchError(f"--exclude {words}: no host is left.")
    return left


def _chosen(slots: Mapping[str, list[int]], words: str, option: str) -> Slots:
    problems: list[str] = []
    chosen: dict[str, set[int]] = {}
    for word in words.split("@"):
        host, colon, numbers = word.partition(":")
        if host not in slots:
            close = difflib.get_close_matches(host, slots, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(slots)}."
            problems.append(f"{option}: the hostfile has no {host!r}; {hint}")
        elif not colon:
            chosen.setdefault(host, set()).update(slots[host])
        elif re.fullmatch(r"\d{1,4}(,\d{1,4})*", numbers) is None:
            problems.append(f"{option}: {word!r} is not of the form HOST:SLOT,SLOT.")
        else:
            asked = {int(number) for number in numbers.split(",")}
            absent = sorted(asked - set(slots[host]))
            if absent:
                shown = ", ".join(map(str, absent))
                problems.append(f"{option}: {host} has slots 0 to {len(slots[host]) - 1}, not {shown}.")
            chosen.setdefault(host, set()).update(asked)
    refuse(problems)
    return {host: sorted(numbers) for host, numbers in chosen.items()}
