"""JAX: the built-in models written by hand, everything under one jit.

Shape letters: N examples, L tokens, D width, H heads, C classes, R LoRA rank, K inner steps.

Weights keep torch's names and are held in the layouts that suit XLA on a CPU: convolutions NHWC and HWIO.
"""

from __future__ import annotations

import functools
import math
import operator
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.peers.base import Prepared
from benchmarks.workloads import Array, Images, Problem, Tokens

Tree = Any  # a dict of arrays by name; JAX is not there where types are checked
Loss = Callable[[Tree, Tree, Tree, Tree], Tree]  # (fast, shared, inputs, targets) -> mean cross-entropy
MetaLoss = Callable[[Tree, Tree], Tree]  # (learned, task) -> query loss after adaptation


def prepare(problem: Problem, variant: str) -> Prepared:
    """Compiles the hypergradient ahead of time.

    Args:
        variant: `reverse` keeps what all steps leave behind; `reverse_checkpoint` recomputes each step
            (`jax.checkpoint`); `mixed_mode` does, too, and takes the derivative of each step's gradient
            forward over reverse (Kemaev et al. 2025, "Scalable Meta-Learning via Mixed-Mode
            Differentiation", section 4).
    """
    jax.config.update("jax_enable_x64", _dtype(problem) == np.float64)
    loss = _loss_of(problem)
    learned, fixed = _weights(problem)
    data = tuple(
        jnp.asarray(_channels_last(problem, values))
        for values in (
            problem.support.inputs,
            problem.support.targets,
            problem.query.inputs,
            problem.query.targets,
        )
    )
    inner_gradient = _mixed_mode_gradient(loss) if variant == "mixed_mode" else jax.grad(loss)
    meta_loss = functools.partial(
        _meta_loss, problem, loss, inner_gradient, checkpoint=variant != "reverse", fixed=fixed
    )
    start_s = time.perf_counter()
    compiled = jax.jit(functools.partial(_sum_over_tasks, problem, meta_loss)).lower(learned, data).compile()
    compile_s = time.perf_counter() - start_s
    first_task = jax.tree.map(operator.itemgetter(0), data)
    forward = jax.jit(lambda learned, task: loss(*_split(learned, fixed), *task[2:]))

    def hypergradient() -> dict[str, Array]:
        gradient = jax.block_until_ready(compiled(learned, data))
        return {name: _torch_layout(np.asarray(value)) for name, value in gradient.items()}

    return Prepared(lambda: jax.block_until_ready(forward(learned, first_task)), hypergradient, compile_s)


def _sum_over_tasks(problem: Problem, meta_loss: MetaLoss, learned: Tree, data: Tree) -> Tree:
    """The hypergradient summed over tasks, in what was found the fastest form on a CPU: side by side for
    LoRA, where tasks share the large products, else one after the other without a loop of XLA's."""
    if problem.lora and problem.workload.num_tasks > 1:
        return jax.grad(lambda learned: jax.vmap(meta_loss, (None, 0))(learned, data).sum())(learned)
    total = jax.tree.map(jnp.zeros_like, learned)
    for number in range(problem.workload.num_tasks):
        task = jax.tree.map(operator.itemgetter(number), data)
        total = jax.tree.map(jnp.add, total, jax.grad(meta_loss)(learned, task))
    return total


def _meta_loss(
    problem: Problem,
    loss: Loss,
    inner_gradient: Loss,
    learned: Tree,
    task: Tree,
    *,
    checkpoint: bool,
    fixed: Tree,
) -> Tree:
    """One task's query loss after K steps of gradient descent on its support loss."""
    support_inputs, support_targets, query_inputs, query_targets = task
    fast, shared = _split(learned, fixed)
    rate = problem.workload.rate

    def step(fast: Tree, _: None) -> tuple[Tree, None]:
        grads = inner_gradient(fast, shared, support_inputs, support_targets)
        return jax.tree.map(lambda value, grad: value - rate * grad, fast, grads), None

    # In a scan no common subexpression can undo the recomputation, and the guard against it would cost time.
    unrolled = isinstance(problem.workload.model, Images)
    body = jax.checkpoint(step, prevent_cse=unrolled) if checkpoint else step
    if unrolled:  # XLA's convolutions are several times slower inside its loops on a CPU
        for _ in range(problem.num_steps):
            fast, _ = body(fast, None)
    else:
        fast, _ = lax.scan(body, fast, None, length=problem.num_steps)
    return loss(fast, shared, query_inputs, query_targets)


def _mixed_mode_gradient(loss: Loss) -> Loss:
    """`jax.grad(loss)`, whose own reverse rule is forward over reverse: with g_bar its cotangent, `H g_bar`
    and `M g_bar` are the tangents of the gradient with respect to (fast, shared) along (g_bar, 0)."""

    def gradient(fast: Tree, shared: Tree, inputs: Tree, targets: Tree) -> Tree:
        return jax.grad(loss)(fast, shared, inputs, targets)

    def save(fast: Tree, shared: Tree, inputs: Tree, targets: Tree) -> tuple[Tree, Tree]:
        return gradient(fast, shared, inputs, targets), (fast, shared, inputs, targets)

    def pull_back(saved: Tree, cotangent: Tree) -> Tree:
        fast, shared, inputs, targets = saved

        def both(fast: Tree) -> Tree:
            return jax.grad(loss, (0, 1))(fast, shared, inputs, targets)

        _, (d_fast, d_shared) = jax.jvp(both, (fast,), (cotangent,))
        return d_fast, d_shared, None, None

    differentiable: Loss = jax.custom_vjp(gradient)
    differentiable.defvjp(save, pull_back)  # type: ignore[attr-defined]
    return differentiable


