"""Learners that are given the support set against loops over examples, and gradients against differences."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from metaloom.engine.adapters.model import Structure
from metaloom.engine.algorithms.feed_forward import FeedForward
from metaloom.engine.algorithms.neural_process import NeuralProcess
from metaloom.engine.algorithms.set_learner import SetLearner, SetReader
from metaloom.engine.backbone import Backbone
from metaloom.engine.learner import TaskBatch
from metaloom.engine.losses import CrossEntropy, MeanSquaredError
from metaloom.engine.precision import Precision, Scales
from metaloom.models import neural_process
from metaloom.models.attention_learner import AttentionLearner
from metaloom.models.mlp import Mlp
from metaloom.models.recurrent_learner import RecurrentLearner

NUM_TASKS, NUM_SUPPORT, NUM_QUERY = 2, 5, 4
NUM_INPUTS, NUM_FEATURES, NUM_CLASSES, NUM_TARGETS, WIDTH = 3, 4, 3, 2, 6
MIN_STD = 0.2

NAMES = ("cnp", "attention", "recurrent")
TASKS = ("classification", "regression")
WAYS = [(name, task) for name in NAMES for task in TASKS]
every_way = pytest.mark.parametrize(("name", "task"), WAYS)


def network_of(name: str, task: str) -> nn.Module:
    torch.manual_seed(5)
    num_labels = NUM_CLASSES if task == "classification" else NUM_TARGETS
    network: nn.Module
    if name == "attention":
        network = AttentionLearner(
            num_features=NUM_FEATURES,
            num_labels=num_labels,
            width=WIDTH,
            num_layers=2,
            num_heads=2,
            num_outputs=num_labels,
        )
    elif name == "recurrent":
        network = RecurrentLearner(
            num_features=NUM_FEATURES,
            num_labels=num_labels,
            width=WIDTH,
            num_layers=2,
            num_outputs=num_labels,
        )
    elif task == "classification":
        network = neural_process.ClassNeuralProcess(
            num_features=NUM_FEATURES, num_classes=num_labels, width=WIDTH, num_layers=2
        )
    else:
        network = neural_process.NeuralProcess(
            num_features=NUM_FEATURES, num_targets=num_labels, width=WIDTH, num_layers=2, min_std=MIN_STD
        )
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)  # none is zero, so that each has an effect
    return network.double()


def algorithm_of(name: str, task: str) -> FeedForward:
    torch.manual_seed(4)
    model = Mlp(num_inputs=NUM_INPUTS, width=NUM_FEATURES, num_layers=1, num_outputs=2, activation="tanh")
    backbone = Backbone(model.double(), Structure(("blocks.0",), model.heads), "tasks", Precision("float64"))
    is_classification = task == "classification"
    reader = SetReader(backbone, network_of(name, task), NUM_CLASSES if is_classification else None)
    if name == "cnp" and not is_classification:
        return NeuralProcess(reader)
    return SetLearner(reader, CrossEntropy() if is_classification else MeanSquaredError())


def batch_of(task: str) -> TaskBatch:
    generator = torch.Generator().manual_seed(1)

    def part(count: int) -> dict[str, Tensor]:
        inputs = torch.randn(NUM_TASKS, count, NUM_INPUTS, dtype=torch.float64, generator=generator)
        if task == "classification":
            targets = torch.randint(NUM_CLASSES, (NUM_TASKS, count), generator=generator)
        else:
            targets = torch.randn(NUM_TASKS, count, NUM_TARGETS, dtype=torch.float64, generator=generator)
        return {"inputs": inputs, "targets": targets}

    return TaskBatch(tuple(range(NUM_TASKS)), part(NUM_SUPPORT), part(NUM_QUERY))


# ---------------------------------------------------------------- the networks again, example by example

Weights = Mapping[str, Tensor]
Predict = Callable[[Weights, list[Tensor], list[Tensor], Tensor], Tensor]


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    bias = weights.get(f"{name}.bias")
    product = torch.stack([(row * x).sum() for row in weights[f"{name}.weight"]])
    return product if bias is None else product + bias


def two_layers(weights: Weights, name: str, x: Tensor) -> Tensor:
    return linear(weights, f"{name}.2", linear(weights, f"{name}.0", x).clamp(min=0.0))


def cnp_by_hand(weights: Weights, xs: list[Tensor], ys: list[Tensor], query: Tensor) -> Tensor:
    encoded = [two_layers(weights, "encoder", torch.cat([x, y])) for x, y in zip(xs, ys, strict=True)]
    return two_layers(weights, "decoder", torch.cat([query, sum(encoded) / torch.tensor(len(encoded))]))


def class_cnp_by_hand(weights: Weights, xs: list[Tensor], ys: list[Tensor], query: Tensor) -> Tensor:
    representation = []
    for label in range(NUM_CLASSES):
        members = [torch.cat([x, y]) for x, y in zip(xs, ys, strict=True) if int(y.argmax()) == label]
        total = torch.zeros(WIDTH, dtype=torch.float64)
        for member in members:
            total = total + two_layers(weights, "encoder", member) / len(members)
        representation.append(total)
    return two_layers(weights, "decoder", torch.cat([query, *representation]))


def normed(weights: Weights, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean()
    scaled = centred / (centred.square().mean() + 1e-5).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attention_by_hand(weights: Weights, xs: list[Tensor], ys: list[Tensor], query: Tensor) -> Tensor:
    tokens = [
        linear(weights, "features", x) + linear(weights, "labels", y) for x, y in zip(xs, ys, strict=True)
    ]
    tokens.append(linear(weights, "features", query) + weights["asked"])
    size = WIDTH // 2
    for block in ("blocks.0", "blocks.1"):
        seen = [
            linear(weights, f"{block}.key_value", normed(weights, f"{block}.norm_attention", t))
            for t in tokens[:-1]
        ]
        after = []
        for token in tokens:
            asks = linear(weights, f"{block}.query", normed(weights, f"{block}.norm_attention", token))
            heads = []
            for head in (slice(0, size), slice(size, WIDTH)):
                scores = [float((asks[head] * s[:WIDTH][head]).sum()) / math.sqrt(size) for s in seen]
                shares = [math.exp(score) / sum(math.exp(other) for other in scores) for score in scores]
                values = [share * s[WIDTH:][head] for share, s in zip(shares, seen, strict=True)]
                heads.append(torch.stack(values).sum(0))
            token = token + linear(weights, f"{block}.proj", torch.cat(heads))
            inner = linear(weights, f"{block}.fc_in", normed(weights, f"{block}.norm_mlp", token))
            inner = 0.5 * inner * (1.0 + torch.erf(inner / math.sqrt(2.0)))
            after.append(token + linear(weights, f"{block}.fc_out", inner))
        tokens = after
    return linear(weights, "head", normed(weights, "norm", tokens[-1]))


def recurrent_by_hand(weights: Weights, xs: list[Tensor], ys: list[Tensor], query: Tensor) -> Tensor:
    states = [(torch.zeros(WIDTH, dtype=torch.float64),) * 2 for _ in range(2)]
    for x, label in zip([*xs, query], [torch.zeros_like(ys[0]), *ys], strict=True):
        inputs = torch.cat([x, label])
        for layer, (hidden, cell) in enumerate(states):
            w = {
                key: weights[f"cells.{layer}.{key}"]
                for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            }
            gates = w["weight_ih"] @ inputs + w["bias_ih"] + w["weight_hh"] @ hidden + w["bias_hh"]
            let_in, keep, new, out = gates.chunk(4)
            cell = keep.sigmoid() * cell + let_in.sigmoid() * new.tanh()
            inputs = out.sigmoid() * cell.tanh()
            states[layer] = (inputs, cell)
    return linear(weights, "head", inputs)


BY_HAND: dict[tuple[str, str], Predict] = {
    ("cnp", "classification"): class_cnp_by_hand,
    ("cnp", "regression"): cnp_by_hand,
    ("attention", "classification"): attention_by_hand,
    ("attention", "regression"): attention_by_hand,
    ("recurrent", "classification"): recurrent_by_hand,
    ("recurrent", "regression"): recurrent_by_hand,
}


def predictions_by_hand(name: str, task: str, data: TaskBatch, row: int) -> list[Tensor]:
    """What a learner says of each query of one task."""
    meta = algorithm_of(name, task).meta_parameters()
    weights = {key.removeprefix("network."): value for key, value in meta.items() if "network." in key}
    body = {
        key.removeprefix("backbone.blocks.0."): value for key, value in meta.items() if "backbone." in key
    }

    def features(part: Mapping[str, Tensor]) -> list[Tensor]:
        return [linear(body, "linear", x).tanh() for x in part["inputs"][row]]

    labels = list(data.support["targets"][row])
    if task == "classification":
        labels = [torch.eye(NUM_CLASSES, dtype=torch.float64)[int(label)] for label in labels]
    predict = BY_HAND[name, task]
    return [predict(weights, features(data.support), labels, query) for query in features(data.query)]


def cross_entropy_by_hand(logits: Tensor, target: Tensor) -> float:
    return math.log(sum(math.exp(float(z)) for z in logits)) - float(logits[int(target)])


@every_way
def test_losses_equal_those_of_loops_over_examples(name: str, task: str) -> None:
    learner, data = algorithm_of(name, task), batch_of(task)
    curve = learner.curve(learner.meta_parameters(), data, num_steps=2)
    for row in range(NUM_TASKS):
        said = predictions_by_hand(name, task, data, row)
        targets = list(data.query["targets"][row])
        if task == "classification":
            losses = [cross_entropy_by_hand(z, y) for z, y in zip(said, targets, strict=True)]
            right = [int(z.argmax()) == int(y) for z, y in zip(said, targets, strict=True)]
            assert curve["accuracy"][row].tolist() == [sum(right) / NUM_QUERY] * 3
        else:
            means = [z[:NUM_TARGETS] for z in said]
            losses = [float((m - y).square().mean()) for m, y in zip(means, targets, strict=True)]
        assert curve["loss"][row].tolist() == pytest.approx([sum(losses) / NUM_QUERY] * 3, rel=1e-10)


def test_a_neural_process_of_a_regression_is_trained_on_the_density_of_a_gaussian() -> None:
    learner, data = algorithm_of("cnp", "regression"), batch_of("regression")
    meta = learner.meta_parameters()
    found = learner.meta_gradient(meta, data)
    measured = learner.curve(meta, data, num_steps=0)
    for row in range(NUM_TASKS):
        log_density = 0.0
        for said, target in zip(
            predictions_by_hand("cnp", "regression", data, row), data.query["targets"][row], strict=True
        ):
            for mean, raw, y in zip(said[:NUM_TARGETS], said[NUM_TARGETS:], target, strict=True):
                std = MIN_STD + (1.0 - MIN_STD) * math.log1p(math.exp(float(raw)))
                density = math.exp(-0.5 * (float(y - mean) / std) ** 2) / (std * math.sqrt(2.0 * math.pi))
                log_density += math.log(density) / NUM_QUERY
        assert float(found.losses[row]) == pytest.approx(-log_density, rel=1e-10)
        assert float(measured["log_likelihood"][row, 0]) == pytest.approx(log_density, rel=1e-10)
        # What is told of a step is the squared error, as of other regressions.
        assert float(found.metrics["loss_after"][row]) == pytest.approx(float(measured["loss"][row, 0]))
    assert set(found.metrics) == set(learner.metric_names)


@every_way
def test_the_gradient_equals_differences_of_what_is_minimised(name: str, task: str) -> None:
    learner, data = algorithm_of(name, task), batch_of(task)
    meta = learner.meta_parameters()
    gradient = learner.meta_gradient(meta, data).gradient
    generator = torch.Generator().manual_seed(2)
    for key in meta:
        along = torch.randn(meta[key].shape, generator=generator, dtype=torch.float64)

        def total(step: float, key: str = key, along: Tensor = along) -> float:
            moved = meta | {key: meta[key] + step * along}
            return float(learner.meta_gradient(moved, data).losses.sum())

        difference = (total(1e-5) - total(-1e-5)) / 2e-5
        slope = float((gradient[key] * along).sum())
        # Rounding of the losses over the step, and the third derivative's part.
        assert slope == pytest.approx(difference, rel=1e-6, abs=1e-8), key
        assert gradient[key].abs().max() > 0.0, key


@every_way
def test_weights_are_meta_parameters_by_their_names(name: str, task: str) -> None:
    learner = algorithm_of(name, task)
    network = network_of(name, task)
    expected = {f"network.{key}" for key, _ in network.named_parameters()}
    assert learner.meta_parameters().keys() == expected | {
        "backbone.blocks.0.linear.weight",
        "backbone.blocks.0.linear.bias",
    }


def reordered(data: TaskBatch, order: list[int]) -> TaskBatch:
    return dataclasses.replace(data, support={key: value[:, order] for key, value in data.support.items()})


@every_way
def test_the_order_of_the_support_examples_counts_for_the_recurrent_learner_alone(
    name: str, task: str
) -> None:
    learner, data = algorithm_of(name, task), batch_of(task)
    meta = learner.meta_parameters()
    loss = learner.curve(meta, data, num_steps=0)["loss"]
    other = learner.curve(meta, reordered(data, [3, 0, 4, 2, 1]), num_steps=0)["loss"]
    if name == "recurrent":
        assert (loss - other).abs().min() > 1e-4
    else:
        assert torch.allclose(loss, other, rtol=1e-12, atol=0.0)  # sums in another order


@every_way
def test_queries_do_not_see_each_other(name: str, task: str) -> None:
    learner, data = algorithm_of(name, task), batch_of(task)
    meta = learner.meta_parameters()
    together = learner.curve(meta, data, num_steps=0)["loss"]
    alone = [
        learner.curve(
            meta,
            dataclasses.replace(
                data, query={key: value[:, row : row + 1] for key, value in data.query.items()}
            ),
            num_steps=0,
        )["loss"]
        for row in range(NUM_QUERY)
    ]
    assert torch.allclose(together, torch.stack(alone).mean(0), rtol=1e-12, atol=0.0)


@every_way
def test_tasks_do_not_see_each_other(name: str, task: str) -> None:
    learner, data = algorithm_of(name, task), batch_of(task)
    meta = learner.meta_parameters()
    together = learner.meta_gradient(meta, data)
    parts = [learner.meta_gradient(meta, part) for part in data.split(1)]
    assert together.losses.tolist() == pytest.approx([float(part.losses) for part in parts], rel=1e-12)
    for key, value in together.gradient.items():
        assert torch.allclose(value, parts[0].gradient[key] + parts[1].gradient[key], rtol=1e-9, atol=1e-13)


def padded(part: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """A part with `count` further examples behind its own, of weight 0."""
    inputs, targets = part["inputs"], part["targets"]
    noise = torch.full((NUM_TASKS, count, *inputs.shape[2:]), 3.0, dtype=inputs.dtype)
    more = targets[:, :1].expand(-1, count, *targets.shape[2:])
    weights = torch.cat([torch.ones(targets.shape[:2]), torch.zeros(NUM_TASKS, count)], dim=1)
    return {
        "inputs": torch.cat([inputs, noise], dim=1),
        "targets": torch.cat([targets, more], dim=1),
        "weights": weights,
    }


@every_way
def test_padding_changes_nothing(name: str, task: str) -> None:
    learner, data = algorithm_of(name, task), batch_of(task)
    wider = dataclasses.replace(data, support=padded(data.support, 2), query=padded(data.query, 3))
    meta = learner.meta_parameters()
    one, other = learner.meta_gradient(meta, data), learner.meta_gradient(meta, wider)
    # Sums of more terms, of which some are zero, are equal to rounding.
    assert torch.allclose(one.losses, other.losses, rtol=1e-12)
    for key, value in one.gradient.items():
        assert torch.allclose(value, other.gradient[key], rtol=1e-9, atol=1e-13)
    for key, value in one.metrics.items():
        assert torch.allclose(value, other.metrics[key], rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_classes_that_a_task_has_not_are_never_chosen(name: str) -> None:
    learner, data = algorithm_of(name, "classification"), batch_of("classification")
    fewer = dataclasses.replace(
        data,
        support=dict(data.support) | {"targets": data.support["targets"] % 2},
        query=dict(data.query) | {"targets": data.query["targets"] % 2},
        num_ways=torch.full((NUM_TASKS,), 2),
    )
    curve = learner.curve(learner.meta_parameters(), fewer, num_steps=0)
    for row in range(NUM_TASKS):
        said = predictions_by_hand(name, "classification", fewer, row)
        losses = [
            cross_entropy_by_hand(z[:2], y) for z, y in zip(said, fewer.query["targets"][row], strict=True)
        ]
        assert float(curve["loss"][row, 0]) == pytest.approx(sum(losses) / NUM_QUERY, rel=1e-10)


@every_way
def test_a_dummy_and_a_scale_have_no_part_in_the_gradient(name: str, task: str) -> None:
    learner, data = algorithm_of(name, task), batch_of(task)
    meta = learner.meta_parameters()
    alone = learner.meta_gradient(meta, data.split(1)[0])
    masked = learner.meta_gradient(
        meta, dataclasses.replace(data, weights=torch.tensor([1.0, 0.0])), Scales(tangent=256.0)
    )
    for key, value in alone.gradient.items():
        assert torch.allclose(value, masked.gradient[key], rtol=1e-9, atol=1e-13)
    assert masked.losses.tolist() == pytest.approx([float(alone.losses), 0.0], rel=1e-12)


@every_way
def test_half_precision_comes_near(name: str, task: str) -> None:
    learner, data = algorithm_of(name, task), batch_of(task)
    meta = learner.meta_parameters()
    expected = learner.curve(meta, data, num_steps=0)["loss"]
    assert isinstance(learner, SetLearner | NeuralProcess)
    backbone = dataclasses.replace(learner.reader.backbone, precision=Precision("bfloat16"))
    half = dataclasses.replace(learner, reader=dataclasses.replace(learner.reader, backbone=backbone))
    in_float32 = data.mapped(lambda t: t.float() if t.is_floating_point() else t)
    meta = {key: value.float() for key, value in meta.items()}
    found = half.meta_gradient(meta, in_float32)
    # bfloat16 has 8 bits, and a loss is a few products of them.
    assert torch.allclose(found.metrics["loss_after"], expected[:, 0], rtol=0.1)
    assert all(value.dtype == torch.float32 for value in found.gradient.values())


def test_a_deviation_is_at_least_the_least() -> None:
    network = network_of("cnp", "regression")
    with torch.no_grad():
        network.get_parameter("decoder.2.bias")[NUM_TARGETS:] = -1e3
    support = torch.randn(1, 3, NUM_FEATURES, dtype=torch.float64)
    _, std = network(support, torch.randn(1, 3, NUM_TARGETS, dtype=torch.float64), support)
    assert std.flatten().tolist() == [MIN_STD] * std.numel()
