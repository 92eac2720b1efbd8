"""Recipes: every rule is enforced, all mistakes are reported at once and in plain words, and views agree."""

import contextlib
import copy
import hashlib
import json
import re
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metaloom.credentials import has_credentials, without_credentials
from metaloom.errors import RecipeError
from metaloom.recipe import (
    Difference,
    GPTModel,
    ImplicitHypergradient,
    LoRAFast,
    NeumannSolver,
    NoTracking,
    Recipe,
    SGDOptimizer,
    UnrolledHypergradient,
    differences,
    dump_recipe,
    flatten_recipe,
    json_schema,
    load_recipe,
    recipe_digest,
    recipe_from_dict,
)
from metaloom.recipe.schema import maml_of
from metaloom.recipe.tasks import data_urls

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))

GLYPHS = """\
name: tiny
model: {kind: conv4}
data: {kind: classes, url: data/glyphs, n_way: 5, n_shot: 1, n_query: 5}
adaptation:
  fast: full
  rule: {kind: sgd, lr: 0.4}
  num_steps: 3
outer: {num_steps: 100, tasks_per_step: 4}
"""

RECOMPUTED = "memory.recompute_blocks=true"
CLASSES = "{kind: classes, url: x, n_way: 5, n_shot: 1, n_query: 5}"
ARRAY = "{kind: array, shape: [3]}"
STDLIB = """\
name: tiny
model: {kind: gpt}
data: {kind: documents, url: data/stdlib}
adaptation:
  fast: lora
  rule: {kind: sgd, lr: 0.4}
  num_steps: 3
outer: {num_steps: 100, tasks_per_step: 4}
"""

