"""The outer optimizer: what moves the meta-parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from metaloom.engine.algorithms.posterior import POSTERIOR
from metaloom.engine.capabilities import PER_STEP
from metaloom.engine.inner_loops.rates import RATES
from metaloom.engine.losses import LOSS
from metaloom.engine.meta_optimizer import States, UpdateRule
from metaloom.engine.names import in_short, matching
from metaloom.engine.sharding.base import Sharding
from metaloom.errors import CapabilityError, MetaloomError

MAX_SKIPPED_IN_A_ROW = 10
# The share of an outer step in a running mean: that of torch's batch norm.
TRACKED_SHARE = 0.1
# What the name of a tracked tensor begins with in a checkpoint.
COUNTED = "counted/"


@dataclasses.dataclass(frozen=True)
class OuterSettings:
    """How the meta-parameters are updated.

    Attributes:
        optimizer: `adam` is AdamW (decoupled weight decay); `sgd` has momentum `betas[0]`.
        lr: learning rate of initialisations and backbone.
        lr_rates: learning rate of learned inner rates, or of their logarithms: what is learned of them.
        lr_loss: learning rate of learned loss parameters.
        warmup_steps: outer steps over which the learning rates rise linearly from 0.
        decay: `cosine` to `final_ratio` at `num_steps`, or `constant`.
        clip_norm: the largest global norm of the gradient, or None.
        ema: decay of the exponential moving average of the meta-parameters, or None.
        lr_posterior: learning rate of the logarithms of a posterior's standard deviations; None for `lr`.
        lr_parts: in place of `lr`, learning rates by kinds of meta-parameters ("backbone") or patterns of
            their names, each of which matches some, and none of which match the same.
    """

    optimizer: Literal["adam", "sgd"]
    lr: float
    lr_rates: float
    lr_loss: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    num_steps: int
    warmup_steps: int
    decay: Literal["cosine", "constant"]
    final_ratio: float
    clip_norm: float | None
    ema: float | None
    lr_posterior: float | None = None
    lr_parts: Mapping[str, float] = dataclasses.field(default_factory=dict)


class SkippedTooOftenError(MetaloomError):
    """A run that moves nothing any more, since its gradients are not finite."""


class OuterOptimizer:
    """Moves the meta-parameters: schedule, clipping, steps that are skipped, moving average. The sharding
    says where they and the optimizer's states are kept.

    All state is a function of the gradients given, so equal gradients keep ranks equal.

    Args:
        meta: what this rank holds of the meta-parameters, by name; copied.
        sharding: how they lie on the ranks.
        tracked: initial values of what is counted beside them: see `Algorithm.tracked`.

    Attributes:
        sharding: as given.
        step: outer steps done.
    """

    def __init__(
        self,
        meta: Mapping[str, Tensor],
        settings: OuterSettings,
        sharding: Sharding,
        *,
        tracked: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.settings = settings
        self.sharding = sharding
        self._optimizer = sharding.optimizer(meta, update_rule(meta, settings))
        self.step = 0
        self._skipped_in_a_row = 0
        self._average = None if settings.ema is None else _copies(self.meta)
        self._tracked = _copies(tracked or {})
        self._counted: dict[str, Tensor] = {}

    @property
    def meta(self) -> dict[str, Tensor]:
        """What this rank holds of the meta-parameters, by name: the same tensors throughout."""
        return self._optimizer.meta

    def count(self, sums: Mapping[str, Tensor]) -> None:
        """Takes in what was counted of some of this rank's tasks of the next step, summed over them."""
        for name, value in sums.items():
            self._counted[name] = self._counted[name] + value if name in self._counted else value

    def update(
        self, gradient: Mapping[str, Tensor], *, num_tasks: int = 1, is_expected: bool = False
    ) -> dict[str, float]:
        """One outer step, or none where the gradient is not finite. Returns what to log.
        Every rank must call.

        Args:
            num_tasks: over all ranks, but for those that are left out, for the mean of what was counted.
            is_expected: whether a gradient that is not finite is one of those that half precision brings.

        Raises:
            SkippedTooOftenError: the gradient was not finite ten times in a row, and unexpectedly.
        """
        # The same on every rank, so every rank decides alike.
        norm = self.sharding.norm(gradient)
        factor = self.lr_factor(self.step)
        self.step += 1
        metrics = {"gradient_norm": norm, "outer_lr": factor * self.settings.lr}
        if not math.isfinite(metrics["gradient_norm"]):
            self._skipped_in_a_row += not is_expected
            if self._skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise SkippedTooOftenError(
                    f"outer step {self.step}: the meta-gradient was not finite {MAX_SKIPPED_IN_A_ROW} times "
                    "in a row. Start a new run with a lower adaptation.rule.lr or outer.optimizer.lr, or set "
                    "adaptation.rule.clip_norm."
                )
            self._optimizer.discard()
            self._counted = {}
            return metrics | {"skipped": 1.0}
        self._skipped_in_a_row = 0
        clip = self.settings.clip_norm
        scale = 1.0 if clip is None else min(1.0, clip / (metrics["gradient_norm"] + 1e-12))
        self._optimizer.apply(gradient, scale=scale, lr_factor=factor)
        if self._average is not None:
            # Rises from 0 so that early averages are not held back at the initial values.
            decay = min(self.settings.ema or 0.0, self.step / (self.step + 9.0))
            for name, value in self._average.items():
                value.lerp_(self.meta[name], 1.0 - decay)
        self._track(num_tasks)
        return metrics | {"skipped": 0.0}

    def _track(self, num_tasks: int) -> None:
        """Moves what is tracked towards the mean of what was counted in this step on all ranks."""
        if not self._tracked:
            return
        own = {
            name: self._counted[name] if name in self._counted else torch.zeros_like(value)
            for name, value in self._tracked.items()
        }
        for name, total in self.sharding.sum_over_ranks(own).items():
            self._tracked[name].lerp_(total / num_tasks, TRACKED_SHARE)
        self._counted = {}

    def lr_factor(self, step: int) -> float:
        """What the learning rates are multiplied by at outer step `step`, counted from 0."""
        settings = self.settings
        if step < settings.warmup_steps:
            return (step + 1) / (settings.warmup_steps + 1)
        if settings.decay == "constant":
            return 1.0
        progress = (step - settings.warmup_steps) / max(1, settings.num_steps - settings.warmup_steps)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        return settings.final_ratio + (1.0 - settings.final_ratio) * cosine

    def evaluation_parameters(self) -> dict[str, Tensor]:
        """The meta-parameters to evaluate and export: the moving average where there is one; and what is
        tracked."""
        return (self.meta if self._average is None else self._average) | self._tracked

    def stored_meta(self) -> dict[str, Tensor]:
        """The meta-parameters as checkpoints hold them."""
        return {name: self.sharding.stored(name, value) for name, value in self.meta.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the next update depends on, as checkpoints hold it, by flat name: `meta/<name>`,
        `average/<name>`, `optimizer/<name>/<state>` and `counted/<name>`. Every rank must call."""
        stored = self.sharding.stored
        tensors = {f"meta/{name}": value for name, value in self.stored_meta().items()}
        tensors |= {f"average/{name}": stored(name, value) for name, value in (self._average or {}).items()}
        for name, states in self._optimizer.states().items():
            tensors |= {f"optimizer/{name}/{key}": stored(name, entry) for key, entry in states.items()}
        return tensors | {f"{COUNTED}{name}": value for name, value in self._tracked.items()}

    def room(self) -> dict[str, Tensor]:
        """The tensors that `load` needs, but for the optimizer's states: what they are like, not their values
        at any step."""
        stored = self.sharding.stored
        tensors = {f"meta/{name}": value for name, value in self.stored_meta().items()}
        tensors |= {f"average/{name}": stored(name, value) for name, value in (self._average or {}).items()}
        return tensors | {f"{COUNTED}{name}": value for name, value in self._tracked.items()}

    def scalars(self) -> dict[str, int]:
        """What the next update depends on besides tensors."""
        return {"step": self.step, "skipped_in_a_row": self._skipped_in_a_row}

    def load(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, int]) -> None:
        """Takes over what `tensors` and `scalars` returned, for the same meta-parameters, on any number of
        ranks. Every rank must call."""
        held = self.sharding.held
        states: States = {}
        for name in self.meta:
            prefix = f"optimizer/{name}/"
            states[name] = {
                key.removeprefix(prefix): held(entry)
                for key, entry in tensors.items()
                if key.startswith(prefix)
            }
        self._optimizer.load({name: held(tensors[f"meta/{name}"]) for name in self.meta}, states)
        for name, value in (self._average or {}).items():
            value.copy_(held(tensors[f"average/{name}"]))
        for name, value in self._tracked.items():
            value.copy_(held(tensors[f"{COUNTED}{name}"]))
        self.step = int(scalars["step"])
        self._skipped_in_a_row = int(scalars["skipped_in_a_row"])


def parameter_of(key: str) -> str:
    """The meta-parameter that a tensor of `OuterOptimizer.tensors` is, or belongs to."""
    kind, _, name = key.partition("/")
    return name.rpartition("/")[0] if kind == "optimizer" else name


def update_rule(meta: Mapping[str, Tensor], settings: OuterSettings) -> UpdateRule:
    """The optimizer's rule, with the full learning rate and the weight decay of each meta-parameter.

    Raises:
        CapabilityError: an entry of `lr_parts` matches no meta-parameter, or one that another matches.
    """
    lr: dict[str, float] = {}
    weight_decay: dict[str, float] = {}
    lr_posterior = settings.lr if settings.lr_posterior is None else settings.lr_posterior
    own = {RATES: settings.lr_rates, LOSS: settings.lr_loss, POSTERIOR: lr_posterior}
    parts = _rates_of_parts([name for name in meta if not name.startswith(tuple(own))], settings.lr_parts)
    for name, value in meta.items():
        prefix = next((prefix for prefix in own if name.startswith(prefix)), None)
        lr[name] = parts.get(name, settings.lr) if prefix is None else own[prefix]
        # A rate's logarithm has no reason to be pulled towards 0, a rate of 1; nor has a loss parameter's, or
        # a standard deviation's. Nor have norms and biases: those of each inner step are rows of a matrix.
        is_free = prefix is not None or value.ndim < 2 or name.startswith(PER_STEP)
        weight_decay[name] = 0.0 if is_free else settings.weight_decay
    return UpdateRule(settings.optimizer, settings.betas, settings.eps, lr, weight_decay)


def _rates_of_parts(names: Sequence[str], rates: Mapping[str, float]) -> dict[str, float]:
    chosen: dict[str, str] = {}
    for entry in rates:
        meant = matching(names, entry)
        if not meant:
            raise CapabilityError(
                f"outer.lr_parts: {entry!r} matches no meta-parameter that outer.optimizer.lr is for; "
                f"this run learns {in_short(names) or 'none'}."
            )
        for name in meant:
            if name in chosen:
                raise CapabilityError(
                    f"outer.lr_parts: {chosen[name]!r} and {entry!r} both match {name}: narrow one of them."
                )
            chosen[name] = entry
    return {name: rates[entry] for name, entry in chosen.items()}


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tensors.items()}
