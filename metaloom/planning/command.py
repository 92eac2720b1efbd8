"""Makes and prints a plan."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from metaloom.errors import CapabilityError, MetaloomError, RecipeError
from metaloom.planning.advice import Remedy, first_fitting, remedies, settings_to_try
from metaloom.planning.counting import IMPOSSIBLE, count
from metaloom.planning.estimate import Layout, estimate
from metaloom.planning.facts import Facts
from metaloom.planning.hardware import HERE, Hardware, device_named, link_named
from metaloom.planning.here import measured_device
from metaloom.planning.report import Plan, as_json, show
from metaloom.planning.request import DEVICES_PER_NODE, Request
from metaloom.planning.sample import calibrated
from metaloom.recipe import (
    DeepSpeedZeroSharding,
    HostSnapshots,
    MLflowTracking,
    Recipe,
    ReplicatedSharding,
    ShardedSharding,
    WholeFast,
    load_recipe,
)
from metaloom.recipe.rules import broken_rules
from metaloom.tracking.console import make_console

RECOMPUTED = "memory.recompute_blocks=true"
WHOLE_IN_SHARDS = "since each task has a whole copy of all weights (adaptation.fast: {})"


def main() -> int:
    """Prints the plan that the arguments ask for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m metaloom.planning")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("request", help="a Request as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        values = json.loads(arguments.request)
        request = Request(**values | {"ranks": tuple(values["ranks"])})
        plan = make_plan(arguments.recipe, request, say=_say)
    except MetaloomError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if request.as_json:
        print(json.dumps(as_json(plan), indent=2))
    else:
        show(plan, make_console())
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def make_plan(path: Path, request: Request, *, say: Callable[[str], None]) -> Plan:
    """The plan of a recipe.

    Args:
        path: of the recipe's file.
        say: told what is being done.

    Raises:
        RecipeError: the file is no recipe.
        CapabilityError: the recipe cannot be computed, or not on such hardware.
    """
    recipe = load_recipe(path)
    hardware = _hardware(recipe, request, say)
    if isinstance(recipe.memory.snapshots, HostSnapshots) and not hardware.device.has_host_memory:
        raise CapabilityError(
            f"memory.snapshots: host, and {hardware.device.name} has no memory but the host's; choose all or "
            "binomial, or hardware with a memory of its own."
        )
    on_gpu = hardware.device.is_asynchronous
    in_shards = isinstance(recipe.sharding, ShardedSharding)
    own = _layout(recipe)
    numbers = tuple(number for number in request.ranks if own.takes(number))
    if not numbers:
        raise CapabilityError(
            f"sharding.shard_size is {own.shard_size}, and divides none of the numbers of ranks, "
            f"{', '.join(map(str, request.ranks))}; ask for multiples of it (--ranks {own.shard_size}), or "
            "change it."
        )

    @functools.cache
    def counted(settings: tuple[str, ...]) -> Facts | None:
        try:
            changed = load_recipe(path, settings)
        except RecipeError:
            return None
        what = f" with {' '.join(settings)}" if settings else ""
        say(f"counting an outer step of {recipe.name}{what}, on tensors without data ...")
        try:
            return count(changed, with_shards=in_shards, on_gpu=on_gpu)
        except IMPOSSIBLE:
            if not settings:
                raise
            return None

    facts = counted(())
    assert facts is not None, "the recipe was loaded"
    if request.hardware == HERE:
        hardware, text = calibrated(recipe, facts, hardware)
        say(text)
    estimates = {own: [estimate(facts, hardware, own, number) for number in numbers]}
    refused: dict[Layout, str] = {}
    misfits: dict[int, tuple[Remedy, ...]] = {}
    elsewhere: list[Remedy] = []
    unfit = [found for found in estimates[own] if not found.fits]
    for found in unfit:  # what is counted for one number of ranks serves all
        misfits[found.num_ranks] = remedies(recipe, counted, hardware, own, found.num_ranks)
    for layout in _others(own):
        changed = _under(recipe, layout)
        why = _refusal(changed)
        if why:
            refused[layout] = why
            continue
        if layout.kind == "sharded":
            if not request.compare and all(misfits.values()):
                continue  # it fits without
            say(f"counting {recipe.name} with its backbone in shards ...")
            settings = () if recipe.memory.recompute_blocks else (RECOMPUTED,)
            facts_there = count(changed, with_shards=True, on_gpu=on_gpu)
        else:
            settings, facts_there = (), facts
        estimates[layout] = [estimate(facts_there, hardware, layout, number) for number in request.ranks]
        if not all(misfits.values()):
            fitting = first_fitting(facts_there, hardware, layout, request.ranks)
            if fitting is not None:
                named = (*settings, f"sharding={layout.kind}")
                elsewhere.append(Remedy(named, layout, fitting))
    left_out = tuple(number for number in request.ranks if number not in numbers)
    tried = [setting for settings in settings_to_try(recipe, hardware) for setting in settings]
    is_here = request.hardware == HERE
    return Plan(
        recipe.name, facts, hardware, is_here, estimates, left_out, refused, misfits, tried, elsewhere
    )


def _layout(recipe: Recipe) -> Layout:
    """The recipe's own."""
    match recipe.sharding:
        case ShardedSharding(shard_size=shard_size):
            return Layout("sharded", shard_size)
        case DeepSpeedZeroSharding(stage=stage, offload_optimizer=offload_optimizer):
            return Layout("deepspeed_zero", stage=stage, offload_optimizer=offload_optimizer)
        case ReplicatedSharding():
            return Layout("replicated")


def _under(recipe: Recipe, layout: Layout) -> Recipe:
    """The recipe under another layout than its own, at that backend's defaults."""
    match layout.kind:
        case "sharded":
            memory = recipe.memory.model_copy(update={"recompute_blocks": True})
            return recipe.model_copy(update={"sharding": ShardedSharding(), "memory": memory})
        case "deepspeed_zero":
            return recipe.model_copy(update={"sharding": DeepSpeedZeroSharding()})
        case "replicated":
            return recipe.model_copy(update={"sharding": ReplicatedSharding()})


def _refusal(recipe: Recipe) -> str:
    """Why a recipe is none; empty where it is one."""
    if isinstance(recipe.sharding, ShardedSharding) and isinstance(recipe.adaptation.fast, WholeFast):
        return WHOLE_IN_SHARDS.format(recipe.adaptation.fast.kind)
    return "; ".join(f"{path}: {text}" for path, text in broken_rules(recipe))


def _others(own: Layout) -> list[Layout]:
    layouts = (Layout("replicated"), Layout("sharded"), Layout("deepspeed_zero", stage=2))
    return [layout for layout in layouts if layout.kind != own.kind]


def _hardware(recipe: Recipe, request: Request, say: Callable[[str], None]) -> Hardware:
    link = link_named(request.link)
    if request.hardware != HERE:
        return Hardware(device_named(request.hardware), link, request.devices_per_node or DEVICES_PER_NODE)
    num_local = request.devices_per_node or recipe.launcher.num_processes
    say("measuring this machine ...")
    torch.set_num_threads(recipe.launcher.threads_per_process)
    device = measured_device(
        recipe.precision.compute,
        num_local_ranks=num_local,
        is_tracked=isinstance(recipe.tracking, MLflowTracking),
    )
    return Hardware(device, link, num_local)