Load = Callable[..., Recipe]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads a recipe from text, with overrides."""

    def load_text(text: str, *overrides: str) -> Recipe:
        path = tmp_path / "r.yaml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path, overrides)

    return load_text


def report(load: Load, text: str, *overrides: str) -> list[str]:
    """The lines of the one error that a recipe raises, without its first."""
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides)
    head, *lines = str(caught.value).splitlines()
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    assert head.endswith(f"r.yaml has {count}:")
    return [line.strip() for line in lines]


# ---------------------------------------------------------------- the ready recipes


def test_there_are_ready_recipes() -> None:
    names = {path.stem for path in RECIPES}
    assert names >= {
        "faces-arm",
        "glyphs-maml",
        "msr-conv",
        "msr-fc",
        "sinusoid-maml",
        "smoke",
        "stdlib-lora",
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_ready_recipe_is_valid_and_named_as_its_file(path: Path) -> None:
    assert load_recipe(path).name == path.stem


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_dumped_recipe_reads_as_an_equal_one(path: Path, load: Load) -> None:
    recipe = load_recipe(path)
    dumped = dump_recipe(recipe)
    again = load(dumped)
    assert again == recipe
    assert recipe_digest(again) == recipe_digest(recipe)
    assert dump_recipe(again) == dumped


def test_a_dump_spells_out_every_default(load: Load) -> None:
    dumped = yaml.safe_load(dump_recipe(load(GLYPHS)))
    assert dumped["outer"]["optimizer"] == {
        "kind": "adam",
        "lr": 1e-3,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": 0.0,
    }
    assert dumped["algorithm"]["hypergradient"] == {"kind": "auto", "limit_gib": None}
    assert dumped["checkpoint"] == {
        "every_steps": None,
        "every_minutes": 10.0,
        "url": None,
        "keep_last": 2,
        "keep_every": None,
        "keep_best": 1,
        "patience_minutes": 60.0,
    }


@pytest.mark.parametrize("name", ["1e-3", "007", "1_000", "null", "true", "no", "2020-01-01", "0x1f", "1.5"])
def test_text_that_looks_like_another_value_survives_a_dump(name: str, load: Load) -> None:
    recipe = load(GLYPHS, f"name='{name}'")
    assert recipe.name == name
    assert load(dump_recipe(recipe)) == recipe


# ---------------------------------------------------------------- reading values


def test_a_number_in_exponent_form_is_a_float(load: Load) -> None:
    assert load(GLYPHS.replace("lr: 0.4", "lr: 1e-3")).adaptation.rule.lr == 1e-3
    assert load(GLYPHS, "adaptation.rule.lr=5E-1").adaptation.rule.lr == 0.5


def test_underscores_may_group_digits(load: Load) -> None:
    assert load(GLYPHS, "outer.num_steps=10_000").outer.num_steps == 10_000
    assert load(GLYPHS, "name=1_").name == "1_"


def test_a_whole_number_is_accepted_as_a_float(load: Load) -> None:
    lr = load(GLYPHS, "adaptation.rule.lr=1").adaptation.rule.lr
    assert isinstance(lr, float)
    assert lr == 1.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            'seed="3"',
            "seed: '3' is not a whole number; give a whole number of at least 0 and at most 4294967295",
        ),
        ("seed=true", "seed: true is not a whole number; give"),
        ("seed=3.0", "seed: 3.0 is not a whole number; give"),
        ("seed=", "seed: null is not a whole number; give"),
        ("seed=-1", "seed: -1; must be at least 0 and at most 4294967295"),
        ("adaptation.rule.lr=true", "adaptation.rule.lr: true is not a number; give a number greater than 0"),
        (
            "adaptation.rule.lr='0.1'",
            "adaptation.rule.lr: '0.1' is not a number; give a number greater than 0",
        ),
        ("adaptation.rule.lr=.inf", "adaptation.rule.lr: inf is not a finite number; give a number greater"),
        (
            "adaptation.rule.lr=-.inf",
            "adaptation.rule.lr: -inf is not a finite number; give a number greater",
        ),
        ("adaptation.rule.lr=.nan", "adaptation.rule.lr: nan is not a finite number; give a number greater"),
        ("adaptation.rule.lr={a: 1}", "adaptation.rule.lr: a section is not a number; give"),
        ("adaptation.rule.lr=0", "adaptation.rule.lr: 0; must be greater than 0"),
        ("adaptation.rule.momentum=1", "adaptation.rule.momentum: 1; must be at least 0 and less than 1"),
        (
            "adaptation.rule.nesterov=1",
            "adaptation.rule.nesterov: 1 is not true or false; give true or false",
        ),
        ("adaptation.rule.proximal=-1", "adaptation.rule.proximal: -1; must be at least 0"),
        ("adaptation.rule.clip_norm=0", "adaptation.rule.clip_norm: 0; must be greater than 0 (or null)"),
        ("adaptation.rule={kind: adam, lr: 1, eps_root: 0}", "eps_root: 0; must be greater than 0"),
        (
            "adaptation.rule={kind: adamw, lr: 1, betas: [0.9, 1]}",
            "betas.1: 1; must be at least 0 and less th",
        ),
        ("adaptation.rule={kind: rmsprop, lr: 1, alpha: 1}", "alpha: 1; must be at least 0 and less than 1"),
        ("adaptation.rule={kind: rmsprop}", "adaptation.rule.lr: missing; give a number greater than 0"),
        (
            "algorithm.meta_parameters.init=1",
            "meta_parameters.init: 1 is not true or false; give true or false",
        ),
        (
            "algorithm.meta_parameters.init=yes",
            "meta_parameters.init: 'yes' is not true or false; give true or",
        ),
        ("name=3", "name: 3 is not text; give text made of at most 100 letters, digits, '-', '_' and '.'"),
        ("name=a b", "name: 'a b'; must be made of at most 100 letters, digits, '-', '_' and '.', the first"),
        ("data.url=''", "data.url: ''; must be not empty"),
        ("outer.ema=1.0", r"outer.ema: 1.0; must be greater than 0 and less than 1 (or null)"),
        ("outer.micro_batch=0", "outer.micro_batch: 0; must be at least 1 (or null)"),
        ("outer.clip_norm=x", "outer.clip_norm: 'x' is not a number; give a number greater than 0 (or null)"),
        (
            "outer.optimizer.betas=[0.9]",
            "betas: [0.9]; must be a list of 2, each a number of at least 0 and less",
        ),
        ("outer.optimizer.betas=[0.9, 1, 1]", "betas: [0.9, 1, 1]; must be a list of 2, each a number of at"),
        ("outer.optimizer.betas=[0.9, 2]", "outer.optimizer.betas.1: 2; must be at least 0 and less than 1"),
        (
            "evaluation.tuning.rate_factors=[]",
            "rate_factors: []; must be a non-empty list, each item a number gre",
        ),
        (
            "evaluation.tuning.rate_factors=[1, x]",
            "rate_factors.1: 'x' is not a number; give a number greater th",
        ),
        (
            "evaluation.baselines=3",
            "baselines: 3; must be a list, each item one of random, ordinary_equal_data",
        ),
        ("model.num_blocks=5", "model.num_blocks: 5; must be at least 1 and at most 4"),
        ("data.n_way=1", "data.n_way: 1; must be at least 2"),
        ("precision=float32", "precision: 'float32' is not a section; give a section of: compute"),
        (
            "validation.early_stopping=3",
            "3 is not a section; give a section of: patience, min_delta (or null)",
        ),
        (
            "sharding={kind: deepspeed_zero, extra: 3}",
            "sharding.extra: 3; must be a section of keys and plain values",
        ),
        ("sharding={kind: deepspeed_zero, stage: 4}", "sharding.stage: 4; must be at least 1 and at most 3"),
        ("outer.optimizer=3", "outer.optimizer: 3 is not a section; give a section with kind: adam or sgd"),
        ("seed=" + "9" * 5000, "(5002 characters) is not a whole number"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused_in_plain_words(
    load: Load, override: str, message: str
) -> None:
    (line,) = report(load, GLYPHS, override)
    assert line.startswith("(command line)")
    assert message in line


def test_a_list_of_targets_or_all_linear_is_accepted(load: Load) -> None:
    fast = load(STDLIB, "adaptation.fast={kind: lora, targets: [qkv, proj]}").adaptation.fast
    assert isinstance(fast, LoRAFast)
    assert fast.targets == ("qkv", "proj")
    assert load(STDLIB).adaptation.fast == LoRAFast(targets="all-linear")
    (line,) = report(load, STDLIB, "adaptation.fast.targets=all_linear")
    assert "adaptation.fast.targets: 'all_linear'; must be a non-empty list, each item text" in line
    assert line.endswith("or 'all-linear'")


@pytest.mark.parametrize(
    "kind", ["unrolled", "rematerialized", "mixed_mode", "first_order", "finite_difference", "reptile"]
)
def test_a_section_may_be_given_by_its_kind_alone(load: Load, kind: str) -> None:
    short = load(GLYPHS, f"algorithm.hypergradient={kind}")
    assert maml_of(short).hypergradient.kind == kind
    assert short == load(GLYPHS, f"algorithm.hypergradient={{kind: {kind}}}")


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("learned", ["none", "shared", "per_group", "per_tensor_per_step", "per_element"])
def test_every_inner_rule_is_read_with_every_grain_of_learned_rates(
    load: Load, kind: str, learned: str
) -> None:
    recipe = load(GLYPHS, f"adaptation.rule={{kind: {kind}, lr: 0.01, learned: {learned}, clip_norm: 2}}")
    rule = recipe.adaptation.rule
    assert (rule.kind, rule.lr, rule.learned, rule.clip_norm) == (kind, 0.01, learned, 2.0)
    assert load(dump_recipe(recipe)) == recipe


def test_the_epsilon_under_the_root_has_a_stated_default(load: Load) -> None:
    for kind in ("adam", "adamw", "rmsprop"):
        dumped = yaml.safe_load(dump_recipe(load(GLYPHS, f"adaptation.rule={{kind: {kind}, lr: 0.01}}")))
        assert dumped["adaptation"]["rule"]["eps_root"] == 1e-8


def test_a_solver_of_the_implicit_estimator_is_a_section_within_its_section(load: Load) -> None:
    text = "algorithm.hypergradient={kind: implicit, damping: 0.5, solver: {kind: neumann, num_terms: 3}}"
    recipe = load(GLYPHS, text, "adaptation.rule.proximal=1")
    solver = NeumannSolver(num_terms=3, step_size=0.1)
    assert maml_of(recipe).hypergradient == ImplicitHypergradient(solver=solver, damping=0.5)
    assert load(dump_recipe(recipe)) == recipe
    wrong = "algorithm.hypergradient={kind: implicit, solver: newton}"
    (line,) = report(load, GLYPHS, wrong, "adaptation.rule.proximal=1")
    assert "hypergradient.solver: 'newton' is not one of conjugate_gradient, neumann; choose" in line


def test_a_section_without_a_kind_has_that_of_its_default(load: Load) -> None:
    assert load(GLYPHS, "outer.optimizer.lr=0.01").outer.optimizer.kind == "adam"
    assert load(GLYPHS, "launcher.num_processes=2").launcher.kind == "local"
    (line,) = report(load, GLYPHS.replace("{kind: conv4}", "{width: 8}"))
    assert line == "line 2  model.kind: missing; one of: conv4, mlp, single_layer, gpt, hf, custom"


# ---------------------------------------------------------------- keys and kinds


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.widht=3",
            "model.widht: unknown key; did you mean 'width'? (model of kind conv4 has: kind, width",
        ),
        (
            "outr.num_steps=3",
            "outr: unknown key; did you mean 'outer'? (a recipe has: name, seed, model, data",
        ),
        (
            "outer.schedul.decay=cosine",
            "outer.schedul: unknown key; did you mean 'schedule'? (outer has: num_st",
        ),
        ("outer.zzz=3", "outer.zzz: unknown key; (outer has: num_steps, tasks_per_step"),
        ("model.norm=bach", "model.norm: 'bach' is not one of batch, layer, none; did you mean 'batch'?"),
        ("model.norm=null", "model.norm: null is not one of batch, layer, none; choose one of them"),
        (
            "adaptation.rule.learned=per_tensr",
            "'per_tensr' is not one of none, shared, per_group, per_tensor, per_tensor_per_step, "
            "per_element; did you mean 'per_tensor'?",
        ),
        (
            "adaptation.rule.kind=adamm",
            "adaptation.rule.kind: 'adamm' is not one of sgd, adam, adamw, rmsprop; did you mean 'adam'?",
        ),
        (
            "adaptation.rule={kind: adam, lr: 0.1, momentum: 0.9}",
            "adaptation.rule.momentum: unknown key; (adaptation.rule of kind adam has: kind, lr, betas, eps, "
            "eps_root, weight_decay, clip_norm, proximal, learned, rates)",
        ),
        (
            "adaptation.rule={kind: rmsprop, lr: 0.1, nesterov: true}",
            "adaptation.rule.nesterov: unknown key; (adaptation.rule of kind rmsprop has: kind, lr, alpha,",
        ),
        (
            "adaptation.rule={kind: adamw, lr: 0.1, eps_rot: 1e-6}",
            "adaptation.rule.eps_rot: unknown key; did you mean 'eps_root'?",
        ),
        ("algorithm.hypergradient=unroled", "reptile; did you mean 'unrolled'?"),
        ("algorithm.hypergradient.kind=mixed", "reptile; did you mean 'mixed_mode'?"),
        (
            "data.kind=clases",
            "data.kind: 'clases' is not one of classes, groups, documents, episodes, synthetic, mixture; did "
            "you mean 'classes'?",
        ),
        ("tracking=mlfow", "tracking: 'mlfow' is not one of mlflow, none; did you mean 'mlflow'?"),
        (
            "sharding=zero",
            "sharding: 'zero' is not one of replicated, sharded, deepspeed_zero; choose one of them",
        ),
        (
            "evaluation.baselines=[randm]",
            "evaluation.baselines.0: 'randm' is not one of random, ordinary_equal",
        ),
    ],
)
def test_an_unknown_key_or_kind_is_refused_with_the_likely_one(
    load: Load, override: str, message: str
) -> None:
    (line,) = report(load, GLYPHS, override)
    assert message in line


def test_a_misspelt_required_key_is_one_problem_not_two(load: Load) -> None:
    lines = report(load, GLYPHS.replace("num_steps: 3", "num_step: 3"))
    assert [line.split(" (")[0] for line in lines] == [
        "line 7  adaptation.num_step: unknown key; did you mean 'num_steps'?"
    ]


def test_a_misspelt_key_does_not_break_rules_by_its_default(load: Load) -> None:
    lines = report(load, STDLIB, "model.context_lenght=512", "data.sequence_length=256")
    assert len(lines) == 1


def test_missing_keys_are_all_named() -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_from_dict({"outer": {}}, source="a dictionary")
    assert str(caught.value).splitlines() == [
        "a dictionary has 6 problems:",
        "  name: missing; give text made of at most 100 letters, digits, '-', '_' and '.', "
        "the first a letter or digit",
        "  model: missing; give a section with kind: conv4 or mlp or single_layer or gpt or hf or custom",
        "  data: missing; give a section with kind: classes or groups or documents or episodes or synthetic "
        "or mixture",
        "  adaptation: missing; give a section with fast, rule, num_steps",
        "  outer.num_steps: missing; give a whole number of at least 1",
        "  outer.tasks_per_step: missing; give a whole number of at least 1",
    ]


def test_all_problems_come_at_once_each_with_its_line(load: Load) -> None:
    text = """\
