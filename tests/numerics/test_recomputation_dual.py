"""Recomputation under dual numbers: the same values and tangents, and what is kept meanwhile."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from metaloom.engine.recomputation import recomputed

SIZE, NUM_BLOCKS, DEPTH = 1024, 4, 6
Run = Callable[..., tuple[Tensor, ...]]


def _plain(compute: Run, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return compute(*tensors)


def _again(compute: Run, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return recomputed(compute, tensors, derivative="forward")


def _block(x: Tensor, weight: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What depends on all three, what on the constant alone, and what is no number."""
    return (x * weight).sin() * fixed + x.tanh(), fixed.exp(), x > 0.0


def _gradients_and_tangents(run: Callable[[Run, list[Tensor]], tuple[Tensor, ...]]) -> list[Tensor]:
    """Of a loss through two blocks, by the start and by a weight that has no tangent of its own."""
    torch.manual_seed(0)
    start, direction, plain_weight, fixed = torch.randn(4, 7, dtype=torch.float64)
    weight = plain_weight.clone().requires_grad_()
    with forward_ad.dual_level():
        x = forward_ad.make_dual(start.clone().requires_grad_(), direction)  # type: ignore[no-untyped-call]
        hidden, constant, positive = run(_block, [x, weight, fixed])
        hidden, _, _ = run(_block, [hidden * positive, weight, constant])
        grads = torch.autograd.grad(hidden.square().sum(), [x, weight])
        pairs = [forward_ad.unpack_dual(grad) for grad in grads]  # type: ignore[no-untyped-call]
        return [part.detach().clone() for pair in pairs for part in pair]


def test_recomputed_under_dual_numbers_the_gradient_and_its_tangent_are_those_of_a_plain_pass() -> None:
    for found, expected in zip(_gradients_and_tangents(_again), _gradients_and_tangents(_plain), strict=True):
        # The same operations in the same order.
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)


class _Produced(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches every tensor that an operation returns, tangents among them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tensors: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor):
            self._tensors.append(weakref.ref(output))
        return output

    def alive_bytes(self) -> int:
        storages: dict[int, int] = {}
        for reference in self._tensors:
            tensor = reference()
            if tensor is not None:
                storages[tensor.untyped_storage().data_ptr()] = int(tensor.untyped_storage().nbytes())
        return sum(storages.values())


def _deep(x: Tensor) -> tuple[Tensor]:
    for _ in range(DEPTH):
        x = x.sin()
    return (x,)


def _kept_bytes(run: Callable[[Run, list[Tensor]], tuple[Tensor, ...]]) -> int:
    start, direction = torch.randn(2, SIZE, dtype=torch.float64)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(start.clone().requires_grad_(), direction.clone())  # type: ignore[no-untyped-call]
        produced = _Produced()
        with produced:
            for _ in range(NUM_BLOCKS):
                (x,) = run(_deep, [x])
            return produced.alive_bytes()


def test_recomputed_under_dual_numbers_a_block_keeps_its_inputs_and_their_tangents_alone() -> None:
    one = SIZE * 8
    # The start and its tangent lie outside; each block's output, with its tangent, is the next one's input.
    assert _kept_bytes(_again) <= 2 * NUM_BLOCKS * one + 2 * one
    assert _kept_bytes(_plain) >= 2 * NUM_BLOCKS * DEPTH * one


def test_after_its_backward_pass_a_block_leaves_gradients_alone() -> None:
    """Also of operations that save what they return, whose tangents have a graph that holds the weights."""
    weights: list[weakref.ref[Tensor]] = []

    def compute(x: Tensor) -> tuple[Tensor]:
        weight = torch.full((SIZE,), 0.5, dtype=torch.float64)  # made anew in each pass, as a gather does
        weights.append(weakref.ref(weight))
        return ((x.tanh() * weight).softmax(0).exp() * weight,)

    start, direction = torch.randn(2, SIZE, dtype=torch.float64)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(start.clone().requires_grad_(), direction)  # type: ignore[no-untyped-call]
        (y,) = _again(compute, [x])
        loss = y.square().sum()
        produced = _Produced()
        with produced:
            (grad,) = torch.autograd.grad(loss, [x])
        del y, loss
        assert len(weights) == 2
        assert not any(weight() is not None for weight in weights)
        gradient, tangent = forward_ad.unpack_dual(grad)  # type: ignore[no-untyped-call]
        assert produced.alive_bytes() <= 2 * SIZE * 8
        assert tangent is not None
        assert torch.count_nonzero(gradient) == torch.count_nonzero(tangent) == SIZE
