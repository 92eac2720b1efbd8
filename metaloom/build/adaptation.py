"""The inner loop of a recipe: what is fast, by which rule, to which loss."""

from __future__ import annotations

import torch
from torch import nn

from metaloom.build.choices import Choices
from metaloom.build.model import (
    model_structure,
    rehearsal_output,
    task_output,
)
from metaloom.engine.adapters.base import Adapter
from metaloom.engine.adapters.full import FullAdapter
from metaloom.engine.adapters.lora import LoraAdapter
from metaloom.engine.adapters.model import Structure
from metaloom.engine.adapters.part import PartAdapter
from metaloom.engine.adapters.selection import (
    head_parameters,
    matching_parameters,
    norm_and_bias_parameters,
)
from metaloom.engine.adapters.soft_prompt import SoftPromptAdapter
from metaloom.engine.adapters.zero_head import ZeroHeadAdapter
from metaloom.engine.algorithms.maml import step_weights
from metaloom.engine.inner_loops.adam import Adam
from metaloom.engine.inner_loops.base import InnerRule
from metaloom.engine.inner_loops.gradient_terms import GradientTerms
from metaloom.engine.inner_loops.head_first import HeadFirst
from metaloom.engine.inner_loops.rates import Grain, Rates
from metaloom.engine.inner_loops.rmsprop import RmsProp
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import Learner, Rehearsal
from metaloom.engine.losses import SupportLoss
from metaloom.engine.precision import Precision
from metaloom.engine.unroll import Unroll
from metaloom.recipe import (
    AdamWRule,
    FullFast,
    HeadFast,
    LoRAFast,
    NormBiasFast,
    PartFast,
    Recipe,
    RMSPropRule,
    SGDRule,
    SoftPromptFast,
)
from metaloom.recipe import InnerRule as InnerRuleSection
from metaloom.recipe import Rehearsal as RehearsalSection
from metaloom.weights import HeldModel


def build_adapter(recipe: Recipe, model: HeldModel, choices: Choices) -> Adapter:
    """What is fast in a model. With shards every rank must call.

    Raises:
        CapabilityError: it cannot be fast in this model.
    """
    adapter = _adapter(recipe, model, choices)
    if recipe.adaptation.head.init == "zero":
        return ZeroHeadAdapter(adapter, task_output(recipe).head)
    return adapter


def _adapter(recipe: Recipe, model: HeldModel, choices: Choices) -> Adapter:
    fast = recipe.adaptation.fast
    structure, shards = model_structure(model.module), model.shards
    generator = torch.Generator().manual_seed(recipe.seed)
    match fast:
        case FullFast():
            return FullAdapter(model.module, structure=structure, tasks=choices.tasks)
        case LoRAFast(targets=targets, rank=rank, alpha=alpha):
            return LoraAdapter(
                model.module,
                targets=targets,
                rank=rank,
                alpha=alpha,
                generator=generator,
                structure=structure,
                shards=shards,
            )
        case SoftPromptFast(num_tokens=num_tokens, start=start):
            return SoftPromptAdapter(
                model.module,
                num_tokens=num_tokens,
                start=start,
                generator=generator,
                structure=structure,
                shards=shards,
            )
        case HeadFast() | NormBiasFast() | PartFast():
            return PartAdapter(
                model.module,
                names=_fast_parameters(recipe, fast, model.module, structure),
                tasks=fast.tasks if isinstance(fast, PartFast) else "together",
                structure=structure,
                shards=shards,
            )


def _fast_parameters(
    recipe: Recipe, fast: HeadFast | NormBiasFast | PartFast, model: nn.Module, structure: Structure
) -> list[str]:
    """The names of the model's parameters that are fast."""
    if isinstance(fast, PartFast):
        return matching_parameters(model, fast.parameters)
    head: list[str] = []
    if isinstance(fast, HeadFast) or fast.head:
        head = head_parameters(model, structure, task_output(recipe).head)
    if isinstance(fast, HeadFast):
        return head
    return list(
        dict.fromkeys([*norm_and_bias_parameters(model, norms=fast.norms, biases=fast.biases), *head])
    )


def build_rule(section: InnerRuleSection) -> InnerRule:
    """The inner rule; its rates are apart, as they may be learned."""
    is_decoupled = isinstance(section, AdamWRule)
    terms = GradientTerms(0.0 if is_decoupled else section.weight_decay, section.clip_norm, section.proximal)
    if isinstance(section, SGDRule):
        return Sgd(terms, momentum=section.momentum, nesterov=section.nesterov)
    if isinstance(section, RMSPropRule):
        return RmsProp(
            terms,
            alpha=section.alpha,
            eps=section.eps,
            eps_root=section.eps_root,
            momentum=section.momentum,
            centered=section.centered,
        )
    return Adam(
        terms,
        betas=section.betas,
        eps=section.eps,
        eps_root=section.eps_root,
        decoupled_weight_decay=section.weight_decay if is_decoupled else 0.0,
    )


def build_unroll(
    recipe: Recipe, adapter: Adapter, *, rate: float, grain: Grain, learns_loss: bool = True
) -> Unroll:
    """The inner problem with a given rate, fixed or where learned rates start.

    Args:
        learns_loss: whether the loss parameters that the recipe learns are read from the meta-parameters;
            they stay where they start otherwise.
    """
    adaptation = recipe.adaptation
    rehearsal, loss, output = adaptation.rehearsal, adaptation.loss, task_output(recipe)
    return Unroll(
        learner=Learner(
            adapter,
            Precision(recipe.precision.compute),
            None if rehearsal is None else _rehearsal(recipe, rehearsal),
            support_loss=SupportLoss(
                loss.temperature, loss.label_smoothing, loss.learned if learns_loss else ()
            ),
            seed=recipe.seed,
            recompute_blocks=recipe.memory.recompute_blocks,
            head_chunk=recipe.memory.head_chunk,
            criterion=output.criterion,
            head=output.head,
        ),
        rule=build_rule(adaptation.rule),
        rates=Rates(
            rate,
            grain,
            adaptation.num_steps,
            scale=adaptation.rule.rates.scale,
            spread=adaptation.rule.rates.spread,
            seed=recipe.seed,
        ),
        step_weights=step_weights(recipe.algorithm.step_weights, adaptation.num_steps),
        head_first=_head_first(recipe, adapter),
    )


def _head_first(recipe: Recipe, adapter: Adapter) -> HeadFirst | None:
    num_steps = recipe.adaptation.head.first_steps
    if num_steps == 0:
        return None
    return HeadFirst(frozenset(adapter.head_weights(task_output(recipe).head)), num_steps)


def _rehearsal(recipe: Recipe, section: RehearsalSection) -> Rehearsal:
    output = rehearsal_output(recipe)
    return Rehearsal(
        section.ratio,
        section.num_samples,
        outer_ratio=section.outer_ratio,
        criterion=output.criterion,
        head=output.head,
    )
