"""Trainings under DeepSpeed for `test_deepspeed_zero.py`, as functions that ranks run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from metaloom.checkpoints.store import Checkpoint, CheckpointStore
from metaloom.engine.combiners.mean import Mean
from metaloom.engine.hypergradients.base import MetaGradient
from metaloom.engine.outer import OuterOptimizer, OuterSettings
from metaloom.engine.sharding.base import Sharding
from metaloom.engine.sharding.deepspeed_zero import DeepSpeedZero, ZeroSettings
from metaloom.engine.sharding.replicated import Replicated
from metaloom.errors import MetaloomError

NUM_TASKS, NUM_STEPS, SAVED_AT = 6, 8, 5
BAD_STEPS = (3, 4)  # two in a row: what is left of the first must not get into what follows the second
# Sizes that nothing divides; the group of the last two has two elements, fewer than four ranks.
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
class Training:
    """A training, or a part of one.

    Attributes:
        optimizer: of `SETTINGS`.
        sharding: `replicated`, or one of `CONFIGURATIONS`.
        first: the step to start from.
        last: the step to end before.
        loaded: the folder of the checkpoint to start from, where that is not step 0.
        saved: the folder of the checkpoint that is left at the end, or None.
    """

    optimizer: str
    sharding: str
    first: int = 0
    last: int = NUM_STEPS
    loaded: Path | None = None
    saved: Path | None = None


class DeepSpeedImported:
    """What ranks get among their arguments: it is made before they are forked, and DeepSpeed imported then,
    once for all of them."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _imported, ()


def _imported() -> DeepSpeedImported:
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (which it imports in its first step)
    return DeepSpeedImported()


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
    if step in BAD_STEPS and task == NUM_TASKS - 1:
        gradient["init.bias"][4] = math.nan
    return MetaGradient(gradient, losses, {})


def train(training: Training) -> dict[str, Any]:
    """Trains, this rank with its share of the tasks; returns the curve and where it ended."""
    if training.sharding == "replicated":
        sharding: Sharding = Replicated()
    else:
        sharding = DeepSpeedZero(CONFIGURATIONS[training.sharding], torch.device("cpu"))
    outer = OuterOptimizer(draws(99), SETTINGS[training.optimizer], sharding)
    if training.loaded is not None:
        checkpoint = CheckpointStore(training.loaded).load(training.first)
        outer.load(checkpoint.tensors, checkpoint.scalars)
    combiner = Mean(outer.meta, sharding, metric_names=())
    curve = []
    for step in range(training.first, training.last):
        for task in range(sharding.rank, NUM_TASKS, sharding.world_size):
            combiner.add(meta_gradient(outer.meta, step, task))
        combined = combiner.combine(NUM_TASKS)
        curve.append(combined.metrics | outer.update(combined.gradient))
    share = {name: value.numel() for name, value in combined.gradient.items()}
    tensors = outer.tensors()
    if training.saved is not None:
        CheckpointStore(training.saved).save(Checkpoint(training.last, tensors, outer.scalars()))
    return {
        "curve": curve,
        "tensors": {name: value.clone() for name, value in tensors.items()},
        "share": share,
        "first_moments": first_moments(outer),
        "description": sharding.describe() if isinstance(sharding, DeepSpeedZero) else "replicated",
        "average": {name: value.clone() for name, value in outer.evaluation_parameters().items()},
    }


def first_moments(outer: OuterOptimizer) -> int:
    """Elements of Adam's first moment that this rank has in memory."""
    optimizer: Any = outer._optimizer
    held = optimizer._optimizer.state.values()
    return sum(state["exp_avg"].numel() for state in held if "exp_avg" in state)


def become_a_rank_for_deepspeed() -> None:
    """What the worker does, and a filter for a warning of DeepSpeed's."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    # It calls torch by a name that newer releases give up.
    warnings.filterwarnings(
        "ignore", r".torch\.distributed\.all_gather_into_tensor. is deprecated", FutureWarning
    )


@dataclasses.dataclass(frozen=True)
class Findings:
    """What DeepSpeed itself says of configurations.

    Attributes:
        read: by stage, what it makes of the one that it is given, by attribute.
        zero: likewise of the ZeRO section, by key.
        zero_keys: of that section.
        refusals: why some extra keys are refused, by key.
        floats: why meta-parameters of float64 are refused.
        device: why a device is refused on which DeepSpeed does not compute.
        disagreement: what an update says where DeepSpeed did not make its step.
        offloaded: what the line on the console says of states in the host's memory.
    """

    read: dict[int, dict[str, Any]]
    zero: dict[int, dict[str, Any]]
    zero_keys: set[str]
    refusals: dict[str, str]
    floats: str
    device: str
    disagreement: str
    offloaded: str


EXTRA: dict[str, dict[str, Any]] = {
    "unknown": {"wal_clock_breakdown": True},
    "unknown in ZeRO": {"zero_optimization": {"reduce_bucket": 5}},
    "as it is": {"wall_clock_breakdown": False},
    "of the wrong type": {"zero_optimization": {"overlap_comm": "perhaps"}},
    "removed": {"elasticity": {"enabled": True}},
    "decided": {"gradient_clipping": 1.0},
    "good": {"zero_optimization": {"overlap_comm": True}, "comms_logger": {"enabled": True}},
}


def train_and_ask(
    trainings: list[Training], _: DeepSpeedImported
) -> tuple[list[dict[str, Any]], Findings | None]:
    """What each training returns, on this rank; and findings, where it is the only one."""
    become_a_rank_for_deepspeed()
    done = [train(training) for training in trainings]
    return done, ask_deepspeed() if dist.get_world_size() == 1 else None


def ask_deepspeed() -> Findings:
    """Findings, on one rank."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    cpu = torch.device("cpu")

    def refusal(act: Callable[[], object]) -> str:
        try:
            act()
        except MetaloomError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def disagree() -> None:
        sharding = DeepSpeedZero(ZeroSettings(1), cpu)
        outer = OuterOptimizer(draws(99), ADAM, sharding)
        gradient = sharding.sum_gradients(draws(1))
        optimizer: Any = outer._optimizer
        optimizer._engine.was_step_applied = lambda: False
        outer.update(gradient)

    doubles = {"init.weight": torch.zeros(2, dtype=torch.float64)}

    shardings = {stage: DeepSpeedZero(ZeroSettings(stage), cpu) for stage in (1, 2)}
    parsed = {}
    for stage, sharding in shardings.items():
        OuterOptimizer(draws(99), ADAM, sharding)
        parsed[stage] = DeepSpeedConfig(sharding.config)
    plain = (bool, int, float, str, type(None))
    return Findings(
        read={
            stage: {name: value for name, value in vars(config).items() if isinstance(value, plain)}
            for stage, config in parsed.items()
        },
        zero={stage: config.zero_config.model_dump(mode="json") for stage, config in parsed.items()},
        zero_keys=set(DeepSpeedZeroConfig.model_fields),
        refusals={
            name: refusal(functools.partial(DeepSpeedZero, ZeroSettings(2, extra=extra), cpu))
            for name, extra in EXTRA.items()
        },
        floats=refusal(lambda: OuterOptimizer(doubles, ADAM, DeepSpeedZero(ZeroSettings(2), cpu))),
        device=refusal(lambda: DeepSpeedZero(ZeroSettings(2), torch.device("cuda"))),
        disagreement=refusal(disagree),
        offloaded=DeepSpeedZero(ZeroSettings(1, offload_optimizer=True), cpu).describe(),
    )
