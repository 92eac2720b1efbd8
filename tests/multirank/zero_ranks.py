"""What ranks under DeepSpeed do, for `test_deepspeed_zero.py`: `python -m tests.multirank.zero_ranks FOLDER`.

One process imports DeepSpeed and then forks the ranks of each play, since an import takes seconds on every rank.
Every rank leaves what it saw in FOLDER/<play>-<rank>.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from metaloom.checkpoints import Checkpoint, CheckpointStore
from metaloom.engine.combiners.mean import Mean
from metaloom.engine.hypergradients.base import MetaGradient
from metaloom.engine.outer import OuterOptimizer, OuterSettings
from metaloom.engine.sharding.base import Sharding
from metaloom.engine.sharding.deepspeed_zero import DeepSpeedZero, ZeroSettings
from metaloom.engine.sharding.replicated import Replicated

NUM_TASKS, NUM_STEPS, BAD_STEP, SAVED_AT = 6, 8, 3, 5
# Sizes that nothing divides; a scalar and a group of two elements, fewer than ranks.
SHAPES = {
    "init.weight": (5, 3),
    "init.bias": (7,),
    "backbone.w": (2, 3, 3),
    "rates.shared": (),
    "loss.log_temperature": (1,),
}
ADAM = OuterSettings(
    optimizer="adam",
    lr=0.05,
    lr_rates=0.2,
    lr_loss=0.2,
    betas=(0.9, 0.95),
    eps=1e-8,
    weight_decay=0.3,
    num_steps=NUM_STEPS,
    warmup_steps=2,
    decay="cosine",
    final_ratio=0.1,
    clip_norm=1.5,
    ema=0.9,
)
SETTINGS = {
    "adam": ADAM,
    "sgd": dataclasses.replace(ADAM, optimizer="sgd", weight_decay=0.1, clip_norm=None, ema=None),
}
CONFIGURATIONS = {
    "stage 1": ZeroSettings(1),
    "stage 2": ZeroSettings(2),
    # Buckets smaller than parameters, reduced to each owner by itself.
    "small buckets": ZeroSettings(
        2, extra={"zero_optimization": {"reduce_bucket_size": 8, "use_multi_rank_bucket_allreduce": False}}
    ),
    "stage 1, offloaded": ZeroSettings(1, offload_optimizer=True),
    "stage 2, offloaded": ZeroSettings(2, offload_optimizer=True),
}


@dataclasses.dataclass(frozen=True)
class Play:
    """One training, or a part of one.

    Attributes:
        optimizer: of `SETTINGS`.
        first: the step to start from: 0, or the checkpoint of `SAVED_AT`.
        last: the step to end before.
    """

    optimizer: str
    first: int = 0
    last: int = NUM_STEPS


def draws(*key: int) -> dict[str, Tensor]:
    """Tensors of the meta-parameters' shapes, as a function of the key."""
    generator = torch.Generator().manual_seed(hash(key) % 2**31)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def meta_gradient(meta: Mapping[str, Tensor], step: int, task: int) -> MetaGradient:
    """That of `sum(curvature * (theta - target)^2) / 2`, where curvature and target are the task's own."""
    target, curvature = draws(step, task, 0), draws(step, task, 1)
    losses, gradient = torch.zeros(1), {}
    for name, value in meta.items():
        difference = value - target[name]
        losses += 0.5 * (curvature[name].square() * difference.square()).sum()
        gradient[name] = curvature[name].square() * difference
    if (step, task) == (BAD_STEP, NUM_TASKS - 1):
        gradient["init.bias"][4] = math.nan
    return MetaGradient(gradient, losses, {})


