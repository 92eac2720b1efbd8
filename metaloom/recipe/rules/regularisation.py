"""Rules about what keeps training tasks from being learned by heart."""

import fnmatch

from metaloom.engine.capabilities import ESTIMATORS
from metaloom.recipe.adaptation import LoRAFast, MSRFast, PartFast
from metaloom.recipe.algorithm import MAMLAlgorithm
from metaloom.recipe.machine import ShardedSharding
from metaloom.recipe.model import Conv4Model, MLPModel
from metaloom.recipe.regularisation import (
    ActivationsRegularisation,
    EntropyRegularisation,
    InequalityRegularisation,
    WeightsRegularisation,
)
from metaloom.recipe.rules.base import Broken, Rule, of_maml
from metaloom.recipe.schema import Recipe
from metaloom.recipe.tasks import task_facts

_LAYER = "bottleneck.linear"  # the stochastic one
WITH_ALPHA = ("generalized_entropy", "atkinson")


def what_is_drawn_is_learned(recipe: Recipe) -> Broken:
    section = recipe.regularisation
    if not isinstance(section, WeightsRegularisation):
        return
    learned = ["backbone"]
    if recipe.maml is not None:
        chosen = recipe.maml.meta_parameters
        learned = [kind for kind in ("backbone", "init") if getattr(chosen, kind)]
    for kind in section.kinds:
        if kind not in learned:
            yield (
                "regularisation.kinds",
                f"{kind}; has no effect, since nothing of that kind is learned; take "
                f"{' or '.join(learned) or 'another regularisation'}",
            )


def what_is_drawn_has_a_gradient(recipe: Recipe) -> Broken:
    section, maml = recipe.regularisation, recipe.maml
    if (
        isinstance(section, WeightsRegularisation)
        and maml is not None
        and maml.hypergradient.kind == "reptile"
    ):
        yield (
            "regularisation.kind",
            "weights; is learned by the gradient at what is drawn, and algorithm.hypergradient = reptile "
            "differentiates nothing; take another estimator",
        )


def what_is_drawn_is_whole(recipe: Recipe) -> Broken:
    section = recipe.regularisation
    if (
        isinstance(section, WeightsRegularisation)
        and "backbone" in section.kinds
        and isinstance(recipe.sharding, ShardedSharding)
    ):
        yield (
            "sharding.kind",
            "sharded; regularisation.kinds = backbone draws whole weights; set it to replicated or "
            "deepspeed_zero",
        )


def a_stochastic_layer_has_a_place(recipe: Recipe) -> Broken:
    section, model = recipe.regularisation, recipe.model
    if not isinstance(section, ActivationsRegularisation):
        return
    if not isinstance(model, MLPModel | Conv4Model):
        yield (
            "regularisation.kind",
            f"activations; is a layer of mlp and conv4, and model.kind is {model.kind}; take another",
        )
    if isinstance(model, Conv4Model) and section.after is not None:
        yield (
            "regularisation.after",
            f"{section.after}; has no effect, since conv4 has the stochastic layer before its head; leave it "
            "out",
        )
    if isinstance(model, MLPModel) and section.after is not None and section.after > model.num_layers:
        yield (
            "regularisation.after",
            f"{section.after}; must be at most model.num_layers = {model.num_layers}",
        )
    if recipe.adaptation.rehearsal is not None:
        yield "adaptation.rehearsal", "given; regularisation = activations has none; set it to null"


