"""Gradients and tangents that are not there, as the tangent of a frozen weight: torch hands a
`torch.autograd.Function` zeros in their place, and a product with zeros takes as long as any other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def left_absent(setup_context: Callable[..., None]) -> Callable[..., None]:
    """For `setup_context` of a function whose `jvp` and `backward` take None for what is not there."""

    @functools.wraps(setup_context)
    def with_absent(ctx: Any, *args: Any) -> None:
        ctx.set_materialize_grads(False)
        setup_context(ctx, *args)

    return with_absent


def none_of_none(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For `backward` of such a function: where there is no gradient of its outputs, there is none of its
    inputs."""

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if all(gradient is None for gradient in gradients):
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx, *gradients)

    return checked