def train(sharding: Sharding, play: Play, store: CheckpointStore | None) -> dict[str, Any]:
    """Plays, each rank its share of the tasks; returns the curve and where it ended."""
    outer = OuterOptimizer(draws(99), SETTINGS[play.optimizer], sharding)
    if play.first > 0:
        assert store is not None
        checkpoint = store.load(play.first)
        outer.load(checkpoint.tensors, checkpoint.scalars)
    combiner = Mean(outer.meta, sharding, metric_names=())
    curve = []
    for step in range(play.first, play.last):
        for task in range(sharding.rank, NUM_TASKS, sharding.world_size):
            combiner.add(meta_gradient(outer.meta, step, task))
        combined = combiner.combine(NUM_TASKS)
        curve.append(combined.metrics | outer.update(combined.gradient))
    tensors = outer.tensors()
    if store is not None and play.last == SAVED_AT:
        store.save(Checkpoint(play.last, tensors, outer.scalars()))
    return {
        "curve": curve,
        "tensors": {name: value.tolist() for name, value in tensors.items()},
        "average": {name: value.tolist() for name, value in outer.evaluation_parameters().items()},
    }


def rank_main(rank: int, folder: Path, world_size: int, act: str) -> None:
    """One rank of an act."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    warnings.simplefilter("error")
    # DeepSpeed calls torch by a name that newer releases give up.
    warnings.filterwarnings("ignore", r".torch\.distributed\.all_gather_into_tensor. is deprecated", FutureWarning)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{act}-meeting",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    done = ACTS[act](folder)
    (folder / f"{act}-{rank}.json").write_text(json.dumps(done), encoding="utf-8")
    dist.destroy_process_group()


def zero(configuration: str) -> DeepSpeedZero:
    return DeepSpeedZero(CONFIGURATIONS[configuration], torch.device("cpu"))


def whole(folder: Path) -> dict[str, Any]:
    """Whole trainings under every configuration, and the first part of one that others go on from."""
    world_size = dist.get_world_size()
    done: dict[str, Any] = {
        f"{optimizer}, {name}": train(zero(name), Play(optimizer), None)
        for name in CONFIGURATIONS
        for optimizer in SETTINGS
    }
    for optimizer in SETTINGS:
        store = CheckpointStore(folder / f"{optimizer}-{world_size}")
        done[f"{optimizer}, first part"] = train(zero("stage 2"), Play(optimizer, last=SAVED_AT), store)
    sharding = zero("stage 2")
    outer = OuterOptimizer(draws(99), ADAM, sharding)
    combiner = Mean(outer.meta, sharding, metric_names=())
    combiner.add(meta_gradient(outer.meta, 0, sharding.rank))
    outer.update(combiner.combine(world_size).gradient)
    engine = outer._optimizer._engine  # type: ignore[attr-defined]
    done["held"] = {
        "states": sum(
            entry.numel() for state in engine.basic_optimizer.state.values() for entry in state.values()
        ),
        "stage": engine.zero_optimization_stage(),
        "clipping": engine.gradient_clipping(),
        "description": sharding.describe(),
    }
    return done


def going_on(folder: Path) -> dict[str, Any]:
    """The second part of trainings that other numbers of ranks, and other backends, have begun."""
    done: dict[str, Any] = {}
    for optimizer in SETTINGS:
        for begun in sorted(folder.glob(f"{optimizer}-*")):
            for name in ("stage 1", "stage 2", "stage 2, offloaded"):
                key = f"{begun.name} by {name}"
                done[key] = train(zero(name), Play(optimizer, first=SAVED_AT), CheckpointStore(begun))
    return done


ACTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    f"{act.__name__}-{world_size}": act for act in (whole, going_on) for world_size in (1, 2, 4)
}


def main(folder: Path) -> None:
    """Plays all acts; each is one group of processes."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed
        from deepspeed.runtime.zero.muon import muon_optimizer  # which DeepSpeed imports in its first step

    assert deepspeed and muon_optimizer
    for optimizer in SETTINGS:
        store = CheckpointStore(folder / f"{optimizer}-replicated")
        train(Replicated(), Play(optimizer, last=SAVED_AT), store)
    for act in ACTS:
        world_size = int(act.rpartition("-")[2])
        multiprocessing.start_processes(
            rank_main, (folder, world_size, act), nprocs=world_size, start_method="fork"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
