"""Which setting would make fit what does not: found by trying settings in the model, one by one, then together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from metaloom.planning.estimate import Estimate, Layout, estimate
from metaloom.planning.facts import Facts
from metaloom.planning.hardware import Hardware
from metaloom.recipe import (
    AllSnapshots,
    AutoHypergradient,
    GPTModel,
    Recipe,
    StdlibData,
    UnrolledHypergradient,
)

# The recipe's facts under further key=value; None where that is no recipe.
Count = Callable[[tuple[str, ...]], Facts | None]
HEAD_CHUNK = 1024
NUM_SLOTS = 9


@dataclasses.dataclass(frozen=True)
class Remedy:
    """Settings under which it fits.

    Attributes:
        settings: as key=value for the command line; none where other ranks or another layout are all.
        layout: how the meta-parameters lie on the ranks then.
        estimate: what an outer step takes then.
    """

    settings: tuple[str, ...]
    layout: Layout
    estimate: Estimate


def remedies(
    recipe: Recipe, count: Count, hardware: Hardware, layout: Layout, num_ranks: int
) -> tuple[Remedy, ...]:
    """The settings that make the recipe fit on so many ranks: each that does so alone, the fastest first, or
    else the shortest series of them that does together; nothing where all of them do not.

    Args:
        count: gives the facts of the recipe with further settings.
    """
    candidates = _candidates(recipe, hardware)
    alone = [
        remedy
        for settings in candidates
        if (remedy := _tried(settings, count, hardware, layout, num_ranks)) is not None
    ]
    smaller = _smaller_micro_batch((), recipe, count, hardware, layout, num_ranks)
    if smaller is not None:
        alone.append(smaller)
    if alone:
        return tuple(sorted(alone, key=lambda remedy: remedy.estimate.step_s))
    together: tuple[str, ...] = ()
    for settings in candidates:
        if count((*together, *settings)) is None:
            continue
        together = (*together, *settings)
        found = _tried(together, count, hardware, layout, num_ranks)
        found = found or _smaller_micro_batch(together, recipe, count, hardware, layout, num_ranks)
        if found is not None:
            return (found,)
    return ()


def _candidates(recipe: Recipe, hardware: Hardware) -> list[tuple[str, ...]]:
    """Settings that take less memory and the recipe has not, the cheapest in time first."""
    found: list[tuple[str, ...]] = []
    estimator, memory = recipe.algorithm.hypergradient, recipe.memory
    if isinstance(recipe.data, StdlibData) and memory.head_chunk is None:
        if recipe.data.num_support * recipe.data.sequence_length > HEAD_CHUNK:
            found.append((f"memory.head_chunk={HEAD_CHUNK}",))
    if isinstance(estimator, UnrolledHypergradient | AutoHypergradient):
        found.append(("algorithm.hypergradient=rematerialized",))
    if isinstance(memory.snapshots, AllSnapshots):
        if hardware.device.has_host_memory:
            found.append(("memory.snapshots=host",))
        elif recipe.adaptation.num_steps > NUM_SLOTS:
            found.append((f"memory.snapshots={{kind: binomial, num_slots: {NUM_SLOTS}}}",))
    if isinstance(recipe.model, GPTModel) and not memory.recompute_blocks:
        found.append(("memory.recompute_blocks=true",))
    return found


def _tried(
    settings: tuple[str, ...], count: Count, hardware: Hardware, layout: Layout, num_ranks: int
) -> Remedy | None:
    """What comes of settings, where it fits."""
    facts = count(settings)
    if facts is None:
        return None
    found = estimate(facts, hardware, layout, num_ranks)
    return Remedy(settings, layout, found) if found.fits else None


def _smaller_micro_batch(
    settings: tuple[str, ...],
    recipe: Recipe,
    count: Count,
    hardware: Hardware,
    layout: Layout,
    num_ranks: int,
) -> Remedy | None:
    """The most tasks side by side that fit, under these settings; None where one does not."""
    facts = count(settings)
    if facts is None:
        return None
    largest = estimate(facts, hardware, layout, num_ranks).micro_batch
    low, best = 1, None
    while low < largest:  # memory grows with T
        middle = (low + largest) // 2
        smaller = dataclasses.replace(facts, micro_batch=middle)
        found = estimate(smaller, hardware, layout, num_ranks)
        if found.fits:
            best = Remedy((*settings, f"outer.micro_batch={middle}"), layout, found)
            low = middle + 1
        else:
            largest = middle
    return best


def first_fitting(
    facts: Facts, hardware: Hardware, layout: Layout, numbers: Sequence[int]
) -> Estimate | None:
    """The estimate of the smallest of the numbers of ranks on which it fits."""
    for num_ranks in numbers:
        found = estimate(facts, hardware, layout, num_ranks)
        if found.fits:
            return found
    return None
