"""Adaptation without labels, by context or batch norm, against loops over examples; its gradient against
differences."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metaloom.engine.adapters.model import Structure
from metaloom.engine.algorithms.arm import ArmBn, ArmCml
from metaloom.engine.algorithms.erm import Erm
from metaloom.engine.algorithms.feed_forward import FeedForward
from metaloom.engine.learner import TaskBatch
from metaloom.engine.losses import CrossEntropy, MeanSquaredError
from metaloom.engine.precision import Precision
from metaloom.engine.whole_model import WholeModel
from metaloom.errors import CapabilityError
from metaloom.models.context import ConvContext, MlpContext
from metaloom.models.conv4 import Conv4
from metaloom.models.mlp import Mlp

NUM_TASKS, NUM_CLASSES, NUM_SUPPORT, NUM_QUERY, NUM_CONTEXT = 2, 3, 5, 4, 2
ALGORITHMS = ("erm", "arm_cml", "arm_cml with batch norm", "arm_bn", "arm_cml of arrays")


def whole(network: nn.Module, prefix: str = "backbone.") -> WholeModel:
    is_context = isinstance(network, ConvContext | MlpContext)
    head = None if is_context else {"tasks": "head"}
    output = None if is_context else "tasks"
    return WholeModel(network.double(), Structure((), head), output, Precision("float64"), prefix=prefix)


def algorithm(name: str, *, is_own_context: bool = False) -> FeedForward:
    torch.manual_seed(0)
    if name == "arm_cml of arrays":
        context = MlpContext(num_inputs=6, num_context=NUM_CONTEXT, width=5)
        network = Mlp(num_inputs=6 + NUM_CONTEXT, width=5, num_layers=1, num_outputs=2, activation="tanh")
        return ArmCml(whole(context, "backbone.context."), whole(network), MeanSquaredError(), is_own_context)
    norm = "batch" if name in ("arm_bn", "arm_cml with batch norm") else "layer"
    num_channels = 1 + NUM_CONTEXT if name.startswith("arm_cml") else 1
    model = whole(Conv4(num_classes=NUM_CLASSES, width=4, num_blocks=2, norm=norm, num_channels=num_channels))
    if name == "erm":
        return Erm(model, CrossEntropy())
    if name == "arm_bn":
        return ArmBn(model, CrossEntropy(), is_own_context)
    images = ConvContext(num_channels=1, num_context=NUM_CONTEXT, width=3, norm=norm)
    return ArmCml(whole(images, "backbone.context."), model, CrossEntropy(), is_own_context)


def batch(name: str) -> TaskBatch:
    generator = torch.Generator().manual_seed(1)

    def part(count: int) -> dict[str, Tensor]:
        shape = (2, 3) if name.endswith("arrays") else (1, 8, 8)
        inputs = torch.randn(NUM_TASKS, count, *shape, dtype=torch.float64, generator=generator)
        if name.endswith("arrays"):
            return {"inputs": inputs, "targets": inputs.flatten(2)[..., :2] ** 2}
        targets = torch.randint(NUM_CLASSES, (NUM_TASKS, count), generator=generator)
        return {"inputs": inputs, "targets": targets}

    return TaskBatch(tuple(range(NUM_TASKS)), part(NUM_SUPPORT), part(NUM_QUERY))


def conv(image: Tensor, layer: nn.Conv2d) -> Tensor:
    return F.conv2d(image[None], layer.weight, layer.bias, layer.stride, layer.padding)[0]


def normed(images: list[Tensor], like: list[Tensor], norm: nn.Module) -> list[Tensor]:
    """Batch norm by the statistics of other images, or layer norm, image by image and channel by channel."""
    results = []
    for image in images:
        channels = []
        for channel in range(len(image)):
            if isinstance(norm, nn.BatchNorm2d):
                seen = [value for other in like for value in other[channel].flatten().tolist()]
            else:
                seen = image.flatten().tolist()
            mean = sum(seen) / len(seen)
            variance = sum((value - mean) ** 2 for value in seen) / len(seen)
            scaled = (image[channel] - mean) / math.sqrt(variance + 1e-5)
            channels.append(scaled * norm.weight[channel] + norm.bias[channel])  # type: ignore[index]
        results.append(torch.stack(channels).detach())
    return results


def layers(network: nn.Module) -> list[tuple[nn.Conv2d, nn.Module]]:
    if isinstance(network, Conv4):
        return [(block.conv, block.norm) for block in network.blocks]  # type: ignore[misc]
    assert isinstance(network, ConvContext)
    return [(network.first, network.first_norm), (network.second, network.second_norm)]


def through(network: nn.Module, images: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """Images through a network's normed layers, and batch statistics those of others on their way too."""
    for layer, norm in layers(network):
        images, like = [conv(image, layer) for image in images], [conv(image, layer) for image in like]
        images, like = normed(images, like, norm), normed(like, like, norm)
        images, like = [image.clamp(min=0.0) for image in images], [image.clamp(min=0.0) for image in like]
    return images


