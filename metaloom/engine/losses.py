"""The loss of an example, and what may be learned of it.

Shape letters: T tasks, N examples, L tokens, C classes (or vocabulary), P numbers of a regression's target.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from metaloom.errors import CapabilityError

LOSS = "loss."
# A class index that counts for nothing: torch's own.
IGNORE = -100
LossParameter = Literal["temperature", "label_smoothing", "class_weights", "group_weights"]
OF_CLASSES: tuple[LossParameter, ...] = ("temperature", "label_smoothing", "class_weights")


@dataclasses.dataclass(frozen=True)
class SupportLoss:
    """What tasks adapt by, as it is changed: a target y of a task of group g costs

        v_g u_y ((1 - s) * -log p_y + s * mean_c(-log p_c)),    p = softmax(z / t)

    or, where targets are numbers, v_g times their squared error. Weights u of classes and v of groups are 1
    unless they are learned: weights of data, as of Ren et al. 2018, "Learning to Reweight Examples for Robust
    Deep Learning", of whole classes and groups in the place of single examples. Means over examples divide by
    their number, not by their weights, so weights act on the length of steps too. A group that is not among
    `groups` has weight 1.

    Learned parameters are kept where they are free: `loss.temperature` holds log t, `loss.label_smoothing`
    the logit of s, `loss.class_weights` `[C]` and `loss.group_weights` `[G]` the logarithms of weights. They
    act through the inner gradient alone: the query loss is as it is without.

    Attributes:
        temperature: t, above 0; where a learned one starts.
        label_smoothing: s, from 0 to below 1; above 0 where it is learned.
        learned: which are meta-parameters.
        num_classes: C, where weights of classes are learned.
        groups: names of the G groups, where weights of groups are learned.
    """

    temperature: float = 1.0
    label_smoothing: float = 0.0
    learned: tuple[LossParameter, ...] = ()
    num_classes: int = 0
    groups: tuple[str, ...] = ()

    @property
    def is_of_classes(self) -> bool:
        """Whether anything is changed that a cross-entropy alone has."""
        return (self.temperature, self.label_smoothing) != (1.0, 0.0) or bool(self.learned_of_classes)

    @property
    def learned_of_classes(self) -> tuple[LossParameter, ...]:
        """What is learned that a cross-entropy alone has."""
        return tuple(name for name in self.learned if name in OF_CLASSES)

    def meta_parameters(self, like: Tensor) -> dict[str, Tensor]:
        """Initial values by name, in the dtype and on the device of `like`."""
        start = {
            "temperature": lambda: like.new_full((), math.log(self.temperature)),
            "label_smoothing": lambda: like.new_full((), _logit(self.label_smoothing)),
            "class_weights": lambda: like.new_zeros(self.num_classes),
            "group_weights": lambda: like.new_zeros(len(self.groups)),
        }
        return {f"{LOSS}{name}": start[name]() for name in self.learned}

    def at(self, meta: Mapping[str, Tensor]) -> LossTensors:
        """What a cross-entropy is changed by at these meta-parameters; None where it is not for good."""
        temperature: Tensor | float | None = None if self.temperature == 1.0 else self.temperature
        smoothing: Tensor | float | None = None if self.label_smoothing == 0.0 else self.label_smoothing
        if "temperature" in self.learned:
            temperature = meta[f"{LOSS}temperature"].exp()
        if "label_smoothing" in self.learned:
            smoothing = meta[f"{LOSS}label_smoothing"].sigmoid()
        weights = meta[f"{LOSS}class_weights"].exp() if "class_weights" in self.learned else None
        return LossTensors(temperature, smoothing, weights)

    def of_groups(self, meta: Mapping[str, Tensor], groups: Sequence[str | None]) -> Tensor | None:
        """v of T tasks by their groups, `[T]`; None where it is 1 for good."""
        if "group_weights" not in self.learned:
            return None
        logarithms = meta[f"{LOSS}group_weights"]
        place = {group: place for place, group in enumerate(self.groups)}
        others = len(self.groups)
        chosen = [others if group is None else place.get(group, others) for group in groups]
        return torch.cat([logarithms, logarithms.new_zeros(1)])[chosen].exp()


@dataclasses.dataclass(frozen=True)
class LossTensors:
    """What a cross-entropy is changed by; None for not at all.

    Attributes:
        temperature: what logits are divided by.
        label_smoothing: share of a target spread over all classes.
        class_weights: `[C]`, what a target's loss is multiplied by.
    """

    temperature: Tensor | float | None = None
    label_smoothing: Tensor | float | None = None
    class_weights: Tensor | None = None

    def weighted(self, losses: Tensor, targets: Tensor) -> Tensor:
        """Losses of class indices of the same shape, each by the weight of its class; one of `IGNORE` counts
        for nothing anyway."""
        return losses if self.class_weights is None else losses * self.class_weights[targets.clamp(min=0)]


PLAIN = LossTensors()


class Criterion(abc.ABC):
    """The loss of a target, given what the model says.

    Attributes:
        scores: names of what is measured beside the loss, of which higher is better.
        takes_support_loss: whether there are classes, with a temperature, a label smoothing and weights.
        num_target_dims: dims of one target: those behind its position among the examples (and tokens).
    """

    scores: ClassVar[tuple[str, ...]]
    takes_support_loss: ClassVar[bool]
    num_target_dims: ClassVar[int]

    @abc.abstractmethod
    def of_targets(
        self, outputs: Tensor, targets: Tensor, how: LossTensors = PLAIN, num_ways: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The loss of each target, then its scores, each shaped like the targets; 0 where one does not count.

        Args:
            outputs: what the model says; half precision is raised to float32 first.
            targets: what it should.
            how: temperature and label smoothing, where `takes_support_loss`; weights of classes are for the
                caller to put on the losses: `LossTensors.weighted`.
            num_ways: `[T]`, how many classes each task has; None for as many as there are outputs.

        Raises:
            CapabilityError: outputs and targets are not of shapes that belong together.
        """

    @abc.abstractmethod
    def is_counted(self, targets: Tensor) -> Tensor:
        """Which targets count, shaped like them."""


