"""Rules about the inner loop."""

from metaloom.recipe.adaptation import FullFast, LoRAFast, SGDRule
from metaloom.recipe.algorithm import MAMLAlgorithm
from metaloom.recipe.data import (
    DocumentsData,
)
from metaloom.recipe.model import Conv4Model, GPTModel
from metaloom.recipe.rules.base import Broken, Rule, of_maml, repeated
from metaloom.recipe.rules.model import GPT_BLOCK_LAYERS
from metaloom.recipe.schema import Recipe
from metaloom.recipe.tasks import (
    task_facts,
)


def regression_has_no_classes(recipe: Recipe) -> Broken:
    loss = recipe.adaptation.loss
    if task_facts(recipe).objective != "regression":
        return
    for name, neutral in (("temperature", 1.0), ("label_smoothing", 0.0)):
        if getattr(loss, name) != neutral or name in loss.learned:
            yield (
                f"adaptation.loss.{name}",
                f"{getattr(loss, name)}; belongs to the cross-entropy of classes, and the targets are "
                "numbers; leave it "
                "out",
            )


def lora_needs_gpt(recipe: Recipe) -> Broken:
    if isinstance(recipe.adaptation.fast, LoRAFast) and not isinstance(recipe.model, GPTModel):
        yield (
            "adaptation.fast.kind",
            f"lora adapts linear layers of model.kind = gpt, and model.kind is {recipe.model.kind}; "
            "set adaptation.fast to full",
        )


def lora_targets_differ(recipe: Recipe) -> Broken:
    fast = recipe.adaptation.fast
    if isinstance(fast, LoRAFast) and isinstance(fast.targets, tuple):
        yield from repeated("adaptation.fast.targets", fast.targets)


def lora_targets_exist(recipe: Recipe) -> Broken:
    fast = recipe.adaptation.fast
    if (
        not (isinstance(recipe.model, GPTModel) and isinstance(fast, LoRAFast))
        or fast.targets == "all-linear"
    ):
        return
    layers = [
        f"blocks.{block}.{name}" for block in range(recipe.model.num_layers) for name in GPT_BLOCK_LAYERS
    ]
    layers.append("head")
    endings = ", ".join(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))
    for position, target in enumerate(fast.targets):
        if not any(layer == target or layer.endswith(f".{target}") for layer in layers):
            yield (
                f"adaptation.fast.targets.{position}",
                f"{target!r}; matches no linear layer of the model, which has {endings}",
            )


def lora_rank_is_low(recipe: Recipe) -> Broken:
    fast = recipe.adaptation.fast
    if isinstance(recipe.model, GPTModel) and isinstance(fast, LoRAFast) and fast.rank > recipe.model.width:
        yield (
            "adaptation.fast.rank",
            f"{fast.rank}; must be at most model.width = {recipe.model.width}",
        )


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
    for name, value in (("weights", norms.weights), ("statistics", norms.statistics)):
        path, is_missing = f"adaptation.norms.{name}", not has_batch_norm
        if name == "weights":
            is_missing = is_missing and not isinstance(model, GPTModel)
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
            f"{recipe.data.kind}; "
            "say where the rehearsal data come from",
        )


def rehearsal_has_an_effect(recipe: Recipe) -> Broken:
    rehearsal = recipe.adaptation.rehearsal
    if rehearsal is not None and rehearsal.ratio == rehearsal.outer_ratio == 0.0:
        yield (
            "adaptation.rehearsal.ratio",
            "0.0; nothing is rehearsed, since adaptation.rehearsal.outer_ratio is 0 too; raise one of them, "
            "or set "
            "adaptation.rehearsal to null",
        )


def a_learned_smoothing_starts_above_zero(recipe: Recipe) -> Broken:
    loss = recipe.adaptation.loss
    if "label_smoothing" in loss.learned and loss.label_smoothing == 0.0:
        yield (
            "adaptation.loss.label_smoothing",
            "0.0; is learned as a logit, which has no value at 0; start above it, for example at 0.05",
        )
    yield from repeated("adaptation.loss.learned", loss.learned)


RULES: tuple[Rule, ...] = (
    regression_has_no_classes,
    lora_needs_gpt,
    lora_targets_differ,
    lora_targets_exist,
    lora_rank_is_low,
    nesterov_needs_momentum,
    proximal_needs_a_second_step,
    norms_have_steps,
    norms_per_step_are_learned,
    rehearsal_has_data,
    rehearsal_has_an_effect,
    a_learned_smoothing_starts_above_zero,
)
