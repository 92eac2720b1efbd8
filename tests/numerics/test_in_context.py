"""A language model with support sequences in context against its own forward pass on texts put together."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from metaloom.engine.adapters.model import Structure
from metaloom.engine.algorithms.in_context import InContext
from metaloom.engine.learner import TaskBatch
from metaloom.engine.precision import Precision
from metaloom.errors import CapabilityError
from metaloom.models.gpt import Gpt

NUM_TASKS, NUM_SUPPORT, NUM_QUERY, LENGTH, VOCABULARY = 2, 3, 2, 4, 7
CONTEXT = 3 * (LENGTH + 1) + LENGTH


def model(*, tied: bool = True) -> Gpt:
    torch.manual_seed(0)
    network = Gpt(
        num_layers=2,
        width=8,
        num_heads=2,
        context_length=CONTEXT,
        tied_embeddings=tied,
        vocabulary=VOCABULARY,
    ).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def learner_of(network: Gpt, *, num_shown: int = 2, recompute_blocks: bool = False) -> InContext:
    structure = Structure(("blocks.0", "blocks.1"), network.heads)
    return InContext(
        network, structure, "language_modelling", Precision("float64"), num_shown, recompute_blocks
    )


def batch() -> TaskBatch:
    generator = torch.Generator().manual_seed(1)

    def part(count: int) -> dict[str, Tensor]:
        texts = torch.randint(VOCABULARY, (NUM_TASKS, count, LENGTH + 1), generator=generator)
        return {"inputs": texts[..., :-1].contiguous(), "targets": texts[..., 1:].contiguous()}

    return TaskBatch(tuple(range(NUM_TASKS)), part(NUM_SUPPORT), part(NUM_QUERY))


def by_hand(network: Gpt, data: TaskBatch, task: int, num_shown: int) -> tuple[float, float]:
    """Loss and accuracy of one task, token by token: each is asked for by a pass of its own, which reads the
    support texts, then the query up to there."""
    shown: list[int] = []
    for row in range(NUM_SUPPORT - num_shown, NUM_SUPPORT):
        shown += data.support["inputs"][task, row].tolist()
        shown.append(int(data.support["targets"][task, row, -1]))
    losses, right = [], []
    for inputs, targets in zip(data.query["inputs"][task], data.query["targets"][task], strict=True):
        for position in range(LENGTH):
            text = shown + inputs[: position + 1].tolist()
            logits = network(torch.tensor([text]))[0, -1].tolist()
            total = sum(math.exp(logit) for logit in logits)
            losses.append(math.log(total) - logits[int(targets[position])])
            right.append(logits.index(max(logits)) == int(targets[position]))
    return sum(losses) / len(losses), sum(right) / len(right)


@pytest.mark.parametrize("num_shown", [1, 2, 3])
def test_losses_equal_those_of_passes_over_texts_put_together(num_shown: int) -> None:
    network, data = model(), batch()
    curve = learner_of(network, num_shown=num_shown).curve({}, data, num_steps=2)
    for task in range(NUM_TASKS):
        loss, accuracy = by_hand(network, data, task, num_shown)
        assert curve["loss"][task].tolist() == pytest.approx([loss] * 3, rel=1e-10)
        assert curve["accuracy"][task].tolist() == pytest.approx([accuracy] * 3)


def test_learned_weights_take_the_place_of_the_models() -> None:
    learner, data = learner_of(model()), batch()
    meta = {name: 1.5 * value for name, value in learner.meta_parameters().items()}
    found = learner.curve(meta, data, num_steps=0)["loss"]
    other = model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    for task in range(NUM_TASKS):
        assert float(found[task, 0]) == pytest.approx(by_hand(other, data, task, 2)[0], rel=1e-10)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("recompute_blocks", [False, True])
def test_the_gradient_equals_differences_of_the_summed_losses(tied: bool, recompute_blocks: bool) -> None:
    learner, data = learner_of(model(tied=tied), recompute_blocks=recompute_blocks), batch()
    meta = learner.meta_parameters()
    assert meta.keys() == {f"backbone.{name}" for name, _ in model(tied=tied).named_parameters()}
    gradient = learner.meta_gradient(meta, data).gradient
    generator = torch.Generator().manual_seed(2)
    for key in meta:
        along = torch.randn(meta[key].shape, generator=generator, dtype=torch.float64)

        def total(step: float, key: str = key, along: Tensor = along) -> float:
            moved = meta | {key: meta[key] + step * along}
            return float(learner.curve(moved, data, num_steps=0)["loss"].sum())

        difference = (total(1e-5) - total(-1e-5)) / 2e-5
        # Rounding of the losses over the step, and the third derivative's part.
        assert float((gradient[key] * along).sum()) == pytest.approx(difference, rel=1e-6, abs=1e-8), key


def test_padded_tasks_are_shown_their_own_last_sequences() -> None:
    network, data = model(), batch()
    learner = learner_of(network)
    meta = learner.meta_parameters()
    whole = learner.meta_gradient(meta, data)

    def padded(part: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        more = {name: value[:, :1].expand(-1, count, -1) for name, value in part.items()}
        weights = torch.cat([torch.ones(part["inputs"].shape[:2]), torch.zeros(NUM_TASKS, count)], dim=1)
        return {name: torch.cat([part[name], more[name]], dim=1) for name in part} | {"weights": weights}

    wider = dataclasses.replace(
        data, support=padded(dict(data.support), 2), query=padded(dict(data.query), 1)
    )
    other = learner.meta_gradient(meta, wider)
    assert torch.allclose(whole.losses, other.losses, rtol=1e-12)
    for key, value in whole.gradient.items():
        assert torch.allclose(value, other.gradient[key], rtol=1e-9, atol=1e-13)


def test_what_cannot_be_in_context_is_refused() -> None:
    network = model()
    with pytest.raises(CapabilityError, match="num_shown is 0; learning in context needs a support sequence"):
        learner_of(network, num_shown=0)
    with pytest.raises(CapabilityError, match="this model has no head that can be told from the rest"):
        InContext(network, Structure(), None, Precision("float64"), 1)
