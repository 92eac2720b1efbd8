"""A plan for people, and as JSON."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from metaloom.planning.advice import Remedy
from metaloom.planning.estimate import Estimate, Layout, Memory
from metaloom.planning.facts import Facts
from metaloom.planning.hardware import GIB, MIB, Hardware
from metaloom.tracking.console import Console

PARTS = {
    "process": "process",
    "weights": "weights",
    "learned": "meta-parameters",
    "optimizer": "optimizer",
    "gradients": "gradients",
    "states": "snapshots",
    "working": "activations",
    "unusable": "allocator",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that a plan says.

    Attributes:
        is_here: whether the hardware is this machine.
        estimates: by layout, for each number of ranks; the recipe's own layout first.
        left_out: numbers of ranks that the recipe's own layout does not take.
        refused: layouts that are not possible, and why.
        misfits: for a number of ranks on which the recipe does not fit, what would make it fit.
        tried: settings that were tried where it does not fit.
        elsewhere: the fewest ranks on which it fits under other layouts, with what those need.
    """

    name: str
    facts: Facts
    hardware: Hardware
    is_here: bool
    estimates: Mapping[Layout, Sequence[Estimate]]
    left_out: Sequence[int]
    refused: Mapping[Layout, str]
    misfits: Mapping[int, Sequence[Remedy]]
    tried: Sequence[str]
    elsewhere: Sequence[Remedy]


def show(plan: Plan, console: Console) -> None:
    """Prints tables and remarks."""
    facts, hardware = plan.facts, plan.hardware
    console.note(
        f"plan for {plan.name}: {facts.num_parameters:,} parameters, {facts.tasks_per_step} tasks per outer "
        f"step, {facts.num_steps} inner step{'' if facts.num_steps == 1 else 's'}, {facts.compute}"
    )
    console.note(
        f"on {hardware.device.name} ({_size(hardware.device.memory_bytes)}), {hardware.devices_per_node} per "
        f"node, {hardware.link.name}"
    )
    own = next(iter(plan.estimates))
    _show_memory(plan.estimates[own], own, console)
    for layout, estimates in plan.estimates.items():
        _show_steps(layout, estimates, console)
    console.note(
        "wire: all communication of a step; what runs beside the computing is not in the step's time"
    )
    for layout, why in plan.refused.items():
        console.note(f"{layout.in_words()}: not possible, {why}")
    for text in remarks(plan):
        console.note(text)


def remarks(plan: Plan) -> list[str]:
    """What does not fit and what would make it fit; which ranks would be idle."""
    own, estimates = next(iter(plan.estimates.items()))
    lines: list[str] = []
    num_local = plan.hardware.devices_per_node
    beyond = next((found for found in estimates if found.num_ranks > num_local), None)
    if plan.is_here and beyond is not None:
        lines.append(
            f"{_ranks(beyond.num_ranks)} and more are planned on several machines like this one, "
            f"{_ranks(num_local)} each, over {plan.hardware.link.name} (--link): that link is not measured"
        )
    if plan.left_out:
        lines.append(
            f"{', '.join(map(str, plan.left_out[:-1]))}{' and ' if plan.left_out[1:] else ''}"
            f"{_ranks(plan.left_out[-1])}: not possible under {own.in_words()}, since sharding.shard_size "
            "must divide the number of ranks"
        )
    for group in _alike(plan, [found for found in estimates if not found.fits]):
        first, last = group[0], group[-1]
        lines.append(
            f"{_span(group)}: does not fit under {own.in_words()} ({_size(first.memory.total)}"
            f"{'' if first is last else f' to {_size(last.memory.total)}'} of "
            f"{_size(plan.hardware.device.memory_bytes)}, most of it {_largest_part(first.memory)}"
            f"{'' if first.peak_in == 'outer step' else f', in {first.peak_in}'})"
        )
        lines += [f"  fits with {_in_words(remedy)}" for remedy in plan.misfits[last.num_ranks]]
        if not plan.misfits[last.num_ranks]:
            tried = ", ".join(_quoted(setting) for setting in ("outer.micro_batch=1", *plan.tried))
            lines.append(f"  none of those tried makes it fit on so many ranks, alone or together: {tried}")
    fitting = next((found for found in estimates if found.fits), None)
    if fitting is not None and not estimates[0].fits:
        lines.append(f"as it is, it fits from {_ranks(fitting.num_ranks)} on, of those asked for")
    lines += [
        f"{remedy.layout.in_words()} fits from {_ranks(remedy.estimate.num_ranks)} on, of those asked for"
        + (f", with {' '.join(map(_quoted, remedy.settings))}" if remedy.settings else "")
        for remedy in plan.elsewhere
    ]
    idle = next((found for found in estimates if found.num_idle_ranks), None)
    if idle is not None:
        lines.append(
            f"{_ranks(idle.num_ranks)}: {idle.num_idle_ranks} of them get no tasks, since "
            f"outer.tasks_per_step is {plan.facts.tasks_per_step}: more ranks than tasks make no step faster"
        )
    return lines


