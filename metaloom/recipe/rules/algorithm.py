"""Rules about what is learned from adaptations, and how its gradient is computed."""

from metaloom.engine.capabilities import (
    ESTIMATORS,
    Kind,
    outer_rehearsal_refusal,
    refusals,
    step_weights_refusal,
)
from metaloom.recipe.adaptation import AdamWRule, FullFast, Head, HeadFast, MSRFast, SupportLoss
from metaloom.recipe.algorithm import (
    CustomAlgorithm,
    FiniteDifferenceHypergradient,
    MAMLAlgorithm,
    ProtonetAlgorithm,
    TruncatedHypergradient,
)
from metaloom.recipe.heads import LogisticAlgorithm, RidgeAlgorithm, SVMAlgorithm
from metaloom.recipe.machine import ShardedSharding
from metaloom.recipe.rules.base import Broken, Rule, of_maml
from metaloom.recipe.schema import Recipe
from metaloom.recipe.tasks import task_facts

EXACT_ESTIMATORS = tuple(
    name
    for name, row in ESTIMATORS.items()
    if all(capability.degree == "exact" for capability in row.of.values())
)
# The estimators that go back over the inner steps one by one, from fast weights that are kept.
SWEEPS = ("auto", "rematerialized", "mixed_mode", "first_order", "truncated")


@of_maml
def the_estimator_takes_outer_rehearsal(recipe: Recipe, maml: MAMLAlgorithm) -> Broken:
    rehearsal = recipe.adaptation.rehearsal
    if rehearsal is None or rehearsal.outer_ratio == 0.0:
        return
    reason = outer_rehearsal_refusal(maml.hypergradient.kind)
    if reason is not None:
        yield "adaptation.rehearsal.outer_ratio", f"{rehearsal.outer_ratio}; {reason}"


@of_maml
def full_adaptation_has_no_backbone(recipe: Recipe, maml: MAMLAlgorithm) -> Broken:
    if isinstance(recipe.adaptation.fast, FullFast) and maml.meta_parameters.backbone:
        yield (
            "algorithm.meta_parameters.backbone",
            "given, but adaptation.fast = full adapts every weight and leaves no backbone; "
            "set it to false (init learns all weights)",
        )


@of_maml
def a_head_of_zero_is_not_learned(recipe: Recipe, maml: MAMLAlgorithm) -> Broken:
    adaptation = recipe.adaptation
    if isinstance(adaptation.fast, HeadFast) and adaptation.head.init == "zero" and maml.meta_parameters.init:
        yield (
            "algorithm.meta_parameters.init",
            "true; has no effect, since adaptation.fast = head adapts the head alone, which starts at zero "
            "(adaptation.head.init); set it to false, and backbone to true",
        )


@of_maml
def something_is_learned(recipe: Recipe, maml: MAMLAlgorithm) -> Broken:
    learned = maml.meta_parameters
    if not (
        learned.init
        or learned.backbone
        or recipe.adaptation.rule.learned != "none"
        or recipe.adaptation.learns_loss
    ):
        yield (
            "algorithm.meta_parameters",
            "init and backbone are both false, adaptation.rule.learned is none and adaptation.loss.learned "
            "is empty, so that nothing is learned; set one of them",
        )


@of_maml
def the_estimator_gives_what_is_learned(recipe: Recipe, maml: MAMLAlgorithm) -> Broken:
    learned = maml.meta_parameters
    kinds: dict[Kind, bool] = {
        "init": learned.init,
        "backbone": bool(learned.backbone) or recipe.adaptation.norms.weights == "per_step",
        "rates": recipe.adaptation.rule.learned != "none",
        "loss": recipe.adaptation.learns_loss,
    }
    for refusal in refusals(
        maml.hypergradient.kind,
        [kind for kind, is_learned in kinds.items() if is_learned],
        has_proximal=recipe.adaptation.rule.proximal > 0.0,
    ):
        yield "algorithm.hypergradient.kind", refusal


@of_maml
def the_estimator_takes_the_step_weights(recipe: Recipe, maml: MAMLAlgorithm) -> Broken:
    if maml.step_weights != "last" and recipe.adaptation.num_steps > 1:
        refusal = step_weights_refusal(maml.hypergradient.kind)
        if refusal is not None:
            yield "algorithm.step_weights", f"{maml.step_weights}; {refusal}"


