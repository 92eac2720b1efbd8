"""Prototypical networks against loops over examples, and their gradient against differences."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from metaloom.engine.adapters.model import Structure
from metaloom.engine.algorithms.protonet import Protonet
from metaloom.engine.backbone import Backbone
from metaloom.engine.learner import TaskBatch
from metaloom.engine.precision import Precision, Scales
from metaloom.errors import CapabilityError
from metaloom.models.conv4 import Conv4

NUM_TASKS, NUM_WAYS, NUM_QUERY = 2, 3, 4


def model() -> Conv4:
    torch.manual_seed(0)
    return Conv4(num_classes=NUM_WAYS, width=4, num_blocks=2, norm="batch").double()


def algorithm(network: Conv4, *, recompute_blocks: bool = False) -> Protonet:
    structure = Structure(("blocks.0", "blocks.1"), network.heads)
    backbone = Backbone(network, structure, "tasks", Precision("float64"), recompute_blocks)
    return Protonet(backbone, NUM_WAYS)


def batch(*, num_shots: int = 2) -> TaskBatch:
    generator = torch.Generator().manual_seed(1)

    def images(count: int) -> Tensor:
        return torch.randn(NUM_TASKS, count, 1, 8, 8, dtype=torch.float64, generator=generator)

    support = torch.arange(NUM_WAYS).repeat(num_shots).expand(NUM_TASKS, -1)
    query = torch.randint(NUM_WAYS, (NUM_TASKS, NUM_QUERY), generator=generator)
    return TaskBatch(
        tuple(range(NUM_TASKS)),
        {"inputs": images(NUM_WAYS * num_shots), "targets": support},
        {"inputs": images(NUM_QUERY), "targets": query},
    )


def by_hand(network: Conv4, data: TaskBatch, task: int, num_ways: int = NUM_WAYS) -> tuple[float, float]:
    """Loss and accuracy of one task, example by example."""
    support, query = data.support["inputs"][task], data.query["inputs"][task]
    hidden = torch.cat([support, query])
    for block in network.blocks:
        hidden = block(hidden)
    features = hidden.mean(dim=(2, 3)).tolist()
    own, asked = features[: len(support)], features[len(support) :]
    centres = []
    for label in range(num_ways):
        members = [f for f, y in zip(own, data.support["targets"][task].tolist(), strict=True) if y == label]
        centres.append([sum(column) / len(members) for column in zip(*members, strict=True)])
    losses, right = [], []
    for feature, target in zip(asked, data.query["targets"][task].tolist(), strict=True):
        scores = [-sum((a - b) ** 2 for a, b in zip(feature, c, strict=True)) for c in centres]
        losses.append(math.log(sum(math.exp(score) for score in scores)) - scores[target])
        right.append(scores.index(max(scores)) == target)
    return sum(losses) / len(losses), sum(right) / len(right)


def test_losses_equal_those_of_loops_over_examples() -> None:
    network, data = model(), batch()
    curve = algorithm(network).curve({}, data, num_steps=3)
    for task in range(NUM_TASKS):
        loss, accuracy = by_hand(network, data, task)
        assert curve["loss"][task].tolist() == pytest.approx([loss] * 4, rel=1e-12)
        assert curve["accuracy"][task].tolist() == [accuracy] * 4


def test_only_the_weights_before_the_head_are_learned() -> None:
    network = model()
    expected = {f"backbone.{name}" for name, _ in network.named_parameters() if not name.startswith("head")}
    assert algorithm(network).meta_parameters().keys() == expected


@pytest.mark.parametrize("recompute_blocks", [False, True])
def test_the_gradient_equals_differences_of_the_summed_losses(recompute_blocks: bool) -> None:
    network, data = model(), batch()
    learner = algorithm(network, recompute_blocks=recompute_blocks)
    meta = learner.meta_parameters()
    found = learner.meta_gradient(meta, data)
    generator = torch.Generator().manual_seed(2)
    along = {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype) for name, value in meta.items()
    }

    def total(step: float) -> float:
        moved = {name: value + step * along[name] for name, value in meta.items()}
        return float(learner.curve(moved, data, num_steps=0)["loss"].sum())

    difference = (total(1e-5) - total(-1e-5)) / 2e-5
    slope = sum(float((found.gradient[name] * along[name]).sum()) for name in meta)
    assert slope == pytest.approx(difference, rel=1e-7)  # the third derivative's part of the difference
    assert found.losses.tolist() == pytest.approx(
        learner.curve(meta, data, num_steps=0)["loss"][:, 0].tolist()
    )


def test_padding_changes_nothing() -> None:
    network, data = model(), batch()
    learner = algorithm(network)
    meta = learner.meta_parameters()

    def padded(part: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        noise = torch.randn(NUM_TASKS, count, 1, 8, 8, dtype=torch.float64)
        ones, zeros = torch.ones(part["targets"].shape), torch.zeros(NUM_TASKS, count)
        return {
            "inputs": torch.cat([part["inputs"], noise], dim=1),
            "targets": torch.cat([part["targets"], torch.zeros(NUM_TASKS, count, dtype=torch.int64)], dim=1),
            "weights": torch.cat([ones, zeros], dim=1),
        }

    wider = dataclasses.replace(
        data, support=padded(dict(data.support), 2), query=padded(dict(data.query), 3)
    )
    whole, other = learner.meta_gradient(meta, data), learner.meta_gradient(meta, wider)
    # Batch statistics are then weighted sums: equal to rounding.
    assert torch.allclose(whole.losses, other.losses, rtol=1e-12)
    for name, value in whole.gradient.items():
        assert torch.allclose(value, other.gradient[name], rtol=1e-9, atol=1e-12)


def test_classes_that_a_task_has_not_are_never_chosen() -> None:
    network, data = model(), batch()
    two = data.support["targets"] % 2
    fewer = dataclasses.replace(
        data,
        support={"inputs": data.support["inputs"], "targets": two},
        query={"inputs": data.query["inputs"], "targets": data.query["targets"] % 2},
        num_ways=torch.full((NUM_TASKS,), 2),
    )
    curve = algorithm(network).curve({}, fewer, num_steps=0)
    for task in range(NUM_TASKS):
        assert float(curve["loss"][task, 0]) == pytest.approx(by_hand(network, fewer, task, 2)[0], rel=1e-12)


def test_a_dummy_has_no_part_in_gradient_and_metrics() -> None:
    learner, data = algorithm(model()), batch()
    meta = learner.meta_parameters()
    (first, _) = data.split(1)
    alone = learner.meta_gradient(meta, first)
    masked = learner.meta_gradient(meta, dataclasses.replace(data, weights=torch.tensor([1.0, 0.0])))
    for name, value in alone.gradient.items():
        assert torch.allclose(value, masked.gradient[name], rtol=1e-12, atol=0.0)
    assert masked.losses.tolist() == [float(alone.losses), 0.0]
    assert {name: value[1].item() for name, value in masked.metrics.items()} == dict.fromkeys(
        masked.metrics, 0.0
    )
    assert set(masked.metrics) == set(learner.metric_names)


def test_a_scale_of_half_precision_is_divided_out() -> None:
    learner, data = algorithm(model()), batch()
    meta = learner.meta_parameters()
    plain = learner.meta_gradient(meta, data)
    scaled = learner.meta_gradient(meta, data, Scales(tangent=1024.0))
    for name, value in plain.gradient.items():
        assert torch.allclose(value, scaled.gradient[name], rtol=1e-12, atol=0.0)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(CapabilityError, match="this model has no head that can be told from the rest"):
        Backbone(torch.nn.Linear(2, 2), Structure(), None, Precision())