def by_hand(learner: FeedForward, data: TaskBatch, task: int) -> tuple[float, float]:
    """Loss and accuracy of one task, image by image."""
    support, query = list(data.support["inputs"][task]), list(data.query["inputs"][task])
    if isinstance(learner, ArmCml):
        context = learner.context.model
        assert isinstance(context, ConvContext)
        described = [conv(each, context.last) for each in through(context, support, support)]
        mean = sum(described[1:], described[0]) / len(described)
        support, query = ([torch.cat([image, mean]) for image in images] for images in (support, query))
    assert isinstance(learner, Erm | ArmBn | ArmCml)
    network = learner.model.model
    assert isinstance(network, Conv4)
    losses, right = [], []
    features = through(network, query, support)
    for feature, target in zip(features, data.query["targets"][task].tolist(), strict=True):
        logits = (network.head.weight @ feature.mean(dim=(1, 2)) + network.head.bias).tolist()
        losses.append(math.log(sum(math.exp(logit) for logit in logits)) - logits[target])
        right.append(logits.index(max(logits)) == target)
    return sum(losses) / len(losses), sum(right) / len(right)


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if not name.endswith("arrays")])
def test_losses_equal_those_of_loops_over_images(name: str) -> None:
    learner, data = algorithm(name), batch(name)
    curve = learner.curve({}, data, num_steps=2)
    for task in range(NUM_TASKS):
        loss, accuracy = by_hand(learner, data, task)
        assert curve["loss"][task].tolist() == pytest.approx([loss] * 3, rel=1e-10)
        assert curve["accuracy"][task].tolist() == [accuracy] * 3


def test_an_array_is_shown_beside_the_mean_of_what_is_said_of_the_context() -> None:
    learner, data = algorithm("arm_cml of arrays"), batch("arm_cml of arrays")
    assert isinstance(learner, ArmCml)
    curve = learner.curve({}, data, num_steps=0)
    assert curve.keys() == {"loss"}
    for task in range(NUM_TASKS):
        with torch.no_grad():
            context = sum(learner.context.model(x[None])[0] for x in data.support["inputs"][task])
            context = context / NUM_SUPPORT
            squares = [
                (learner.model.model(torch.cat([x.flatten(), context])[None])[0] - y).square().mean()
                for x, y in zip(data.query["inputs"][task], data.query["targets"][task], strict=True)
            ]
        assert float(curve["loss"][task, 0]) == pytest.approx(float(sum(squares)) / NUM_QUERY, rel=1e-12)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_gradient_equals_differences_of_the_summed_losses(name: str) -> None:
    learner, data = algorithm(name), batch(name)
    meta = learner.meta_parameters()
    generator = torch.Generator().manual_seed(2)
    along = {
        key: torch.randn(value.shape, generator=generator, dtype=value.dtype) for key, value in meta.items()
    }
    gradient = learner.meta_gradient(meta, data).gradient
    assert all(bool(value.any()) for value in gradient.values())

    def total(step: float) -> float:
        moved = {key: value + step * along[key] for key, value in meta.items()}
        return float(learner.curve(moved, data, num_steps=0)["loss"].sum())

    slope = sum(float((gradient[key] * along[key]).sum()) for key in meta)
    # The third derivative's part of the difference, and no kink within so short a way.
    assert slope == pytest.approx((total(1e-6) - total(-1e-6)) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_labels_of_the_context_have_no_influence(name: str) -> None:
    learner, data = algorithm(name), batch(name)
    meta = learner.meta_parameters()
    other = dataclasses.replace(
        data, support={**data.support, "targets": data.support["targets"].flip(1) * 0 + 1}
    )
    one, two = learner.meta_gradient(meta, data), learner.meta_gradient(meta, other)
    assert torch.equal(one.losses, two.losses)
    assert all(torch.equal(value, two.gradient[key]) for key, value in one.gradient.items())


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "erm"])
def test_the_context_is_a_set_and_its_images_matter(name: str) -> None:
    learner, data = algorithm(name), batch(name)

    def losses(support: Tensor) -> Tensor:
        changed = dataclasses.replace(data, support={**data.support, "inputs": support})
        return learner.curve({}, changed, num_steps=0)["loss"]

    inputs = data.support["inputs"]
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(losses(inputs[:, order]), losses(inputs), rtol=1e-12, atol=0.0)
    assert (losses(2.0 * inputs + 1.0) - losses(inputs)).abs().min() > 1e-6