@of_maml
def annealed_weights_change(recipe: Recipe, maml: MAMLAlgorithm) -> Broken:
    if maml.step_weights == "annealed" and recipe.adaptation.num_steps == 1:
        yield (
            "algorithm.step_weights",
            "annealed; has no effect, since adaptation.num_steps is 1 and there is one query loss; set it to "
            "last",
        )
    if maml.annealing_steps is not None and maml.step_weights != "annealed":
        yield (
            "algorithm.annealing_steps",
            f"{maml.annealing_steps}; has no effect, since algorithm.step_weights is {maml.step_weights}; "
            "leave it out, or set that to annealed",
        )


@of_maml
def the_first_order_comes_before_another(recipe: Recipe, maml: MAMLAlgorithm) -> Broken:
    if maml.first_order_steps == 0:
        return
    kind = maml.hypergradient.kind
    if kind not in EXACT_ESTIMATORS:
        yield (
            "algorithm.first_order_steps",
            f"{maml.first_order_steps}; goes over to exact derivatives, and algorithm.hypergradient = {kind} "
            f"is not; set it to 0, or take one of {', '.join(EXACT_ESTIMATORS)}",
        )
    if maml.first_order_steps >= recipe.outer.num_steps:
        yield (
            "algorithm.first_order_steps",
            f"{maml.first_order_steps}; must be less than outer.num_steps = {recipe.outer.num_steps}; for "
            "first order throughout take algorithm.hypergradient = first_order",
        )
    if recipe.adaptation.learns_loss:
        asker = "loss.learned" if recipe.adaptation.loss.learned else "learned_loss"
        yield (
            "algorithm.first_order_steps",
            f"{maml.first_order_steps}; first_order gives no gradient of loss parameters, which "
            f"adaptation.{asker} asks for; set it to 0, or learn none",
        )


@of_maml
def finite_differences_need_digits(recipe: Recipe, maml: MAMLAlgorithm) -> Broken:
    compute = recipe.precision.compute
    is_half = compute in ("bfloat16", "float16")
    if isinstance(maml.hypergradient, FiniteDifferenceHypergradient) and is_half:
        yield (
            "precision.compute",
            f"{compute}; algorithm.hypergradient = finite_difference compares gradients at weights a little "
            f"apart, which {compute} rounds to the same; set it to float32",
        )


@of_maml
def a_difference_is_taken(recipe: Recipe, maml: MAMLAlgorithm) -> Broken:
    estimator = maml.hypergradient
    if (
        isinstance(estimator, FiniteDifferenceHypergradient)
        and estimator.epsilon != FiniteDifferenceHypergradient().epsilon
        and not (
            maml.meta_parameters.backbone
            or recipe.adaptation.learns_loss
            or recipe.adaptation.norms.weights == "per_step"
        )
    ):
        yield (
            "algorithm.hypergradient.epsilon",
            f"{estimator.epsilon}; has no effect, since the initialisation alone is learned, for which "
            "finite_difference takes no difference; leave it out",
        )


@of_maml
def implicit_has_no_scales(recipe: Recipe, maml: MAMLAlgorithm) -> Broken:
    if maml.hypergradient.kind == "implicit" and recipe.precision.compute == "float16":
        yield (
            "precision.compute",
            "float16; algorithm.hypergradient = implicit has no scaling of what vanishes or overflows in it; "
            "set it to bfloat16 or float32",
        )


@of_maml
def implicit_needs_a_minimum(recipe: Recipe, maml: MAMLAlgorithm) -> Broken:
    rule = recipe.adaptation.rule
    is_implicit = maml.hypergradient.kind == "implicit"
    if is_implicit and isinstance(rule, AdamWRule) and rule.weight_decay != 0.0:
        yield (
            "adaptation.rule.weight_decay",
            f"{rule.weight_decay}; is decoupled under adamw, so no term of what is minimised, and "
            "algorithm.hypergradient = implicit takes the end of adaptation for a minimum; set it to 0, or "
            "take adam",
        )


