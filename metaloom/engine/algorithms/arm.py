"""Adaptive risk minimisation: a task's unlabelled inputs say how its inputs are to be read.

Zhang et al. 2021, "Adaptive Risk Minimization: Learning to Adapt to Domain Shift": the weights
are learned for the loss *after* adaptation to K unlabelled inputs of a group. Here these inputs are a task's
support inputs, the *context*; support targets are never read. Adaptation by gradient steps on a learned loss
(ARM-LL) is `Maml` with `metaloom.engine.learned_loss.LearnedLoss`.

Shape letters: T tasks, S support examples (the context), Q query examples, E channels or numbers of
a context.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from metaloom.engine.adapters.norms import BATCH_NORMS
from metaloom.engine.algorithms.feed_forward import FeedForward, Tensors, judged
from metaloom.engine.learner import TaskBatch
from metaloom.engine.losses import Criterion
from metaloom.engine.whole_model import WholeModel
from metaloom.errors import CapabilityError


@dataclasses.dataclass(frozen=True)
class ArmCml(FeedForward):
    """ARM-CML, contextual meta-learning (Zhang et al. 2021):

        c = mean of h(x_s) over the context,    prediction of x_q = g([x_q, c])

    h the context network, g the prediction network; the context is further channels of an image (each at its
    position), or further numbers of an array. Where the networks have batch norm, its statistics are those of
    the context, so that no query depends on another.

    Attributes:
        context: h.
        model: g; it is shown E more channels, or numbers, than an input has.
        criterion: the loss of a target.
        is_own_context: whether the queries are the context's examples, so that one pass of g is enough.
    """

    context: WholeModel
    model: WholeModel
    criterion: Criterion
    is_own_context: bool = False

    @property
    def scores(self) -> tuple[str, ...]:
        return self.criterion.scores

    def meta_parameters(self) -> dict[str, Tensor]:
        return self.model.meta_parameters() | self.context.meta_parameters()

    def losses(
        self, meta: Tensors, batch: TaskBatch, *, outer_step: int | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        support = batch.support
        described = self.context.outputs(meta, support["inputs"], support.get("weights"))
        context = context_mean(described, support.get("weights"))
        beside = [
            {**part, "inputs": with_context(part["inputs"], context)} for part in (support, batch.query)
        ]
        outputs = outputs_in_context(self.model, meta, *beside, is_own_context=self.is_own_context)
        return judged(outputs, batch, self.criterion)


@dataclasses.dataclass(frozen=True)
class ArmBn(FeedForward):
    """ARM-BN (Zhang et al. 2021): batch norm by the statistics of the context, in training and
    after it.

    Attributes:
        model: its weights are what is learned.
        criterion: the loss of a target.
        is_own_context: whether the queries are the context's examples, so that one pass is enough.

    Raises:
        CapabilityError: the model has no batch norm.
    """

    model: WholeModel
    criterion: Criterion
    is_own_context: bool = False

    def __post_init__(self) -> None:
        if not has_batch_norm(self.model.model):
            raise CapabilityError(
                "arm_bn adapts by the statistics of batch norm, and this model has none: give it batch norm, "
                "or take arm_cml."
            )

    @property
    def scores(self) -> tuple[str, ...]:
        return self.criterion.scores

    def meta_parameters(self) -> dict[str, Tensor]:
        return self.model.meta_parameters()

    def losses(
        self, meta: Tensors, batch: TaskBatch, *, outer_step: int | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = outputs_in_context(
            self.model, meta, batch.support, batch.query, is_own_context=self.is_own_context
        )
        return judged(outputs, batch, self.criterion)


def outputs_in_context(
    model: WholeModel, meta: Tensors, context: Tensors, query: Tensors, *, is_own_context: bool
) -> Tensor:
    """What a model says of the queries, `[T, Q, ...]`, with batch statistics of the context alone.

    Args:
        context: `inputs` `[T, S, ...]`, with `weights` `[T, S]` where it is padded.
        query: the same with Q in place of S.
        is_own_context: whether the two are the same examples.
    """
    if is_own_context or not has_batch_norm(model.model):
        return model.outputs(meta, query["inputs"], query.get("weights"))
    inputs = torch.cat([context["inputs"], query["inputs"]], dim=1)
    num_context = context["inputs"].shape[1]
    weights = torch.zeros(inputs.shape[:2], device=inputs.device)
    weights[:, :num_context] = context.get("weights", 1.0)
    return model.outputs(meta, inputs, weights)[:, num_context:]


def context_mean(described: Tensor, weights: Tensor | None) -> Tensor:
    """c, the mean of the context network's outputs over each task's context, `[T, E, ...]`, in at least
    float32.

    Args:
        described: `[T, S, E, ...]`.
        weights: `[T, S]`, 0 for padding; None where there is none.
    """
    wide = described.to(torch.promote_types(described.dtype, torch.float32))
    if weights is None:
        return wide.mean(1)
    shares = weights.to(wide.dtype) / weights.to(wide.dtype).sum(1, keepdim=True)
    return (wide * shares.view(*shares.shape, *(1,) * (wide.ndim - 2))).sum(1)


def with_context(inputs: Tensor, context: Tensor) -> Tensor:
    """Inputs `[T, N, channels, height, width]` or `[T, N, ...]` with each task's context behind their
    channels or, flattened, their numbers.

    Args:
        context: `[T, E, height, width]` or `[T, E]`.
    """
    if context.ndim == 2:
        inputs = inputs.flatten(2)
    beside = context.to(inputs.dtype)[:, None].expand(-1, inputs.shape[1], *context.shape[1:])
    return torch.cat([inputs, beside], dim=2)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether anything in a model is normalised by the statistics of the examples at hand."""
    return any(isinstance(module, BATCH_NORMS) for module in model.modules())
