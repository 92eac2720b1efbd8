"""Which settings are tried, in which order, and what is said of them; on facts made by hand."""

from __future__ import annotations

import dataclasses

import pytest

from metaloom.planning.advice import Count, first_fitting, remedies
from metaloom.planning.estimate import Layout, estimate
from metaloom.planning.facts import Amounts, Facts, Sizes, Way, sampled
from metaloom.planning.hardware import Hardware
from metaloom.recipe import Recipe, recipe_from_dict
from tests.unit.test_planning_estimate import HARDWARE, some_facts

REPLICATED = Layout("replicated")
HEAD, REMATERIALIZED, HOST, RECOMPUTED = (
    "memory.head_chunk=1024",
    "algorithm.hypergradient=rematerialized",
    "memory.snapshots=host",
    "memory.recompute_blocks=true",
)


def recipe() -> Recipe:
    return recipe_from_dict(
        {
            "name": "advised",
            "model": {"kind": "gpt", "context_length": 1024},
            "data": {"kind": "documents", "url": "none", "num_support": 2, "sequence_length": 1024},
            "adaptation": {"fast": "lora", "rule": {"kind": "sgd", "lr": 0.1}, "num_steps": 12},
            "algorithm": {"hypergradient": "unrolled"},
            "outer": {"num_steps": 10, "tasks_per_step": 4},
        },
        source="test",
    )


def taking(bytes_per_task: float) -> Facts:
    """A task takes so much, and nothing else takes anything."""
    amounts = sampled(
        ((1, 2), (1,), (1,), (1,)), lambda point: Amounts(bytes_per_task * point.tasks, flops=1.0)
    )
    return some_facts(
        tasks_per_step=4,
        ways=(Way("loop", "unrolled", False, amounts),),
        update=Amounts(),
        own=Sizes(),
        backbone=Sizes(weights=64.0),
    )


def with_room(num_bytes: float) -> Hardware:
    """A device with so much for what a micro-batch takes."""
    held = estimate(taking(0.0), HARDWARE, REPLICATED, 1).memory.total
    return dataclasses.replace(
        HARDWARE, device=dataclasses.replace(HARDWARE.device, memory_bytes=held + num_bytes)
    )


def counting(bytes_of: dict[frozenset[str], float], asked: list[tuple[str, ...]]) -> Count:
    """Facts by settings; what is not listed takes 100 bytes per task."""

    def count(settings: tuple[str, ...]) -> Facts | None:
        asked.append(settings)
        return taking(bytes_of.get(frozenset(settings), 100.0))

    return count


def test_a_smaller_micro_batch_is_enough_where_it_fits_and_is_as_large_as_can_be() -> None:
    asked: list[tuple[str, ...]] = []
    (found,) = remedies(recipe(), counting({}, asked), with_room(350.0), REPLICATED, 1)
    assert found.settings == ("outer.micro_batch=3",)
    assert found.estimate.fits
    assert asked == [()]  # nothing else was counted for it


def test_each_setting_that_does_it_alone_is_told_with_the_micro_batch_that_then_fits() -> None:
    bytes_of = {frozenset({REMATERIALIZED}): 10.0, frozenset({RECOMPUTED}): 30.0}
    found = remedies(recipe(), counting(bytes_of, []), with_room(70.0), REPLICATED, 1)
    assert {remedy.settings for remedy in found} == {
        (REMATERIALIZED,),
        (RECOMPUTED, "outer.micro_batch=2"),
    }
    times = [remedy.estimate.step_s for remedy in found]
    assert times == sorted(times)


def test_settings_are_taken_together_where_none_does_it_alone() -> None:
    together = frozenset({HEAD, REMATERIALIZED, HOST})
    (found,) = remedies(recipe(), counting({together: 5.0}, []), with_room(20.0), REPLICATED, 1)
    assert found.settings == (HEAD, REMATERIALIZED, HOST)


def test_of_settings_that_fit_together_those_that_do_nothing_are_not_told() -> None:
    def count(settings: tuple[str, ...]) -> Facts:
        return taking(5.0 if {HEAD, HOST} <= set(settings) else 100.0)

    (found,) = remedies(recipe(), count, with_room(20.0), REPLICATED, 1)
    assert found.settings == (HEAD, HOST)


def test_settings_that_exclude_each_other_are_not_taken_together() -> None:
    def count(settings: tuple[str, ...]) -> Facts | None:
        if {REMATERIALIZED, HOST} <= set(settings):
            return None
        return taking(5.0 if RECOMPUTED in settings and HEAD in settings else 100.0)

    (found,) = remedies(recipe(), count, with_room(20.0), REPLICATED, 1)
    assert found.settings == (HEAD, RECOMPUTED)


def test_nothing_is_told_where_no_setting_helps() -> None:
    assert remedies(recipe(), counting({}, []), with_room(20.0), REPLICATED, 1) == ()


def test_on_a_cpu_snapshots_have_no_host_to_go_to() -> None:
    asked: list[tuple[str, ...]] = []
    room = with_room(20.0)
    cpu = dataclasses.replace(room, device=dataclasses.replace(room.device, has_host_memory=False))
    remedies(recipe(), counting({}, asked), cpu, REPLICATED, 1)
    assert all(HOST not in settings for settings in asked)
    assert ("memory.snapshots={kind: binomial, num_slots: 9}",) in asked


@pytest.mark.parametrize(("room", "expected"), [(400.0, 1), (200.0, 2), (100.0, 4), (90.0, None)])
def test_the_fewest_ranks_on_which_it_fits_are_found(room: float, expected: int | None) -> None:
    found = first_fitting(taking(100.0), with_room(room), REPLICATED, (1, 2, 4, 8))
    assert (None if found is None else found.num_ranks) == expected
