"""Attention that can be differentiated twice, in memory linear in the sequence length.

Shape letters: N leading dims (sequences and heads), L queries, M keys, E width of a head, C queries of a
chunk. With P = softmax(scale * Q K^T + mask), by rows:

    O  = P V
    dV = P^T dO,  dP = dO V^T,  r = rowsum(P * dP),  dS = P * (dP - r)
    dQ = scale * dS K,  dK = scale * dS^T Q

and along a direction (q, k, v) of (Q, K, V), and o of dO, a dot marking the derivative:

    S. = scale * (q K^T + Q k^T),  P. = P * (S. - rowsum(P * S.)),  O. = P. V + P v
    dP. = o V^T + dO v^T,  r. = rowsum(P. * dP + P * dP.),  dS. = P. * (dP - r) + P * (dP. - r.)
    dQ. = scale * (dS. K + dS k),  dK. = scale * (dS.^T Q + dS^T q),  dV. = P.^T dO + P^T o

The Hessian of <dO, O> is symmetric, so the same formulas are the forward-mode rule of the backward pass
and its reverse-mode rule. Rows of P belong to one query each: everything is computed for C queries at a
time, and P, the only thing that is quadratic in the length, is never kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from metaloom.engine.kernels.absent import left_absent, none_of_none
from metaloom.engine.kernels.autocast import as_autocast
from metaloom.engine.kernels.order import last_derivative
from metaloom.errors import CapabilityError

# Large enough for efficient matrix products, small enough that a chunk's scores stay in a CPU's cache.
CHUNK_CPU = 64
CHUNK_GPU = 256
_chunk = ContextVar[int | None]("_chunk", default=None)

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


@contextlib.contextmanager
def chunks_of(num_queries: int | None) -> Iterator[None]:
    """While it lasts, attention takes so many queries at a time, as it would on another device; None for as
    many as this one takes."""
    token = _chunk.set(num_queries)
    try:
        yield
    finally:
        _chunk.reset(token)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` with a second derivative and a forward-mode rule.

    The forward pass is torch's own, fused where torch can; the backward pass and its derivatives are
    computed in chunks of queries. Memory: the inputs, and `N * C * M` of a chunk.

    Raises:
        CapabilityError: dropout inside the attention, whose draws a fused kernel cannot replay; a mask
            that is itself differentiated; a mask beside `is_causal`.
    """
    refuse_dropout(dropout_p)
    _refuse_two_masks(attn_mask, is_causal)
    if attn_mask is not None and attn_mask.requires_grad:
        raise CapabilityError(
            "this attention mask requires gradients, and second derivatives through a mask are not "
            "implemented: add learned biases to the scores by a mask that is a constant."
        )
    key, value = _for_each_head(query, key, value, enable_gqa)
    # Heads are often strided views; made contiguous once, every product after is free of copies.
    query, key, value = (part.contiguous() for part in as_autocast(query, key, value))
    plan = _Plan(
        1.0 / math.sqrt(query.shape[-1]) if scale is None else scale,
        is_causal,
        attn_mask,
        _chunk.get() or (CHUNK_CPU if query.device.type == "cpu" else CHUNK_GPU),
    )
    output: Tensor = _Attention.apply(query, key, value, plan)  # type: ignore[no-untyped-call]
    return output


def written_out_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The same from elementary functions, for `torch.func.vmap`: all scores at once, `[..., L, M]`.

    Raises:
        CapabilityError: dropout inside the attention; a mask beside `is_causal`.
    """
    refuse_dropout(dropout_p)
    _refuse_two_masks(attn_mask, is_causal)
    key, value = _for_each_head(query, key, value, enable_gqa)
    scores = query @ key.transpose(-2, -1) * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    scores = _wide(scores)
    # A finite fill: -inf would give NaN under dual numbers.
    lowest = torch.finfo(scores.dtype).min
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, lowest)
    elif attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, lowest)
    elif attn_mask is not None:
        scores = scores + _finite(attn_mask, scores.dtype)
    weights = scores.softmax(dim=-1)
    if attn_mask is not None:
        weights = weights.masked_fill(_sees_nothing(attn_mask), 0.0)
    return weights.to(value.dtype) @ value


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What does not change with the inputs: scale, mask, and how many queries are taken at a time."""

    scale: float
    is_causal: bool
    mask: Tensor | None
    chunk: int

    def chunks(self, query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice]]:
        """Slices of queries, and of the keys that they may look at."""
        num_queries, num_keys = query.shape[-2], key.shape[-2]
        for start in range(0, num_queries, self.chunk):
            stop = min(start + self.chunk, num_queries)
            yield slice(start, stop), slice(0, min(stop, num_keys) if self.is_causal else num_keys)

    def weights(self, query: Tensor, key: Tensor, rows: slice, columns: slice) -> Tensor:
        """P of these queries, `[..., C, M]`, at least float32."""
        scores = _wide(query @ key.transpose(-2, -1)).mul_(self.scale)
        blocked = self._blocked(rows, columns, scores)
        if blocked is not None:
            scores.masked_fill_(blocked, torch.finfo(scores.dtype).min)
        elif self.mask is not None:
            scores.add_(_rows(self.mask, rows, columns))
        weights = scores.softmax(dim=-1)
        if self.mask is not None:
            weights.masked_fill_(_sees_nothing(_rows(self.mask, rows, columns)), 0.0)
        return weights

    def _blocked(self, rows: slice, columns: slice, scores: Tensor) -> Tensor | None:
        if self.is_causal:
            num_rows, num_columns = scores.shape[-2:]
            ones = torch.ones(num_rows, num_columns, dtype=torch.bool, device=scores.device)
            return ones.triu_(rows.start - columns.start + 1)
        if self.mask is not None and self.mask.dtype == torch.bool:
            return ~_rows(self.mask, rows, columns)
        return None


