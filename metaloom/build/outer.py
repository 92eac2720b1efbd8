"""The combiner of tasks, and the settings of optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from metaloom.engine.combiners.base import Combiner
from metaloom.engine.combiners.dwa import DWA
from metaloom.engine.combiners.even import Even
from metaloom.engine.combiners.gradnorm import GradNorm
from metaloom.engine.combiners.group_dro import GroupDRO
from metaloom.engine.combiners.mean import Mean
from metaloom.engine.combiners.mgda import MGDA
from metaloom.engine.combiners.pcgrad import PCGrad
from metaloom.engine.combiners.per_task import PerTask
from metaloom.engine.combiners.q_ffl import QFFL
from metaloom.engine.combiners.uncertainty import Uncertainty
from metaloom.engine.combiners.upweighting import Upweighting
from metaloom.engine.combiners.weighted import Weighted
from metaloom.engine.outer import OuterSettings
from metaloom.engine.sharding.base import Sharding
from metaloom.recipe import (
    AdamOptimizer,
    DWACombiner,
    GradNormCombiner,
    GroupDROCombiner,
    MeanCombiner,
    MGDACombiner,
    OrdinaryTraining,
    PCGradCombiner,
    Pretrain,
    QFFLCombiner,
    Recipe,
    UncertaintyCombiner,
    UpweightingCombiner,
)


def build_combiner(
    recipe: Recipe, meta: Mapping[str, Tensor], sharding: Sharding, *, metric_names: Sequence[str]
) -> Combiner:
    """What combines the tasks' meta-gradients.

    Args:
        meta: what this rank holds of the meta-parameters.
        metric_names: what the algorithm reports.

    Raises:
        CapabilityError: outer.combiner.of matches nothing that is learned.
    """
    section = recipe.outer.combiner
    match section:
        case MeanCombiner(log_cosines=False):
            return Mean(meta, sharding, metric_names=metric_names)
        case UncertaintyCombiner(lr=lr):
            return Weighted(Uncertainty(lr), meta, sharding, metric_names=metric_names)
        case DWACombiner(temperature=temperature, num_steps=num_steps):
            return Weighted(DWA(temperature, num_steps), meta, sharding, metric_names=metric_names)
        case UpweightingCombiner():
            return Weighted(Upweighting(), meta, sharding, metric_names=metric_names)
        case MeanCombiner():
            return PerTask(Even(), meta, sharding, metric_names=metric_names, log_cosines=True)
        case PCGradCombiner(of=of):
            return PerTask(PCGrad(recipe.seed), meta, sharding, metric_names=metric_names, of=of)
        case MGDACombiner(of=of):
            return PerTask(MGDA(), meta, sharding, metric_names=metric_names, of=of)
        case GradNormCombiner(alpha=alpha, lr=lr, of=of):
            return PerTask(GradNorm(alpha, lr), meta, sharding, metric_names=metric_names, of=of)
        case QFFLCombiner(q=q):
            rule: QFFL | GroupDRO = QFFL(q)
        case GroupDROCombiner(step_size=step_size):
            rule = GroupDRO(step_size)
    return PerTask(
        rule,
        meta,
        sharding,
        metric_names=metric_names,
        of=section.of,
        log_cosines=section.log_cosines,
    )


def outer_settings(recipe: Recipe) -> OuterSettings:
    """The outer optimizer's settings."""
    outer, optimizer, schedule = recipe.outer, recipe.outer.optimizer, recipe.outer.schedule
    is_adam = isinstance(optimizer, AdamOptimizer)
    return OuterSettings(
        optimizer="adam" if is_adam else "sgd",
        lr=optimizer.lr,
        lr_rates=optimizer.lr if outer.lr_rates is None else outer.lr_rates,
        lr_loss=optimizer.lr if outer.lr_loss is None else outer.lr_loss,
        lr_posterior=outer.lr_posterior,
        lr_parts=outer.lr_parts,
        betas=optimizer.betas if isinstance(optimizer, AdamOptimizer) else (optimizer.momentum, 0.0),
        eps=optimizer.eps if isinstance(optimizer, AdamOptimizer) else 0.0,
        weight_decay=optimizer.weight_decay,
        num_steps=outer.num_steps,
        warmup_steps=schedule.warmup_steps,
        decay=schedule.decay,
        final_ratio=schedule.final_ratio,
        clip_norm=outer.clip_norm,
        ema=outer.ema,
    )


def ordinary_settings(
    training: Pretrain | OrdinaryTraining, *, num_steps: int, warmup_steps: int
) -> OuterSettings:
    """The optimizer's settings of an ordinary training: AdamW, warm-up, cosine to a tenth."""
    return OuterSettings(
        optimizer="adam",
        lr=training.lr,
        lr_rates=training.lr,
        lr_loss=training.lr,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=training.weight_decay,
        num_steps=num_steps,
        warmup_steps=warmup_steps,
        decay="cosine",
        final_ratio=0.1,
        clip_norm=1.0,
        ema=None,
    )