def a_stochastic_layer_is_shared(recipe: Recipe) -> Broken:
    section = recipe.regularisation
    if not isinstance(section, ActivationsRegularisation):
        return
    if recipe.maml is None:
        yield (
            "regularisation.kind",
            f"activations; is a part of adaptation by inner steps, and algorithm.kind = "
            f"{recipe.algorithm.kind} takes none; take weights",
        )
    elif not recipe.maml.meta_parameters.backbone:
        yield (
            "regularisation.kind",
            "activations; its layer is one that tasks share, and algorithm.meta_parameters.backbone is "
            "false; set that to true, with an adaptation.fast that leaves weights to share",
        )
    fast = recipe.adaptation.fast
    if isinstance(fast, MSRFast):
        yield (
            "adaptation.fast.kind",
            "msr; adapts every layer, and that of regularisation = activations has to be shared; take part, "
            "head or norm_bias",
        )
    if isinstance(fast, PartFast):
        layer = (f"{_LAYER}.weight", f"{_LAYER}.bias")
        for pattern in fast.parameters:
            if any(fnmatch.fnmatchcase(name, pattern) for name in layer):
                yield (
                    "adaptation.fast.parameters",
                    f"{pattern!r}; matches the layer of regularisation = activations, which has to be "
                    "shared; name others",
                )
    if isinstance(fast, LoRAFast):
        targets = ("all-linear",) if fast.targets == "all-linear" else fast.targets
        for target in targets:
            if target == "all-linear" or f".{_LAYER}".endswith(f".{target}"):
                yield (
                    "adaptation.fast.targets",
                    f"{target}; adapts the layer of regularisation = activations, which has to be shared; "
                    "name others, such as head",
                )
    if isinstance(recipe.sharding, ShardedSharding):
        yield (
            "sharding.kind",
            "sharded; regularisation = activations computes with whole weights; set it to replicated or "
            "deepspeed_zero",
        )


def terms_before_adaptation_need_steps(recipe: Recipe) -> Broken:
    section = recipe.regularisation
    if isinstance(section, EntropyRegularisation | InequalityRegularisation) and recipe.maml is None:
        yield (
            "regularisation.kind",
            f"{section.kind}; is a term of the meta-loss of algorithm.kind = maml, before its inner steps, "
            f"and that is {recipe.algorithm.kind}; take weights, or maml",
        )


@of_maml
def the_estimator_takes_terms_before_adaptation(recipe: Recipe, maml: MAMLAlgorithm) -> Broken:
    section, estimator = recipe.regularisation, maml.hypergradient.kind
    if (
        isinstance(section, EntropyRegularisation | InequalityRegularisation)
        and ESTIMATORS[estimator].end_only
    ):
        others = ", ".join(name for name, row in ESTIMATORS.items() if not row.end_only)
        yield (
            "regularisation.kind",
            f"{section.kind}; is a term of the meta-loss before adaptation, and algorithm.hypergradient = "
            f"{estimator} looks at the fully adapted weights alone; take one of {others}",
        )


def entropies_are_of_classes(recipe: Recipe) -> Broken:
    objective = task_facts(recipe).objective
    if isinstance(recipe.regularisation, EntropyRegularisation) and objective == "regression":
        yield (
            "regularisation.kind",
            "entropy; is that of classes, and the tasks are regression; take inequality",
        )


def inequality_is_between_tasks(recipe: Recipe) -> Broken:
    section = recipe.regularisation
    if not isinstance(section, InequalityRegularisation):
        return
    if recipe.outer.tasks_per_step == 1:
        yield (
            "regularisation.kind",
            "inequality; has no effect, since outer.tasks_per_step is 1; raise that",
        )
    if section.alpha is not None and section.measure not in WITH_ALPHA:
        yield (
            "regularisation.alpha",
            f"{section.alpha}; has no effect, since regularisation.measure is {section.measure}; leave it "
            f"out, or take one of {', '.join(WITH_ALPHA)}",
        )
    if section.alpha is not None and section.measure == "atkinson" and section.alpha <= 0.0:
        yield (
            "regularisation.alpha",
            f"{section.alpha}; must be above 0 for regularisation.measure = atkinson",
        )


def spreads_are_learned(recipe: Recipe) -> Broken:
    if recipe.outer.lr_posterior is not None and not isinstance(recipe.regularisation, WeightsRegularisation):
        yield (
            "outer.lr_posterior",
            f"{recipe.outer.lr_posterior}; has no effect, since regularisation is not weights; leave it out",
        )


RULES: tuple[Rule, ...] = (
    what_is_drawn_is_learned,
    what_is_drawn_has_a_gradient,
    what_is_drawn_is_whole,
    a_stochastic_layer_has_a_place,
    a_stochastic_layer_is_shared,
    terms_before_adaptation_need_steps,
    the_estimator_takes_terms_before_adaptation,
    entropies_are_of_classes,
    inequality_is_between_tasks,
    spreads_are_learned,
)