class _Attention(torch.autograd.Function):
    """(Q, K, V) -> O."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, plan: _Plan) -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, plan.mask, is_causal=plan.is_causal, scale=plan.scale
        )

    @staticmethod
    @left_absent
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.plan = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    @none_of_none
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        gradients: Triple = _AttentionGradient.apply(  # type: ignore[no-untyped-call]
            d_output, *ctx.saved_tensors, ctx.plan
        )
        return (*gradients, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        query, key, value = ctx.saved_tensors
        directions = _filled(tangents[:3], (query, key, value))
        return _output_tangent(ctx.plan, (query, key, value), directions)


class _AttentionGradient(torch.autograd.Function):
    """(dO, Q, K, V) -> (dQ, dK, dV)."""

    @staticmethod
    def forward(d_output: Tensor, query: Tensor, key: Tensor, value: Tensor, plan: _Plan) -> Triple:
        d_query, d_output = torch.empty_like(query), d_output.contiguous()
        d_key, d_value = _zeros(key), _zeros(value)
        for rows, columns in plan.chunks(query, key):
            q, k, v, do = (
                query[..., rows, :],
                key[..., columns, :],
                value[..., columns, :],
                d_output[..., rows, :],
            )
            weights = plan.weights(q, k, rows, columns)
            d_weights = _wide(do @ v.transpose(-2, -1))
            d_scores = _softmax_gradient(weights, d_weights).mul_(plan.scale).to(q.dtype)
            d_query[..., rows, :] = d_scores @ k
            d_key[..., columns, :] += d_scores.transpose(-2, -1) @ q
            d_value[..., columns, :] += weights.to(q.dtype).transpose(-2, -1) @ do
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype)

    @staticmethod
    @left_absent
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Triple) -> None:
        *tensors, ctx.plan = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    @none_of_none
    @last_derivative
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
        d_output, *inputs = ctx.saved_tensors
        filled = _filled(directions, tuple(inputs))
        result = _gradient_tangents(ctx.plan, d_output, tuple(inputs), filled, None)
        return (*result, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Triple:
        d_output, *inputs = ctx.saved_tensors
        directions = _filled(tangents[1:4], tuple(inputs))
        _, d_query, d_key, d_value = _gradient_tangents(
            ctx.plan, d_output, tuple(inputs), directions, tangents[0]
        )
        return d_query, d_key, d_value


def _output_tangent(plan: _Plan, inputs: tuple[Tensor, ...], directions: tuple[Tensor, ...]) -> Tensor:
    """O. along `directions` of (Q, K, V)."""
    query, key, value = inputs
    q_dot, k_dot, v_dot = directions
    tangent = torch.empty_like(query[..., :1].expand(*query.shape[:-1], value.shape[-1]))
    for rows, columns in plan.chunks(query, key):
        q, k = query[..., rows, :], key[..., columns, :]
        weights = plan.weights(q, k, rows, columns)
        weights_dot = _weights_tangent(plan, weights, q, k, q_dot[..., rows, :], k_dot[..., columns, :])
        tangent[..., rows, :] = (
            weights_dot.to(q.dtype) @ value[..., columns, :] + weights.to(q.dtype) @ v_dot[..., columns, :]
        )
    return tangent


def _gradient_tangents(
    plan: _Plan,
    d_output: Tensor,
    inputs: tuple[Tensor, ...],
    directions: tuple[Tensor, ...],
    d_output_dot: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(O., dQ., dK., dV.) along `directions` of (Q, K, V) and `d_output_dot` of dO (None for zero)."""
    query, key, value = inputs
    q_dots, k_dots, v_dots = (direction.contiguous() for direction in directions)
    d_output = d_output.contiguous()
    output_dot, d_query_dot = torch.empty_like(d_output), torch.empty_like(query)
    d_key_dot, d_value_dot = _zeros(key), _zeros(value)
    for rows, columns in plan.chunks(query, key):
        q, k, v, do = (
            query[..., rows, :],
            key[..., columns, :],
            value[..., columns, :],
            d_output[..., rows, :],
        )
        q_dot, k_dot, v_dot = q_dots[..., rows, :], k_dots[..., columns, :], v_dots[..., columns, :]
        narrow = q.dtype
        weights = plan.weights(q, k, rows, columns)
        weights_dot = _weights_tangent(plan, weights, q, k, q_dot, k_dot)
        d_weights = _wide(do @ v.transpose(-2, -1))
        d_weights_dot = _wide(do @ v_dot.transpose(-2, -1))
        if d_output_dot is not None:
            d_weights_dot += d_output_dot[..., rows, :] @ v.transpose(-2, -1)
        centred = d_weights.sub_((weights * d_weights).sum(-1, keepdim=True))  # dP - r
        # r. = rowsum(P. * dP + P * dP.), and rowsum(P.) = 0, so that dP may be centred in it.
        d_scores_dot = weights_dot * centred
        centred_dot = d_weights_dot.sub_((d_scores_dot + weights * d_weights_dot).sum(-1, keepdim=True))
        d_scores_dot.addcmul_(weights, centred_dot)
        d_scores = centred.mul_(weights).mul_(plan.scale).to(narrow)
        d_scores_dot = d_scores_dot.mul_(plan.scale).to(narrow)
        weights, weights_dot = weights.to(narrow), weights_dot.to(narrow)
        output_dot[..., rows, :] = weights_dot @ v + weights @ v_dot
        d_query_dot[..., rows, :] = d_scores_dot @ k + d_scores @ k_dot
        d_key_dot[..., columns, :] += d_scores_dot.transpose(-2, -1) @ q + d_scores.transpose(-2, -1) @ q_dot
        d_value_dot[..., columns, :] += weights_dot.transpose(-2, -1) @ do
        if d_output_dot is not None:
            d_value_dot[..., columns, :] += weights.transpose(-2, -1) @ d_output_dot[..., rows, :]
    return output_dot, d_query_dot, d_key_dot.to(key.dtype), d_value_dot.to(value.dtype)


