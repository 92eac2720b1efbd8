"""How often a kernel may be differentiated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from metaloom.errors import CapabilityError


def last_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For a backward pass that must not be differentiated again. (torch's `once_differentiable` lets pass,
    with a derivative that lacks terms, what does not go through its error node.)

    Raises:
        CapabilityError: it runs with `create_graph`, so a third derivative is being taken.
    """

    @functools.wraps(backward)
    def checked(*args: Any) -> Any:
        if torch.is_grad_enabled():
            raise CapabilityError(
                "a third derivative is taken of something that has two: meta-gradients of meta-gradients "
                "need kernels of their own."
            )
        return backward(*args)

    return checked
