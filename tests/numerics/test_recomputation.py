"""Recomputation changes memory, and no derivative.

Shape letters: T tasks, N examples, L tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from metaloom.engine.adapters.full import FullAdapter
from metaloom.engine.choice import graph_bytes
from metaloom.engine.forward_pass import Derivative
from metaloom.engine.recomputation import Compute, recomputed
from metaloom.errors import CapabilityError
from tests.numerics.problems import Problem, assert_gradients_agree, conv4_problem, last
from tests.numerics.token_problems import (
    EXACT,
    RANK,
    VOCABULARY,
    WIDTH,
    distance,
    hypergradient,
    recomputing,
    transformer_problem,
    with_learner,
)

Function = Callable[..., tuple[Tensor, ...]]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two_layers(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return ((x @ w).tanh() @ w + b,)


def several(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """Two outputs of numbers, between them one of integers; the last does not depend on b."""
    hidden = (x @ w).sin()
    return hidden * b, hidden.argmax(-1), hidden.exp().sum(0)


def forgetful(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return ((x**3).sum(-1), w.sum().detach() * x)


def linear(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return (2.0 * x + b,)


def inside_another(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    (hidden,) = recomputed(two_layers, (x, w, b), derivative="reverse")
    return recomputed(several, (hidden.square(), w, b), derivative="reverse")


FUNCTIONS: dict[str, tuple[Compute, Compute]] = {
    "two layers": (two_layers, two_layers),
    "several outputs, one of integers": (several, several),
    "an input unused and one detached": (forgetful, forgetful),
    "linear": (linear, linear),
    "nested": (inside_another, lambda x, w, b: several(two_layers(x, w, b)[0].square(), w, b)),
}


def inputs() -> list[Tensor]:
    return [random(3, 4, seed=1), random(4, 4, seed=2), random(4, seed=3)]


def weighted(outputs: Sequence[Tensor]) -> Tensor:
    """A number that every output of numbers moves, in more than one direction."""
    numbers = [output for output in outputs if output.is_floating_point()]
    terms = [(random(*o.shape, seed=50 + i) * o + 0.3 * o.square()).sum() for i, o in enumerate(numbers)]
    return torch.stack(terms).sum()


def derivatives(function: Function, wanted: Sequence[int] = (0, 1, 2)) -> list[Tensor]:
    """Values, gradients and reverse-over-reverse products."""
    leaves = [tensor.requires_grad_(i in wanted) for i, tensor in enumerate(inputs())]
    active = [leaves[i] for i in wanted]
    outputs = function(*leaves)
    grads = torch.autograd.grad(
        weighted(outputs), active, create_graph=True, allow_unused=True, materialize_grads=True
    )
    slope = torch.stack([(random(*g.shape, seed=70 + i) * g).sum() for i, g in enumerate(grads)]).sum()
    second = torch.autograd.grad(slope, active, allow_unused=True, materialize_grads=True)
    return [tensor.detach() for tensor in (*outputs, *grads, *second)]


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        # The same operations, summed in another order at most.
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (name, wanted)
        for name in FUNCTIONS
        for wanted in [(0, 1, 2), (0,), (1, 2), (2, 0)]
        if name != "an input unused and one detached" or 0 in wanted
    ],
    ids=str,
)
def test_recomputation_keeps_value_gradient_and_double_gradient(name: str, wanted: tuple[int, ...]) -> None:
    compute, plain = FUNCTIONS[name]

    def again(*tensors: Tensor) -> tuple[Tensor, ...]:
        return recomputed(compute, tensors, derivative="reverse")

    assert_same(derivatives(again, wanted), derivatives(plain, wanted))


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "nested"])
def test_recomputation_keeps_the_tangent_of_the_gradient(name: str) -> None:
    compute, plain = FUNCTIONS[name]

    def tangents(function: Function) -> list[Tensor]:
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(  # type: ignore[no-untyped-call]
                    tensor.requires_grad_(), random(*tensor.shape, seed=90 + i)
                )
                for i, tensor in enumerate(inputs())
            ]
            grads = torch.autograd.grad(
                weighted(function(*duals)), duals, allow_unused=True, materialize_grads=True
            )
            pairs: list[Any] = [forward_ad.unpack_dual(g) for g in grads]  # type: ignore[no-untyped-call]
            return [
                (torch.zeros_like(primal) if tangent is None else tangent).detach()
                for primal, tangent in pairs
            ]

    def again(*tensors: Tensor) -> tuple[Tensor, ...]:
        return recomputed(compute, tensors, derivative="forward")

    assert_same(tangents(again), tangents(plain))


def test_an_output_of_integers_needs_no_gradient_and_others_do() -> None:
    leaves = [tensor.requires_grad_() for tensor in inputs()]
    product, winners, total = recomputed(several, leaves, derivative="reverse")
    assert (product.requires_grad, winners.requires_grad, total.requires_grad) == (True, False, True)
    assert winners.dtype == torch.int64


def test_an_input_of_integers_passes_through() -> None:
    rows = torch.tensor([2, 0])
    x = random(3, 4, seed=1).requires_grad_()

    def pick(x: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        return (x[rows].pow(3),)

    (output,) = recomputed(pick, (x, rows), derivative="reverse")
    (grad,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    expected[rows] = 6.0 * x.detach()[rows]
    torch.testing.assert_close(second, expected, rtol=1e-13, atol=0.0)


class Saved:
    """What autograd has saved while `hooks` were active, and not freed since."""

    @dataclasses.dataclass(eq=False)
    class _One:
        tensor: Tensor

    def __init__(self) -> None:
        self._alive: weakref.WeakSet[Saved._One] = weakref.WeakSet()

    def hooks(self) -> AbstractContextManager[None]:
        def pack(tensor: Tensor) -> Saved._One:
            one = Saved._One(tensor)
            self._alive.add(one)
            return one

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor)

    @property
    def tensors(self) -> list[Tensor]:
        return [one.tensor for one in self._alive]

    def storages(self) -> set[int]:
        return {tensor.untyped_storage().data_ptr() for tensor in self.tensors}


@pytest.mark.parametrize("derivative", ["reverse", "forward", "once"])
def test_between_forward_and_backward_the_inputs_alone_are_kept(derivative: Derivative) -> None:
    leaves = [tensor.requires_grad_() for tensor in inputs()]
    saved = Saved()
    with saved.hooks():
        outputs = recomputed(two_layers, leaves, derivative=derivative)
    assert outputs[0].requires_grad
    assert saved.tensors
    assert saved.storages() <= {tensor.untyped_storage().data_ptr() for tensor in leaves}


def test_after_a_differentiable_backward_pass_inputs_and_cotangents_alone_are_kept() -> None:
    leaves = [tensor.requires_grad_() for tensor in inputs()]
    cotangent = random(3, 4, seed=4)
    (output,) = recomputed(two_layers, leaves, derivative="reverse")
    saved = Saved()
    with saved.hooks():
        grads = torch.autograd.grad(output, leaves, cotangent, create_graph=True)
    assert all(grad.requires_grad for grad in grads)
    assert saved.tensors
    assert saved.storages() <= {t.untyped_storage().data_ptr() for t in (*leaves, cotangent)}


# --- blocks and head chunks of models ----------------------------------------------------------------------

PROBLEMS: dict[str, Callable[[], Problem]] = {
    "lora": lambda: transformer_problem(),
    "lora, head too, backbone": lambda: transformer_problem("lora and head", backbone=True),
    "lora, head too, tied backbone": lambda: transformer_problem(
        "lora and head", backbone=True, tied_embeddings=True
    ),
    "all weights": lambda: transformer_problem("full"),
    "all weights, tied": lambda: transformer_problem("full", tied_embeddings=True),
}
# Of 12 and 18 tokens a task: a chunk across sequences with a ragged last one, one token, all at once.
HEAD_CHUNKS = (5, 1, 100)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("estimator", EXACT)
def test_recomputed_blocks_and_head_chunks_leave_every_exact_hypergradient_as_it_is(
    name: str, estimator: str
) -> None:
    problem = PROBLEMS[name]()
    expected = hypergradient(problem)
    chunks = HEAD_CHUNKS if estimator != "mixed_mode" else HEAD_CHUNKS[:1]
    for blocks, head_chunk in [(True, None), *((False, size) for size in chunks), (True, chunks[0])]:
        actual = hypergradient(recomputing(problem, blocks=blocks, head_chunk=head_chunk), EXACT[estimator])
        # Sums in another order, through three inner steps.
        assert_gradients_agree(actual, expected, rtol=1e-9)


@pytest.mark.parametrize("estimator", EXACT)
def test_recomputed_blocks_of_a_convolutional_network_leave_the_hypergradient_as_it_is(
    estimator: str,
) -> None:
    problem = conv4_problem(step_weights=(0.0, 0.5, 0.0, 1.0), grain="per_tensor")
    actual = hypergradient(recomputing(problem, blocks=True, head_chunk=None), EXACT[estimator])
    assert_gradients_agree(actual, hypergradient(problem), rtol=1e-9)
    both = hypergradient(recomputing(problem, blocks=True, head_chunk=4), EXACT[estimator])
    assert_gradients_agree(both, hypergradient(problem), rtol=1e-9)


@pytest.mark.parametrize("estimator", EXACT)
@pytest.mark.parametrize("fast", ["lora", "full"])
def test_under_bfloat16_recomputed_blocks_round_as_those_that_are_not(estimator: str, fast: Any) -> None:
    problem = transformer_problem(fast, compute="bfloat16", backbone=fast == "lora")
    plain = hypergradient(problem, EXACT[estimator])
    recomputed_ = hypergradient(recomputing(problem, blocks=True, head_chunk=5), EXACT[estimator])
    exact = hypergradient(transformer_problem(fast, compute="float32", backbone=fast == "lora"))
    # A recomputed block rounds alike, but sums of gradients over its uses are rounded in another order: the
    # two may differ by as much as either differs from float32, and by no more.
    assert distance(recomputed_, plain) <= distance(plain, exact)
    assert 1e-4 < distance(recomputed_, exact) < 0.06


def test_recomputed_blocks_keep_a_smaller_graph() -> None:
    problem = transformer_problem("lora", num_sequences=20)
    smaller = recomputing(problem, blocks=True, head_chunk=None)
    sizes = [graph_bytes(p.unroll, p.meta, p.batch) for p in (problem, smaller)]
    # A block keeps some thirty activations a token, and its input alone when recomputed.
    assert sizes[1] < 0.5 * sizes[0]


@pytest.mark.parametrize("fast", ["lora", "lora and head", "full"])
def test_head_chunks_keep_no_logits(fast: Any) -> None:
    def logits_kept(problem: Problem) -> list[tuple[int, ...]]:
        saved = Saved()
        meta = {name: value.detach().requires_grad_() for name, value in problem.meta.items()}
        state = problem.unroll.start(meta, problem.batch.num_tasks)
        with saved.hooks():
            after = problem.unroll.inner_step(meta, *state, problem.batch, 0, create_graph=True)
        shapes = [tuple(tensor.shape) for tensor in saved.tensors]
        del after
        # Weights of the head, and their transposes and gradients, have no dim but its width or its rank.
        weights = {VOCABULARY, WIDTH, RANK, 1}
        return [s for s in shapes if VOCABULARY in s and not set(s[1:] if 2 in s[:1] else s) <= weights]

    problem = transformer_problem(fast, num_sequences=3)
    assert logits_kept(problem), "the plain graph keeps logits"
    assert not logits_kept(recomputing(problem, blocks=False, head_chunk=4))


def test_a_head_that_is_not_last_or_not_told_is_refused() -> None:
    problem = transformer_problem(head_chunk=4)
    problem.model.register_forward_hook(lambda module, args, output: 2.0 * output)
    with pytest.raises(CapabilityError, match=r"not that of its head 'head' \(something is computed after"):
        hypergradient(problem)


def test_head_chunks_of_a_model_without_a_head_are_refused() -> None:
    problem = conv4_problem(step_weights=last(1))
    adapter = FullAdapter(problem.model)
    learner = recomputing(problem, blocks=False, head_chunk=4).unroll.learner
    with pytest.raises(CapabilityError, match=r"memory\.head_chunk is 4, and this model has no head"):
        hypergradient(with_learner(problem, dataclasses.replace(learner, adapter=adapter)))