def _weights_tangent(
    plan: _Plan, weights: Tensor, q: Tensor, k: Tensor, q_dot: Tensor, k_dot: Tensor
) -> Tensor:
    """P. = P * (S. - rowsum(P * S.))."""
    scores_dot = _wide(q_dot @ k.transpose(-2, -1) + q @ k_dot.transpose(-2, -1)).mul_(plan.scale)
    return _softmax_gradient(weights, scores_dot)


def _softmax_gradient(weights: Tensor, cotangent: Tensor) -> Tensor:
    """P * (c - rowsum(P * c)): the softmax's Jacobian, which is symmetric."""
    product: Tensor = torch._softmax_backward_data(cotangent, weights, -1, weights.dtype)
    return product


def refuse_dropout(probability: float) -> None:
    """Refuses dropout inside an attention.

    Raises:
        CapabilityError: the probability is not 0.
    """
    if probability != 0.0:
        raise CapabilityError(
            f"attention dropout ({probability}) inside a fused kernel cannot be replayed when a step is "
            "computed again: set the model's attention dropout to 0 (dropout of activations is replayed)."
        )


def _refuse_two_masks(mask: Tensor | None, is_causal: bool) -> None:
    if mask is not None and is_causal:
        raise CapabilityError(
            "an attention has both is_causal=True and a mask, which torch leaves undefined: put the causal "
            "part into the mask."
        )


def _for_each_head(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> Pair:
    """Keys and values repeated for the query heads that share them."""
    if not enable_gqa or query.shape[-3] == key.shape[-3]:
        return key, value
    repeats = query.shape[-3] // key.shape[-3]
    return key.repeat_interleave(repeats, dim=-3), value.repeat_interleave(repeats, dim=-3)


def _rows(mask: Tensor, rows: slice, columns: slice) -> Tensor:
    """The part of a mask `[..., L or 1, M]` that these queries and keys need."""
    return (mask if mask.shape[-2] == 1 else mask[..., rows, :])[..., columns]


def _finite(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of numbers with the lowest finite one in place of -inf, so that no row of scores is -inf alone:
    its softmax, and every derivative of it, would be NaN."""
    return mask.to(dtype).clamp(min=torch.finfo(dtype).min)


def _sees_nothing(mask: Tensor) -> Tensor:
    """Queries that may look at no key, `[..., L or 1, 1]`: torch gives them zeros."""
    blocked = ~mask if mask.dtype == torch.bool else mask == -math.inf
    return blocked.all(dim=-1, keepdim=True)


def _wide(scores: Tensor) -> Tensor:
    """At least float32: half precision holds neither a softmax nor its sums."""
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=_wide(tensor.new_empty(0)).dtype)


def _filled(tangents: tuple[Tensor | None, ...], like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(
        torch.zeros_like(primal) if tangent is None else tangent
        for tangent, primal in zip(tangents, like, strict=True)
    )
