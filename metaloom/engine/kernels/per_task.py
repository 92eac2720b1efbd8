"""Layers with a weight or bias per task, of T tasks in one pass: activations are `[T * N, ...]`, task after
task.

Each takes the kernel that runs the layer where its weights are shared, and runs it once for all tasks; what
is per task comes after it.

Shape letters: T tasks, N examples, L tokens, V vocabulary, C channels, D input width, D' output width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from metaloom.engine.kernels.low_rank import product_per_task
from metaloom.errors import CapabilityError

Kernel = Callable[..., Tensor]


def linear_per_task(kernel: Kernel, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, W `[T, D', D]` or shared `[D', D]`, b `[T, D']`, shared or None; inputs `[T * N, ..., D]`,
    or `[T, M, D]`."""
    if _are_shared((weight, 2), (bias, 1)):
        return kernel(inputs, weight, bias)
    if weight.ndim == 2:
        output = kernel(inputs, weight)
    else:
        rows = _of_tasks(inputs, len(weight))
        output = product_per_task(rows.flatten(1, -2), weight).view(*inputs.shape[:-1], weight.shape[1])
    return _affine(output, None, bias, num_dims=1)


def transposed_linear_per_task(
    kernel: Kernel,
    input: Tensor,  # noqa: A002 (torch's name)
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Tensor:
    """`torch.addmm`, `beta b + alpha x W`, for W `[T, D, D']` or shared `[D, D']`, b `[T, D']` or shared, and
    x `[T * N, D]`."""
    # More rows than one, and not one for each row of x: torch itself has no such sum.
    is_per_task = input.ndim == 2 and 1 < len(input) != len(mat1)
    if mat2.ndim == 2 and not is_per_task:
        return kernel(input, mat1, mat2, beta=beta, alpha=alpha)
    output = mat1 @ mat2 if mat2.ndim == 2 else linear_per_task(F.linear, mat1, mat2.transpose(1, 2))
    bias = input[0] if input.ndim == 2 and len(input) == 1 else input
    if alpha != 1:
        output = alpha * output
    return _affine(output, None, bias if beta == 1 else beta * bias, num_dims=1)


def embedding_per_task(
    kernel: Kernel,
    tokens: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    of_inputs: torch.Size | None = None,
) -> Tensor:
    """Rows of a table `[T, V, D]` or shared `[V, D]` for tokens `[T * N, ...]`, or for positions that all
    examples share, `[L]` or `[1, L]`: of a table per task these become those of every example. The row of
    `padding_idx` gets no gradient.

    Args:
        of_inputs: the shape of what the model is called with, `[T * N, ...]`.

    Raises:
        CapabilityError: the embedding does more than that; or tokens are neither of all examples nor shared.
    """
    if weight.ndim == 2:
        return kernel(tokens, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise CapabilityError(
            "an embedding with max_norm, scale_grad_by_freq or sparse has no copy per task in one pass of "
            "all tasks: leave these out, or set adaptation.fast to part with tasks: loop."
        )
    num_tasks, vocabulary = weight.shape[:2]
    assert of_inputs is not None, "tables per task are of a model that is called with all tasks"
    num_examples = of_inputs[0]
    # Of one dim are the tokens of examples where these are single tokens, and else positions.
    if not (len(tokens) == num_examples and (tokens.ndim > 1 or len(of_inputs) == 1)):
        if tokens.ndim > 1 and len(tokens) > 1:
            raise CapabilityError(
                f"an embedding is given {len(tokens)} rows in its first dim for {num_examples} examples: "
                "keep examples in the first dim, or set adaptation.fast to part with tasks: loop."
            )
        shared = tokens if tokens.ndim == 1 else tokens[0]
        tokens = shared.expand(num_examples, *shared.shape)
    first = vocabulary * torch.arange(num_tasks, device=tokens.device)
    of_tasks = _of_tasks(tokens, num_tasks)
    places = of_tasks + first.view(-1, *(1,) * (of_tasks.ndim - 1))
    vectors = kernel(places, weight.flatten(0, 1)).view(*tokens.shape, weight.shape[2])
    if padding_idx is None:
        return vectors
    padding_idx = padding_idx % vocabulary
    return torch.where((tokens == padding_idx)[..., None], vectors.detach(), vectors)


def conv_per_task(
    num_sides: int,
    kernel: Kernel,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """A convolution of `[T * N, C, ...]` with a weight `[T, C', C / groups, ...]` or without T, and a bias
    `[T, C']`, shared or None.

    Args:
        num_sides: dims that the filters move along.
    """
    if _are_shared((weight, 2 + num_sides), (bias, 1)):
        return kernel(inputs, weight, bias, stride, padding, dilation, groups)
    if weight.ndim == 2 + num_sides:
        output = kernel(inputs, weight, None, stride, padding, dilation, groups)
    else:
        num_tasks = len(weight)
        folded = _of_tasks(inputs, num_tasks).transpose(0, 1).flatten(1, 2)  # [N, T * C, ...]
        made = kernel(folded, weight.flatten(0, 1), None, stride, padding, dilation, num_tasks * groups)
        of_tasks = made.view(len(made), num_tasks, weight.shape[1], *made.shape[2:])
        output = of_tasks.transpose(0, 1).flatten(0, 1)
    return _affine(output, None, bias, num_dims=1, num_behind=num_sides)


def layer_norm_per_task(
    kernel: Kernel,
    inputs: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer norm, its weight and bias `[T, *normalized_shape]`, shared or None."""
    if _are_shared((weight, len(normalized_shape)), (bias, len(normalized_shape))):
        return kernel(inputs, normalized_shape, weight, bias, eps)
    normed = kernel(inputs, normalized_shape, None, None, eps)
    return _affine(normed, weight, bias, num_dims=len(normalized_shape))


def rms_norm_per_task(
    kernel: Kernel,
    inputs: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """RMS norm, its weight `[T, *normalized_shape]`, shared or None."""
    if _are_shared((weight, len(normalized_shape))):
        return kernel(inputs, normalized_shape, weight, eps)
    return _affine(kernel(inputs, normalized_shape, None, eps), weight, None, num_dims=len(normalized_shape))


def group_norm_per_task(
    kernel: Kernel,
    inputs: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Group norm of `[T * N, C, ...]`, its weight and bias `[T, C]`, shared or None."""
    if _are_shared((weight, 1), (bias, 1)):
        return kernel(inputs, num_groups, weight, bias, eps)
    normed = kernel(inputs, num_groups, None, None, eps)
    return _affine(normed, weight, bias, num_dims=1, num_behind=inputs.ndim - 2)


def batch_norm_per_task(
    inputs: Tensor,
    num_tasks: int,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch norm of `[T * N, C, ...]` by the statistics of each task's examples: those of T * C channels.

    Args:
        weight: `[T, C]`, shared `[C]` or None; so is the bias.
    """
    of_tasks = _of_tasks(inputs, num_tasks)  # [T, N, C, ...]
    folded = of_tasks.transpose(0, 1).flatten(1, 2)  # [N, T * C, ...]

    def of_channels(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.expand(num_tasks, inputs.shape[1]).flatten()

    normed = F.batch_norm(
        folded,
        of_channels(running_mean),
        of_channels(running_var),
        of_channels(weight),
        of_channels(bias),
        training,
        momentum,
        eps,
    )
    unfolded = normed.view(normed.shape[0], num_tasks, *inputs.shape[1:]).transpose(0, 1)
    return unfolded.reshape(inputs.shape)


def _are_shared(*of_dims: tuple[Tensor | None, int]) -> bool:
    """Whether no tensor has a dim of tasks in front of so many of its own."""
    return all(value is None or value.ndim <= num_dims for value, num_dims in of_dims)


def _affine(
    normed: Tensor, weight: Tensor | None, bias: Tensor | None, *, num_dims: int, num_behind: int = 0
) -> Tensor:
    """`normed * weight + bias`, each over `num_dims` dims, with the tasks in front or shared by them,
    `num_behind` dims from the end."""

    def beside(value: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        value = value.to(values.dtype)
        if value.ndim == num_dims:
            return values, value.view(*value.shape, *(1,) * num_behind)
        of_tasks = _of_tasks(values, len(value))
        between = of_tasks.ndim - 1 - num_dims - num_behind
        return of_tasks, value.view(len(value), *(1,) * between, *value.shape[1:], *(1,) * num_behind)

    result = normed
    if weight is not None:
        values, factors = beside(weight, result)
        result = (values * factors).view(normed.shape)
    if bias is not None:
        values, terms = beside(bias, result)
        result = (values + terms).view(normed.shape)
    return result


def _of_tasks(inputs: Tensor, num_tasks: int) -> Tensor:
    """`[T * N, ...]` as `[T, N, ...]`.

    Raises:
        CapabilityError: the rows are not as many for each task.
    """
    if len(inputs) % num_tasks:
        raise CapabilityError(
            f"a layer of the model is given {len(inputs)} rows in its first dim for {num_tasks} tasks: keep "
            "examples in the first dim, or set adaptation.fast to full, which runs one task at a time."
        )
    return inputs.reshape(num_tasks, len(inputs) // num_tasks, *inputs.shape[1:])