# Weights.


def _dtype(problem: Problem) -> np.dtype[Any]:
    return next(problem.model.parameters()).numpy().dtype


def _weights(problem: Problem) -> tuple[Tree, Tree]:
    """Meta-parameters by metaloom's names, and the other weights by torch's."""
    weights = {name: value.numpy() for name, value in problem.model.named_parameters()}
    fast = problem.lora or weights
    learned = {f"init.{name}": value for name, value in fast.items()}
    fixed = {}
    if problem.lora and problem.workload.learn_backbone:
        learned |= {f"backbone.{name}": value for name, value in weights.items()}
    elif problem.lora:
        fixed = weights

    def arrays(values: dict[str, Array]) -> Tree:
        return {name: jnp.asarray(_jax_layout(value)) for name, value in values.items()}

    return arrays(learned), arrays(fixed)


def _split(learned: Tree, fixed: Tree) -> tuple[Tree, Tree]:
    """Fast weights and shared weights by torch's names."""
    fast = {name[5:]: value for name, value in learned.items() if name.startswith("init.")}
    shared = {name[9:]: value for name, value in learned.items() if name.startswith("backbone.")}
    return fast, shared | fixed


def _jax_layout(weight: Array) -> Array:
    return weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight  # OIHW -> HWIO


def _torch_layout(weight: Array) -> Array:
    return weight.transpose(3, 2, 0, 1) if weight.ndim == 4 else weight


def _channels_last(problem: Problem, values: Array) -> Array:
    return values.transpose(0, 1, 3, 4, 2) if values.ndim == 5 else values  # [T, N, C, H, W]


# Models, as metaloom.models has them.


def _loss_of(problem: Problem) -> Loss:
    sizes = problem.workload.model
    logits_of = _conv4 if isinstance(sizes, Images) else functools.partial(_gpt, sizes, problem.lora_scale)

    def loss(fast: Tree, shared: Tree, inputs: Tree, targets: Tree) -> Tree:
        log_probabilities = jax.nn.log_softmax(logits_of(shared | fast, inputs))
        return -jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1).mean()

    return loss


def _conv4(weights: Tree, images: Tree) -> Tree:
    features = images  # [N, H, W, C]
    for block in range(4):
        name = f"blocks.{block}"
        features = lax.conv_general_dilated(
            features,
            weights[f"{name}.conv.weight"],
            (2, 2),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        features = jax.nn.relu(_normalised(weights, f"{name}.norm", features, (0, 1, 2)))
    return features.mean((1, 2)) @ weights["head.weight"].T + weights["head.bias"]


def _gpt(sizes: Tokens, lora_scale: float, weights: Tree, tokens: Tree) -> Tree:
    linear = functools.partial(_linear, weights, lora_scale)
    hidden = weights["token_embedding.weight"][tokens] + weights["position_embedding.weight"]  # [N, L, D]
    for block in range(sizes.num_layers):
        name = f"blocks.{block}"
        inputs = _normalised(weights, f"{name}.norm_attention", hidden, (-1,))
        mixed = _causal_attention(linear(f"{name}.attention.qkv", inputs), sizes.num_heads)
        hidden = hidden + linear(f"{name}.attention.proj", mixed)
        inputs = _normalised(weights, f"{name}.norm_mlp", hidden, (-1,))
        inner = jax.nn.gelu(linear(f"{name}.mlp.fc_in", inputs), approximate=False)
        hidden = hidden + linear(f"{name}.mlp.fc_out", inner)
    return _normalised(weights, "norm", hidden, (-1,)) @ weights["head.weight"].T


def _linear(weights: Tree, lora_scale: float, name: str, inputs: Tree) -> Tree:
    outputs = inputs @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
    if f"{name}.lora_a" in weights:
        low_rank = inputs @ weights[f"{name}.lora_a"].T
        outputs = outputs + lora_scale * (low_rank @ weights[f"{name}.lora_b"].T)
    return outputs


def _causal_attention(qkv: Tree, num_heads: int) -> Tree:
    N, L, width = qkv.shape
    query, key, value = (
        part.reshape(N, L, num_heads, -1).transpose(0, 2, 1, 3) for part in jnp.split(qkv, 3, axis=-1)
    )
    scores = query @ key.swapaxes(-2, -1) / math.sqrt(query.shape[-1])
    past = jnp.tril(jnp.ones((L, L), bool))
    weights = jax.nn.softmax(jnp.where(past, scores, jnp.finfo(scores.dtype).min))
    return (weights @ value).transpose(0, 2, 1, 3).reshape(N, L, width // 3)


def _normalised(weights: Tree, name: str, values: Tree, axes: tuple[int, ...]) -> Tree:
    """Layer norm over the last axis, or batch norm by the examples' own statistics over all others."""
    mean = values.mean(axes, keepdims=True)
    variance = jnp.square(values - mean).mean(axes, keepdims=True)
    scaled = (values - mean) * lax.rsqrt(variance + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]
