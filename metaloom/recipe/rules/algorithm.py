"""Rules about what is learned from adaptations, and how its gradient is computed."""

from metaloom.engine.capabilities import Kind, outer_rehearsal_refusal, refusals, step_weights_refusal
from metaloom.recipe.adaptation import AdamWRule, FullFast, HeadFast
from metaloom.recipe.algorithm import FiniteDifferenceHypergradient, TruncatedHypergradient
from metaloom.recipe.rules.base import Broken, Rule
from metaloom.recipe.schema import Recipe

# The estimators that go back over the inner steps one by one, from fast weights that are kept.
SWEEPS = ("auto", "rematerialized", "mixed_mode", "first_order", "truncated")


def the_estimator_takes_outer_rehearsal(recipe: Recipe) -> Broken:
    rehearsal = recipe.adaptation.rehearsal
    if rehearsal is None or rehearsal.outer_ratio == 0.0:
        return
    reason = outer_rehearsal_refusal(recipe.algorithm.hypergradient.kind)
    if reason is not None:
        yield "adaptation.rehearsal.outer_ratio", f"{rehearsal.outer_ratio}; {reason}"


def full_adaptation_has_no_backbone(recipe: Recipe) -> Broken:
    if isinstance(recipe.adaptation.fast, FullFast) and recipe.algorithm.meta_parameters.backbone:
        yield (
            "algorithm.meta_parameters.backbone",
            "true, but adaptation.fast = full adapts every weight and leaves no backbone; "
            "set it to false (init learns all weights)",
        )


def a_head_of_zero_is_not_learned(recipe: Recipe) -> Broken:
    adaptation = recipe.adaptation
    if (
        isinstance(adaptation.fast, HeadFast)
        and adaptation.head.init == "zero"
        and recipe.algorithm.meta_parameters.init
    ):
        yield (
            "algorithm.meta_parameters.init",
            "true; has no effect, since adaptation.fast = head adapts the head alone, which starts at zero "
            "(adaptation.head.init); set it to false, and backbone to true",
        )


def something_is_learned(recipe: Recipe) -> Broken:
    learned = recipe.algorithm.meta_parameters
    if not (
        learned.init
        or learned.backbone
        or recipe.adaptation.rule.learned != "none"
        or recipe.adaptation.loss.learned
    ):
        yield (
            "algorithm.meta_parameters",
            "init and backbone are both false, adaptation.rule.learned is none and adaptation.loss.learned "
            "is empty, so that nothing is learned; set one of them",
        )


def the_estimator_gives_what_is_learned(recipe: Recipe) -> Broken:
    learned = recipe.algorithm.meta_parameters
    kinds: dict[Kind, bool] = {
        "init": learned.init,
        "backbone": learned.backbone,
        "rates": recipe.adaptation.rule.learned != "none",
        "loss": bool(recipe.adaptation.loss.learned),
    }
    for refusal in refusals(
        recipe.algorithm.hypergradient.kind,
        [kind for kind, is_learned in kinds.items() if is_learned],
        has_proximal=recipe.adaptation.rule.proximal > 0.0,
    ):
        yield "algorithm.hypergradient.kind", refusal


def the_estimator_takes_the_step_weights(recipe: Recipe) -> Broken:
    if recipe.algorithm.step_weights != "last" and recipe.adaptation.num_steps > 1:
        refusal = step_weights_refusal(recipe.algorithm.hypergradient.kind)
        if refusal is not None:
            yield "algorithm.step_weights", f"{recipe.algorithm.step_weights}; {refusal}"


def finite_differences_need_digits(recipe: Recipe) -> Broken:
    compute = recipe.precision.compute
    is_half = compute in ("bfloat16", "float16")
    if isinstance(recipe.algorithm.hypergradient, FiniteDifferenceHypergradient) and is_half:
        yield (
            "precision.compute",
            f"{compute}; algorithm.hypergradient = finite_difference compares gradients at weights a little "
            f"apart, which {compute} rounds to the same; set it to float32",
        )


def a_difference_is_taken(recipe: Recipe) -> Broken:
    estimator = recipe.algorithm.hypergradient
    if (
        isinstance(estimator, FiniteDifferenceHypergradient)
        and estimator.epsilon != FiniteDifferenceHypergradient().epsilon
        and not (recipe.algorithm.meta_parameters.backbone or recipe.adaptation.loss.learned)
    ):
        yield (
            "algorithm.hypergradient.epsilon",
            f"{estimator.epsilon}; has no effect, since the initialisation alone is learned, for which "
            "finite_difference takes no difference; leave it out",
        )


def implicit_has_no_scales(recipe: Recipe) -> Broken:
    if recipe.algorithm.hypergradient.kind == "implicit" and recipe.precision.compute == "float16":
        yield (
            "precision.compute",
            "float16; algorithm.hypergradient = implicit has no scaling of what vanishes or overflows in it; "
            "set it to bfloat16 or float32",
        )


def implicit_needs_a_minimum(recipe: Recipe) -> Broken:
    rule = recipe.adaptation.rule
    is_implicit = recipe.algorithm.hypergradient.kind == "implicit"
    if is_implicit and isinstance(rule, AdamWRule) and rule.weight_decay != 0.0:
        yield (
            "adaptation.rule.weight_decay",
            f"{rule.weight_decay}; is decoupled under adamw, so no term of what is minimised, and "
            "algorithm.hypergradient = implicit takes the end of adaptation for a minimum; set it to 0, or "
            "take adam",
        )


def truncation_is_within_adaptation(recipe: Recipe) -> Broken:
    estimator = recipe.algorithm.hypergradient
    if isinstance(estimator, TruncatedHypergradient) and estimator.num_steps > recipe.adaptation.num_steps:
        yield (
            "algorithm.hypergradient.num_steps",
            f"{estimator.num_steps}; must be at most adaptation.num_steps = {recipe.adaptation.num_steps}",
        )


RULES: tuple[Rule, ...] = (
    the_estimator_takes_outer_rehearsal,
    full_adaptation_has_no_backbone,
    a_head_of_zero_is_not_learned,
    something_is_learned,
    the_estimator_gives_what_is_learned,
    the_estimator_takes_the_step_weights,
    finite_differences_need_digits,
    a_difference_is_taken,
    implicit_has_no_scales,
    implicit_needs_a_minimum,
    truncation_is_within_adaptation,
)
