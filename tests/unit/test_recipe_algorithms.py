"""Rules about algorithms whose adaptation takes no steps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from metaloom.errors import CapabilityError, RecipeError
from metaloom.recipe import RidgeAlgorithm, load_recipe
from metaloom.recipe.schema import maml_of
from metaloom.recipe.tasks import num_in_context, positions_in_context, tokens_per_task
from tests.commands import RECIPES

SMOKE, STDLIB = RECIPES / "smoke.yaml", RECIPES / "stdlib-lora.yaml"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["adaptation.rule.learned=shared"],
            "adaptation.rule.learned: shared; has no effect, since algorithm.kind = protonet adapts without "
            "inner steps; set it to none",
        ),
        (
            ["adaptation.loss={learned: [temperature]}"],
            "adaptation.loss.learned: temperature; has no effect, since algorithm.kind = protonet",
        ),
        (
            ["memory.snapshots={kind: binomial, num_slots: 2}"],
            "memory.snapshots.kind: binomial; has no effect, since algorithm.kind = protonet",
        ),
        (["memory.head_chunk=8"], "memory.head_chunk: 8; has no effect, since algorithm.kind = protonet"),
        (
            ["sharding=sharded"],
            "sharding.kind: sharded; algorithm.kind = protonet computes with whole weights; set it to",
        ),
    ],
)
def test_what_has_no_effect_without_steps_is_refused(overrides: Sequence[str], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(SMOKE, ["algorithm=protonet", *overrides])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["algorithm.step_weights=annealed"],
            "algorithm.step_weights: annealed; has no effect, since adaptation.num_steps is 1 and there is "
            "one query loss; set it to last",
        ),
        (
            ["algorithm.annealing_steps=3"],
            "algorithm.annealing_steps: 3; has no effect, since algorithm.step_weights is last; leave it out",
        ),
        (
            ["algorithm={first_order_steps: 2, hypergradient: reptile}"],
            "algorithm.first_order_steps: 2; goes over to exact derivatives, and algorithm.hypergradient = "
            "reptile is not; set it to 0, or take one of unrolled, rematerialized, mixed_mode, auto",
        ),
        (
            ["algorithm.first_order_steps=6"],
            "algorithm.first_order_steps: 6; must be less than outer.num_steps = 6; for first order "
            "throughout take algorithm.hypergradient = first_order",
        ),
        (
            ["algorithm.first_order_steps=2", "adaptation.loss={learned: [temperature]}"],
            "algorithm.first_order_steps: 2; first_order gives no gradient of loss parameters, which "
            "adaptation.loss.learned asks for; set it to 0, or learn none",
        ),
        (
            ["algorithm.first_order_steps=2", "adaptation.learned_loss={}"],
            "algorithm.first_order_steps: 2; first_order gives no gradient of loss parameters, which "
            "adaptation.learned_loss asks for; set it to 0, or learn none",
        ),
        (
            ["adaptation.norms.weights=per_step", "algorithm.meta_parameters.init=false"],
            "adaptation.norms.weights: per_step; has no effect, since they are learned with the "
            "initialisation, and algorithm.meta_parameters.init is false; leave it out",
        ),
        (
            ["adaptation.norms.weights=per_step", "algorithm.hypergradient=reptile"],
            "algorithm.hypergradient.kind: reptile gives no gradient of the backbone",
        ),
        (
            ["adaptation.norms.weights=per_step", "model.norm=none"],
            "adaptation.norms.weights: per_step; and model.kind = conv4 has no norm here; leave it out",
        ),
        (
            ["adaptation.norms.statistics=per_step", "model.norm=none"],
            "adaptation.norms.statistics: per_step; and model.kind = conv4 has no batch norm here; leave it",
        ),
        (
            ["adaptation.norms.statistics=per_step", "adaptation.fast.tasks=vmap"],
            "adaptation.norms.statistics: per_step; is not counted under adaptation.fast.tasks = vmap; set",
        ),
        (
            ["algorithm=protonet", "adaptation.norms={weights: per_step, statistics: per_step}"],
            "adaptation.norms.weights: per_step; has no effect, since algorithm.kind = protonet",
        ),
        (
            ["algorithm={step_weights: annealed, hypergradient: implicit}", "adaptation.num_steps=2"],
            "algorithm.step_weights: annealed; implicit looks at the fully adapted weights alone",
        ),
    ],
)
def test_what_changes_in_training_has_an_effect(overrides: Sequence[str], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(SMOKE, overrides)


def test_norms_per_step_are_for_whole_models() -> None:
    message = "adaptation.norms.weights: per_step; is there for adaptation.fast.kind = full, and that is lora"
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(STDLIB, ["adaptation.norms.weights=per_step"])


@pytest.mark.parametrize(
    ("overrides", "ways"),
    [
        (["adaptation.fast=full"], ("loop", "vmap")),
        (["adaptation.fast={kind: full, tasks: vmap}"], ("vmap",)),
        (["adaptation.fast=full", "adaptation.norms.statistics=per_step"], ("loop",)),
        (["adaptation.fast=full", "algorithm=protonet"], ("loop",)),
    ],
)
def test_tasks_are_put_side_by_side_only_in_ways_that_can_be(
    overrides: Sequence[str], ways: tuple[str, ...]
) -> None:
    assert load_recipe(SMOKE, overrides).task_ways == ways


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm=ridge"], "algorithm.kind: ridge; stands on what a model makes of its inputs before its"),
        (["algorithm=arm_cml"], "algorithm.kind: arm_cml; stands on what a model makes of its inputs"),
        (["adaptation.fast=head"], "adaptation.fast.kind: head; adapts a part of a model, and model.kind ="),
        (["adaptation.fast=norm_bias"], "adaptation.fast.kind: norm_bias; adapts a part of a model"),
    ],
)
def test_a_single_layer_has_no_parts(overrides: Sequence[str], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(RECIPES / "msr-conv.yaml", overrides)


@pytest.mark.parametrize("section", ["head={init: zero}", "loss={label_smoothing: 0.3}"])
def test_without_steps_and_baselines_nothing_adapts(section: str) -> None:
    overrides = ["algorithm=protonet", f"adaptation.{section}"]
    key = section.partition("=")[0]
    message = f"adaptation.{key}: given; has no effect, since algorithm.kind = protonet adapts without inner"
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(SMOKE, [*overrides, "evaluation.baselines=[]"])
    load_recipe(SMOKE, [*overrides, "evaluation.baselines=[random]"])


def test_norms_of_every_kind_have_weights_per_step() -> None:
    recipe = load_recipe(SMOKE, ["model.norm=layer", "adaptation.norms.weights=per_step"])
    assert recipe.adaptation.norms.weights == "per_step"


def test_a_difference_is_taken_of_norms_per_step() -> None:
    estimator = "algorithm.hypergradient={kind: finite_difference, epsilon: 0.1}"
    load_recipe(SMOKE, ["adaptation.norms.weights=per_step", estimator])


def test_there_is_a_width_for_each_layer() -> None:
    message = "model.widths: [40]; must have one width for each of model.num_layers = 2"
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(RECIPES / "sinusoid-maml.yaml", ["model.widths=[40]"])


def test_an_algorithm_that_classifies_needs_classes() -> None:
    with pytest.raises(RecipeError) as raised:
        load_recipe(STDLIB, ["algorithm=protonet"])
    message = str(raised.value)
    assert "algorithm.kind: protonet tells classes apart, and the tasks are language_modelling" in message
    assert "adaptation.rehearsal: given; has no effect" in message


REGRESSION = (
    "data={kind: groups, url: x, inputs: {kind: array, shape: [3]}, targets: {kind: number}, "
    "num_support: 3, num_query: 2}",
    "model={kind: mlp}",
)


@pytest.mark.parametrize("kind", ["protonet", "logistic", "svm"])
def test_an_algorithm_that_classifies_takes_no_numbers(kind: str) -> None:
    with pytest.raises(RecipeError, match=f"{kind} tells classes apart, and the tasks are regression"):
        load_recipe(SMOKE, [*REGRESSION, f"algorithm={kind}"])


def test_ridge_takes_classes_and_numbers_and_no_tokens() -> None:
    assert load_recipe(SMOKE, ["algorithm=ridge"]).algorithm == RidgeAlgorithm()
    of_numbers = load_recipe(SMOKE, [*REGRESSION, "algorithm={kind: ridge, bias: 1.0, learned: [bias]}"])
    assert of_numbers.algorithm == RidgeAlgorithm(bias=1.0, learned=("bias",))
    with pytest.raises(RecipeError, match="ridge fits classes or numbers, and the tasks are language"):
        load_recipe(STDLIB, ["algorithm=ridge"])


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (
            "{kind: ridge, bias: 0.5}",
            "algorithm.bias: 0.5; has no effect, since the same number on all logits changes no probability; "
            "set it to 0",
        ),
        ("{kind: ridge, learned: [bias]}", "algorithm.learned: bias has no effect, since the same number on"),
        ("{kind: svm, learned: [scale, scale]}", "algorithm.learned: 'scale' is listed twice; list it once"),
        ("{kind: logistic, regulariser: 0.0}", "algorithm.regulariser: 0.0; must be greater than 0"),
        (
            "{kind: protonet, feature_chunk: 2}",
            "algorithm.feature_chunk: 2; model.norm = batch normalises by the statistics of all of a task's "
            "examples, which chunks would change; set it to null, or model.norm to none",
        ),
    ],
)
def test_options_of_a_head_have_an_effect_and_change_nothing_else(algorithm: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(SMOKE, [f"algorithm={algorithm}"])


def test_plan_and_check_name_algorithms_that_they_do_not_follow() -> None:
    with pytest.raises(
        CapabilityError, match=re.escape("algorithm.kind: protonet adapts without inner steps")
    ):
        maml_of(load_recipe(SMOKE, ["algorithm=protonet"]))


CLASSES_AND_NUMBERS = ("cnp", "attention_learner", "recurrent_learner")
IN_CONTEXT = (
    "algorithm=in_context",
    "adaptation.rule.learned=none",
    "adaptation.rehearsal=null",
    "data.sequence_length=20",
    "outer.lr_rates=null",
)


@pytest.mark.parametrize("kind", CLASSES_AND_NUMBERS)
def test_a_set_learner_needs_a_label_for_each_example(kind: str) -> None:
    message = f"algorithm.kind: {kind} reads examples with a label each, and the tasks are language_modelling"
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(STDLIB, [f"algorithm={kind}", *IN_CONTEXT[1:]])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            "{kind: attention_learner, width: 10, num_heads: 4}",
            "algorithm.width: 10; must be a multiple of algorithm.num_heads = 4, for example 8",
        ),
        (
            "{kind: cnp, min_std: 0.2}",
            "algorithm.min_std: 0.2; has no effect, since the tasks are classification",
        ),
    ],
)
def test_values_of_a_set_learner_fit(section: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(SMOKE, [f"algorithm={section}"])


def test_as_many_support_sequences_are_in_context_as_fit() -> None:
    recipe = load_recipe(STDLIB, IN_CONTEXT)
    assert num_in_context(recipe) == 2  # 2 * 21 + 20 = 62 of 64 positions
    assert positions_in_context(recipe) == 62
    assert tokens_per_task(recipe) == 4 * 62
    assert num_in_context(load_recipe(STDLIB, [*IN_CONTEXT, "data.num_support=1"])) == 1
    assert num_in_context(load_recipe(STDLIB, [*IN_CONTEXT, "model.context_length=61"])) == 1


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        (
            STDLIB,
            [*IN_CONTEXT, "data.sequence_length=32"],
            "model.context_length: 64; 'in_context' (algorithm.kind) needs room for a support sequence and "
            "the token after it, 33 tokens, in front of a query of 32; raise it to 65 or more",
        ),
        (
            STDLIB,
            ["evaluation.baselines=[random, in_context]"],
            "model.context_length: 64; 'in_context' (evaluation.baselines) needs room for",
        ),
        (
            SMOKE,
            ["algorithm=in_context"],
            "algorithm.kind: 'in_context' puts the text before a query in front of it, which data.kind = "
            "documents alone has, and data.kind is classes; take another",
        ),
        (
            SMOKE,
            ["evaluation.baselines=[in_context_equal_data]"],
            "evaluation.baselines: 'in_context_equal_data' puts the text before a query in front of it",
        ),
        (
            STDLIB,
            ["evaluation.baselines=[in_context]", "data.sequence_length=20", "pretrain=null"],
            "evaluation.baselines: 'in_context' reads 62 tokens at once, and no training before has seen so "
            "many; give model.weights or pretrain",
        ),
        (
            STDLIB,
            ["evaluation.baselines=[in_context_equal_compute]", "data.sequence_length=20"],
            "pretrain.sequence_length: null; pre-training sees 20 tokens at once, and "
            "'in_context_equal_compute' (evaluation.baselines) reads 62; set it to 62 or more",
        ),
        (
            STDLIB,
            [
                "evaluation.baselines=[in_context]",
                "data.sequence_length=20",
                "pretrain.sequence_length=62",
                "sharding=sharded",
            ],
            "evaluation.baselines: 'in_context' computes with whole weights, and sharding.kind is sharded",
        ),
        (
            STDLIB,
            ["pretrain.sequence_length=65"],
            "pretrain.sequence_length: 65; must be at most model.context_length = 64",
        ),
    ],
)
def test_what_cannot_be_in_context_is_refused(recipe: Path, overrides: Sequence[str], message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        load_recipe(recipe, overrides)
    assert message in str(raised.value)


def test_given_weights_may_know_the_positions_in_context() -> None:
    recipe = load_recipe(
        STDLIB,
        [
            "evaluation.baselines=[in_context]",
            "data.sequence_length=20",
            "pretrain=null",
            "model.weights=weights.safetensors",
        ],
    )
    assert recipe.baselines == ("in_context",)
