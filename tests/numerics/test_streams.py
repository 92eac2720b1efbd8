"""A stream of unlabelled inputs: each is predicted by those before it alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from metaloom.engine.learner import TaskBatch
from metaloom.engine.streams import StreamCurve, stream_positions
from tests.numerics.test_arm import NUM_SUPPORT, algorithm, batch


@pytest.mark.parametrize(
    ("count", "positions"), [(1, ()), (2, (1,)), (3, (1, 2)), (8, (1, 2, 4)), (9, (1, 2, 4, 8))]
)
def test_places_double_and_leave_something_to_predict(count: int, positions: tuple[int, ...]) -> None:
    assert stream_positions(count) == positions


def own_curve(name: str, support: range, query: range, data: TaskBatch) -> torch.Tensor:
    """The loss of some examples of the support set by others of it."""
    picked = [{key: value[:, list(rows)] for key, value in data.support.items()} for rows in (support, query)]
    at = dataclasses.replace(data, support=picked[0], query=picked[1])
    return algorithm(name).curve({}, at, num_steps=0)["loss"][:, 0]


@pytest.mark.parametrize("name", ["erm", "arm_cml", "arm_bn"])
def test_what_comes_next_is_predicted_by_what_came_before(name: str) -> None:
    data = batch(name)
    points = StreamCurve(algorithm(name).curve, has_queries=False)({}, data, num_steps=3)
    assert points["accuracy"].shape == points["loss"].shape == (2, 3)
    for place, (seen, end) in enumerate([(1, 2), (2, 4), (4, 5)]):
        expected = own_curve(name, range(seen), range(seen, end), data)
        torch.testing.assert_close(points["loss"][:, place], expected, rtol=1e-12, atol=0.0)


def test_what_comes_later_has_no_influence() -> None:
    data, learner = batch("arm_cml"), algorithm("arm_cml")
    later = data.support["inputs"].clone()
    later[:, 4:] += 5.0
    stream = StreamCurve(learner.curve, has_queries=False)
    one = stream({}, data, num_steps=0)["loss"]
    two = stream({}, dataclasses.replace(data, support={**data.support, "inputs": later}), num_steps=0)[
        "loss"
    ]
    assert torch.equal(one[:, :2], two[:, :2])
    assert not torch.equal(one[:, 2], two[:, 2])


def test_queries_follow_the_support_examples() -> None:
    data, learner = batch("arm_cml"), algorithm("arm_cml")
    points = StreamCurve(learner.curve, has_queries=True)({}, data, num_steps=0)["loss"]
    assert points.shape == (2, len(stream_positions(NUM_SUPPORT + 4)))
    both = {key: torch.cat([value, data.query[key]], dim=1) for key, value in data.support.items()}
    whole = dataclasses.replace(data, support=both, query={})
    assert torch.equal(points, StreamCurve(learner.curve, has_queries=False)({}, whole, num_steps=0)["loss"])
