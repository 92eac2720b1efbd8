"""Rules about the inner loop."""

import fnmatch

from metaloom.recipe.adaptation import (
    DenseSymmetry,
    FullFast,
    Head,
    HeadFast,
    LearnedRateValues,
    LoRAFast,
    MSRFast,
    NormBiasFast,
    PartFast,
    SGDRule,
    SoftPromptFast,
)
from metaloom.recipe.algorithm import MAMLAlgorithm
from metaloom.recipe.data import (
    ClassesData,
    DocumentsData,
)
from metaloom.recipe.model import (
    Conv4Model,
    CustomModel,
    GPTModel,
    HuggingFaceModel,
    MLPModel,
    SingleLayerModel,
)
from metaloom.recipe.rules.base import Broken, Rule, of_maml, repeated
from metaloom.recipe.rules.model import has_tied_head, linear_layers
from metaloom.recipe.rules.multi_task import named_groups
from metaloom.recipe.schema import Recipe
from metaloom.recipe.tasks import data_sets, task_facts


def regression_has_no_classes(recipe: Recipe) -> Broken:
    loss = recipe.adaptation.loss
    if task_facts(recipe).objective != "regression":
        return
    if "class_weights" in loss.learned:
        yield (
            "adaptation.loss.learned",
            "class_weights; are those of classes, and the targets are numbers; leave them out",
        )
    for name, neutral in (("temperature", 1.0), ("label_smoothing", 0.0)):
        if getattr(loss, name) != neutral or name in loss.learned:
            yield (
                f"adaptation.loss.{name}",
                f"{getattr(loss, name)}; belongs to the cross-entropy of classes, and the targets are "
                "numbers; leave it out",
            )


def lora_targets_differ(recipe: Recipe) -> Broken:
    fast = recipe.adaptation.fast
    if isinstance(fast, LoRAFast) and isinstance(fast.targets, tuple):
        yield from repeated("adaptation.fast.targets", fast.targets)


def lora_targets_exist(recipe: Recipe) -> Broken:
    fast = recipe.adaptation.fast
    if not isinstance(fast, LoRAFast):
        return
    layers = linear_layers(recipe)
    if not layers:
        yield (
            "adaptation.fast.kind",
            f"lora; adapts linear layers, and model.kind = {recipe.model.kind} has none here; set it to full",
        )
        return
    if fast.targets == "all-linear":
        if layers in (["head"], ["layer"]):
            yield (
                "adaptation.fast.targets",
                f"all-linear; leaves the output head out, and model.kind = {recipe.model.kind} has no other "
                f"linear layer; set it to [{layers[0]}], or adaptation.fast to full",
            )
        return
    endings = ", ".join(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))
    for position, target in enumerate(fast.targets):
        if not any(
            layer == target or layer.endswith(f".{target}") or fnmatch.fnmatchcase(layer, target)
            for layer in layers
        ):
            yield (
                f"adaptation.fast.targets.{position}",
                f"{target!r}; matches no linear layer of the model, which has {endings}",
            )


def lora_rank_is_low(recipe: Recipe) -> Broken:
    fast, model = recipe.adaptation.fast, recipe.model
    if isinstance(model, SingleLayerModel | HuggingFaceModel | CustomModel):
        return
    most, key = model.width, "width"
    if isinstance(model, MLPModel) and model.widths is not None:
        most, key = min(model.widths), "widths"
    if isinstance(fast, LoRAFast) and fast.rank > most:
        yield (
            "adaptation.fast.rank",
            f"{fast.rank}; must be at most model.{key} = {most}",
        )


def msr_layers_differ(recipe: Recipe) -> Broken:
    fast = recipe.adaptation.fast
    if isinstance(fast, MSRFast) and isinstance(fast.layers, tuple):
        yield from repeated("adaptation.fast.layers", fast.layers)


@of_maml
def msr_learns_its_symmetry(recipe: Recipe, maml: MAMLAlgorithm) -> Broken:
    if isinstance(recipe.adaptation.fast, MSRFast) and not maml.meta_parameters.backbone:
        yield (
            "algorithm.meta_parameters.backbone",
            "false; under adaptation.fast.kind = msr it is the symmetry, which is what msr is there to "
            "learn; set it to true",
        )


def a_dense_symmetry_makes_the_weights(recipe: Recipe) -> Broken:
    fast = recipe.adaptation.fast
    if (
        isinstance(fast, MSRFast)
        and isinstance(fast.symmetry, DenseSymmetry)
        and recipe.model.weights is not None
    ):
        yield (
            "model.weights",
            "given; adaptation.fast.symmetry = dense makes the weights of layers from random numbers; set it "
            "to kronecker, which starts at the weights, or model.weights to null",
        )


def patterns_differ(recipe: Recipe) -> Broken:
    fast = recipe.adaptation.fast
    if isinstance(fast, PartFast):
        yield from repeated("adaptation.fast.parameters", fast.parameters)


