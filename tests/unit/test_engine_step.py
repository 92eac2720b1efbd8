"""One outer step, its parts, and the curve of adaptation."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from metaloom.engine.adapters.full import FullAdapter
from metaloom.engine.algorithms.maml import Maml, step_weights
from metaloom.engine.combiners.mean import Mean
from metaloom.engine.evaluation import adaptation_curve
from metaloom.engine.hypergradients import HYPERGRADIENTS
from metaloom.engine.hypergradients.base import MetaGradient, gradient_of
from metaloom.engine.inner_loops.rates import Rates
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import Learner, Rehearsal, TaskBatch
from metaloom.engine.outer import OuterOptimizer, OuterSettings
from metaloom.engine.precision import LossScaler, Precision
from metaloom.engine.sharding.replicated import Replicated
from metaloom.engine.step import StepTasks, outer_step
from metaloom.engine.unroll import Unroll, adapt

T, D, C, K = 4, 3, 2, 3
SETTINGS = OuterSettings(
    optimizer="sgd",
    lr=0.5,
    lr_rates=0.5,
    lr_loss=0.1,
    betas=(0.0, 0.0),
    eps=0.0,
    weight_decay=0.0,
    num_steps=10,
    warmup_steps=0,
    decay="constant",
    final_ratio=1.0,
    clip_norm=None,
    ema=None,
)


def batch(*, retention: bool = False) -> TaskBatch:
    generator = torch.Generator().manual_seed(1)

    def part(num_examples: int) -> dict[str, Tensor]:
        inputs = torch.randn(T, num_examples, D, generator=generator).double()
        return {"inputs": inputs, "targets": torch.randint(C, (T, num_examples), generator=generator)}

    numbers = tuple(range(10, 10 + T))
    return TaskBatch(numbers, part(4), part(5), part(6), part(2) if retention else None)


def unroll(*, rehearsal: Rehearsal | None = None, num_steps: int = K) -> Unroll:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(D, C).double()
    learner = Learner(FullAdapter(model), Precision("float64"), rehearsal)
    rates = Rates(0.3, "per_tensor_per_step", num_steps)
    return Unroll(learner, Sgd(momentum=0.5), rates, step_weights("last", num_steps))


def initial_meta(problem: Unroll) -> dict[str, Tensor]:
    adapter = problem.learner.adapter
    fast = adapter.init({}, 1)
    rates = problem.rates.meta_parameters(fast)
    return adapter.meta_parameters(init=True, backbone=False) | rates


def assert_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        # Sums in another order.
        torch.testing.assert_close(actual[name], value, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_an_outer_step_moves_theta_by_the_mean_hypergradient(micro_batch: int) -> None:
    algorithm = Maml(unroll(), HYPERGRADIENTS["rematerialized"]())
    outer = OuterOptimizer(initial_meta(algorithm.unroll), SETTINGS, Replicated())
    before = {name: value.clone() for name, value in outer.meta.items()}
    whole = algorithm.meta_gradient(before, batch())
    metrics = outer_step(
        StepTasks(batch(), T, micro_batch),
        algorithm,
        Mean(outer.meta, Replicated(), metric_names=algorithm.metric_names),
        outer,
        LossScaler(Precision("float64")),
    )
    assert_close(outer.meta, {name: value - 0.5 * whole.gradient[name] / T for name, value in before.items()})
    assert metrics.keys() == {
        "meta_loss",
        *algorithm.metric_names,
        "left_out",
        "gradient_norm",
        "outer_lr",
        "skipped",
    }
    assert metrics["meta_loss"] == pytest.approx(float(whole.losses.mean()))
    for name, value in whole.metrics.items():
        assert metrics[name] == pytest.approx(float(value.mean())), name
    assert outer.step == 1


def test_repeated_outer_steps_lower_the_meta_loss() -> None:
    algorithm = Maml(unroll(), HYPERGRADIENTS["mixed_mode"]())
    outer = OuterOptimizer(initial_meta(algorithm.unroll), SETTINGS, Replicated())
    combiner = Mean(outer.meta, Replicated(), metric_names=algorithm.metric_names)
    tasks, scaler = StepTasks(batch(), T, 2), LossScaler(Precision("float64"))
    losses = [outer_step(tasks, algorithm, combiner, outer, scaler)["meta_loss"] for _ in range(20)]
    # Plain gradient descent on one batch with a small enough rate: each step goes down.
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_a_step_without_tasks_has_no_micro_batches() -> None:
    assert StepTasks(None, 3, 2).micro_batches() == []
    sizes = [part.num_tasks for part in StepTasks(batch(), T, 3).micro_batches()]
    assert sizes == [3, 1]


def test_the_mean_divides_by_the_tasks_of_all_ranks_and_starts_anew() -> None:
    combiner = Mean({"a": torch.zeros(2)}, Replicated(), metric_names=["loss_after"])

    def part(value: float) -> MetaGradient:
        losses = torch.tensor([value, value], dtype=torch.float64)
        return MetaGradient({"a": torch.tensor([value, 1.0])}, losses, {"loss_after": 2 * losses})

    combiner.add(part(1.0))
    combiner.add(part(3.0))
    combined = combiner.combine(8)
    assert combined.gradient["a"].tolist() == [0.5, 0.25]
    assert combined.metrics["meta_loss"] == 1.0
    assert combined.metrics["loss_after"] == 2.0
    combiner.add(part(2.0))
    assert combiner.combine(1).gradient["a"].tolist() == [2.0, 1.0]
    assert combiner.combine(1).gradient["a"].tolist() == [0.0, 0.0]


def test_the_mean_leaves_what_it_was_given_as_it_was() -> None:
    combiner = Mean({"a": torch.zeros(2)}, Replicated(), metric_names=["loss_after"])
    part = MetaGradient({"a": torch.ones(2)}, torch.ones(1), {})
    combiner.add(part)
    combiner.add(part)
    assert part.gradient["a"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("rehearsal", [None, Rehearsal(0.4, 2)])
def test_the_adaptation_curve_equals_adapting_step_by_step(rehearsal: Rehearsal | None) -> None:
    problem = unroll(rehearsal=rehearsal)
    meta, data = initial_meta(problem), batch(retention=True)
    num_steps = K + 2  # longer than was trained for: the last rate goes on
    curve = adaptation_curve(problem, meta, data, num_steps=num_steps)
    assert curve["loss"].shape == curve["accuracy"].shape == (T, num_steps + 1)
    assert curve["loss"].dtype == curve["accuracy"].dtype == torch.float64

    fast, state = problem.start(meta, T)
    for step in range(num_steps + 1):
        losses, aux = problem.learner.losses("query", meta, fast, data, 0)
        torch.testing.assert_close(curve["loss"][:, step], losses, rtol=1e-13, atol=0)
        assert torch.equal(curve["accuracy"][:, step], aux["accuracy"])
        if step in (0, num_steps):
            end, _ = problem.learner.losses("retention", meta, fast, data, 0)
            torch.testing.assert_close(
                curve["retention_loss"][:, 0 if step == 0 else 1], end, rtol=1e-13, atol=0
            )
        if step < num_steps:
            leaves = {name: value.detach().requires_grad_() for name, value in fast.items()}
            fast, state = problem.inner_step(meta, leaves, state, data, step, create_graph=False)


def test_the_curve_has_no_retention_without_such_data() -> None:
    problem = unroll()
    curve = adaptation_curve(problem, initial_meta(problem), batch(), num_steps=1)
    assert curve.keys() == {"loss", "accuracy"}


def test_adaptation_starts_at_the_initialisation_and_lowers_the_support_loss() -> None:
    problem, data = unroll(), batch()
    meta = initial_meta(problem)
    path = list(adapt(problem, meta, data, num_steps=K))
    assert len(path) == K + 1
    assert all(
        torch.equal(path[0].fast[name], meta[f"init.{name}"].expand(T, -1, -1)) for name in ("weight",)
    )
    losses = [problem.learner.losses("support", meta, at.fast, data, 0)[0] for at in path]
    assert bool((losses[-1] < losses[0]).all())
    assert not any(value.requires_grad for at in path for value in (*at.fast.values(), *at.state.values()))


@pytest.mark.parametrize(
    ("kind", "num_steps", "weights"),
    [
        ("last", 1, (0.0, 1.0)),
        ("last", 3, (0.0, 0.0, 0.0, 1.0)),
        ("uniform", 4, (0.0, 0.25, 0.25, 0.25, 0.25)),
    ],
)
def test_step_weights_of_each_kind(kind: str, num_steps: int, weights: tuple[float, ...]) -> None:
    assert step_weights("last" if kind == "last" else "uniform", num_steps) == weights


def test_a_gradient_by_what_is_not_connected_is_zero() -> None:
    x, y = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    assert gradient_of([(x**2).sum()], {"x": x, "y": y})["y"].tolist() == [0.0, 0.0, 0.0]
    assert gradient_of([torch.ones(())], {"x": x})["x"].tolist() == [0.0, 0.0]


def test_one_process_without_a_group_is_a_world_of_its_own() -> None:
    sharding = Replicated()
    assert (sharding.rank, sharding.world_size) == (0, 1)
    tensors = {"a": torch.ones(2)}
    assert torch.equal(sharding.sum_over_ranks(tensors)["a"], tensors["a"])
    assert sharding.gather([1, 2]) == [1, 2]
