"""Multi-task architectures against loops over units and tasks; their gradients against differences."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metaloom.engine.adapters.model import Structure
from metaloom.engine.algorithms.multi_task import MultiTask
from metaloom.engine.learner import TaskBatch
from metaloom.engine.losses import CrossEntropy, MeanSquaredError
from metaloom.engine.precision import Precision
from metaloom.engine.whole_model import WholeModel
from metaloom.errors import CapabilityError
from metaloom.models import multi_task
from metaloom.models.conv4 import Conv4
from metaloom.models.mlp import Mlp
from metaloom.models.multi_task import CrossStitch, Film, MultiHead, Network

GROUPS = ("left", "right", "other.one")
ARCHITECTURES: dict[str, type[MultiHead | Film | CrossStitch]] = {
    "multi_head": MultiHead,
    "film": Film,
    "cross_stitch": CrossStitch,
}
NUM_INPUTS, WIDTH, NUM_OUTPUTS = 3, 4, 2


def perceptron() -> Mlp:
    return Mlp(num_inputs=NUM_INPUTS, width=WIDTH, num_layers=2, num_outputs=NUM_OUTPUTS, activation="tanh")


def network_of(architecture: str) -> multi_task.MultiTask:
    """With numbers of its own everywhere: no scale is 1, and no two tasks are mixed alike."""
    torch.manual_seed(0)
    model = ARCHITECTURES[architecture](perceptron, GROUPS).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def learner_of(architecture: str, *, recompute_blocks: bool = False) -> MultiTask:
    model = network_of(architecture)
    whole = WholeModel(
        model, Structure(model.block_names), None, Precision("float64"), recompute_blocks=recompute_blocks
    )
    return MultiTask(whole, MeanSquaredError(), GROUPS)


def tasks(groups: tuple[str | None, ...]) -> TaskBatch:
    generator = torch.Generator().manual_seed(1)

    def part(count: int) -> dict[str, Tensor]:
        shape = (len(groups), count)
        return {
            "inputs": torch.randn(*shape, NUM_INPUTS, dtype=torch.float64, generator=generator),
            "targets": torch.randn(*shape, NUM_OUTPUTS, dtype=torch.float64, generator=generator),
        }

    return TaskBatch(tuple(range(len(groups))), part(1), part(4), groups=groups)


def layer(weights: dict[str, Any], name: str, values: list[float]) -> list[float]:
    return [
        sum(w * v for w, v in zip(row, values, strict=True)) + bias
        for row, bias in zip(weights[f"{name}.weight"], weights[f"{name}.bias"], strict=True)
    ]


def by_hand(architecture: str, model: nn.Module, example: list[float], place: int) -> list[float]:
    """What a model says of one example for one task, unit by unit."""
    weights = {name: value.tolist() for name, value in model.named_parameters()}
    match architecture:
        case "multi_head":
            for row in range(2):
                example = [math.tanh(v) for v in layer(weights, f"network.blocks.{row}.linear", example)]
            return layer(weights, f"heads.{place}", example)
        case "film":
            for row in range(2):
                made = [math.tanh(v) for v in layer(weights, f"network.blocks.{row}.linear", example)]
                scale, shift = (weights[f"films.{row}.{what}"][place] for what in ("scale", "shift"))
                example = [s * v + t for s, v, t in zip(scale, made, shift, strict=True)]
            return layer(weights, "network.head", example)
    of_tasks = [example] * len(GROUPS)
    for row in range(2):
        outputs = [
            [math.tanh(v) for v in layer(weights, f"networks.{task}.blocks.{row}.linear", of_tasks[task])]
            for task in range(len(GROUPS))
        ]
        alpha = weights[f"stitches.{row}.alpha"]
        of_tasks = [
            [
                sum(alpha[task][other][unit] * outputs[other][unit] for other in range(len(GROUPS)))
                for unit in range(WIDTH)
            ]
            for task in range(len(GROUPS))
        ]
    return layer(weights, f"networks.{place}.head", of_tasks[place])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_equal_those_of_loops_over_units(architecture: str) -> None:
    learner, batch = learner_of(architecture), tasks(("right", "left", "right", "other.one"))
    losses = learner.curve({}, batch, num_steps=1)["loss"]
    for task, group in enumerate(batch.groups or ()):
        errors = []
        for example, target in zip(batch.query["inputs"][task], batch.query["targets"][task], strict=True):
            said = by_hand(architecture, learner.model.model, example.tolist(), GROUPS.index(str(group)))
            errors += [(one - other) ** 2 for one, other in zip(said, target.tolist(), strict=True)]
        assert losses[task].tolist() == pytest.approx([sum(errors) / len(errors)] * 2, rel=1e-12)


@pytest.mark.parametrize("recompute_blocks", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_gradient_equals_differences(architecture: str, recompute_blocks: bool) -> None:
    learner = learner_of(architecture, recompute_blocks=recompute_blocks)
    batch, meta = tasks(("right", "left")), learner.meta_parameters()
    found = learner.meta_gradient(meta, batch)
    generator = torch.Generator().manual_seed(2)
    for name, value in meta.items():
        along = torch.randn(value.shape, dtype=torch.float64, generator=generator)

        def total(by: float, name: str = name, along: Tensor = along) -> float:
            moved = meta | {name: meta[name] + by * along}
            return float(learner.losses(moved, batch, outer_step=None)[0].sum())

        expected = (total(1e-5) - total(-1e-5)) / 2e-5
        assert float((found.gradient[name] * along).sum()) == pytest.approx(expected, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize(
    ("architecture", "own"),
    [
        ("multi_head", {"heads.0.weight", "heads.0.bias"}),
        # Rows of tables that all groups have; mixtures and networks of others are on the way of each.
        ("film", set()),
        ("cross_stitch", {"networks.0.head.weight", "networks.0.head.bias"}),
    ],
)
def test_a_group_alone_moves_what_is_its_own(architecture: str, own: set[str]) -> None:
    learner = learner_of(architecture)
    meta = learner.meta_parameters()
    gradient = learner.meta_gradient(meta, tasks(("right", "other.one"))).gradient
    still = {name for name, value in gradient.items() if not bool(value.any())}
    assert still == {f"backbone.{name}" for name in own}
    if architecture == "film":
        for row in range(2):
            of_left = gradient[f"backbone.films.{row}.scale"][0]
            assert not bool(of_left.any())
            assert bool(gradient[f"backbone.films.{row}.scale"][1:].any())


def test_cross_stitch_without_mixing_is_a_network_for_each() -> None:
    model: Any = network_of("cross_stitch")
    inputs = torch.randn(5, NUM_INPUTS, dtype=torch.float64)
    with torch.no_grad():
        for stitch in model.stitches:
            stitch.alpha.copy_(torch.eye(3, dtype=torch.float64)[:, :, None].expand(3, 3, WIDTH))
        for place, group in enumerate(GROUPS):
            torch.testing.assert_close(
                model(inputs, group), model.networks[place](inputs), rtol=1e-14, atol=0.0
            )


def test_where_mixtures_and_modulations_start() -> None:
    stitched: Any = CrossStitch(perceptron, GROUPS)
    modulated = Film(perceptron, GROUPS)
    alpha = stitched.stitches[0].alpha
    expected = torch.tensor([[0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.05, 0.05, 0.9]])
    torch.testing.assert_close(alpha[:, :, 2].detach(), expected)
    inputs = torch.randn(5, NUM_INPUTS)
    with torch.no_grad():
        said = [modulated(inputs, group) for group in GROUPS]
        assert all(torch.equal(each, modulated.network(inputs)) for each in said)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_images_are_scaled_and_mixed_by_channel(architecture: str) -> None:
    def make() -> Network:
        return Conv4(num_classes=3, width=WIDTH, num_blocks=2, norm="layer")

    torch.manual_seed(0)
    model: Any = ARCHITECTURES[architecture](make, GROUPS[:2])
    images = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "scale" in name or "alpha" in name:
                parameter.zero_()  # of every channel but the first
                parameter[..., 0] = 1.0
        said = model(images, "left")
        if architecture == "multi_head":
            features = images
            for block in model.network.blocks:
                features = block(features)
            expected = model.heads[0](features.mean(dim=(2, 3)))
        else:
            # One block after the other, of which the first channel alone goes on.
            is_film = architecture == "film"
            networks = [model.network] if is_film else list(model.networks)
            features = images
            for row in range(2):
                outputs = [network.blocks[row](features) for network in networks]
                features = torch.zeros_like(outputs[0])
                features[:, 0] = sum(output[:, 0] for output in outputs)
            expected = networks[0].head(features.mean(dim=(2, 3)))
    torch.testing.assert_close(said, expected)


def test_classes_are_told_with_an_accuracy() -> None:
    learner = dataclasses.replace(learner_of("film"), criterion=CrossEntropy())
    batch = tasks(("left", "right"))
    batch.query["targets"] = torch.randint(NUM_OUTPUTS, (2, 4))  # type: ignore[index]
    curve = learner.curve({}, batch, num_steps=0)
    assert set(curve) == {"loss", "accuracy"}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (("left", None), "episode 1 has no group, and this model is for the groups left, right, other.one"),
        (("middle", "left"), "episode 0 is of group 'middle', and this model is for the groups left, right,"),
    ],
)
def test_a_group_that_the_model_has_not_is_refused(groups: tuple[str | None, ...], message: str) -> None:
    with pytest.raises(CapabilityError, match=message):
        learner_of("film").curve({}, tasks(groups), num_steps=0)