def norms_and_biases_are_there(recipe: Recipe) -> Broken:
    fast, model = recipe.adaptation.fast, recipe.model
    if not isinstance(fast, NormBiasFast):
        return
    has_norms = isinstance(model, GPTModel | HuggingFaceModel | CustomModel) or (
        isinstance(model, Conv4Model) and model.norm != "none"
    )
    if not (fast.norms or fast.biases):
        yield (
            "adaptation.fast.kind",
            "norm_bias, and norms and biases are both false; set one of them, or adaptation.fast to head",
        )
    elif fast.norms and not has_norms:
        yield (
            "adaptation.fast.norms",
            f"true; has no effect, since this model ({model.kind}) has no norms; set it to false",
        )


def soft_prompts_need_a_decoder(recipe: Recipe) -> Broken:
    model = recipe.model
    if not isinstance(recipe.adaptation.fast, SoftPromptFast) or isinstance(model, GPTModel | CustomModel):
        return
    if isinstance(model, HuggingFaceModel):
        if model.task != "causal-lm":
            yield (
                "adaptation.fast.kind",
                f"soft_prompt adapts vectors in front of a text that goes on, and model.task is "
                f"{model.task}, which may be read at the first token; set adaptation.fast to lora",
            )
        return
    yield (
        "adaptation.fast.kind",
        f"soft_prompt adapts vectors in front of a text for model.kind = gpt, hf or custom, and that is "
        f"{model.kind}; set adaptation.fast to full, head, norm_bias or lora",
    )


def the_head_is_apart(recipe: Recipe) -> Broken:
    fast, head = recipe.adaptation.fast, recipe.adaptation.head
    if not has_tied_head(recipe):
        return
    if isinstance(fast, HeadFast) or (isinstance(fast, NormBiasFast) and fast.head):
        where = "adaptation.fast.kind" if isinstance(fast, HeadFast) else "adaptation.fast.head"
        what = "head" if isinstance(fast, HeadFast) else "true"
        yield where, f"{what}; the head's weight is the embedding's too; set model.tied_embeddings to false"
    elif isinstance(fast, FullFast) and head != Head():
        yield (
            "adaptation.head",
            "is about the head alone, whose weight is the embedding's too; set model.tied_embeddings to "
            "false",
        )


def the_head_is_fast(recipe: Recipe) -> Broken:
    fast, head = recipe.adaptation.fast, recipe.adaptation.head
    is_fast = isinstance(fast, FullFast | HeadFast | PartFast)
    is_fast = is_fast or (isinstance(fast, NormBiasFast) and fast.head)
    is_fast = is_fast or (isinstance(fast, LoRAFast) and bool(fast.modules_to_save))
    if head != Head() and not is_fast:
        yield (
            "adaptation.head",
            f"has no effect, since adaptation.fast = {fast.kind} does not adapt the head's own weights; "
            "leave it out",
        )


def other_steps_follow_the_heads(recipe: Recipe) -> Broken:
    first_steps, num_steps = recipe.adaptation.head.first_steps, recipe.adaptation.num_steps
    if first_steps and isinstance(recipe.adaptation.fast, HeadFast):
        yield (
            "adaptation.head.first_steps",
            f"{first_steps}; has no effect, since adaptation.fast = head adapts nothing else; leave it out",
        )
    elif first_steps >= num_steps:
        yield (
            "adaptation.head.first_steps",
            f"{first_steps}; must be less than adaptation.num_steps = {num_steps}, so that the rest adapts "
            "too; lower it, or set adaptation.fast to head",
        )


def rate_values_are_learned(recipe: Recipe) -> Broken:
    rule = recipe.adaptation.rule
    if rule.rates != LearnedRateValues() and rule.learned == "none":
        yield (
            "adaptation.rule.rates",
            "has no effect, since adaptation.rule.learned is none; set that, or leave rates out",
        )
    if rule.rates.spread is not None and rule.rates.spread[0] >= rule.rates.spread[1]:
        low, high = rule.rates.spread
        yield "adaptation.rule.rates.spread", f"[{low}, {high}]; the first must be less than the second"


def nesterov_needs_momentum(recipe: Recipe) -> Broken:
    rule = recipe.adaptation.rule
    if isinstance(rule, SGDRule) and rule.nesterov and rule.momentum == 0.0:
        yield (
            "adaptation.rule.nesterov",
            "true; has no effect, since adaptation.rule.momentum is 0; set momentum, or nesterov to false",
        )


def _reads_off_the_end(recipe: Recipe) -> bool:
    """Whether the estimator reads the proximal term off the end of adaptation."""
    return recipe.maml is not None and recipe.maml.hypergradient.kind == "implicit"


def proximal_needs_a_second_step(recipe: Recipe) -> Broken:
    proximal = recipe.adaptation.rule.proximal
    if (
        proximal != 0.0
        and recipe.adaptation.num_steps == 1
        and recipe.evaluation_num_steps == 1
        and not _reads_off_the_end(recipe)
    ):
        yield (
            "adaptation.rule.proximal",
            f"{proximal}; has no effect, since adaptation.num_steps is 1 and that step starts where it pulls "
            "to; take more steps, or leave it out",
        )


