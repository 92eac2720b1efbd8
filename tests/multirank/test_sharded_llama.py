"""A Llama of transformers under `sharded`: what ranks send each other, when, and when it is given back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from metaloom.engine.hypergradients.base import Hypergradient
from metaloom.engine.hypergradients.mixed_mode import MixedMode
from metaloom.engine.hypergradients.rematerialized import Rematerialized
from metaloom.engine.sharding.sharded import Event
from tests.multirank.llama import LARGE, SMALL, Size, Trained, train
from tests.multirank.processes import run_ranks

# Has torch compare the shapes of all ranks at each collective: gloo alone does not mind another order, on
# which NCCL hangs.
COMPARED = {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}


def trained(estimator: Hypergradient, size: Size, num_outer_steps: int, backbone: bool) -> Trained:
    return train(size, estimator, num_outer_steps, backbone=backbone, compute="float32")


def collectives(events: Sequence[Event]) -> list[Event]:
    return [event for event in events if event.kind != "release"]


def most_alive(events: Sequence[Event]) -> int:
    """The most gathers whose weights had not been given back, at any time."""
    alive = most = 0
    for event in events:
        alive += {"gather": 1, "release": -1, "scatter": 0}[event.kind] if event.names else 0
        most = max(most, alive)
    return most


def layer(number: int) -> str:
    return f"llama.model.layers.{number}.mlp.up_proj.weight"


def assert_gathered_given_back_and_gathered_again(
    ranks: list[Trained], size: Size, num_outer_steps: int, *, passes: int
) -> None:
    """That each layer is gathered `passes` times in an outer step, and hardly ever in vain."""
    first = collectives(ranks[0].events)
    assert all(collectives(rank.events) == first for rank in ranks)
    for rank in ranks:
        # This block's weights and the next one's; and gloo's thread may let go of a buffer a moment late.
        assert most_alive(rank.events) <= 3
        counts = Counter(event.kind for event in rank.events if event.names)
        assert counts["gather"] - counts["release"] <= 1  # at the end
    in_vain = 0
    for number in range(size.num_layers):
        gathers = [event for event in first if event.kind == "gather" and layer(number) in event.names]
        assert len(gathers) >= passes * num_outer_steps
        in_vain += len(gathers) - passes * num_outer_steps
    # Where a pass ends, what came before does not always tell which one follows.
    assert in_vain <= 4 * num_outer_steps
    gathers = [event for event in first if event.kind == "gather" and event.names]
    # What comes next is learned in the first pass over it; where one pass follows another it changes.
    ahead = sum(event.is_ahead for event in gathers[len(gathers) // num_outer_steps :])
    assert ahead > 0.8 * len(gathers) * (num_outer_steps - 1) / num_outer_steps


# An inner step: forwards, and again backwards. The query loss: the same. In the sweep also, under dual
# numbers; without these, both once more to differentiate them.
@pytest.mark.parametrize(("estimator", "passes"), [(Rematerialized(), 8), (MixedMode(), 6)])
def test_blocks_are_gathered_given_back_and_gathered_again_in_one_order(
    estimator: Hypergradient, passes: int
) -> None:
    ranks = run_ranks(4, trained, estimator, SMALL, 3, True, timeout_s=600.0, environment=COMPARED)
    assert_gathered_given_back_and_gathered_again(ranks, SMALL, 3, passes=passes)
    # Each layer's gradient is summed into shards twice in the sweep, through the gradient and through what it
    # is taken at, and once of the query loss; no inner step has use for it.
    scatters = Counter(event.num_elements for event in ranks[0].events if event.kind == "scatter")
    of_a_layer = max(event.num_elements for event in ranks[0].events if layer(0) in event.names)
    assert scatters[of_a_layer] == SMALL.num_layers * 3 * 3


@pytest.mark.slow
def test_a_llama_of_300_million_parameters_trains_on_4_ranks() -> None:
    ranks = run_ranks(4, trained, MixedMode(), LARGE, 2, False, timeout_s=500.0, environment=COMPARED)
    assert ranks[0].num_parameters >= 300e6
    assert_gathered_given_back_and_gathered_again(ranks, LARGE, 2, passes=6)
    assert ranks[0].losses[1] < ranks[0].losses[0]
    assert all(rank.losses == ranks[0].losses for rank in ranks)
