"""The settings of optimizers."""

from __future__ import annotations

from metaloom.engine.outer import OuterSettings
from metaloom.recipe import (
    AdamOptimizer,
    OrdinaryTraining,
    Pretrain,
    Recipe,
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
