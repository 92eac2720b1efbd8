"""Rules about memory, number formats, shards and hosts."""

import re

from metaloom.credentials import without_credentials
from metaloom.engine.sharding.deepspeed_config import refused_keys
from metaloom.recipe.adaptation import (
    PartFast,
    WholeFast,
    shares_passes,
)
from metaloom.recipe.algorithm import MAMLAlgorithm
from metaloom.recipe.machine import (
    DeepSpeedZeroSharding,
    ShardedSharding,
)
from metaloom.recipe.model import GPTModel
from metaloom.recipe.rules.algorithm import SWEEPS
from metaloom.recipe.rules.base import Broken, Rule, of_maml
from metaloom.recipe.schema import Recipe


@of_maml
def snapshots_have_a_use(recipe: Recipe, maml: MAMLAlgorithm) -> Broken:
    kept, estimator = recipe.memory.snapshots.kind, maml.hypergradient.kind
    if kept != "all" and estimator not in SWEEPS:
        yield (
            "memory.snapshots.kind",
            f"{kept}; has no effect, since algorithm.hypergradient = {estimator} does not go back over the "
            f"inner steps one by one, as {', '.join(SWEEPS)} do; set it to all",
        )


def vmap_recomputes_nothing(recipe: Recipe) -> Broken:
    fast = recipe.adaptation.fast
    if not (isinstance(fast, WholeFast) and fast.tasks == "vmap"):
        return
    asked = [name for name in ("recompute_blocks", "head_chunk") if getattr(recipe.memory, name)]
    for name in asked:
        yield (
            f"memory.{name}",
            f"{getattr(recipe.memory, name)}; adaptation.fast.tasks = vmap recomputes nothing; set that to "
            "loop",
        )
    if isinstance(recipe.model, GPTModel) and recipe.model.dropout > 0.0:
        yield (
            "model.dropout",
            f"{recipe.model.dropout}; is not drawn under adaptation.fast.tasks = vmap; set that to loop",
        )


def zero_has_two_stages(recipe: Recipe) -> Broken:
    sharding = recipe.sharding
    if isinstance(sharding, DeepSpeedZeroSharding) and sharding.stage == 3:
        yield (
            "sharding.stage",
            "3; shards the weights too, and DeepSpeed gathers them in hooks that autograd does not see: "
            "no hypergradient passes through them; set it to 2, or sharding.kind to sharded",
        )


def zero_keeps_float32(recipe: Recipe) -> Broken:
    if isinstance(recipe.sharding, DeepSpeedZeroSharding) and recipe.precision.compute == "float64":
        yield (
            "precision.compute",
            "float64; DeepSpeed keeps optimizer states and master weights in float32, and would round to it; "
            "set it to float32, or sharding.kind to replicated",
        )


def extra_keys_are_left_open(recipe: Recipe) -> Broken:
    if isinstance(recipe.sharding, DeepSpeedZeroSharding):
        for key, reason in refused_keys(recipe.sharding.extra):
            yield f"sharding.extra.{key}", f"is refused, since {reason}; leave it out"


def shards_divide_the_ranks(recipe: Recipe) -> Broken:
    sharding, launcher = recipe.sharding, recipe.launcher
    size = sharding.shard_size if isinstance(sharding, ShardedSharding) else None
    num_hosts = 1 if launcher.hosts is None else launcher.hosts.num_hosts
    if size is not None and num_hosts * launcher.num_processes % size:
        of_hosts = "" if launcher.hosts is None else f" on each of {num_hosts} hosts"
        yield (
            "sharding.shard_size",
            f"{size}; must divide the number of ranks, launcher.num_processes = {launcher.num_processes}"
            f"{of_hosts}",
        )


def shards_are_of_a_shared_backbone(recipe: Recipe) -> Broken:
    if isinstance(recipe.sharding, ShardedSharding) and isinstance(recipe.adaptation.fast, WholeFast):
        yield (
            "sharding.kind",
            "sharded divides the weights that tasks share, and with adaptation.fast.kind = "
            f"{recipe.adaptation.fast.kind} every task has a whole copy of all weights; set sharding.kind to "
            "replicated, or adaptation.fast to lora",
        )


