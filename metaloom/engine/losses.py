"""The loss of an example, and what may be learned of it.

Shape letters: T tasks, N examples, L tokens, C classes (or vocabulary).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

LOSS = "loss."
LossParameter = Literal["temperature", "label_smoothing"]


@dataclasses.dataclass(frozen=True)
class SupportLoss:
    """The cross-entropy that tasks adapt by: `(1 - s) * -log p_y + s * mean_c(-log p_c)`, p = softmax(z / t).

    Learned parameters are kept where they are free: `loss.temperature` holds log t, `loss.label_smoothing`
    the logit of s. They act through the inner gradient alone: the query loss is the plain cross-entropy.

    Attributes:
        temperature: t, above 0; where a learned one starts.
        label_smoothing: s, from 0 to below 1; above 0 where it is learned.
        learned: which of the two are meta-parameters.
    """

    temperature: float = 1.0
    label_smoothing: float = 0.0
    learned: tuple[LossParameter, ...] = ()

    def meta_parameters(self, like: Tensor) -> dict[str, Tensor]:
        """Initial values by name, in the dtype and on the device of `like`."""
        smoothing = self.label_smoothing
        start = {
            "temperature": lambda: math.log(self.temperature),
            "label_smoothing": lambda: _logit(smoothing),
        }
        return {f"{LOSS}{name}": like.new_full((), start[name]()) for name in self.learned}

    def at(self, meta: Mapping[str, Tensor]) -> LossTensors:
        """Temperature and smoothing at these meta-parameters; None where they are 1 and 0 for good."""
        temperature: Tensor | float | None = None if self.temperature == 1.0 else self.temperature
        smoothing: Tensor | float | None = None if self.label_smoothing == 0.0 else self.label_smoothing
        if "temperature" in self.learned:
            temperature = meta[f"{LOSS}temperature"].exp()
        if "label_smoothing" in self.learned:
            smoothing = meta[f"{LOSS}label_smoothing"].sigmoid()
        return LossTensors(temperature, smoothing)


@dataclasses.dataclass(frozen=True)
class LossTensors:
    """What a cross-entropy is changed by; None for not at all."""

    temperature: Tensor | float | None = None
    label_smoothing: Tensor | float | None = None


PLAIN = LossTensors()


def token_losses(logits: Tensor, targets: Tensor, how: LossTensors = PLAIN) -> Tensor:
    """The cross-entropy of each target, shaped like the targets, in nats.

    Args:
        logits: `[..., C]`; half precision is raised to float32 first.
        targets: `[...]`, class indices.
        how: temperature and label smoothing.
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    if how.temperature is not None:
        logits = logits / how.temperature
    flat, wanted = logits.flatten(0, -2), targets.flatten()
    if how.label_smoothing is None:
        return F.cross_entropy(flat, wanted, reduction="none").view(targets.shape)
    log_p = flat.log_softmax(-1)
    right = F.nll_loss(log_p, wanted, reduction="none")
    return ((1.0 - how.label_smoothing) * right - how.label_smoothing * log_p.mean(-1)).view(targets.shape)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of each example, `[T, N]`, in nats.

    Args:
        logits: `[T, N, C]` or `[T, N, L, C]`; half precision is raised to float32 first.
        targets: `[T, N]` or `[T, N, L]`, class indices.
    """
    return example_means(token_losses(logits, targets))


def example_means(values: Tensor) -> Tensor:
    """The mean over the tokens of each example: `[T, N]` of `[T, N]` or `[T, N, L]`."""
    return values.flatten(2).mean(-1) if values.ndim > 2 else values


def is_right(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether the likeliest class is the target, shaped like the targets."""
    return logits.detach().argmax(-1) == targets


def bits_per_byte(nats: float) -> float:
    """A byte-level loss in bits."""
    return nats / math.log(2.0)


def _logit(probability: float) -> float:
    return math.log(probability) - math.log1p(-probability)
