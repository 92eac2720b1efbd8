"""What can be learned, and by which estimator, goes through a whole run: training, its record, evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metaloom.checkpoints.store import CheckpointStore
from metaloom.recipe import Recipe, load_recipe
from metaloom.sources import episode_source, open_data
from tests.commands import RECIPES, curve, run_well
from tests.in_process import trained_and_evaluated

SMOKE = RECIPES / "smoke.yaml"
SHORT = (
    "outer.num_steps=2",
    "outer.tasks_per_step=2",
    "outer.schedule.warmup_steps=0",
    "launcher.num_processes=1",
    "adaptation.num_steps=2",
    "validation.every_steps=null",
    "evaluation.num_episodes=4",
    "evaluation.tuning.num_episodes=2",
    "evaluation.baselines=[random]",
    "tracking=none",
)


def assert_evaluated(folder: Path) -> None:
    """Two outer steps were done, and both contenders measured before and after each of two inner steps."""
    assert [record["skipped"] for record in curve(folder) if "skipped" in record] == [0.0, 0.0]
    methods = json.loads((folder / "evaluation.json").read_text())["methods"]
    assert [len(method["mean"]) for method in methods] == [3, 3]
    assert all(math.isfinite(value) for method in methods for value in method["mean"])


@pytest.mark.usefixtures("alone")
def test_learned_loss_parameters_and_rates_per_element_are_evaluated(
    tmp_path: Path, glyphs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    learned = (
        "adaptation.rule.learned=per_element",
        "adaptation.loss={label_smoothing: 0.1, learned: [temperature, label_smoothing]}",
        "algorithm.hypergradient={kind: truncated, num_steps: 1}",
    )
    recipe = load_recipe(SMOKE, (f"data.url={glyphs}", *SHORT, *learned))
    assert_evaluated(trained_and_evaluated(recipe, tmp_path / "run"))
    output = capfd.readouterr().out
    assert "meta-trained" in output
    assert "random init" in output


@pytest.mark.usefixtures("alone")
def test_weights_of_classes_are_learned_and_evaluated(tmp_path: Path, glyphs: Path) -> None:
    learned = ("data.labels=kept", "adaptation.loss.learned=[class_weights]", "outer.lr_loss=0.1")
    folder = trained_and_evaluated(
        load_recipe(SMOKE, (f"data.url={glyphs}", *SHORT, *learned)), tmp_path / "run"
    )
    assert_evaluated(folder)
    newest = CheckpointStore(folder / "checkpoints" / "meta").load_newest(pytest.fail)
    assert newest is not None
    assert bool((newest.tensors["meta/loss.class_weights"] != 0.0).all())


@pytest.mark.usefixtures("alone")
def test_weights_of_groups_are_learned_kept_and_evaluated(tmp_path: Path) -> None:
    """A mixture of two families of regressions, whose groups are their places in it."""
    part = "{data: {kind: synthetic, task: sinusoid, num_support: 3}}"
    overrides = (
        f"data={{kind: mixture, parts: [{part}, {part}]}}",
        "algorithm={hypergradient: mixed_mode}",
        "adaptation.fast={kind: full, tasks: loop}",
        "adaptation.loss={learned: [group_weights], groups: [synthetic 0, synthetic 1]}",
        "outer.lr_loss=0.1",
        "outer.combiner=mean",
    )
    recipe = load_recipe(RECIPES / "unequal-scales.yaml", (*SHORT, *overrides))
    folder = trained_and_evaluated(recipe, tmp_path / "run")
    assert_evaluated(folder)
    newest = CheckpointStore(folder / "checkpoints" / "meta").load_newest(pytest.fail)
    assert newest is not None
    weights = newest.tensors["meta/loss.group_weights"]
    assert weights.shape == (2,)
    assert bool((weights != 0.0).any())


@pytest.mark.usefixtures("alone")
def test_every_part_of_maml_plus_plus_is_trained_and_evaluated(
    tmp_path: Path, glyphs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = (
        "adaptation.rule.learned=per_tensor_per_step",
        "adaptation.norms={weights: per_step, statistics: per_step}",
        "algorithm={hypergradient: rematerialized, step_weights: annealed, annealing_steps: 2, "
        "first_order_steps: 1}",
    )
    recipe = load_recipe(SMOKE, (f"data.url={glyphs}", *SHORT, *parts))
    assert_evaluated(trained_and_evaluated(recipe, tmp_path / "run"))
    assert "Batch norm of the meta-trained model takes running means of training" in capfd.readouterr().out


@pytest.mark.usefixtures("alone")
def test_an_algorithm_without_inner_steps_is_trained_and_evaluated(
    tmp_path: Path, glyphs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(SMOKE, (f"data.url={glyphs}", *SHORT, "algorithm=protonet"))
    folder = trained_and_evaluated(recipe, tmp_path / "run")
    output = capfd.readouterr().out
    assert "meta-trained for 2 outer steps" in output
    assert "no steps" in output
    assert_evaluated(folder)
    ours, _ = json.loads((folder / "evaluation.json").read_text())["methods"]
    assert len(set(ours["mean"])) == 1


@pytest.mark.usefixtures("alone")
def test_a_head_of_zero_on_learned_features_is_trained_and_evaluated(tmp_path: Path, glyphs: Path) -> None:
    way = (
        "adaptation.fast=head",
        "adaptation.head.init=zero",
        "algorithm.meta_parameters={init: false, backbone: true}",
    )
    recipe = load_recipe(SMOKE, (f"data.url={glyphs}", *SHORT, *way))
    assert_evaluated(trained_and_evaluated(recipe, tmp_path / "run"))


@pytest.mark.usefixtures("alone")
def test_a_soft_prompt_is_planned_checked_trained_and_evaluated(tmp_path: Path, stdlib: Path) -> None:
    recipe = RECIPES / "stdlib-lora.yaml"
    small = (
        f"data.url={stdlib}",
        "adaptation.fast={kind: soft_prompt, num_tokens: 3}",
        "model={kind: gpt, num_layers: 1, width: 8, num_heads: 2, context_length: 19}",
        "data.sequence_length=16",
        "pretrain=null",
    )
    run_well("plan", recipe, *small, cwd=tmp_path)
    assert "passed: unrolled is exact" in run_well("check", recipe, *small, cwd=tmp_path)
    assert_evaluated(trained_and_evaluated(load_recipe(recipe, (*small, *SHORT)), tmp_path / "run"))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "way",
    [
        ("algorithm.hypergradient=implicit", "adaptation.rule.proximal=0.5"),
        ("algorithm.hypergradient=finite_difference", "adaptation.loss.learned=[temperature]"),
        ("algorithm.hypergradient=reptile",),
        ("adaptation.fast={kind: msr, symmetry: kronecker}", "algorithm.meta_parameters.backbone=true"),
        ("algorithm=ridge",),
        ("algorithm=logistic",),
        ("algorithm={kind: svm, feature_chunk: 2}", "model.norm=none"),
        (
            "algorithm={kind: ridge, learned: [regulariser, bias], feature_chunk: 3}",
            "data={kind: synthetic, task: sinusoid, num_support: 4, num_query: 3}",
            "model=mlp",
        ),
    ],
    ids=lambda way: way[0].partition("=")[2],
)
def test_what_was_trained_in_such_a_way_is_evaluated(
    way: tuple[str, ...], tmp_path: Path, glyphs: Path
) -> None:
    recipe = load_recipe(SMOKE, (f"data.url={glyphs}", *SHORT, *way))
    assert_evaluated(trained_and_evaluated(recipe, tmp_path / "run"))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kind", ["cnp", "attention_learner", "recurrent_learner"])
def test_what_reads_support_sets_is_trained_and_evaluated(kind: str, tmp_path: Path, glyphs: Path) -> None:
    section = f"algorithm={{kind: {kind}, width: 8, num_layers: 1}}"
    more = ("evaluation.baselines=[ordinary_equal_compute]", "validation.every_steps=2")
    recipe = load_recipe(SMOKE, (f"data.url={glyphs}", *SHORT, *more, section))
    assert_evaluated(trained_and_evaluated(recipe, tmp_path / "run"))


STDLIB = RECIPES / "stdlib-lora.yaml"
OF_TEXTS = (
    "model={kind: gpt, num_layers: 1, width: 8, num_heads: 2, context_length: 64}",
    "data.sequence_length=20",
    "data.num_support=3",
    "data.num_query=2",
    "adaptation.rule.learned=none",
    "outer.lr_rates=null",
    "adaptation.rehearsal=null",
    "pretrain={num_steps: 2, batch_size: 2, lr: 0.01, sequence_length: 64, splits: [train]}",
    "evaluation.ordinary.batch_size=4",
)


@pytest.mark.usefixtures("alone")
def test_a_language_model_in_context_is_trained_and_stands_beside_others(
    tmp_path: Path, stdlib: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    baselines = "[pretrained, in_context, in_context_equal_data, in_context_equal_compute]"
    overrides = (f"data.url={stdlib}", *SHORT, *OF_TEXTS, f"evaluation.baselines={baselines}")
    recipe = load_recipe(STDLIB, (*overrides, "algorithm=in_context"))
    folder = trained_and_evaluated(recipe, tmp_path / "run")
    shown = capfd.readouterr().out
    assert "In context, the last 2 of 3 support sequences, 42 tokens, are in front of each query" in shown
    evaluation = json.loads((folder / "evaluation.json").read_text())
    methods = {method["name"]: method for method in evaluation["methods"]}
    assert list(methods) == [
        "meta-trained",
        "pre-trained only",
        "in context",
        "in context, equal data",
        "in context, equal compute",
    ]
    for name, method in methods.items():
        assert all(math.isfinite(value) for value in method["mean"])
        if name != "pre-trained only":
            assert len(set(method["mean"])) == 1
            assert method["inner_rate"] == "no steps"
    # The weights before meta-training, before any ordinary training.
    assert methods["in context"]["training"] == "2 steps of pre-training"
    # Two outer steps of two tasks, each of 3 + 2 sequences.
    assert methods["in context, equal data"]["training"].endswith("then 5 steps, 20 samples")
    means = [method["mean"][0] for method in methods.values()]
    assert len(set(means)) == len(means)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "way",
    [
        ("adaptation.fast={kind: norm_bias, head: true}", "adaptation.head={init: zero, first_steps: 1}"),
        (
            "adaptation.fast={kind: part, parameters: [blocks.1.conv.weight, head.*], tasks: loop}",
            "algorithm.meta_parameters.backbone=true",
        ),
        ("adaptation.fast={kind: lora, targets: [head], rank: 2}", "algorithm.meta_parameters.backbone=true"),
        (
            "adaptation.rule.learned=per_element",
            "adaptation.rule.rates={scale: linear, spread: [0.005, 0.1]}",
        ),
    ],
    ids=["norm_bias", "part", "lora", "meta_sgd"],
)
def test_what_is_fast_and_how_fast_is_trained_and_evaluated(
    way: tuple[str, ...], tmp_path: Path, glyphs: Path
) -> None:
    recipe = load_recipe(SMOKE, (f"data.url={glyphs}", *SHORT, *way))
    assert_evaluated(trained_and_evaluated(recipe, tmp_path / "run"))


TRANSFERRED = ("linear probe", "fine-tuned")


def methods_of(folder: Path) -> dict[str, Any]:
    """The compared methods by their names."""
    methods = json.loads((folder / "evaluation.json").read_text())["methods"]
    return {method["name"]: method for method in methods}


def naive_errors(recipe: Recipe, weights: dict[str, Tensor], names: Collection[str]) -> list[float]:
    """The mean squared error over the test tasks before and after each of two steps of gradient descent on
    the named weights of a network with one hidden layer."""
    source = episode_source(recipe, open_data(recipe), "test", seed=recipe.seed + 1, num_steps=2)
    episodes = [source.episode(number) for number in range(recipe.evaluation.num_episodes)]
    errors = []
    for episode in episodes:
        values = {name: value.double() for name, value in weights.items()}
        support, query = (
            {k: torch.from_numpy(v) for k, v in part.items()} for part in (episode.support, episode.query)
        )

        def error(part: dict[str, Tensor], at: dict[str, Tensor]) -> Tensor:
            inputs = part["inputs"].double().flatten(1)
            hidden = (inputs @ at["blocks.0.linear.weight"].T + at["blocks.0.linear.bias"]).relu()
            outputs = hidden @ at["head.weight"].T + at["head.bias"]
            return (outputs - part["targets"].double().reshape(outputs.shape)).square().mean()

        own = [float(error(query, values))]
        for _ in range(2):
            fast = {name: values[name].requires_grad_() for name in names}
            slopes = torch.autograd.grad(error(support, values | fast), list(fast.values()))
            rate = recipe.adaptation.rule.lr
            values |= {
                name: (value - rate * slope).detach()
                for (name, value), slope in zip(fast.items(), slopes, strict=True)
            }
            own.append(float(error(query, values)))
        errors.append(own)
    return [sum(column) / len(column) for column in zip(*errors, strict=True)]


@pytest.mark.usefixtures("alone")
def test_a_linear_probe_moves_the_head_alone_and_fine_tuning_moves_all(tmp_path: Path) -> None:
    sines = (
        "data={kind: synthetic, task: sinusoid, num_support: 4, num_query: 3}",
        "model={kind: mlp, width: 8, num_layers: 1}",
        "adaptation.fast={kind: norm_bias, norms: false}",
        "adaptation.rule.lr=0.02",
        "evaluation.baselines=[ordinary_equal_data, linear_probe, fine_tuned]",
        "evaluation.ordinary={lr: 0.01, batch_size: 2}",
    )
    recipe = load_recipe(SMOKE, (*SHORT, *sines))
    folder = trained_and_evaluated(recipe, tmp_path / "run")
    # They adapt what one ordinary training has left.
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["meta", "ordinary_equal_data"]
    trained = CheckpointStore(folder / "checkpoints" / "ordinary_equal_data").load_newest(pytest.fail)
    assert trained is not None
    weights = trained.under("meta/backbone.")
    methods = methods_of(folder)
    moved = {
        "ordinary, equal data": ("blocks.0.linear.bias", "head.bias"),
        "linear probe": ("head.weight", "head.bias"),
        "fine-tuned": tuple(weights),
    }
    for name, names in moved.items():
        assert methods[name]["training"] == methods["ordinary, equal data"]["training"]
        # A run computes in float32.
        assert methods[name]["mean"] == pytest.approx(naive_errors(recipe, weights, names), rel=1e-5)
    assert len({method["mean"][-1] for method in methods.values()}) == len(methods) == 4


@pytest.mark.usefixtures("alone")
def test_a_classifiers_head_starts_at_zero_in_a_linear_probe_and_in_fine_tuning(
    tmp_path: Path, glyphs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    way = (
        "adaptation.fast={kind: norm_bias, head: true}",
        "adaptation.head.first_steps=1",
        "evaluation.baselines=[linear_probe, fine_tuned]",
        # Features of 18 steps, and a head that leaves zero by far: otherwise one class is taken for all.
        "evaluation.ordinary={lr: 0.01, batch_size: 2}",
        "adaptation.rule.lr=5.0",
        "evaluation.num_episodes=8",
    )
    recipe = load_recipe(SMOKE, (f"data.url={glyphs}", *SHORT, *way))
    methods = methods_of(trained_and_evaluated(recipe, tmp_path / "run"))
    assert list(methods) == ["meta-trained", *TRANSFERRED]
    for name in TRANSFERRED:
        # All classes of a task are alike to it, and as many queries belong to each.
        assert methods[name]["mean"][0] == pytest.approx(1 / 3)
        assert methods[name]["mean"][-1] > 1 / 3
    assert "Ordinary training is judged at its last step" in capfd.readouterr().out


@pytest.mark.usefixtures("alone")
def test_a_pretrained_language_model_is_probed_and_fine_tuned_without_more_training(
    tmp_path: Path, stdlib: Path
) -> None:
    overrides = (
        *(f"data.url={stdlib}", *SHORT, *OF_TEXTS),
        "model.tied_embeddings=false",
        "evaluation.baselines=[pretrained, linear_probe, fine_tuned]",
    )
    recipe = load_recipe(STDLIB, overrides)
    folder = trained_and_evaluated(recipe, tmp_path / "run")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["meta", "pretrain"]
    methods = methods_of(folder)
    assert list(methods) == ["meta-trained", "pre-trained only", *TRANSFERRED]
    for name in TRANSFERRED:
        assert methods[name]["training"] == "2 steps of pre-training"
        # One pass over all tasks, or one each: the same in float32.
        assert methods[name]["mean"][0] == pytest.approx(methods["pre-trained only"]["mean"][0], rel=1e-5)
    assert len({method["mean"][-1] for method in methods.values()}) == len(methods)
