"""Rules about validation, evaluation and tracking."""

from metaloom.credentials import has_credentials
from metaloom.recipe.adaptation import HeadFast, WholeFast
from metaloom.recipe.evaluation import MLflowTracking
from metaloom.recipe.machine import ShardedSharding
from metaloom.recipe.model import SingleLayerModel
from metaloom.recipe.rules.base import Broken, Rule, repeated
from metaloom.recipe.rules.model import has_tied_head
from metaloom.recipe.schema import Recipe
from metaloom.recipe.tasks import may_have_groups, task_facts


def tuning_rates_differ(recipe: Recipe) -> Broken:
    factors = recipe.evaluation.tuning.rate_factors
    if len(set(factors)) < len(factors):
        yield (
            "evaluation.tuning.rate_factors",
            f"{list(factors)}; names a factor twice",
        )


def early_stopping_needs_validation(recipe: Recipe) -> Broken:
    if recipe.validation.early_stopping is not None and recipe.validation.every_steps is None:
        yield (
            "validation.early_stopping",
            "counts validations, and validation.every_steps is null, so there are none; "
            "set validation.every_steps, or validation.early_stopping to null",
        )


def rates_exist_for_each_evaluation_step(recipe: Recipe) -> Broken:
    if recipe.adaptation.rule.learned == "per_tensor_per_step" and recipe.evaluation.num_steps is not None:
        trained, evaluated = recipe.adaptation.num_steps, recipe.evaluation.num_steps
        if evaluated > trained:
            yield (
                "evaluation.num_steps",
                f"{evaluated}; adaptation.rule.learned = per_tensor_per_step has rates for "
                f"adaptation.num_steps = {trained} steps only; lower it, or learn per_tensor rates",
            )


def pretrained_baseline_needs_pretrain(recipe: Recipe) -> Broken:
    if "pretrained" in (recipe.evaluation.baselines or ()) and recipe.pretrain is None:
        yield (
            "evaluation.baselines",
            "'pretrained' needs a pretrain section, and pretrain is null; remove it from the list",
        )


def baselines_differ(recipe: Recipe) -> Broken:
    yield from repeated("evaluation.baselines", recipe.evaluation.baselines or ())


def a_linear_probe_has_a_head(recipe: Recipe) -> Broken:
    if "linear_probe" not in recipe.baselines:
        return
    if isinstance(recipe.adaptation.fast, HeadFast):
        yield (
            "evaluation.baselines",
            "'linear_probe' adapts the head alone, as all baselines do under adaptation.fast = head, and is "
            f"{recipe.transferred} then; take that",
        )
    elif isinstance(recipe.model, SingleLayerModel):
        yield (
            "evaluation.baselines",
            "'linear_probe' adapts the head alone, and model.kind = single_layer has nothing before it; "
            "remove it from the list",
        )
    elif has_tied_head(recipe):
        yield (
            "evaluation.baselines",
            "'linear_probe' adapts the head alone, whose weight is the embedding's too; set "
            "model.tied_embeddings to false, or remove it from the list",
        )


def fine_tuning_has_whole_weights(recipe: Recipe) -> Broken:
    if "fine_tuned" not in recipe.baselines:
        return
    fast = recipe.adaptation.fast
    if isinstance(fast, WholeFast):
        yield (
            "evaluation.baselines",
            f"'fine_tuned' adapts all weights, as all baselines do under adaptation.fast = {fast.kind}, and "
            f"is {recipe.transferred} then; take that",
        )
    elif isinstance(recipe.sharding, ShardedSharding):
        yield (
            "evaluation.baselines",
            "'fine_tuned' gives every task a whole copy of all weights, and sharding.kind is sharded; remove "
            "it from the list",
        )


def validations_choose_the_best(recipe: Recipe) -> Broken:
    best_by, keep_best = recipe.validation.best_by, recipe.checkpoint.keep_best
    if recipe.validation.every_steps is None:
        reason = "has no effect, since validation.every_steps is null and nothing is validated; set that"
        if best_by != "loss":
            yield "validation.best_by", f"{best_by}; {reason}"
        if keep_best != 1:
            yield "checkpoint.keep_best", f"{keep_best}; {reason}"
    elif best_by.endswith("accuracy") and task_facts(recipe).objective == "regression":
        yield "validation.best_by", f"{best_by}; a regression has a loss alone; set it to loss"
    elif best_by.startswith("worst_group") and not may_have_groups(recipe):
        yield (
            "validation.best_by",
            f"{best_by}; these tasks have no groups; set it to loss or accuracy, or take data.kind groups or "
            "mixture",
        )


def checkpoint_url_has_no_secret(recipe: Recipe) -> Broken:
    url = recipe.checkpoint.url
    if url is not None and has_credentials(url):
        yield (
            "checkpoint.url",
            "holds a user name, password or token (not shown), and a recipe is stored with each run; remove "
            "it: credentials come from the environment, as those of data.url do",
        )


def tracking_uri_has_no_secret(recipe: Recipe) -> Broken:
    tracking = recipe.tracking
    if isinstance(tracking, MLflowTracking) and tracking.uri is not None and has_credentials(tracking.uri):
        yield (
            "tracking.uri",
            "holds a user name, password or token (not shown), and a recipe is stored with each run; "
            "remove it, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
            "or MLFLOW_TRACKING_TOKEN, in the environment",
        )


RULES: tuple[Rule, ...] = (
    tuning_rates_differ,
    early_stopping_needs_validation,
    rates_exist_for_each_evaluation_step,
    pretrained_baseline_needs_pretrain,
    baselines_differ,
    a_linear_probe_has_a_head,
    fine_tuning_has_whole_weights,
    validations_choose_the_best,
    checkpoint_url_has_no_secret,
    tracking_uri_has_no_secret,
)