def test_without_adaptation_support_inputs_have_no_influence() -> None:
    learner, data = algorithm("erm"), batch("erm")
    other = dataclasses.replace(data, support={**data.support, "inputs": 9.0 * data.support["inputs"]})
    for name, value in learner.curve({}, data, num_steps=0).items():
        assert torch.equal(value, learner.curve({}, other, num_steps=0)[name])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_prediction_does_not_depend_on_the_other_queries(name: str) -> None:
    learner, data = algorithm(name), batch(name)
    singles = [
        dataclasses.replace(data, query={key: value[:, [row]] for key, value in data.query.items()})
        for row in range(NUM_QUERY)
    ]
    losses = torch.stack([learner.curve({}, single, num_steps=0)["loss"][:, 0] for single in singles])
    whole_loss = learner.curve({}, data, num_steps=0)["loss"][:, 0]
    torch.testing.assert_close(losses.mean(0), whole_loss, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "erm"])
def test_one_pass_is_enough_where_the_queries_are_the_context(name: str) -> None:
    data = batch(name)
    same = dataclasses.replace(data, query=data.support)
    one = algorithm(name, is_own_context=True)
    meta = one.meta_parameters()
    short, long = one.meta_gradient(meta, same), algorithm(name).meta_gradient(meta, same)
    torch.testing.assert_close(short.losses, long.losses, rtol=1e-11, atol=0.0)
    for key, value in short.gradient.items():
        torch.testing.assert_close(value, long.gradient[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_padding_changes_nothing(name: str) -> None:
    learner, data = algorithm(name), batch(name)
    meta = learner.meta_parameters()

    def padded(part: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        longer = {key: torch.cat([value, 3 * value[:, :count]], dim=1) for key, value in part.items()}
        longer["targets"] = torch.cat([part["targets"], part["targets"][:, :count]], dim=1)
        weights = torch.ones(longer["inputs"].shape[:2])
        weights[:, -count:] = 0.0
        return longer | {"weights": weights}

    wider = dataclasses.replace(
        data, support=padded(dict(data.support), 2), query=padded(dict(data.query), 3)
    )
    one, two = learner.meta_gradient(meta, data), learner.meta_gradient(meta, wider)
    # Batch statistics and means are then weighted sums: equal to rounding.
    torch.testing.assert_close(one.losses, two.losses, rtol=1e-11, atol=0.0)
    for key, value in one.gradient.items():
        torch.testing.assert_close(value, two.gradient[key], rtol=1e-8, atol=1e-12)


def test_weights_of_an_output_that_is_not_read_are_not_learned() -> None:
    network = Conv4(num_classes=3, width=2, num_blocks=1, norm="layer", num_rehearsal_classes=4)
    model = WholeModel(network, Structure((), network.heads), "tasks", Precision())
    names = model.meta_parameters().keys()
    assert "backbone.head.weight" in names
    assert not any("rehearsal_head" in name for name in names)


def test_arm_bn_needs_batch_norm() -> None:
    network = Conv4(num_classes=3, width=2, num_blocks=1, norm="layer")
    with pytest.raises(CapabilityError, match="arm_bn adapts by the statistics of batch norm"):
        ArmBn(whole(network), CrossEntropy())