def norms_have_steps(recipe: Recipe) -> Broken:
    norms, model, fast = recipe.adaptation.norms, recipe.model, recipe.adaptation.fast
    has_batch_norm = isinstance(model, Conv4Model) and model.norm == "batch"
    has_norm = isinstance(model, GPTModel) or (isinstance(model, Conv4Model) and model.norm != "none")
    for name, value in (("weights", norms.weights), ("statistics", norms.statistics)):
        path = f"adaptation.norms.{name}"
        is_missing = not (has_norm if name == "weights" else has_batch_norm)
        if value != "per_step":
            continue
        if not isinstance(fast, FullFast):
            yield (
                path,
                f"per_step; is there for adaptation.fast.kind = full, and that is {fast.kind}; leave it out",
            )
        elif is_missing:
            kind = "batch norm" if name == "statistics" else "norm"
            yield path, f"per_step; and model.kind = {model.kind} has no {kind} here; leave it out"
        elif name == "statistics" and fast.tasks == "vmap":
            yield (
                path,
                "per_step; is not counted under adaptation.fast.tasks = vmap; set that to loop or auto",
            )


@of_maml
def norms_per_step_are_learned(recipe: Recipe, maml: MAMLAlgorithm) -> Broken:
    if recipe.adaptation.norms.weights == "per_step" and not maml.meta_parameters.init:
        yield (
            "adaptation.norms.weights",
            "per_step; has no effect, since they are learned with the initialisation, and "
            "algorithm.meta_parameters.init is false; leave it out",
        )


def rehearsal_has_data(recipe: Recipe) -> Broken:
    rehearsal = recipe.adaptation.rehearsal
    if rehearsal is not None and rehearsal.data is None and not isinstance(recipe.data, DocumentsData):
        yield (
            "adaptation.rehearsal.data",
            "null; only data.kind = documents has a split rehearsal of its own, and data.kind is "
            f"{recipe.data.kind}; say where the rehearsal data come from",
        )


def rehearsal_has_an_effect(recipe: Recipe) -> Broken:
    rehearsal = recipe.adaptation.rehearsal
    if rehearsal is not None and rehearsal.ratio == rehearsal.outer_ratio == 0.0:
        yield (
            "adaptation.rehearsal.ratio",
            "0.0; nothing is rehearsed, since adaptation.rehearsal.outer_ratio is 0 too; raise one of them, "
            "or set adaptation.rehearsal to null",
        )


def a_learned_smoothing_starts_above_zero(recipe: Recipe) -> Broken:
    loss = recipe.adaptation.loss
    if "label_smoothing" in loss.learned and loss.label_smoothing == 0.0:
        yield (
            "adaptation.loss.label_smoothing",
            "0.0; is learned as a logit, which has no value at 0; start above it, for example at 0.05",
        )
    yield from repeated("adaptation.loss.learned", loss.learned)


def weighted_classes_are_the_same_in_all_tasks(recipe: Recipe) -> Broken:
    draws = any(isinstance(d, ClassesData) and d.labels != "kept" for d in data_sets(recipe).values())
    if "class_weights" in recipe.adaptation.loss.learned and draws:
        yield (
            "adaptation.loss.learned",
            "class_weights; every task gives its classes other labels, so that none is worth more than "
            "another; set data.labels to kept, or leave them out",
        )


def weighted_groups_are_known(recipe: Recipe) -> Broken:
    loss = recipe.adaptation.loss
    if "group_weights" in loss.learned:
        yield from named_groups(
            recipe,
            loss.groups,
            path="adaptation.loss.groups",
            asker=("adaptation.loss.learned", "group_weights; there is one for each group of tasks"),
            remedy="leave them out",
        )
    elif loss.groups is not None:
        yield (
            "adaptation.loss.groups",
            f"{', '.join(loss.groups)}; has no effect, since adaptation.loss.learned has no group_weights; "
            "leave it out",
        )


RULES: tuple[Rule, ...] = (
    regression_has_no_classes,
    lora_targets_differ,
    lora_targets_exist,
    lora_rank_is_low,
    msr_layers_differ,
    msr_learns_its_symmetry,
    a_dense_symmetry_makes_the_weights,
    patterns_differ,
    norms_and_biases_are_there,
    soft_prompts_need_a_decoder,
    the_head_is_apart,
    the_head_is_fast,
    other_steps_follow_the_heads,
    rate_values_are_learned,
    nesterov_needs_momentum,
    proximal_needs_a_second_step,
    norms_have_steps,
    norms_per_step_are_learned,
    rehearsal_has_data,
    rehearsal_has_an_effect,
    a_learned_smoothing_starts_above_zero,
    weighted_classes_are_the_same_in_all_tasks,
    weighted_groups_are_known,
)