@of_maml
def truncation_is_within_adaptation(recipe: Recipe, maml: MAMLAlgorithm) -> Broken:
    estimator = maml.hypergradient
    if isinstance(estimator, TruncatedHypergradient) and estimator.num_steps > recipe.adaptation.num_steps:
        yield (
            "algorithm.hypergradient.num_steps",
            f"{estimator.num_steps}; must be at most adaptation.num_steps = {recipe.adaptation.num_steps}",
        )


def algorithms_fit_the_objective(recipe: Recipe) -> Broken:
    objective, algorithm = task_facts(recipe).objective, recipe.algorithm
    classifies = isinstance(algorithm, ProtonetAlgorithm | LogisticAlgorithm | SVMAlgorithm)
    if classifies and objective != "classification":
        yield (
            "algorithm.kind",
            f"{recipe.algorithm.kind} tells classes apart, and the tasks are {objective}; take another, for "
            "example maml",
        )
    if isinstance(algorithm, RidgeAlgorithm) and objective == "language_modelling":
        yield (
            "algorithm.kind",
            f"ridge fits classes or numbers, and the tasks are {objective}; take another, for example maml",
        )


def without_steps_nothing_of_them_is_learned(recipe: Recipe) -> Broken:
    if recipe.maml is not None or isinstance(recipe.algorithm, CustomAlgorithm):
        return
    adaptation, memory, kind = recipe.adaptation, recipe.memory, recipe.algorithm.kind
    because = f"has no effect, since algorithm.kind = {kind} adapts without inner steps"
    if adaptation.rule.learned != "none":
        yield "adaptation.rule.learned", f"{adaptation.rule.learned}; {because}; set it to none"
    if isinstance(adaptation.fast, MSRFast):
        yield (
            "adaptation.fast.kind",
            f"msr; learns no symmetry, since algorithm.kind = {kind}; set it to full",
        )
    if adaptation.loss.learned:
        yield "adaptation.loss.learned", f"{', '.join(adaptation.loss.learned)}; {because}; set it to []"
    for name, default in (("weights", "fast"), ("statistics", "batch")):
        value = getattr(adaptation.norms, name)
        if value != default:
            yield f"adaptation.norms.{name}", f"{value}; {because}; set it to {default}"
    if not recipe.baselines:
        is_given = {"head": adaptation.head != Head(), "loss": adaptation.loss != SupportLoss()}
        for key in (key for key, given in is_given.items() if given):
            yield (
                f"adaptation.{key}",
                f"given; {because}, and evaluation.baselines are none that would adapt so; leave it out",
            )
    if adaptation.learned_loss is not None:
        yield (
            "adaptation.learned_loss",
            f"given; {because}; set it to null, or take algorithm.kind = maml, which is then ARM-LL",
        )
    if adaptation.rehearsal is not None:
        yield "adaptation.rehearsal", f"given; {because}; set it to null"
    if memory.snapshots.kind != "all":
        yield "memory.snapshots.kind", f"{memory.snapshots.kind}; {because}; set it to all"
    if memory.head_chunk is not None:
        yield "memory.head_chunk", f"{memory.head_chunk}; {because}; set it to null"


def without_steps_weights_are_whole(recipe: Recipe) -> Broken:
    if recipe.maml is None and isinstance(recipe.sharding, ShardedSharding):
        yield (
            "sharding.kind",
            f"sharded; algorithm.kind = {recipe.algorithm.kind} computes with whole weights; set it to "
            "replicated or deepspeed_zero",
        )


RULES: tuple[Rule, ...] = (
    the_estimator_takes_outer_rehearsal,
    full_adaptation_has_no_backbone,
    a_head_of_zero_is_not_learned,
    something_is_learned,
    the_estimator_gives_what_is_learned,
    the_estimator_takes_the_step_weights,
    annealed_weights_change,
    the_first_order_comes_before_another,
    finite_differences_need_digits,
    a_difference_is_taken,
    implicit_has_no_scales,
    implicit_needs_a_minimum,
    truncation_is_within_adaptation,
    algorithms_fit_the_objective,
    without_steps_nothing_of_them_is_learned,
    without_steps_weights_are_whole,
)