def shards_are_gathered_for_all_tasks(recipe: Recipe) -> Broken:
    fast = recipe.adaptation.fast
    if (
        isinstance(recipe.sharding, ShardedSharding)
        and isinstance(fast, PartFast)
        and not shares_passes(fast)
    ):
        yield (
            "adaptation.fast.tasks",
            f"{fast.tasks}; sharding.kind = sharded gathers every weight for each pass, and this would be "
            "one for each task; set it to together, or sharding.kind to replicated",
        )


def shards_are_gathered_again(recipe: Recipe) -> Broken:
    if isinstance(recipe.sharding, ShardedSharding) and not recipe.memory.recompute_blocks:
        yield (
            "memory.recompute_blocks",
            "false; with sharding.kind = sharded a block is computed again when it is differentiated, or its "
            "whole weights would be kept until then; set it to true, or sharding.kind to replicated",
        )


def fewer_hosts_are_not_more(recipe: Recipe) -> Broken:
    hosts = recipe.launcher.hosts
    if hosts is not None and hosts.min_hosts is not None and hosts.min_hosts > hosts.num_hosts:
        yield (
            "launcher.hosts.min_hosts",
            f"{hosts.min_hosts}; must be at most launcher.hosts.num_hosts = {hosts.num_hosts}",
        )


def own_folders_hold_no_checkpoints(recipe: Recipe) -> Broken:
    hosts = recipe.launcher.hosts
    if hosts is not None and hosts.own_folders and recipe.checkpoint.url is None:
        yield (
            "launcher.hosts.own_folders",
            "true; checkpoints would lie in the run folder of one host, where the others cannot read them; "
            "say with checkpoint.url where all can, or set it to false",
        )


def hosts_meet_at_one_of_them(recipe: Recipe) -> Broken:
    hosts = recipe.launcher.hosts
    if hosts is None:
        return
    path, shown = "launcher.hosts.endpoint", repr(without_credentials(hosts.endpoint))
    host, _, port = hosts.endpoint.rpartition(":")
    if not re.fullmatch(r"\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+", host) or not re.fullmatch("[0-9]+", port):
        yield path, f"{shown}; must be host:port, for example node-0:29400"
    elif not 1 <= int(port) <= 65535:
        yield path, f"{shown}; the port must be from 1 to 65535, for example 29400"
    elif host in ("0.0.0.0", "[::]", "localhost"):
        yield path, f"{shown}; is another machine on each host; name one that all of them reach"


def a_notice_can_be_found(recipe: Recipe) -> Broken:
    notice = recipe.launcher.notice
    if notice is None:
        return
    if notice.file is None and notice.url is None:
        yield "launcher.notice", "names neither a file nor a url to look at; give one, or set it to null"
    for name in ("pattern", "header"):
        if notice.url is None and getattr(notice, name) is not None:
            yield f"launcher.notice.{name}", "has no effect without launcher.notice.url; give that"
    if notice.url is not None and not re.match(r"https?://", notice.url):
        yield "launcher.notice.url", f"{without_credentials(notice.url)!r}; must be an http or https URL"
    if notice.header is not None and ":" not in notice.header:
        yield "launcher.notice.header", "must be 'Name: value', for example 'Metadata-Flavor: Google'"
    if notice.pattern is not None:
        try:
            re.compile(notice.pattern)
        except re.error as error:
            yield "launcher.notice.pattern", f"{notice.pattern!r}; is no regular expression: {error}"


RULES: tuple[Rule, ...] = (
    snapshots_have_a_use,
    vmap_recomputes_nothing,
    zero_has_two_stages,
    zero_keeps_float32,
    extra_keys_are_left_open,
    shards_divide_the_ranks,
    shards_are_of_a_shared_backbone,
    shards_are_gathered_for_all_tasks,
    shards_are_gathered_again,
    fewer_hosts_are_not_more,
    own_folders_hold_no_checkpoints,
    hosts_meet_at_one_of_them,
    a_notice_can_be_found,
)
