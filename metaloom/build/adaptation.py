"""The inner loop of a recipe: what is fast, by which rule, to which loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from metaloom.build.choices import Choices
from metaloom.build.model import (
    model_structure,
    rehearsal_output,
    task_output,
)
from metaloom.build.regularisation import meta_terms, nat_price
from metaloom.engine.adapters.base import Adapter
from metaloom.engine.adapters.full import FullAdapter
from metaloom.engine.adapters.lora import LoraAdapter
from metaloom.engine.adapters.model import Structure
from metaloom.engine.adapters.msr import Dense, Kronecker, MsrAdapter
from metaloom.engine.adapters.norms import PerStepNorms
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
from metaloom.engine.learned_loss import LearnedLoss
from metaloom.engine.learner import Learner, Rehearsal
from metaloom.engine.losses import LossParameter, SupportLoss
from metaloom.engine.precision import Precision
from metaloom.engine.stopping import StopPoints
from metaloom.engine.unroll import Unroll
from metaloom.recipe import (
    AdamWRule,
    DenseSymmetry,
    FullFast,
    HeadFast,
    LoRAFast,
    MSRFast,
    NormBiasFast,
    PartFast,
    Recipe,
    RMSPropRule,
    SGDRule,
    SoftPromptFast,
)
from metaloom.recipe import InnerRule as InnerRuleSection
from metaloom.recipe import Rehearsal as RehearsalSection
from metaloom.recipe.tasks import groups_by_recipe, num_outputs, task_facts
from metaloom.weights import HeldModel


def build_adapter(recipe: Recipe, model: HeldModel, choices: Choices, *, is_learned: bool = True) -> Adapter:
    """What is fast in a model. With shards every rank must call.

    Args:
        is_learned: whether the model is meta-trained: what norms learn for each inner step, and
            symmetries, are not there otherwise.

    Raises:
        CapabilityError: it cannot be fast in this model.
    """
    adapter = _adapter(recipe, model, choices, is_learned=is_learned)
    if recipe.adaptation.head.init == "zero":
        return ZeroHeadAdapter(adapter, task_output(recipe).head)
    return adapter


def _adapter(recipe: Recipe, model: HeldModel, choices: Choices, *, is_learned: bool) -> Adapter:
    fast = recipe.adaptation.fast
    structure, shards = model_structure(model.module), model.shards
    generator = torch.Generator().manual_seed(recipe.seed)
    match fast:
        case FullFast():
            norms = _per_step_norms(recipe) if is_learned else None
            return FullAdapter(model.module, structure=structure, tasks=choices.tasks, norms=norms)
        case MSRFast() if not is_learned:
            return FullAdapter(model.module, structure=structure, tasks=choices.tasks)
        case MSRFast(symmetry=symmetry, layers=layers):
            return MsrAdapter(
                model.module,
                symmetry=Dense(symmetry.rank, symmetry.std)
                if isinstance(symmetry, DenseSymmetry)
                else Kronecker(),
                layers=layers,
                generator=generator,
                structure=structure,
                tasks=choices.tasks,
            )
        case LoRAFast(targets=targets, rank=rank, alpha=alpha):
            return LoraAdapter(
                model.module,
                targets=targets,
                rank=rank,
                alpha=alpha,
                generator=generator,
                rank_stabilized=fast.rslora,
                dropout=fast.dropout,
                whole_modules=fast.modules_to_save,
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
    found = norm_and_bias_parameters(model, norms=fast.norms, biases=fast.biases)
    return list(
        # A stochastic layer is shared: what it tells has its price.
        dict.fromkeys([*(name for name in found if not name.startswith("bottleneck.")), *head])
    )


def _per_step_norms(recipe: Recipe) -> PerStepNorms | None:
    norms = recipe.adaptation.norms
    weights, statistics = norms.weights == "per_step", norms.statistics == "per_step"
    if not (weights or statistics):
        return None
    return PerStepNorms(recipe.adaptation.num_steps, weights, statistics)


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
    recipe: Recipe,
    adapter: Adapter,
    *,
    rate: float,
    grain: Grain,
    learns_loss: bool = True,
    points: StopPoints | None = None,
) -> Unroll:
    """The inner problem with a given rate, fixed or where learned rates start.

    Args:
        points: where it may be broken off; None for nowhere.
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
            support_loss=_support_loss(recipe, loss.learned if learns_loss else ()),
            seed=recipe.seed,
            recompute_blocks=recipe.memory.recompute_blocks,
            head_chunk=recipe.memory.head_chunk,
            criterion=output.criterion,
            head=output.head,
            learned_loss=_learned_loss(recipe) if learns_loss else None,
            bottleneck=nat_price(recipe),
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
        step_weights=step_weights(_step_weights(recipe), adaptation.num_steps),
        terms=meta_terms(recipe),
        head_first=_head_first(recipe, adapter),
        points=points or StopPoints(),
    )


def _head_first(recipe: Recipe, adapter: Adapter) -> HeadFirst | None:
    num_steps = recipe.adaptation.head.first_steps
    if num_steps == 0:
        return None
    return HeadFirst(frozenset(adapter.head_weights(task_output(recipe).head)), num_steps)


def _support_loss(recipe: Recipe, learned: tuple[LossParameter, ...]) -> SupportLoss:
    loss = recipe.adaptation.loss
    return SupportLoss(
        loss.temperature,
        loss.label_smoothing,
        learned,
        num_classes=num_outputs(recipe) if "class_weights" in learned else 0,
        groups=(loss.groups or groups_by_recipe(recipe)) if "group_weights" in learned else (),
    )


def _learned_loss(recipe: Recipe) -> LearnedLoss | None:
    section, num_outputs = recipe.adaptation.learned_loss, task_facts(recipe).num_outputs
    if section is None:
        return None
    assert num_outputs is not None, "a rule of the recipe has seen to it"
    return LearnedLoss(num_outputs, section.width, section.num_layers, recipe.seed)


def _rehearsal(recipe: Recipe, section: RehearsalSection) -> Rehearsal:
    output = rehearsal_output(recipe)
    return Rehearsal(
        section.ratio,
        section.num_samples,
        outer_ratio=section.outer_ratio,
        criterion=output.criterion,
        head=output.head,
    )


def _step_weights(recipe: Recipe) -> Literal["last", "uniform"]:
    """Those at which a training starts."""
    if recipe.maml is None or recipe.maml.step_weights == "last":
        return "last"
    return "uniform"
