"""A model seen as the losses of tasks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metaloom.engine.adapters.base import Adapter, Learned, broadcast_init
from metaloom.engine.adapters.model import Readout
from metaloom.engine.forward_pass import ForwardPass
from metaloom.engine.learner import Learner, Objective, Rehearsal, TaskBatch
from metaloom.engine.losses import bits, cross_entropy
from metaloom.engine.precision import Precision

T, S, Q, D, C = 2, 3, 4, 5, 6


class Linear(Adapter):
    """Logits `W x`, W fast."""

    def meta_parameters(self, *, init: bool, backbone: Learned) -> dict[str, Tensor]:
        return {"init.w": torch.zeros(C, D)} if init else {}

    def init(self, meta: Mapping[str, Tensor], num_tasks: int) -> dict[str, Tensor]:
        return broadcast_init({"w": torch.zeros(C, D)}, meta, num_tasks)

    def forward(
        self,
        meta: Mapping[str, Tensor],
        fast: Mapping[str, Tensor],
        inputs: Tensor,
        forward_pass: ForwardPass,
    ) -> Readout:
        return Readout(inputs @ fast["w"].transpose(1, 2))


def part(num_examples: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "inputs": torch.randn(T, num_examples, D, generator=generator),
        "targets": torch.randint(C, (T, num_examples), generator=generator),
    }


def batch() -> TaskBatch:
    return TaskBatch((40, 41), part(S, 1), part(Q, 2), rehearsal=part(5, 3), retention=part(2, 4))


def weights() -> dict[str, Tensor]:
    return {"w": torch.randn(T, C, D, generator=torch.Generator().manual_seed(9))}


def losses_by_hand(tensors: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy of each task, one example at a time."""
    w = weights()["w"]
    return torch.stack(
        [
            torch.stack(
                [
                    F.cross_entropy(w[task] @ x, y)
                    for x, y in zip(tensors["inputs"][task], tensors["targets"][task], strict=True)
                ]
            ).mean()
            for task in range(T)
        ]
    )


def losses(objective: Objective, *, rehearsal: Rehearsal | None = None, step: int = 0) -> Tensor:
    learner = Learner(Linear(), Precision(), rehearsal)
    return learner.losses(objective, {}, weights(), batch(), step)[0]


def test_each_objective_reads_its_own_data() -> None:
    data = batch()
    assert data.retention is not None
    torch.testing.assert_close(losses("support"), losses_by_hand(data.support))
    torch.testing.assert_close(losses("query"), losses_by_hand(data.query))
    torch.testing.assert_close(losses("retention"), losses_by_hand(data.retention))


@pytest.mark.parametrize(("step", "rows"), [(0, [0, 1]), (1, [2, 3]), (2, [4, 0]), (3, [1, 2]), (5, [0, 1])])
def test_rehearsal_mixes_by_its_ratio_whatever_the_number_of_examples(step: int, rows: list[int]) -> None:
    data = batch()
    assert data.rehearsal is not None
    old = {name: value[:, rows] for name, value in data.rehearsal.items()}
    mixed = losses("support", rehearsal=Rehearsal(ratio=0.2, num_samples=2), step=step)
    torch.testing.assert_close(mixed, 0.8 * losses_by_hand(data.support) + 0.2 * losses_by_hand(old))


def test_rehearsal_touches_the_inner_loss_alone() -> None:
    rehearsal = Rehearsal(ratio=0.2, num_samples=2)
    assert torch.equal(losses("query", rehearsal=rehearsal), losses("query"))
    assert torch.equal(losses("retention", rehearsal=rehearsal), losses("retention"))


def test_accuracy_is_each_tasks_share_of_right_answers() -> None:
    data = batch()
    logits = torch.einsum("tnd,tcd->tnc", data.query["inputs"], weights()["w"])
    learner = Learner(Linear(), Precision())
    accuracy = learner.losses("query", {}, weights(), data, 0)[1]["accuracy"]
    expected = [
        sum(int(logits[task, row].argmax()) == int(data.query["targets"][task, row]) for row in range(Q)) / Q
        for task in range(T)
    ]
    assert accuracy.tolist() == expected


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4)])
def test_cross_entropy_is_the_mean_over_the_tokens_of_each_example(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*shape, 7, generator=generator, dtype=torch.float64)
    targets = torch.randint(7, shape, generator=generator)
    actual = cross_entropy(logits, targets)
    assert actual.shape == (2, 3)
    picked = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(actual, picked.reshape(2, 3, -1).mean(-1))


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_cross_entropy_is_never_computed_in_half_precision(given: torch.dtype, computed: torch.dtype) -> None:
    assert cross_entropy(torch.zeros(1, 2, 3, dtype=given), torch.zeros(1, 2).long()).dtype == computed


def test_uniform_guesses_over_bytes_cost_eight_bits() -> None:
    loss = cross_entropy(torch.zeros(1, 1, 4, 256), torch.zeros(1, 1, 4).long())
    assert bits(float(loss)) == pytest.approx(8.0)
    assert bits(math.log(2.0)) == 1.0


@pytest.mark.parametrize(("size", "numbers"), [(1, [(40,), (41,)]), (2, [(40, 41)]), (9, [(40, 41)])])
def test_a_split_batch_holds_the_same_tasks_in_order(size: int, numbers: list[tuple[int, ...]]) -> None:
    whole = batch()
    pieces = whole.split(size)
    assert [piece.numbers for piece in pieces] == numbers
    for name in ("support", "query", "rehearsal", "retention"):
        for key, value in getattr(whole, name).items():
            assert torch.equal(torch.cat([getattr(piece, name)[key] for piece in pieces]), value)


def test_a_split_batch_keeps_each_tasks_number_of_classes_and_what_its_meta_loss_rehearses() -> None:
    whole = dataclasses.replace(batch(), num_ways=torch.tensor([3, 5]), outer_rehearsal=part(3, 8))
    pieces = whole.split(1)
    assert [piece.num_ways.tolist() for piece in pieces if piece.num_ways is not None] == [[3], [5]]
    for name, value in part(3, 8).items():
        cut = [piece.outer_rehearsal[name] for piece in pieces if piece.outer_rehearsal is not None]
        assert torch.equal(torch.cat(cut), value)
    assert [piece.num_ways for piece in batch().split(1)] == [None, None]


def test_a_split_batch_without_rehearsal_has_none() -> None:
    for piece in TaskBatch((0, 1), part(S, 1), part(Q, 2)).split(1):
        assert piece.rehearsal is None
        assert piece.retention is None


def test_outputs_are_what_the_query_loss_is_read_from() -> None:
    learner, query = Learner(Linear(), Precision()), batch().query
    in_chunks = dataclasses.replace(learner, head_chunk=2)
    outputs = in_chunks.outputs({}, weights(), query["inputs"], 1)
    expected, _ = learner.losses("query", {}, weights(), batch(), 1)
    read = [F.cross_entropy(own, targets) for own, targets in zip(outputs, query["targets"], strict=True)]
    torch.testing.assert_close(torch.stack(read), expected)
