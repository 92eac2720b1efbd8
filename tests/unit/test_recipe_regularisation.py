"""Rules about what keeps training tasks from being learned by heart, and what is built of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from metaloom.build import Choices, build_algorithm, build_model, outer_settings
from metaloom.engine.algorithms.base import Algorithm
from metaloom.engine.algorithms.inequality import Inequality
from metaloom.engine.algorithms.maml import Maml
from metaloom.engine.algorithms.posterior import Posterior
from metaloom.engine.algorithms.protonet import Protonet
from metaloom.engine.inequality import Measure
from metaloom.engine.outer import update_rule
from metaloom.engine.sharding.replicated import Replicated
from metaloom.engine.terms import EntropyReduction
from metaloom.errors import RecipeError
from metaloom.models.conv4 import Conv4
from metaloom.recipe import ActivationsRegularisation, load_recipe
from tests.commands import RECIPES
from tests.unit.test_recipe import KINDS_OF_DATA

SMOKE, STDLIB = RECIPES / "smoke.yaml", RECIPES / "stdlib-lora.yaml"
OVER_INIT = "regularisation={kind: weights, kinds: [init]}"

OVER_PARTS = ("regularisation=activations", "algorithm.meta_parameters.backbone=true")


@pytest.mark.parametrize(
    ("path", "overrides", "message"),
    [
        (
            SMOKE,
            ["regularisation=weights"],
            "regularisation.kinds: backbone; has no effect, since nothing of that kind is learned; take init",
        ),
        (
            SMOKE,
            ["algorithm=protonet", OVER_INIT],
            "regularisation.kinds: init; has no effect, since nothing of that kind is learned; take backbone",
        ),
        (
            SMOKE,
            ["algorithm.hypergradient=reptile", OVER_INIT],
            "regularisation.kind: weights; is learned by the gradient at what is drawn, and "
            "algorithm.hypergradient = reptile differentiates nothing; take another estimator",
        ),
        (
            STDLIB,
            [
                "algorithm.meta_parameters.backbone=true",
                "regularisation=weights",
                "sharding=sharded",
            ],
            "sharding.kind: sharded; regularisation.kinds = backbone draws whole weights; set it to",
        ),
        (
            SMOKE,
            [*OVER_PARTS, "adaptation.fast=msr"],
            "adaptation.fast.kind: msr; adapts every layer, and that of regularisation = activations has to",
        ),
        (
            SMOKE,
            [*OVER_PARTS, "adaptation.fast={kind: part, parameters: ['*.bias']}"],
            "adaptation.fast.parameters: '*.bias'; matches the layer of regularisation = activations",
        ),
        (
            SMOKE,
            ["algorithm=protonet", "regularisation={kind: entropy, weight: 1.0}"],
            "regularisation.kind: entropy; is a term of the meta-loss of algorithm.kind = maml, before its "
            "inner steps, and that is protonet; take weights, or maml",
        ),
        (
            SMOKE,
            ["algorithm.hypergradient=finite_difference", "regularisation={kind: inequality, weight: 1.0}"],
            "regularisation.kind: inequality; is a term of the meta-loss before adaptation, and "
            "algorithm.hypergradient = finite_difference looks at the fully adapted weights alone; take one "
            "of unrolled, rematerialized, mixed_mode, auto, first_order, truncated",
        ),
        (
            SMOKE,
            ["outer.tasks_per_step=1", "regularisation={kind: inequality, weight: 1.0}"],
            "regularisation.kind: inequality; has no effect, since outer.tasks_per_step is 1; raise that",
        ),
        (
            SMOKE,
            ["regularisation={kind: inequality, weight: 1.0, measure: gini, alpha: 2.0}"],
            "regularisation.alpha: 2.0; has no effect, since regularisation.measure is gini; leave it out",
        ),
        (
            SMOKE,
            ["regularisation={kind: inequality, weight: 1.0, measure: atkinson, alpha: 0.0}"],
            "regularisation.alpha: 0.0; must be above 0 for regularisation.measure = atkinson",
        ),
        (
            SMOKE,
            ["outer.lr_posterior=0.1"],
            "outer.lr_posterior: 0.1; has no effect, since regularisation is not weights; leave it out",
        ),
        (
            SMOKE,
            ["regularisation=activations"],
            "regularisation.kind: activations; its layer is one that tasks share, and "
            "algorithm.meta_parameters.backbone is false; set that to true",
        ),
        (
            SMOKE,
            ["regularisation={kind: activations, after: 1}"],
            "regularisation.after: 1; has no effect, since conv4 has the stochastic layer before its head",
        ),
        (
            SMOKE,
            ["model={kind: mlp, num_layers: 2}", "regularisation={kind: activations, after: 3}"],
            "regularisation.after: 3; must be at most model.num_layers = 2",
        ),
        (
            SMOKE,
            ["algorithm=protonet", "regularisation=activations"],
            "regularisation.kind: activations; is a part of adaptation by inner steps, and algorithm.kind = "
            "protonet takes none; take weights",
        ),
        (
            STDLIB,
            ["regularisation=activations", "sharding=sharded"],
            "regularisation.kind: activations; is a layer of mlp and conv4, and model.kind is gpt; take",
        ),
        (
            STDLIB,
            ["regularisation=activations", "sharding=sharded"],
            "sharding.kind: sharded; regularisation = activations computes with whole weights; set it to",
        ),
        (
            STDLIB,
            ["regularisation=activations"],
            "adaptation.rehearsal: given; regularisation = activations has none; set it to null",
        ),
        (SMOKE, ["regularisation=entropy"], "regularisation.weight: missing"),
    ],
)
def test_what_has_no_effect_or_cannot_be_is_refused(
    path: Path, overrides: Sequence[str], message: str
) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(path, overrides)


SHARES = ("regularisation=activations", "algorithm.meta_parameters.backbone=true")


@pytest.mark.parametrize(("targets", "named"), [("all-linear", "all-linear"), ("[head, linear]", "linear")])
def test_no_low_rank_adapter_stands_beside_a_stochastic_layer(targets: str, named: str) -> None:
    message = (
        f"adaptation.fast.targets: {named}; adapts the layer of regularisation = activations, which has to "
        "be shared; name others, such as head"
    )
    model = "model={kind: mlp, num_layers: 2}"
    fast = f"adaptation.fast={{kind: lora, rank: 1, targets: {targets}}}"
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(SMOKE, [model, fast, *SHARES])


@pytest.mark.parametrize(
    "fast",
    ["head", "norm_bias", "{kind: part, parameters: [head.*]}", "{kind: lora, rank: 1, targets: [head]}"],
)
def test_a_stochastic_layer_is_learned_and_never_fast(fast: str) -> None:
    found = built(*SHARES, f"adaptation.fast={fast}")
    assert isinstance(found, Maml)
    meta = found.meta_parameters()
    assert {name for name in meta if "bottleneck" in name} == {
        "backbone.bottleneck.linear.weight",
        "backbone.bottleneck.linear.bias",
    }
    assert not any("bottleneck" in name for name in found.unroll.learner.init(meta, 1))


def test_entropies_need_classes() -> None:
    (numbers,) = (data for data in KINDS_OF_DATA if "number" in str(data) and "groups" in str(data))
    overrides = [f"data={numbers}", "model=mlp", "regularisation={kind: entropy, weight: 1.0}"]
    with pytest.raises(RecipeError, match=r"regularisation\.kind: entropy; is that of classes, and"):
        load_recipe(SMOKE, overrides)


def built(*overrides: str) -> Algorithm:
    recipe = load_recipe(SMOKE, overrides)
    device = torch.device("cpu")
    model = build_model(recipe, device, Replicated())
    return build_algorithm(recipe, model, Choices(), device)


def test_a_recipe_gives_a_posterior_its_options() -> None:
    values = "beta: 0.5, initial_std: 0.2, prior_std: 3.0, samples: per_task"
    found = built("algorithm=protonet", f"regularisation={{kind: weights, {values}}}", "seed=4")
    assert isinstance(found, Posterior)
    assert isinstance(found.inner, Protonet)
    assert (found.kinds, found.beta, found.initial_std) == (("backbone.",), 0.5, 0.2)
    assert (found.prior_std, found.samples, found.seed) == (3.0, "per_task", 4)


def test_a_recipe_gives_terms_their_weights() -> None:
    found = built("regularisation={kind: entropy, weight: 0.25}")
    assert isinstance(found, Maml)
    assert found.unroll.terms == (EntropyReduction(0.25),)
    found = built("regularisation={kind: inequality, weight: 0.25, measure: atkinson, alpha: 2.0}")
    assert isinstance(found, Inequality)
    assert (found.measure, found.weight, found.inner.unroll.terms) == (Measure("atkinson", 2.0), 0.25, ())
    found = built("regularisation={kind: inequality, weight: 1.0}")
    assert isinstance(found, Inequality)
    assert found.measure == Measure("theil")


def test_a_recipe_gives_a_model_its_stochastic_layer() -> None:
    section = ActivationsRegularisation(beta=0.5, width=3)
    recipe = load_recipe(SMOKE).model_copy(update={"regularisation": section})
    device = torch.device("cpu")
    network = build_model(recipe, device, Replicated()).module
    assert isinstance(network, Conv4)
    assert (network.bottleneck is not None, network.head.in_features) == (True, 3)
    algorithm = build_algorithm(recipe, build_model(recipe, device, Replicated()), Choices(), device)
    assert isinstance(algorithm, Maml)
    assert algorithm.unroll.learner.bottleneck == 0.5
    assert "kl_after" in algorithm.metric_names


def test_without_regularisation_an_algorithm_is_as_it_was() -> None:
    found = built()
    assert isinstance(found, Maml)
    assert found.unroll.terms == ()


def test_spreads_have_a_rate_of_their_own_and_no_weight_decay() -> None:
    rate = ("outer.optimizer.weight_decay=0.1", "outer.optimizer.lr=0.5")
    for extra, expected in ((("outer.lr_posterior=0.01",), 0.01), ((), 0.5)):
        recipe = load_recipe(SMOKE, (OVER_INIT, *rate, *extra))
        meta = {"init.w": torch.zeros(2, 2), "posterior.init.w": torch.zeros(2, 2)}
        rule = update_rule(meta, outer_settings(recipe))
        assert rule.lr == {"init.w": 0.5, "posterior.init.w": expected}
        assert rule.weight_decay == {"init.w": 0.1, "posterior.init.w": 0.0}
