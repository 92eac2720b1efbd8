"""Weights that are made of a symmetry and of what a task adapts.

Shape letters: T tasks, N examples, K inner steps, M numbers of a weight, R numbers that are fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call
from torch.nn import functional as F

from metaloom.engine.adapters.full import FullAdapter
from metaloom.engine.adapters.msr import Dense, Kronecker, MsrAdapter, Symmetry
from metaloom.engine.hypergradients import HYPERGRADIENTS
from metaloom.engine.inner_loops.rates import Rates
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import Learner, TaskBatch
from metaloom.engine.losses import MeanSquaredError
from metaloom.engine.precision import Precision
from metaloom.engine.unroll import Unroll, adapt
from tests.numerics.msr_problems import SYMMETRIES, msr_problem
from tests.numerics.problems import HEAVY, Problem, assert_gradients_agree, last, logits_of, perturbed
from tests.numerics.token_problems import EXACT, hypergradient, recomputing

UNEVEN = (0.3, 0.0, 0.5, 1.2)
RATE, NUM_TASKS, NUM_STEPS = 0.05, 3, 2
each_symmetry = pytest.mark.parametrize("symmetry", SYMMETRIES)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return make().double().requires_grad_(False)


def network() -> nn.Module:
    """Layers of all kinds, with biases, a stride and groups."""
    return nn.Sequential(
        nn.Conv2d(2, 4, (3, 2), stride=2, groups=2),
        nn.Tanh(),
        nn.Flatten(2),
        nn.Conv1d(4, 3, 2),
        nn.Tanh(),
        nn.Flatten(1),
        nn.Linear(9, 2),
    )


def msr(model: nn.Module, symmetry: Symmetry, tasks: Literal["loop", "vmap"] = "loop") -> MsrAdapter:
    generator = torch.Generator().manual_seed(3)
    return MsrAdapter(model, symmetry=symmetry, layers="all", generator=generator, tasks=tasks)


def regression(symmetry: str, tasks: Literal["loop", "vmap"]) -> Problem:
    model = small(network)
    adapter = msr(model, SYMMETRIES[symmetry], tasks)
    rates = Rates(RATE, "per_tensor", NUM_STEPS)
    learner = Learner(adapter, Precision("float64"), criterion=MeanSquaredError())
    meta = adapter.meta_parameters(init=True, backbone=True) | rates.meta_parameters(adapter.init({}, 1))

    def part(num_examples: int, seed: int) -> dict[str, Tensor]:
        return {
            "inputs": random(NUM_TASKS, num_examples, 2, 5, 5, seed=seed),
            "targets": random(NUM_TASKS, num_examples, 2, seed=seed + 1),
        }

    batch = TaskBatch(tuple(range(NUM_TASKS)), part(4, 10), part(5, 20))
    unroll = Unroll(learner, Sgd(), rates, last(NUM_STEPS))
    return Problem(unroll, perturbed(meta, scale=0.1), batch, model)


def parameters_of(
    problem: Problem, meta: Mapping[str, Tensor], fast: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The parameters of one task as the paper has them: vec(W) = U v, with U written out."""
    result: dict[str, Tensor] = {}
    for name, own in problem.model.named_parameters():
        if name in fast:
            result[name] = fast[name]
            continue
        u = {key.rpartition(".")[2]: meta[key] for key in meta if key.startswith(f"backbone.{name}.")}
        if "u" in u:
            matrix = u["u"]
        else:
            matrix = torch.kron(u["u_out"], u["u_in"])
            if "u_filter" in u:
                matrix = torch.kron(matrix, u["u_filter"])
        result[name] = (matrix @ fast[f"{name}.v"].reshape(-1)).reshape(own.shape)
    return result


def naive_gradient(problem: Problem) -> dict[str, Tensor]:
    """Algorithm 1 of the paper, task by task and with nothing of the engine: K steps of SGD on v and on what
    has no symmetry, then the gradient of the query losses through them."""
    meta = {name: value.clone().requires_grad_() for name, value in problem.meta.items()}
    total = torch.zeros((), dtype=torch.float64)
    for task in range(NUM_TASKS):
        fast = {n.removeprefix("init."): value for n, value in meta.items() if n.startswith("init.")}

        def loss(part: Mapping[str, Tensor], fast: Mapping[str, Tensor], task: int = task) -> Tensor:
            weights = parameters_of(problem, meta, fast)
            outputs = functional_call(problem.model, weights, (part["inputs"][task],))
            return F.mse_loss(outputs, part["targets"][task])

        for _ in range(NUM_STEPS):
            gradients = grad(loss(problem.batch.support, fast), list(fast.values()), create_graph=True)
            fast = {
                name: value - meta[f"rates.{name}"].exp() * gradient
                for (name, value), gradient in zip(fast.items(), gradients, strict=True)
            }
        total = total + loss(problem.batch.query, fast)
    return dict(zip(meta, grad(total, list(meta.values())), strict=True))


@each_symmetry
@pytest.mark.parametrize("tasks", ["loop", "vmap"])
def test_every_exact_estimator_equals_the_papers_algorithm_written_out(
    symmetry: str, tasks: Literal["loop", "vmap"]
) -> None:
    problem = regression(symmetry, tasks)
    expected = naive_gradient(problem)
    assert {name.partition(".")[0] for name in expected} == {"init", "backbone", "rates"}
    for estimator in ("unrolled", "rematerialized", "mixed_mode"):
        result = HYPERGRADIENTS[estimator]().meta_gradient(problem.unroll, problem.meta, problem.batch)
        # The same sums in another order.
        assert_gradients_agree(result.gradient, expected, rtol=1e-9)


