"""What torch says where it cannot differentiate an operation, in words that name a way out."""

from __future__ import annotations

import re

_REVERSE = re.compile(r"derivative for '?([\w:.]+?)'? is not implemented")
_FORWARD = re.compile(r"forward AD with ([\w:.]+) that does not support it")
_FORWARD_OF_THE_MODELS_OWN = "You must implement the jvp function for custom autograd.Function"
_BATCHED = re.compile(r"Batching rule not implemented for ([\w:]+(?:\.\w+)?)")


def operation_in(said: str) -> str | None:
    """The operation that an error of torch's names as lacking a derivative; None where it names none."""
    found = _REVERSE.search(said) or _FORWARD.search(said)
    return None if found is None else found.group(1)


def refusal_of(estimator: str, said: str) -> str | None:
    """Why an estimator cannot be computed and what to do, from an error of torch's; None where it is about
    something else."""
    cannot = f"{estimator} cannot be computed on this model"
    if (found := _REVERSE.search(said)) is not None:
        return (
            f"{cannot}: torch has no derivative of {found.group(1)}, which it needs; replace that operation "
            "by ones that can be differentiated twice."
        )
    if (found := _FORWARD.search(said)) is not None:
        return (
            f"{cannot}: torch has no forward-mode derivative of {found.group(1)}, which it needs; take "
            "rematerialized, which needs none."
        )
    if _FORWARD_OF_THE_MODELS_OWN in said:
        return (
            f"{cannot}: one of the model's autograd functions has no jvp, its forward-mode derivative; write "
            "one, or take rematerialized, which needs none."
        )
    if (found := _BATCHED.search(said)) is not None:
        return (
            f"{cannot} for all tasks at once: torch.func.vmap knows nothing of {found.group(1)}; set "
            "adaptation.fast.tasks to loop."
        )
    return None