def as_json(plan: Plan) -> dict[str, Any]:
    """The same as JSON values."""

    def remedy(found: Remedy) -> dict[str, Any]:
        return {
            "settings": list(found.settings),
            "sharding": dataclasses.asdict(found.layout),
            "estimate": _values(found.estimate),
        }

    return {
        "recipe": plan.name,
        "num_parameters": plan.facts.num_parameters,
        "hardware": dataclasses.asdict(
            dataclasses.replace(
                plan.hardware,
                device=dataclasses.replace(
                    plan.hardware.device, flops_per_s=dict(plan.hardware.device.flops_per_s)
                ),
            )
        ),
        "plans": [
            {"sharding": dataclasses.asdict(layout), "estimates": [_values(found) for found in estimates]}
            for layout, estimates in plan.estimates.items()
        ],
        "left_out": list(plan.left_out),
        "refused": [
            {"sharding": dataclasses.asdict(layout), "why": why} for layout, why in plan.refused.items()
        ],
        "misfits": [
            {"num_ranks": number, "remedies": [remedy(found) for found in each]}
            for number, each in plan.misfits.items()
        ],
        "elsewhere": [remedy(found) for found in plan.elsewhere],
        "remarks": remarks(plan),
    }


def _values(found: Estimate) -> dict[str, Any]:
    memory = dataclasses.asdict(found.memory) | {"total": found.memory.total}
    return dataclasses.asdict(found) | {"memory": memory}


def _show_memory(estimates: Sequence[Estimate], layout: Layout, console: Console) -> None:
    unit, size = ("GiB", GIB) if max(found.memory.total for found in estimates) >= 10 * GIB else ("MiB", MIB)
    columns = ["ranks", *PARTS.values(), "total", "fits"]
    rows = [
        [
            str(found.num_ranks),
            *(_number(getattr(found.memory, part) / size) for part in PARTS),
            _number(found.memory.total / size),
            "yes" if found.fits else "no",
        ]
        for found in estimates
    ]
    _show(console, f"memory of a rank at its peak, {unit}: {layout.in_words()}", columns, rows)


def _show_steps(layout: Layout, estimates: Sequence[Estimate], console: Console) -> None:
    columns = [
        "ranks",
        "tasks per rank",
        "side by side",
        "memory",
        "fits",
        "host memory",
        "over the wire",
        "compute",
        "wire",
        "step",
        "tasks/s",
        "efficiency",
    ]
    first = estimates[0]
    rows = [
        [
            str(found.num_ranks),
            str(found.tasks_per_rank),
            str(found.micro_batch),
            _size(found.memory.total),
            "yes" if found.fits else "no",
            _size(found.host_bytes),
            _size(found.wire_bytes),
            _time(found.compute_s),
            _time(found.communication_s),
            _time(found.step_s),
            f"{found.tasks_per_s:.3g}",
            f"{found.tasks_per_s / first.tasks_per_s * first.num_ranks / found.num_ranks:.0%}",
        ]
        for found in estimates
    ]
    _show(console, f"an outer step: {layout.in_words()} ({_ways(estimates)})", columns, rows)


def _show(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table without the columns in which nothing stands."""
    kept = [index for index in range(len(columns)) if any(row[index] != "-" for row in rows)]
    console.table(title, [columns[index] for index in kept], [[row[index] for index in kept] for row in rows])


def _ways(estimates: Sequence[Estimate]) -> str:
    """By which way, and from how many ranks on by another."""
    parts = [estimates[0].way]
    for before, found in itertools.pairwise(estimates):
        if found.way != before.way:
            parts.append(f"from {_ranks(found.num_ranks)} on {found.way}")
    return "; ".join(parts)


def _alike(plan: Plan, unfit: Sequence[Estimate]) -> list[list[Estimate]]:
    """Those that do not fit, in runs of neighbours that the same settings would make fit."""

    def settings(found: Estimate) -> list[tuple[str, ...]]:
        return [remedy.settings for remedy in plan.misfits[found.num_ranks]]

    groups: list[list[Estimate]] = []
    for found in unfit:
        if groups and settings(groups[-1][-1]) == settings(found):
            groups[-1].append(found)
        else:
            groups.append([found])
    return groups


def _span(group: Sequence[Estimate]) -> str:
    first, last = group[0].num_ranks, group[-1].num_ranks
    return _ranks(first) if first == last else f"{first} to {last} ranks"


def _in_words(remedy: Remedy) -> str:
    found = remedy.estimate
    settings = " ".join(map(_quoted, remedy.settings))
    on = f" on {_ranks(found.num_ranks)}"
    return f"{settings}: {_size(found.memory.total)}, {_time(found.step_s)} per step{on}"


def _quoted(setting: str) -> str:
    """As it is typed in a shell."""
    return f"'{setting}'" if " " in setting else setting


def _largest_part(memory: Memory) -> str:
    return PARTS[max(PARTS, key=lambda part: float(getattr(memory, part)))]


def _ranks(number: int) -> str:
    return f"{number} rank{'' if number == 1 else 's'}"


def _number(amount: float) -> str:
    if amount == 0:
        return "-"
    return f"{amount:,.0f}" if amount >= 100 else f"{amount:.3g}"


def _size(num_bytes: float) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return "-" if num_bytes == 0 else f"{num_bytes:.0f} B"


def _time(seconds: float) -> str:
    if seconds == 0.0:
        return "-"
    if seconds < 1e-3:
        return f"{1e6 * seconds:.3g} us"
    return f"{1e3 * seconds:.3g} ms" if seconds < 1.0 else f"{seconds:.3g} s"