@each_symmetry
@pytest.mark.parametrize("estimator", EXACT)
def test_vmap_equals_the_loop_on_a_network_with_batch_norm(symmetry: str, estimator: str) -> None:
    expected = hypergradient(msr_problem(symmetry, step_weights=UNEVEN, rule=HEAVY))
    actual = hypergradient(
        msr_problem(symmetry, step_weights=UNEVEN, rule=HEAVY, tasks="vmap"), EXACT[estimator]
    )
    # Sums in another order, amplified by batch norm of small statistics.
    assert_gradients_agree(actual, expected, rtol=1e-9)


@each_symmetry
@pytest.mark.parametrize("estimator", EXACT)
def test_recomputed_blocks_and_head_change_no_derivative(symmetry: str, estimator: str) -> None:
    problem = msr_problem(symmetry, step_weights=UNEVEN)
    again = recomputing(problem, blocks=True, head_chunk=4)
    assert_gradients_agree(hypergradient(again, EXACT[estimator]), hypergradient(problem), rtol=1e-9)


@each_symmetry
def test_first_order_differs_in_every_kind_of_meta_parameter(symmetry: str) -> None:
    problem = msr_problem(symmetry, step_weights=last(3))
    exact, first = hypergradient(problem), hypergradient(problem, HYPERGRADIENTS["first_order"]())
    for name, value in exact.items():
        # Exact estimators agree to 1e-9: a difference of 1e-4 is the second order's, not rounding's.
        assert float((first[name] - value).norm() / value.norm()) > 1e-4, name


def test_a_dense_symmetry_can_make_a_convolution_of_a_linear_layer() -> None:
    length, size = 7, 3
    places = length - size + 1
    adapter = msr(small(lambda: nn.Linear(length, places, bias=False)), Dense(rank=size))
    u = torch.zeros(places, length, size, dtype=torch.float64)
    for place in range(places):
        u[place, place : place + size] = torch.eye(size, dtype=torch.float64)
    filters, inputs = random(NUM_TASKS, size, seed=1), random(NUM_TASKS, 4, length, seed=2)
    outputs = logits_of(adapter, {"backbone.weight.u": u.flatten(0, 1)}, {"weight.v": filters}, inputs)
    expected = torch.stack(
        [F.conv1d(x[:, None], v[None, None])[:, 0] for x, v in zip(inputs, filters, strict=True)]
    )
    torch.testing.assert_close(outputs, expected, rtol=1e-13, atol=1e-14)


def test_a_dense_symmetry_can_make_a_group_convolution_of_a_convolution() -> None:
    adapter = msr(small(lambda: nn.Conv2d(1, 4, 3, bias=False)), Dense(rank=9))
    basis = torch.eye(9, dtype=torch.float64).view(9, 3, 3)
    u = torch.stack([basis.rot90(turns, (1, 2)) for turns in range(4)])  # [4, 9, 3, 3]
    meta = {"backbone.weight.u": u.movedim(1, -1).reshape(36, 9)}
    fast, images = {"weight.v": random(1, 9, seed=1)}, random(1, 2, 1, 6, 6, seed=2)
    outputs = logits_of(adapter, meta, fast, images)
    turned = logits_of(adapter, meta, fast, images.rot90(1, (3, 4)))
    # Equivariance: turning the image turns each channel, and moves it on to the next.
    expected = outputs.rot90(1, (3, 4)).roll(1, dims=2)
    torch.testing.assert_close(turned, expected, rtol=1e-12, atol=1e-13)
    assert not torch.allclose(turned, outputs)


def test_a_product_of_identities_adapts_as_every_weight_being_fast_does() -> None:
    problem = msr_problem("kronecker", step_weights=last(2), grain="none")
    learner = problem.unroll.learner
    full = FullAdapter(problem.model)
    adapter = msr(problem.model, Kronecker())
    batch = problem.batch
    paths = []
    for own in (adapter, full):
        unroll = Unroll(Learner(own, learner.precision), Sgd(), Rates(RATE, "none", 2), last(2))
        paths.append(list(adapt(unroll, {}, batch, num_steps=2))[-1].fast)
    ours = adapter.weights({}, paths[0])
    assert ours.keys() == paths[1].keys()
    for name, value in paths[1].items():
        torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-14)
        # It did adapt.
        assert not torch.allclose(value, dict(problem.model.named_parameters())[name])


@each_symmetry
def test_another_tasks_numbers_have_no_effect_bit_for_bit(symmetry: str) -> None:
    problem = msr_problem(symmetry, step_weights=last(1), num_tasks=3)
    adapter = problem.unroll.learner.adapter
    fast = {name: value.clone() for name, value in adapter.init(problem.meta, 3).items()}
    inputs = problem.batch.query["inputs"]
    before = logits_of(adapter, problem.meta, fast, inputs)
    moved = {
        name: value + torch.tensor([0.0, 1.0, 0.0]).view(-1, *[1] * (value.ndim - 1))
        for name, value in fast.items()
    }
    after = logits_of(adapter, problem.meta, moved, inputs)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.allclose(before[1], after[1])
