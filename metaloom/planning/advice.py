"""Which setting would make fit what does not: found by trying settings, one by one, then together."""

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
    UnrolledHypergradient,
)
from metaloom.recipe.schema import maml_of
from metaloom.recipe.tasks import num_inputs, task_facts

# The recipe's facts under further key=value; None where that is no recipe, or cannot be computed.
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
    """The settings that make the recipe fit on so many ranks; nothing where all of them do not.

    First the micro-batch alone, which costs nothing but what is side by side; else each other setting that
    does so alone, with the micro-batch that then fits, the fastest first; else several of them together, of
    which none can be left out.

    Args:
        count: gives the facts of the recipe with further settings; asked as little as that takes.
    """

    def tried(settings: tuple[str, ...]) -> Remedy | None:
        facts = count(settings)
        return None if facts is None else _fitting(facts, settings, hardware, layout, num_ranks)

    smaller = tried(())
    if smaller is not None:
        return (smaller,)
    candidates = settings_to_try(recipe, hardware)
    alone = [remedy for settings in candidates if (remedy := tried(settings)) is not None]
    if alone:
        return tuple(sorted(alone, key=lambda remedy: remedy.estimate.step_s))
    together: tuple[str, ...] = ()
    for settings in candidates:
        if count((*together, *settings)) is None:
            continue  # two settings that exclude each other
        together = (*together, *settings)
        found = tried(together)
        if found is not None:
            return (_without_idle(found, together, tried),)
    return ()


def _without_idle(
    found: Remedy, together: tuple[str, ...], tried: Callable[[tuple[str, ...]], Remedy | None]
) -> Remedy:
    """The remedy without the settings that it does without, the dearest in time left out first. The last
    stays: what came before it was not enough."""
    for setting in reversed(together[:-1]):
        fewer = tuple(other for other in together if other != setting)
        without = tried(fewer)
        if without is not None:
            found, together = without, fewer
    return found


def settings_to_try(recipe: Recipe, hardware: Hardware) -> list[tuple[str, ...]]:
    """Settings that take less memory and the recipe has not, the cheapest in time first."""
    found: list[tuple[str, ...]] = []
    estimator, memory = maml_of(recipe).hypergradient, recipe.memory
    num_tokens = _tokens_of_a_support_set(recipe)
    if num_tokens > HEAD_CHUNK and memory.head_chunk is None:
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


def _tokens_of_a_support_set(recipe: Recipe) -> int:
    """Tokens whose logits exist at a time; 0 where a model says one thing of a sample."""
    facts = task_facts(recipe)
    is_modelled = facts.objective == "language_modelling"
    return facts.num_support * num_inputs(facts.inputs) if is_modelled else 0


def _fitting(
    facts: Facts, settings: tuple[str, ...], hardware: Hardware, layout: Layout, num_ranks: int
) -> Remedy | None:
    """With these settings, and with the most tasks side by side that fit; None where one task does not."""
    as_it_is = estimate(facts, hardware, layout, num_ranks)
    if as_it_is.fits:
        return Remedy(settings, layout, as_it_is)
    best = None
    low, high = 1, as_it_is.micro_batch - 1
    while low <= high:  # memory grows with T
        middle = (low + high) // 2
        found = estimate(dataclasses.replace(facts, micro_batch=middle), hardware, layout, num_ranks)
        if found.fits:
            best = Remedy((*settings, f"outer.micro_batch={middle}"), layout, found)
            low = middle + 1
        else:
            high = middle - 1
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
