"""Criteria: the loss of a target, what counts, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from metaloom.engine.adapters.model import Structure
from metaloom.engine.capabilities import ESTIMATORS, outer_rehearsal_refusal
from metaloom.engine.learner import Learner
from metaloom.engine.losses import (
    IGNORE,
    CrossEntropy,
    LossTensors,
    MeanSquaredError,
    SupportLoss,
    cross_entropy,
    example_means,
    is_right,
    task_means,
    token_losses,
)
from metaloom.engine.precision import Precision
from metaloom.errors import CapabilityError
from tests.numerics.problems import small_gpt, small_lora


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("how", [LossTensors(), LossTensors(1.7, 0.2)])
def test_ignored_targets_cost_nothing_and_leave_the_others_as_they_are(how: LossTensors) -> None:
    logits, targets = random(2, 3, 4, 5), torch.full((2, 3, 4), 2)
    ignored = targets.clone()
    ignored[0, 1, 2:] = IGNORE
    before, after = token_losses(logits, targets, how), token_losses(logits, ignored, how)
    assert not after[0, 1, 2:].any()
    assert torch.equal(after[targets == ignored], before[targets == ignored])


def test_an_example_costs_the_mean_over_its_counted_tokens_and_nothing_without_any() -> None:
    logits = random(1, 2, 4, 5)
    targets = torch.tensor([[[1, IGNORE, 3, IGNORE], [IGNORE] * 4]])
    log_p = logits.log_softmax(-1)
    expected = -(log_p[0, 0, 0, 1] + log_p[0, 0, 2, 3]) / 2
    torch.testing.assert_close(cross_entropy(logits, targets), torch.stack([expected, 0.0 * expected])[None])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", [LossTensors(), LossTensors(0.01, 0.3)])
def test_classes_beyond_the_ways_have_no_probability_and_no_part_in_the_smoothing(
    dtype: torch.dtype, how: LossTensors
) -> None:
    logits, targets = random(2, 3, 5).to(dtype), torch.tensor([[0, 1, 1], [2, 0, 3]])
    logits[0, :, 2:] = 60.0  # likelier than any class that there is
    actual = token_losses(logits, targets, how, torch.tensor([2, 4]))
    for task, ways in enumerate((2, 4)):
        expected = token_losses(logits[task, :, :ways], targets[task], how)
        torch.testing.assert_close(actual[task], expected)
    assert is_right(logits, targets, torch.tensor([2, 4]))[0].tolist() == [
        int(logits[0, row, :2].argmax()) == int(targets[0, row]) for row in range(3)
    ]


def test_weights_of_zero_leave_examples_out_of_a_tasks_mean() -> None:
    values, weights = random(2, 4), torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    expected = torch.stack([values[0, [0, 2, 3]].mean(), torch.zeros((), dtype=torch.float64)])
    torch.testing.assert_close(task_means(values, weights), expected)
    torch.testing.assert_close(task_means(values, None), values.mean(1))


def test_a_squared_error_is_of_each_number_and_an_examples_loss_their_mean() -> None:
    outputs, targets = random(2, 3, 4), random(2, 3, 4, seed=2)
    (each,) = MeanSquaredError().of_targets(outputs, targets)
    means = example_means(each, MeanSquaredError().is_counted(targets))
    torch.testing.assert_close(means, torch.linalg.vector_norm(outputs - targets, dim=-1) ** 2 / 4)
    (half,) = MeanSquaredError().of_targets(outputs.bfloat16(), targets.bfloat16())
    assert half.dtype == torch.float32


WRONG: list[tuple[Any, tuple[int, ...], Tensor, str]] = [
    (
        CrossEntropy(),
        (2, 3, 4, 5),
        torch.zeros(2, 3).long(),
        r"shape \[2, 3, 4, 5\], the targets \[2, 3\]: a cr",
    ),
    (
        MeanSquaredError(),
        (2, 3, 1),
        torch.zeros(2, 3, 4),
        r"\[2, 3, 1\], the targets \[2, 3, 4\]: a regression",
    ),
]


@pytest.mark.parametrize(("criterion", "shape", "targets", "message"), WRONG)
def test_outputs_that_do_not_belong_to_the_targets_are_refused(
    criterion: Any, shape: tuple[int, ...], targets: Tensor, message: str
) -> None:
    with pytest.raises(CapabilityError, match=message):
        criterion.of_targets(torch.zeros(shape), targets)


def test_a_regression_has_no_classes() -> None:
    with pytest.raises(CapabilityError, match="has num_ways, and a regression has no classes: leave it out"):
        MeanSquaredError().of_targets(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), num_ways=torch.tensor([2]))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            SupportLoss(1.5),
            "temperature of 1.5 and a label smoothing of 0.0, learned: none; these belong to the",
        ),
        (SupportLoss(learned=("temperature",)), "learned: temperature; .* leave them out, or classify"),
    ],
)
def test_a_regression_has_no_temperature_and_no_label_smoothing(loss: SupportLoss, message: str) -> None:
    with pytest.raises(CapabilityError, match=message):
        Learner(small_lora(small_gpt()), Precision(), support_loss=loss, criterion=MeanSquaredError())


def test_the_head_of_an_output_is_found_by_its_name_and_what_there_is_not_is_refused() -> None:
    one, several = Structure((), "head"), Structure((), {"tasks": "head", "rehearsal": "other"})
    assert (one.head_of(None), several.head_of("rehearsal"), Structure().head_of(None)) == (
        "head",
        "other",
        None,
    )
    with pytest.raises(CapabilityError, match="'rehearsal' is asked for, and this model has one output"):
        one.head_of("rehearsal")
    with pytest.raises(
        CapabilityError, match="'old' is none of this model's: it has tasks, rehearsal; name one"
    ):
        several.head_of("old")
    with pytest.raises(CapabilityError, match="no head is named: it has tasks, rehearsal"):
        several.head_of(None)


def test_every_estimator_but_reptile_takes_rehearsal_in_the_meta_loss() -> None:
    refusing = [name for name in ESTIMATORS if outer_rehearsal_refusal(name) is not None]
    assert refusing == ["reptile"]