@dataclasses.dataclass(frozen=True)
class CrossEntropy(Criterion):
    """The cross-entropy of class indices, in nats: outputs `[T, N, C]` and targets `[T, N]`, one for an
    example, or `[T, N, L, C]` and `[T, N, L]`, one for a token. A target of `IGNORE` counts for nothing."""

    scores = ("accuracy",)
    takes_support_loss = True
    num_target_dims = 0

    def of_targets(
        self, outputs: Tensor, targets: Tensor, how: LossTensors = PLAIN, num_ways: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        if outputs.shape[:-1] != targets.shape:
            raise CapabilityError(
                f"the model's outputs have shape {list(outputs.shape)}, the targets {list(targets.shape)}: "
                "a cross-entropy needs the logits of all classes for each target, one more dim at the end. "
                "Take the head of the model that gives them, or another objective."
            )
        return token_losses(outputs, targets, how, num_ways), is_right(outputs, targets, num_ways)

    def is_counted(self, targets: Tensor) -> Tensor:
        return targets != IGNORE


@dataclasses.dataclass(frozen=True)
class MeanSquaredError(Criterion):
    """The squared error of each of a target's numbers, outputs and targets `[T, N, P]`; an example's loss is
    the mean over them. There is no score."""

    scores = ()
    takes_support_loss = False
    num_target_dims = 1

    def of_targets(
        self, outputs: Tensor, targets: Tensor, how: LossTensors = PLAIN, num_ways: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        if outputs.shape != targets.shape:
            raise CapabilityError(
                f"the model's outputs have shape {list(outputs.shape)}, the targets {list(targets.shape)}: "
                "a regression needs one output for each number of a target. Give the model as many outputs."
            )
        if num_ways is not None:
            raise CapabilityError(
                "the batch has num_ways, and a regression has no classes: leave it out, or classify."
            )
        return ((_in_full(outputs) - _in_full(targets)).square(),)

    def is_counted(self, targets: Tensor) -> Tensor:
        return torch.ones_like(targets, dtype=torch.bool)


@dataclasses.dataclass(frozen=True)
class PredictionEntropy(Criterion):
    """The entropy of what the model says of a target's class, in nats, whatever the target: outputs and
    targets as of `CrossEntropy`. 0 where the target is `IGNORE`. There is no score."""

    scores = ()
    takes_support_loss = False
    num_target_dims = 0

    def of_targets(
        self, outputs: Tensor, targets: Tensor, how: LossTensors = PLAIN, num_ways: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        logits = _in_full(outputs)
        if num_ways is not None:
            logits = _without_other_classes(logits, num_ways)
        log_p = logits.log_softmax(-1)
        p = log_p.exp()
        if num_ways is not None:
            log_p = log_p.masked_fill(_is_other_class(logits, num_ways), 0.0)
        return ((-(p * log_p).sum(-1)).masked_fill(targets == IGNORE, 0.0),)

    def is_counted(self, targets: Tensor) -> Tensor:
        return targets != IGNORE


def token_losses(
    logits: Tensor, targets: Tensor, how: LossTensors = PLAIN, num_ways: Tensor | None = None
) -> Tensor:
    """The cross-entropy of each target, shaped like the targets, in nats; 0 where that is `IGNORE`.

    Args:
        logits: `[..., C]`, `[T, ..., C]` with `num_ways`; half precision is raised to float32 first.
        targets: `[...]`, class indices.
        how: temperature and label smoothing.
        num_ways: `[T]`, how many of the C classes each task has; None for all. The others have probability 0
            and no part in the label smoothing.
    """
    logits = _in_full(logits)
    if how.temperature is not None:
        logits = logits / how.temperature
    if num_ways is not None:
        logits = _without_other_classes(logits, num_ways)
    flat, wanted = logits.flatten(0, -2), targets.flatten()
    if how.label_smoothing is None:
        return F.cross_entropy(flat, wanted, reduction="none", ignore_index=IGNORE).view(targets.shape)
    log_p = flat.log_softmax(-1)
    right = F.nll_loss(log_p, wanted, reduction="none", ignore_index=IGNORE).view(targets.shape)
    log_p = log_p.view(logits.shape)
    if num_ways is None:
        mean = log_p.mean(-1)
    else:
        own = log_p.masked_fill(_is_other_class(logits, num_ways), 0.0)
        mean = own.sum(-1) / _beside(num_ways, targets.ndim)
    mean = mean.masked_fill(targets == IGNORE, 0.0)
    return (1.0 - how.label_smoothing) * right - how.label_smoothing * mean


def _in_full(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _without_other_classes(logits: Tensor, num_ways: Tensor) -> Tensor:
    """The logits with those of classes that a task does not have so low that their probability is 0: finite,
    since infinite ones have NaN for a tangent."""
    return logits.masked_fill(_is_other_class(logits, num_ways), torch.finfo(logits.dtype).min / 2)


def _is_other_class(logits: Tensor, num_ways: Tensor) -> Tensor:
    """Which logits `[T, ..., C]` are of classes from a task's `num_ways` on; `[T, 1 ..., C]`."""
    return torch.arange(logits.shape[-1], device=logits.device) >= _beside(num_ways, logits.ndim)


def _beside(per_task: Tensor, num_dims: int) -> Tensor:
    """One number per task, `[T]`, beside a tensor of so many dims: `[T, 1, ...]`."""
    return per_task.view(-1, *(1,) * (num_dims - 1))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of each example, `[T, N]`, in nats.

    Args:
        logits: `[T, N, C]` or `[T, N, L, C]`; half precision is raised to float32 first.
        targets: `[T, N]` or `[T, N, L]`, class indices.
    """
    return example_means(token_losses(logits, targets), targets != IGNORE)


def example_means(values: Tensor, is_counted: Tensor) -> Tensor:
    """The mean over what counts of each example, `[T, N]` of `[T, N, ...]`; 0 where nothing does.

    Args:
        values: 0 where they do not count.
        is_counted: shaped like them.
    """
    if values.ndim == 2:
        return values
    return values.flatten(2).sum(-1) / is_counted.flatten(2).sum(-1).clamp(min=1)


def task_means(values: Tensor, weights: Tensor | None) -> Tensor:
    """The weighted mean over the examples of each task, `[T]`; 0 where all weights are.

    Args:
        values: `[T, N]`.
        weights: `[T, N]`, 0 for padding; None for equal ones.
    """
    if weights is None:
        return values.mean(1)
    weights = weights.to(values.dtype)
    total = weights.sum(1)
    return (values * weights).sum(1) / torch.where(total == 0.0, 1.0, total)


def is_right(logits: Tensor, targets: Tensor, num_ways: Tensor | None = None) -> Tensor:
    """Whether the likeliest class is the target, shaped like the targets; `num_ways` as in `token_losses`."""
    logits = logits.detach()
    if num_ways is not None:
        logits = _without_other_classes(logits, num_ways)
    return logits.argmax(-1) == targets


def bits(nats: float) -> float:
    """A cross-entropy in bits."""
    return nats / math.log(2.0)


def _logit(probability: float) -> float:
    return math.log(probability) - math.log1p(-probability)
