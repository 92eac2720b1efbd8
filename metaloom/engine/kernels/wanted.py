"""Which of a function's derivatives the backward pass that is running asks for."""

from __future__ import annotations

from typing import Any

import torch


def wanted(ctx: Any) -> tuple[bool, ...]:
    """For each tensor that a `torch.autograd.Function` was given, whether its gradient is on the way to what
    is being differentiated by; for use in `backward`.

    `ctx.needs_input_grad` says only whether it requires gradients at all. An inner step differentiates by
    fast weights alone, through layers whose own weights are meta-parameters: their gradient is a third
    of a linear layer's work, and for sharded weights a collective. It may not be left out for good, since the
    second derivative visits the same function again.

    A leaf counts as wanted: torch does not tell (torch.nn.Parameter and the like; a view of it is none).
    """
    return tuple(
        node is not None and (_is_leaf(node) or torch._C._will_engine_execute_node(node))
        for node, _ in ctx.next_functions
    )


def _is_leaf(node: Any) -> bool:
    return bool(node.name() == "torch::autograd::AccumulateGrad")