name: all wrong
model:
  kind: conv4
  widht: 32
data:
  kind: classes
  url: data/glyphs
  n_shot: 9
  n_query: 5
adaptation:
  fast: full
  rule:
    kind: sgd
    lr: fast
  num_steps: 3
outer:
  num_steps: 10
  tasks_per_step: 4
  optimizer:
    betas:
      - 0.9
      - 9
  schedule:
    warmup_steps: 10
"""
    assert report(load, text, "outer.tasks_per_step=0", "algorithm.meta_parameters.backbone=true") == [
        "line 1          name: 'all wrong'; must be made of at most 100 letters, digits, '-', '_' and '.', "
        "the first a letter or digit",
        "line 4          model.widht: unknown key; did you mean 'width'? "
        "(model of kind conv4 has: kind, width, num_blocks, norm, weights)",
        "line 5          data.n_way: missing; give it, or variable for tasks that differ",
        "line 14         adaptation.rule.lr: 'fast' is not a number; give a number greater than 0",
        "line 22         outer.optimizer.betas.1: 9; must be at least 0 and less than 1",
        "line 24         outer.schedule.warmup_steps: 10; must be less than outer.num_steps = 10",
        "(command line)  outer.tasks_per_step: 0; must be at least 1",
        "(command line)  algorithm.meta_parameters.backbone: given, but adaptation.fast = full adapts every "
        "weight and leaves no backbone; set it to false (init learns all weights)",
    ]


# ---------------------------------------------------------------- rules between values


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (
            STDLIB,
            ["model.width=100", "model.num_heads=8"],
            "model.width: 100; must be a multiple of model.num_heads = 8, for example 96",
        ),
        (
            STDLIB,
            ["model.context_length=64"],
            "data.sequence_length: 128; must be at most model.context_length = 64; shorten the seq",
        ),
        (
            STDLIB,
            ["pretrain={num_steps: 10, batch_size: 4, lr: 1e-3, warmup_steps: 10}"],
            "pretrain.warmup_steps: 10; must be less than pretrain.num_steps = 10",
        ),
        (
            STDLIB,
            ["pretrain={num_steps: 10, batch_size: 4, lr: 1e-3, splits: [train, train]}"],
            "pretrain.splits: 'train' is listed twice; list it once",
        ),
        (
            STDLIB,
            ["adaptation.fast.targets=[qkv, proj, qkv]"],
            "fast.targets: 'qkv' is listed twice; list it once",
        ),
        (
            GLYPHS,
            ["pretrain={num_steps: 10, batch_size: 4, lr: 1e-3}"],
            "pretrain: only for model.kind = gpt, and model.kind is conv4; set pretrain to null",
        ),
        (
            GLYPHS,
            ["adaptation.fast=lora"],
            "adaptation.fast.targets: all-linear; leaves the output head out, and model.kind = conv4 has no "
            "other linear layer; set it to [head], or adaptation.fast to full",
        ),
        (
            GLYPHS,
            ["adaptation.rehearsal={}"],
            "adaptation.rehearsal.data: null; only data.kind = documents has a split rehearsal of its own, "
            "and data.kind is classes; say where the rehearsal data come from",
        ),
        (
            GLYPHS,
            ["model=gpt"],
            "model.kind: gpt reads texts, and data (kind classes) gives images; set model.kind to conv4, or",
        ),
        (
            GLYPHS,
            ["data={kind: documents, url: data/stdlib}"],
            "model.kind: conv4 reads images, and data (kind documents) gives texts; set model.kind to gpt, "
            "or",
        ),
        (
            GLYPHS,
            ["algorithm.meta_parameters.backbone=true"],
            "algorithm.meta_parameters.backbone: given, but adaptation.fast = full adapts every weight",
        ),
        (
            STDLIB,
            ["algorithm.meta_parameters.init=false"],
            "algorithm.meta_parameters: init and backbone are both false, adaptation.rule.learned is none",
        ),
        (
            STDLIB,
            ["adaptation.fast={kind: lora, targets: [qkvv]}"],
            "adaptation.fast.targets.0: 'qkvv'; matches no linear layer of the model, which has qkv, proj",
        ),
        (
            STDLIB,
            ["adaptation.fast={kind: lora, rank: 100000}"],
            "adaptation.fast.rank: 100000; must be at most model.width",
        ),
        (
            GLYPHS,
            ["adaptation.fast={kind: part, parameters: ['*.bias', '*.bias']}"],
            "adaptation.fast.parameters: '*.bias' is listed twice; list it once",
        ),
        (
            GLYPHS,
            ["adaptation.fast={kind: norm_bias, norms: false, biases: false}"],
            "adaptation.fast.kind: norm_bias, and norms and biases are both false; set one of them",
        ),
        (
            GLYPHS,
            ["adaptation.fast=norm_bias", "model.norm=none"],
            "adaptation.fast.norms: true; has no effect, since this model (conv4) has no norms; set it to "
            "false",
        ),
        (
            GLYPHS,
            ["adaptation.fast=soft_prompt"],
            "adaptation.fast.kind: soft_prompt adapts vectors in front of a text for model.kind = gpt,",
        ),
        (
            STDLIB,
            ["adaptation.fast={kind: soft_prompt, num_tokens: 1}", "data.sequence_length=128"],
            "data.sequence_length: 128; must be at most model.context_length = 128 - "
            "adaptation.fast.num_tokens = 1; shorten",
        ),
        (
            STDLIB,
            ["adaptation.fast=head"],
            "adaptation.fast.kind: head; the head's weight is the embedding's too; set model.tied_embeddings",
        ),
        (
            STDLIB,
            ["adaptation.fast={kind: norm_bias, head: true}"],
            "adaptation.fast.head: true; the head's weight is the embedding's too; set model.tied_embeddings",
        ),
        (
            STDLIB,
            ["adaptation.fast=full", "adaptation.head.init=zero", "algorithm.meta_parameters.backbone=false"],
            "adaptation.head: is about the head alone, whose weight is the embedding's too; set "
            "model.tied_em",
        ),
        (
            GLYPHS,
            ["adaptation.fast=norm_bias", "adaptation.head.init=zero"],
            "adaptation.head: has no effect, since adaptation.fast = norm_bias does not adapt the head's own "
            "weights; leave it out",
        ),
        (
            GLYPHS,
            ["adaptation.fast=head", "adaptation.head.first_steps=1"],
            "adaptation.head.first_steps: 1; has no effect, since adaptation.fast = head adapts nothing else",
        ),
        (
            GLYPHS,
            ["adaptation.num_steps=3", "adaptation.head.first_steps=3"],
            "adaptation.head.first_steps: 3; must be less than adaptation.num_steps = 3, so that the rest ad",
        ),
        (
            GLYPHS,
            ["adaptation.fast=head", "adaptation.head.init=zero"],
            "algorithm.meta_parameters.init: true; has no effect, since adaptation.fast = head adapts the "
            "head alone, which starts at zero",
        ),
        (
            GLYPHS,
            ["adaptation.rule.rates.scale=linear", "adaptation.rule.learned=none"],
            "adaptation.rule.rates: has no effect, since adaptation.rule.learned is none; set that, or leave",
        ),
        (
            GLYPHS,
            ["adaptation.rule.rates.spread=[0.1, 0.005]", "adaptation.rule.learned=per_element"],
            "adaptation.rule.rates.spread: [0.1, 0.005]; the first must be less than the second",
        ),
        (
            GLYPHS,
            [
                "adaptation.fast={kind: part, parameters: [head.*], tasks: loop}",
                "sharding=sharded",
                "memory.recompute_blocks=true",
            ],
            "adaptation.fast.tasks: loop; sharding.kind = sharded gathers every weight for each pass, and "
            "this",
        ),
        (
            GLYPHS,
            ["outer.lr_rates=0.5", "adaptation.rule.learned=none"],
            "outer.lr_rates: 0.5; has no effect, since adaptation.rule.learned is none; leave it out",
        ),
        (
            GLYPHS,
            ["outer.lr_parts={init.head.*: 0.1, rates: 0.5}"],
            "outer.lr_parts.rates: 0.5; is given as outer.lr_rates; move it there",
        ),
        (
            GLYPHS,
            ["outer.lr_parts={init: 0}"],
            "outer.lr_parts.init: 0; must be greater than 0",
        ),
        (
            STDLIB,
            ["algorithm.meta_parameters.backbone=[]"],
            "algorithm.meta_parameters.backbone: []; must be true or false, or a non-empty list",
        ),
        (
            GLYPHS,
            ["adaptation.rule.nesterov=true"],
            "adaptation.rule.nesterov: true; has no effect, since adaptation.rule.momentum is 0; set "
            "momentum, or nesterov to false",
        ),
        (
            GLYPHS,
            ["adaptation.rule={kind: adam, lr: 0.1, proximal: 0.5}", "adaptation.num_steps=1"],
            "adaptation.rule.proximal: 0.5; has no effect, since adaptation.num_steps is 1 and that step "
            "starts where it pulls to; take more steps, or leave it out",
        ),
        (
            GLYPHS,
            ["evaluation.tuning.rate_factors=[1.0, 1.0]"],
            "evaluation.tuning.rate_factors: [1.0, 1.0]; names a factor twice",
        ),
        (
            GLYPHS,
            ["algorithm.hypergradient=reptile", "adaptation.rule.learned=shared"],
            "algorithm.hypergradient.kind: reptile gives no gradient of learned inner rates: it moves the "
            "initialisation towards the adapted weights and differentiates nothing; unrolled, remat",
        ),
        (
            STDLIB,
            ["algorithm.hypergradient=reptile", "algorithm.meta_parameters.backbone=true"],
            "algorithm.hypergradient.kind: reptile gives no gradient of the backbone: it moves",
        ),
        (
            GLYPHS,
            ["algorithm.hypergradient=implicit"],
            "algorithm.hypergradient.kind: implicit gives the gradient of the initialisation through the "
            "proximal term alone, and the inner rule has none; give it one (proximal above 0), or take",
        ),
        (
            STDLIB,
            [
                "algorithm.hypergradient=implicit",
                "algorithm.meta_parameters={init: false, backbone: true}",
                "adaptation.rule.learned=per_tensor",
            ],
            "algorithm.hypergradient.kind: implicit gives no gradient of learned inner rates: a minimum does",
        ),
        (
            GLYPHS,
            ["algorithm.hypergradient=finite_difference", "algorithm.step_weights=uniform"],
            "algorithm.step_weights: uniform; finite_difference looks at the fully adapted weights alone, so "
            "the query loss counts after the last inner step only; set step_weights to last",
        ),
        (
            GLYPHS,
            ["algorithm.hypergradient=finite_difference", "precision.compute=bfloat16"],
            "precision.compute: bfloat16; algorithm.hypergradient = finite_difference compares gradients at",
        ),
        (
            STDLIB,
            ["algorithm.hypergradient={kind: finite_difference, epsilon: 0.1}"],
            "algorithm.hypergradient.epsilon: 0.1; has no effect, since the initialisation alone is learned, "
            "for which finite_difference takes no difference; leave it out",
        ),
        (
            GLYPHS,
            ["outer.schedule.warmup_steps=100"],
            "outer.schedule.warmup_steps: 100; must be less than outer.num_steps = 100",
        ),
        (
            GLYPHS,
            ["data={kind: classes, url: x, variable: {}, n_shot: 1}"],
            "data.n_shot: 1; has no effect, since data.variable draws ways and shots; leave one of the two "
            "out",
        ),
        (
            GLYPHS,
            ["data={kind: classes, url: x, variable: {min_way: 9, max_way: 8}}"],
            "data.variable.min_way: 9; must be at most data.variable.max_way = 8",
        ),
        (
            GLYPHS,
            ["data={kind: classes, url: x, variable: {max_support: 49}}"],
            "data.variable.max_support: 49; must be at least data.variable.max_way = 50, since every class "
            "has a",
        ),
        (
            GLYPHS,
            ["data.labels=kept", "data.window={num_classes: 9}"],
            "data.labels: kept; every task has a class for each label, and data.window draws from few or "
            "varying",
        ),
        (
            GLYPHS,
            ["data.window={num_classes: 4}"],
            "data.window.num_classes: 4; must be at least the 5 classes of a task, and several times that",
        ),
        (
            GLYPHS,
            ["model=mlp", "data.inputs={kind: array, shape: [3]}", "data.affine={shift_px: 1}"],
            "data.affine: changes images, and data.inputs.kind is array; set it to null",
        ),
        (
            GLYPHS,
            [f"data={{kind: mixture, parts: [{{data: {CLASSES}}}, {{data: {{kind: documents, url: x}}}}]}}"],
            "data.parts.1.data: its tasks are language_modelling, and those of data.parts.0.data "
            "classification",
        ),
        (
            GLYPHS,
            [
                f"data={{kind: mixture, parts: [{{data: {CLASSES}}}, "
                "{data: {kind: classes, url: x, n_way: 5, n_shot: 1, n_query: 5, "
                "inputs: {kind: image, channels: 3}}}]}",
            ],
            "data.parts.1.data: its inputs are 28 x 28 images of 3 channels, and those of data.parts.0.data "
            "28 x",
        ),
        (
            GLYPHS,
            ["data={kind: groups, url: x, inputs: image, targets: number, num_support: 4, num_query: 4}"],
            "model.kind: conv4 tells classes apart or models text, and the targets are numbers; set "
            "model.kind to",
        ),
        (
            GLYPHS,
            [
                "model=mlp",
                f"data={{kind: groups, url: x, inputs: {ARRAY}, targets: number, num_support: 4, "
                "num_query: 4}",
                "adaptation.loss.temperature=2.0",
            ],
            "adaptation.loss.temperature: 2.0; belongs to the cross-entropy of classes, and the targets are",
        ),
        (
            GLYPHS,
            ["adaptation.rehearsal={ratio: 0.0, data: {kind: classes, url: x, num_classes: 9}}"],
            "adaptation.rehearsal.ratio: 0.0; nothing is rehearsed, since adaptation.rehearsal.outer_ratio",
        ),
        (
            GLYPHS,
            ["adaptation.rehearsal.data={kind: classes, url: x, num_classes: 9, inputs: {size: 32}}"],
            "adaptation.rehearsal.data.inputs: 32 x 32 images of 1 channel; the model is shown 28 x 28",
        ),
        (
            GLYPHS,
            ["adaptation.rehearsal.data={kind: documents, url: x}"],
            "model.kind: conv4 reads images, and adaptation.rehearsal.data (kind documents) gives texts; set",
        ),
        (
            STDLIB,
            ["adaptation.rehearsal.data={kind: documents, url: x, sequence_length: 999}"],
            "adaptation.rehearsal.data.sequence_length: 999; must be at most model.context_length = ",
        ),
        (
            STDLIB,
            ["adaptation.rehearsal.data={kind: documents, url: 's3://key:word@bucket/x'}"],
            "adaptation.rehearsal.data.url: holds a user name, password or token (not shown), and a recipe",
        ),
        (
            GLYPHS,
            ["validation.early_stopping.patience=3"],
            "validation.early_stopping: counts validations, and validation.every_steps is null, so there are",
        ),
        (
            GLYPHS,
            ["adaptation.rule.learned=per_tensor_per_step", "evaluation.num_steps=4"],
            "evaluation.num_steps: 4; adaptation.rule.learned = per_tensor_per_step has rates for "
            "adaptation.num_steps = 3 steps only; lower it, or learn per_tensor rates",
        ),
        (
            STDLIB,
            ["evaluation.baselines=[random, pretrained]"],
            "evaluation.baselines: 'pretrained' needs a pretrain section, and pretrain is null; remove it",
        ),
        (
            GLYPHS,
            ["evaluation.baselines=[random, random]"],
            "evaluation.baselines: 'random' is listed twice; list it once",
        ),
        (
            GLYPHS,
            ["evaluation.baselines=[linear_probe]", "adaptation.fast=head"],
            "evaluation.baselines: 'linear_probe' adapts the head alone, as all baselines do under "
            "adaptation.fast = head, and is ordinary_equal_data then; take that",
        ),
        (
            STDLIB,
            ["evaluation.baselines=[linear_probe]"],
            "evaluation.baselines: 'linear_probe' adapts the head alone, whose weight is the embedding's "
            "too; set model.tied_embeddings to false, or remove it from the list",
        ),
        (
            GLYPHS,
            [
                "evaluation.baselines=[linear_probe]",
                "data={kind: synthetic, task: sinusoid, num_support: 4}",
                "model={kind: single_layer, layer: linear}",
            ],
            "evaluation.baselines: 'linear_probe' adapts the head alone, and model.kind = single_layer has "
            "nothing before it; remove it from the list",
        ),
        (
            GLYPHS,
            ["evaluation.baselines=[fine_tuned]"],
            "evaluation.baselines: 'fine_tuned' adapts all weights, as all baselines do under "
            "adaptation.fast = full, and is ordinary_equal_data then; take that",
        ),
        (
            GLYPHS,
            [
                "evaluation.baselines=[fine_tuned]",
                "adaptation.fast={kind: msr, symmetry: kronecker}",
                "algorithm.meta_parameters.backbone=true",
            ],
            "evaluation.baselines: 'fine_tuned' adapts all weights, as all baselines do under "
            "adaptation.fast = msr, and is ordinary_equal_data then; take that",
        ),
        (
            STDLIB,
            [
                "evaluation.baselines=[fine_tuned]",
                "adaptation.fast=full",
                "algorithm.meta_parameters={init: true, backbone: false}",
                "pretrain={num_steps: 1, batch_size: 1, lr: 1}",
            ],
            "adaptation.fast = full, and is pretrained then; take that",
        ),
        (
            STDLIB,
            ["evaluation.baselines=[fine_tuned]", "sharding=sharded", RECOMPUTED],
            "evaluation.baselines: 'fine_tuned' gives every task a whole copy of all weights, and "
            "sharding.kind is sharded; remove it from the list",
        ),
        (
            GLYPHS,
            ["launcher.hosts={endpoint: 'node-0:29400', num_hosts: 2, min_hosts: 3}"],
            "launcher.hosts.min_hosts: 3; must be at most launcher.hosts.num_hosts = 2",
        ),
        (
            GLYPHS,
            ["launcher.hosts={endpoint: node-0, num_hosts: 2}"],
            "launcher.hosts.endpoint: 'node-0'; must be host:port, for example node-0:29400",
        ),
        (
            GLYPHS,
            ["launcher.hosts={endpoint: 'me:pw@node-0:29400', num_hosts: 2}"],
            "launcher.hosts.endpoint: '***@node-0:29400'; must be host:port, for example",
        ),
        (
            GLYPHS,
            ["launcher.hosts={endpoint: 'node-0:0', num_hosts: 2}"],
            "launcher.hosts.endpoint: 'node-0:0'; the port must be from 1 to 65535, for example 29400",
        ),
        (
            GLYPHS,
            ["launcher.hosts={endpoint: 'localhost:29400', num_hosts: 2}"],
            "launcher.hosts.endpoint: 'localhost:29400'; is another machine on each host; name one",
        ),
        (
            GLYPHS,
            ["algorithm.hypergradient={kind: truncated, num_steps: 4}"],
            "algorithm.hypergradient.num_steps: 4; must be at most adaptation.num_steps = 3",
        ),
        (
            GLYPHS,
            ["algorithm.hypergradient=unrolled", "memory.snapshots={kind: binomial, num_slots: 2}"],
            "memory.snapshots.kind: binomial; has no effect, since algorithm.hypergradient = unrolled does "
            "not go back over the inner steps one by one, as auto, rematerialized, mixed_mode, first_order, "
            "truncated do; set it to all",
        ),
        (
            GLYPHS,
            ["adaptation.fast={kind: full, tasks: vmap}", "memory.recompute_blocks=true"],
            "memory.recompute_blocks: True; adaptation.fast.tasks = vmap recomputes nothing; set that "
            "to loop",
        ),
        (
            STDLIB,
            [
                "adaptation.fast={kind: full, tasks: vmap}",
                "algorithm.meta_parameters.backbone=false",
                "model.dropout=0.1",
            ],
            "model.dropout: 0.1; is not drawn under adaptation.fast.tasks = vmap; set that to loop",
        ),
        (
            GLYPHS,
            ["adaptation.loss.learned=[label_smoothing]"],
            "adaptation.loss.label_smoothing: 0.0; is learned as a logit, which has no value at 0; start",
        ),
        (
            GLYPHS,
            ["adaptation.loss.learned=[temperature, temperature]"],
            "adaptation.loss.learned: 'temperature' is listed twice; list it once",
        ),
        (
            GLYPHS,
            ["outer.lr_loss=0.1"],
            "outer.lr_loss: 0.1; has no effect, since adaptation.loss.learned is empty; leave it out",
        ),
        (
            GLYPHS,
            ["algorithm.hypergradient=first_order", "adaptation.loss.learned=[temperature]"],
            "algorithm.hypergradient.kind: first_order gives no gradient of loss parameters: loss parameters "
            "act through the inner gradients alone, which it holds constant; unrolled, rematerialized,",
        ),
        (
            GLYPHS,
            [
                "algorithm.hypergradient=implicit",
                "adaptation.rule.proximal=1",
                "precision.compute=float16",
            ],
            "precision.compute: float16; algorithm.hypergradient = implicit has no scaling of what vanishes",
        ),
        (
            GLYPHS,
            [
                "algorithm.hypergradient=implicit",
                "adaptation.rule={kind: adamw, lr: 0.1, proximal: 1}",
            ],
            "adaptation.rule.weight_decay: 0.01; is decoupled under adamw, so no term of what is minimised",
        ),
        (
            STDLIB,
            ["sharding={kind: sharded, shard_size: 2}", "launcher.num_processes=3", RECOMPUTED],
            "sharding.shard_size: 2; must divide the number of ranks, launcher.num_processes = 3",
        ),
        (
            GLYPHS,
            ["sharding=sharded", RECOMPUTED],
            "sharding.kind: sharded divides the weights that tasks share, and with adaptation.fast.kind = "
            "full every task has a whole copy of all weights; set sharding.kind to replicated, or ",
        ),
        (
            STDLIB,
            ["sharding=sharded"],
            "memory.recompute_blocks: false; with sharding.kind = sharded a block is computed again when it "
            "is differentiated, or its whole weights would be kept until then; set it to true, or ",
        ),
        (
            GLYPHS,
            ["sharding={kind: deepspeed_zero, stage: 3}"],
            "sharding.stage: 3; shards the weights too, and DeepSpeed gathers them in hooks that autograd "
            "does not see: no hypergradient passes through them; set it to 2, or sharding.kind to sharded",
        ),
        (
            GLYPHS,
            ["sharding=deepspeed_zero", "precision.compute=float64"],
            "precision.compute: float64; DeepSpeed keeps optimizer states and master weights in float32, and "
            "would round to it; set it to float32, or sharding.kind to replicated",
        ),
        *(
            (
                GLYPHS,
                ["sharding=deepspeed_zero", f"sharding.extra.{key}={value}"],
                f"sharding.extra.{message}",
            )
            for key, value, message in (
                (
                    "train_batch_size",
                    "4",
                    "train_batch_size: is refused, since outer.tasks_per_step and outer",
                ),
                ("gradient_clipping", "1.0", "gradient_clipping: is refused, since outer.clip_norm says how"),
                (
                    "optimizer",
                    "{type: Adam}",
                    "optimizer: is refused, since outer.optimizer names the optimizer",
                ),
                ("bf16.enabled", "true", "bf16: is refused, since precision.compute says in which format"),
                ("wandb.enabled", "true", "wandb: is refused, since tracking says where the run is recorded"),
                ("zero_optimization.stage", "1", "zero_optimization.stage: is refused, since sharding.stage"),
                (
                    "zero_optimization.stage3_max_live_parameters",
                    "1",
                    "zero_optimization.stage3_max_live_parameters: is refused, since it is of stage 3, and",
                ),
                (
                    "zero_optimization.round_robin_gradients",
                    "true",
                    "zero_optimization.round_robin_gradients",
                ),
                ("zero_optimization", "3", "zero_optimization: is refused, since it is a section of keys"),
            )
        ),
        (
            GLYPHS,
            ["tracking.uri=https://user:word@host"],
            "tracking.uri: holds a user name, password or token (not shown), and a recipe is stored with "
            "each run; remove it, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        ),
        (
            GLYPHS,
            ["data.url=s3://key:word@bucket/glyphs"],
            "data.url: holds a user name, password or token (not shown), and a recipe is stored with "
            "each run; remove it, and give the credentials in the file system's own settings",
        ),
    ],
)
def test_a_rule_between_values_is_enforced(load: Load, text: str, overrides: list[str], message: str) -> None:
    (line,) = report(load, text, *overrides)
    assert message in line


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        (STDLIB, ["model.width=96", "model.num_heads=8"]),
        (STDLIB, ["model.context_length=128"]),
        (STDLIB, ["adaptation.rehearsal.ratio=0.5"]),
        (STDLIB, ["adaptation.fast=full"]),
        (STDLIB, ["algorithm.meta_parameters={init: false, backbone: true}"]),
        (GLYPHS, ["data.n_shot=7"]),
        (GLYPHS, ["outer.schedule.warmup_steps=99"]),
        (GLYPHS, ["validation={every_steps: 5, early_stopping: {patience: 3}}"]),
        (GLYPHS, ["adaptation.rule.learned=per_tensor", "evaluation.num_steps=4"]),
        (GLYPHS, ["adaptation.rule.learned=per_tensor_per_step", "evaluation.num_steps=3"]),
        (GLYPHS, ["adaptation.rule={kind: sgd, lr: 0.4, momentum: 0.9, nesterov: true}"]),
        (GLYPHS, ["adaptation.rule.proximal=0.5", "adaptation.num_steps=2"]),
        (GLYPHS, ["adaptation.rule.proximal=0.5", "adaptation.num_steps=1", "evaluation.num_steps=2"]),
        (GLYPHS, ["adaptation.rule.proximal=0", "adaptation.num_steps=1"]),
        (GLYPHS, ["evaluation.baselines=[]"]),
        (GLYPHS, ["sharding={kind: deepspeed_zero, stage: 1}", "precision.compute=bfloat16"]),
        (GLYPHS, ["sharding=deepspeed_zero", "sharding.extra.zero_optimization.overlap_comm=true"]),
        (GLYPHS, ["algorithm.hypergradient=implicit", "adaptation.rule.proximal=0.1"]),
        (
            STDLIB,
            [
                "algorithm.hypergradient={kind: implicit, solver: neumann}",
                "algorithm.meta_parameters={init: false, backbone: true}",
            ],
        ),
        (GLYPHS, ["algorithm.hypergradient={kind: finite_difference, epsilon: 0.01}"]),
        (
            STDLIB,
            [
                "algorithm.hypergradient={kind: finite_difference, epsilon: 0.1}",
                "algorithm.meta_parameters.backbone=true",
            ],
        ),
        (
            GLYPHS,
            [
                "algorithm.hypergradient={kind: finite_difference, epsilon: 0.1}",
                "adaptation.loss.learned=[temperature]",
            ],
        ),
        (
            GLYPHS,
            ["algorithm.hypergradient=reptile", "algorithm.step_weights=uniform", "adaptation.num_steps=1"],
        ),
    ],
)
def test_a_recipe_at_the_edge_of_a_rule_is_accepted(load: Load, text: str, overrides: list[str]) -> None:
    load(text, *overrides)


# Rules that look at an unreadable value must stay silent.
@pytest.mark.parametrize(
    "override",
    [
        "model=3",
        "data=3",
        "adaptation=3",
        "outer=3",
        "algorithm=3",
        "validation=3",
        "evaluation=3",
        "tracking=3",
    ],
)
def test_a_rule_about_an_unreadable_value_is_passed_over(load: Load, override: str) -> None:
    for text in (GLYPHS, STDLIB):
        (line,) = report(load, text, override)
        assert "is not a section" in line


def test_values_that_follow_from_others(load: Load) -> None:
    plain = load(STDLIB)
    assert plain.evaluation_num_steps == 3
    assert plain.baselines == ("random", "ordinary_equal_data", "ordinary_equal_compute")
    pretrained = load(STDLIB, "pretrain={num_steps: 1, batch_size: 1, lr: 1}", "evaluation.num_steps=9")
    assert pretrained.evaluation_num_steps == 9
    assert pretrained.baselines[-1] == "pretrained"
    assert load(STDLIB, "evaluation.baselines=[]").baselines == ()
    assert (plain.transferred, pretrained.transferred) == ("ordinary_equal_data", "pretrained")


def test_other_ways_of_adapting_are_compared_where_the_recipe_has_another(load: Load) -> None:
    load(GLYPHS, "evaluation.baselines=[linear_probe]")
    load(GLYPHS, "adaptation.fast=head", "evaluation.baselines=[fine_tuned]")
    load(STDLIB, "model.tied_embeddings=false", "evaluation.baselines=[linear_probe, fine_tuned]")


# ---------------------------------------------------------------- overrides


def test_overrides_reach_absent_sections_null_sections_and_list_items(load: Load) -> None:
    recipe = load(
        GLYPHS + "validation: null\nevaluation: {baselines: [random, ordinary_equal_data]}\n",
        "validation={every_steps: 5}",
        "validation.early_stopping.patience=2",
        "evaluation.baselines.1=ordinary_equal_compute",
        "outer.optimizer=sgd",
        "outer.optimizer.lr=0.5",
        "algorithm.hypergradient.kind=unrolled",
        "tracking=none",
        "outer.num_steps=7",
        "outer.num_steps=8",
    )
    assert recipe.validation.early_stopping is not None
    assert recipe.validation.early_stopping.patience == 2
    assert recipe.evaluation.baselines == ("random", "ordinary_equal_compute")
    assert recipe.outer.optimizer == SGDOptimizer(lr=0.5)
    assert maml_of(recipe).hypergradient == UnrolledHypergradient()
    assert recipe.tracking == NoTracking()
    assert recipe.outer.num_steps == 8


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "outer.num_steps",
            "'outer.num_steps' is not an override; write key=value, for example outer.num_steps",
        ),
        ("=3", "'=3' is not an override; write key=value"),
        ("outer..num_steps=3", "is not an override; write key=value"),
        ("seed=[1", "seed: not YAML: while parsing a flow sequence"),
        (
            "outer={num_steps: 1, num_steps: 2}",
            "outer.num_steps: given twice, first on (command line); keep one",
        ),
        ("seed.value=3", "seed.value: 0 has no parts; set seed itself"),
        (
            "evaluation.baselines.1=random",
            "evaluation.baselines.1: no such item; the list has 1, numbered from 0",
        ),
        (
            "evaluation.baselines.x=random",
            "evaluation.baselines.x: no such item; the list has 1, numbered from 0",
        ),
        ("outer.optimizer.betas.0=0.5", "no list is given here to change an item of; set the whole list"),
        ("seed=*anchor", "seed: not YAML: aliases are not allowed; write the value out"),
    ],
)
def test_an_override_that_cannot_be_applied_is_refused(load: Load, override: str, message: str) -> None:
    text = GLYPHS + "seed: 0\nevaluation: {baselines: [random]}\n"
    lines = report(load, text, override)
    assert any(line.startswith("(command line)") and message in line for line in lines)


def test_an_overridden_value_is_no_longer_blamed_on_its_line(load: Load) -> None:
    text = GLYPHS.replace("lr: 0.4", "lr: fast")
    assert report(load, text)[0].startswith("line 6")
    assert report(load, text, "adaptation.rule.lr=slow")[0].startswith("(command line)")
    load(text, "adaptation.rule.lr=0.1")


# ---------------------------------------------------------------- files that are not recipes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty; a recipe has at least name, model, data, adaptation, outer"),
        ("# nothing\n", "empty; a recipe has at least"),
        ("- a\n- b\n", r"a recipe is a list of 'key: value' lines, not \['a', 'b'\]"),
        ("maml", "a recipe is a list of 'key: value' lines, not 'maml'"),
        ("a: 1\nb: [1\nc: 2\n", "line 3  not YAML: while parsing a flow sequence"),
        ("a: 1\n\tb: 2\n", "line 2  not YAML: "),
        ("a: 1\n--- \nb: 2\n", "line 2  not YAML: expected a single document"),
        ("a: 1\nb: \x07\n", "line 2  not YAML: it holds a control character"),
        ('a: "\\UFFFFFFFF"\n', "not YAML: it holds a character or version that does not exist"),
        ("[" * 3000, "not a recipe: it is nested too deep"),
        ("a: &x 1\nb: *x\n", "line 2  not YAML: aliases are not allowed; write the value out"),
        (
            "a: 1\nb: !!python/name:os.system x\n",
            "line 2  b: the tag tag:yaml.org,2002:python/name:os.system is not",
        ),
        (
            "a: 1\nb: !!int x\n",
            "line 2  b: not a value of its tag tag:yaml.org,2002:int; write a plain value",
        ),
        ("a: 1\n[1]: 2\n", "line 2  a key must be a word, not a list or section"),
        ("seed: 1\nname: a\nseed: 2\n", "line 3  seed: given twice, first on line 1; keep one of them"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(load: Load, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(text)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "smoke.yaml").write_text(GLYPHS)
    with pytest.raises(RecipeError, match=r"smok\.yaml: no such file; did you mean .*smoke\.yaml\?"):
        load_recipe(tmp_path / "smok.yaml")
    with pytest.raises(RecipeError, match=r"zzz: no such file$"):
        load_recipe(tmp_path / "zzz")
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match="cannot be read: "):
        load_recipe("a\0b")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(RecipeError, match=r"latin\.yaml: not text in UTF-8 \(byte 9\)"):
        load_recipe(str(tmp_path / "latin.yaml"))


def test_a_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("\ufeff" + GLYPHS, encoding="utf-8")
    assert load_recipe(path).name == "tiny"


# ---------------------------------------------------------------- credentials


@pytest.mark.parametrize(
    "url",
    [
        "https://user:{}@host/mlflow",
        "https://{}@host",
        "HTTPS://{}@host",
        "postgresql://user:p/{}@host:5432/db",
        "mysql+pymysql://user:p@{}@host/db",
        "simplecache::https://user:{}@host/shards",
        "https://host/shards?token={}",
        "https://host/shards?a=b&X-Amz-Signature={}",
        "postgresql://host/db?user=u&password={}",
    ],
)
@pytest.mark.parametrize("secret", ["hunter2", "it's#\"here"])
def test_a_secret_is_refused_and_not_echoed(load: Load, url: str, secret: str) -> None:
    whole = url.format(secret)
    assert has_credentials(whole)
    places: list[dict[str, Any]] = [
        {"tracking": {"kind": "mlflow", "uri": whole}},
        {"tracking": whole},
        {"tracking": {"kind": whole}},
        {"tracking": {"uri": [whole]}},
        {"tracking": {"uri": {"address": whole}}},
        {"data": {"kind": "classes", "url": whole}},
        {"seed": whole},
        {"adaptation": whole},
        {"evaluation": {"baselines": [whole]}},
        {whole: 1},
        {"tracking": {"password": secret}},
    ]
    for place in places:
        with pytest.raises(RecipeError) as caught:
            recipe_from_dict(yaml.safe_load(GLYPHS) | place, source="a dictionary")
        assert secret not in str(caught.value)
        assert caught.value.__cause__ is None
    for override in (whole, f"tracking.uri=[{whole}", f"seed='{whole}", f"tracking.{whole}=3"):
        with pytest.raises(RecipeError) as caught:
            load(GLYPHS, override)
        assert secret not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:5000",
        "sqlite:////home/me@work/mlflow.db",
        "abfss://container@account.dfs.core.windows.net/shards",
        "simplecache::abfss://container@account.dfs.core.windows.net/shards",
        "s3://bucket/shards",
        "file:///data/shards",
        "data/glyphs",
        "databricks://profile",
        "https://host/shards?version=3",
        "postgresql://user@host/db",
    ],
)
def test_a_url_without_a_secret_is_accepted(load: Load, url: str) -> None:
    assert not has_credentials(url)
    recipe = load(GLYPHS, f"data.url='{url}'", f"tracking.uri='{url}'")
    assert data_urls(recipe) == {"data.url": url}


def test_text_without_credentials_is_not_blotted() -> None:
    assert without_credentials("'a: b', mail me@host") == "'***@host"  # rather too much
    assert without_credentials("see http://host:80/a?b=c") == "see http://host:80/a?b=c"


# ---------------------------------------------------------------- views


def test_flattened_recipe_has_every_value_as_text(load: Load) -> None:
    flat = flatten_recipe(load(STDLIB, "adaptation.fast.targets=[qkv, proj]"))
    assert flat["adaptation.rule.lr"] == "0.4"
    assert flat["adaptation.fast.targets"] == '["qkv", "proj"]'
    assert flat["model.kind"] == "gpt"
    assert flat["model.tied_embeddings"] == "true"
    assert flat["pretrain"] == "null"
    assert all(isinstance(value, str) for value in flat.values())


def test_digest_is_stable_and_depends_on_the_values_alone(load: Load) -> None:
    digest = recipe_digest(load(GLYPHS))
    canonical = json.dumps(json.loads(load(GLYPHS).model_dump_json()), sort_keys=True, separators=(",", ":"))
    assert digest == hashlib.sha256(canonical.encode()).hexdigest()
    other_order = yaml.safe_dump(yaml.safe_load(GLYPHS), sort_keys=True)
    assert recipe_digest(load(other_order)) == digest
    assert recipe_digest(load(GLYPHS, "outer.clip_norm=1")) == recipe_digest(
        load(GLYPHS, "outer.clip_norm=1.0")
    )
    assert recipe_digest(load(GLYPHS, "seed=1")) != digest


def test_a_recipe_is_immutable_and_hashable(load: Load) -> None:
    recipe = load(GLYPHS)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3
    assert hash(recipe) == hash(load(GLYPHS))
    extra = ("sharding=deepspeed_zero", "sharding.extra.zero_optimization.overlap_comm=true")
    assert hash(load(GLYPHS, *extra)) == hash(load(GLYPHS, *extra)) != hash(load(GLYPHS, extra[0]))


def test_given_values_are_not_changed() -> None:
    values = yaml.safe_load(GLYPHS)
    before = copy.deepcopy(values)
    recipe_from_dict(values, source="a dictionary")
    assert values == before


def test_the_schema_describes_every_key() -> None:
    schema = json_schema()
    sections = {"Recipe": schema, **schema["$defs"]}
    assert len(sections) > 30
    for section in sections.values():
        for key, field in section["properties"].items():
            assert field.get("description"), f"{section['title']}.{key}"
    optimizer = schema["$defs"]["Outer"]["properties"]["optimizer"]
    assert optimizer["anyOf"][-1] == {"type": "string", "enum": ["adam", "sgd"]}
    rule = schema["$defs"]["Adaptation"]["properties"]["rule"]
    assert rule["anyOf"][-1] == {"type": "string", "enum": ["adam", "adamw", "rmsprop", "sgd"]}


def test_differences_tell_harmless_from_harmful(load: Load) -> None:
    old = load(STDLIB)
    new = load(
        STDLIB,
        "name=other",
        "seed=1",
        "model.width=64",
        "data.url=elsewhere",
        "data.num_query=9",
        "adaptation.rehearsal.ratio=0.2",
        "outer.tasks_per_step=8",
        "outer.micro_batch=2",
        "launcher.num_processes=4",
        "validation.every_steps=5",
        "tracking=none",
    )
    found = differences(old, new)
    assert found[0] == Difference("name", "tiny", "other", harmful=False)
    assert Difference("adaptation.rehearsal", "null", "absent", harmful=True) in found
    assert Difference("adaptation.rehearsal.ratio", "absent", "0.2", harmful=True) in found
    assert {difference.path for difference in found if difference.harmful} == {
        "seed",
        "model.width",
        "data.num_query",
        "adaptation.rehearsal",
        "adaptation.rehearsal.ratio",
        "adaptation.rehearsal.num_samples",
        "adaptation.rehearsal.outer_ratio",
        "adaptation.rehearsal.outer_samples",
        "adaptation.rehearsal.data",
        "outer.tasks_per_step",
    }
    assert {difference.path for difference in found if not difference.harmful} == {
        "name",
        "data.url",
        "outer.micro_batch",
        "launcher.num_processes",
        "validation.every_steps",
        "tracking.kind",
        "tracking.uri",
        "tracking.experiment",
    }
    assert differences(old, old) == []


@pytest.mark.parametrize(
    "override",
    [
        "pretrain={num_steps: 1, batch_size: 1, lr: 1}",
        "algorithm.step_weights=uniform",
        "outer.optimizer.lr=0.1",
        "outer.schedule.final_ratio=0.2",
        "outer.clip_norm=1",
        "outer.ema=0.9",
        "precision.compute=float64",
    ],
)
def test_a_change_of_what_a_run_computes_is_harmful(load: Load, override: str) -> None:
    assert all(difference.harmful for difference in differences(load(STDLIB), load(STDLIB, override)))


def test_more_outer_steps_are_harmful_only_where_the_rate_decays_towards_the_end(load: Load) -> None:
    def harmful(decay: str) -> list[bool]:
        old = load(GLYPHS, f"outer.schedule.decay={decay}")
        new = load(GLYPHS, f"outer.schedule.decay={decay}", "outer.num_steps=200")
        return [difference.harmful for difference in differences(old, new)]

    assert harmful("cosine") == [True]
    assert harmful("constant") == [False]


def test_recipes_import_neither_torch_nor_other_parts() -> None:
    program = (
        "import sys, metaloom.recipe\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "parts = {name.split('.')[1] for name in sys.modules if name.startswith('metaloom.')}\n"
        "assert parts == {'recipe', 'errors', 'engine', 'credentials'}, parts\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# ---------------------------------------------------------------- any input gives a Recipe or a RecipeError

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["conv4", "gpt", "glyphs", "stdlib", "lora", "full", "sgd", "adamw", "cosine", "none", 1, 8, 0.5]
    )
)
keys = st.sampled_from(
    sorted({"", "zzz", *(key.split(".")[-1] for key in flatten_recipe(load_recipe(RECIPES[-1])))})
)
junk = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)
quietly = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def is_recipe_or_error(make: Callable[[], Recipe]) -> None:
    message = ""
    try:
        recipe = make()
    except RecipeError as error:
        message = str(error)
    else:
        assert recipe_from_dict(yaml.safe_load(dump_recipe(recipe)), source="its dump") == recipe
    assert not re.search(r"pydantic|Input should|type=|\[Errno", message)


@quietly
@given(
    place=st.sampled_from(
        [(recipe, path) for recipe in RECIPES for path in sorted(flatten_recipe(load_recipe(recipe)))]
    ),
    depth=st.integers(1, 3),
    value=junk,
)
def test_a_recipe_with_junk_anywhere_gives_a_recipe_or_an_error(
    place: tuple[Path, str], depth: int, value: Any
) -> None:
    recipe, path = place
    values = yaml.safe_load(dump_recipe(load_recipe(recipe)))
    around = values
    *sections, last = path.split(".")[:depth]
    for key in sections:
        around = around[key]
    around[last] = value
    is_recipe_or_error(lambda: recipe_from_dict(values, source="junk"))


@quietly
@given(
    text=st.text(alphabet=string.printable + "é\u2028\x85\x00", max_size=60),
    where=st.integers(0, len(GLYPHS)),
)
def test_a_file_with_junk_anywhere_gives_a_recipe_or_an_error(load: Load, text: str, where: int) -> None:
    is_recipe_or_error(lambda: load(GLYPHS[:where] + text + GLYPHS[where:]))
    is_recipe_or_error(lambda: load(text))


@quietly
@given(override=st.text(alphabet="=.[]{}:,'\"!&*01e-+_~ \t" + "kindouterseed", max_size=30))
def test_a_junk_override_gives_a_recipe_or_an_error(load: Load, override: str) -> None:
    is_recipe_or_error(lambda: load(GLYPHS, override))
    is_recipe_or_error(lambda: load(GLYPHS, "outer." + override))


def test_the_models_have_the_documented_defaults() -> None:
    assert GPTModel() == GPTModel(
        num_layers=4, width=128, num_heads=4, context_length=128, tied_embeddings=True
    )


def test_a_job_has_the_documented_time_to_stop(load: Load) -> None:
    assert load(GLYPHS).launcher.stop_within_s == 25.0


KINDS_OF_DATA = (
    "{kind: classes, url: x, n_way: 5, n_shot: 1, n_query: 5, inputs: {kind: image, channels: 1}, window: "
    "{num_classes: 9}}",
    "{kind: groups, url: x, inputs: {kind: array, shape: [3]}, targets: {kind: number}, num_support: 3, "
    "num_query: 3}",
    "{kind: episodes, url: x, inputs: {kind: text, length: 9}, targets: {kind: class, num_classes: 3}, "
    "num_support: 3, num_query: 3}",
    "{kind: mixture, parts: [{data: {kind: documents, url: x}}, {weight: 2, data: {kind: classes, url: x, "
    "n_way: 5, n_shot: 1, n_query: 5}}]}",
    "{kind: synthetic, task: {kind: equivariant_1d, rank: 2, length: 9, filter_size: 3}, num_test_tasks: 9}",
    "{kind: synthetic, task: {kind: equivariant_2d, turns: 8, flips: true, size: 9, num_filters: 2, "
    "filter_size: 3}, "
    "num_support: 3}",
)


@pytest.mark.parametrize("data", KINDS_OF_DATA)
@pytest.mark.parametrize("rehearsal", ["null", "{data: {kind: classes, url: x, num_classes: 3}}"])
@pytest.mark.parametrize("junk", [None, "x", "leave it out"])
def test_one_mistake_anywhere_in_the_data_gives_a_recipe_or_an_error(
    data: str, rehearsal: str, junk: str | None
) -> None:
    def places(section: Any) -> Iterator[tuple[Any, Any]]:
        for key, value in list(section.items() if isinstance(section, dict) else enumerate(section)):
            yield section, key
            if isinstance(value, dict | list):
                yield from places(value)

    values = yaml.safe_load(GLYPHS)
    values["data"] = yaml.safe_load(data)
    values["adaptation"]["rehearsal"] = yaml.safe_load(rehearsal)
    sections = [values["data"], *([] if rehearsal == "null" else [values["adaptation"]["rehearsal"]])]
    for section, key in [place for top in sections for place in places(top)]:
        before = section[key]
        if junk == "leave it out":
            del section[key]
        else:
            section[key] = junk
        with contextlib.suppress(RecipeError):
            recipe_from_dict(values, source="a test")
        if isinstance(section, list) and junk == "leave it out":
            section.insert(key, before)
        else:
            section[key] = before
