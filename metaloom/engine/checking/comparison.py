"""Whether a hypergradient is what it claims to be, on the user's own model and data.

Two witnesses. The *oracle* is `unrolled`, the whole graph differentiated once. *Differences* of the meta-loss
need forward passes and first-order inner gradients alone, so that they see what every way of differentiating
twice would lose alike: a tensor that was detached, a backward pass that is computed from constants or marked
`once_differentiable`, whose second derivative torch.autograd.grad leaves out without a word.

All of it is meant for float64: the tolerances are those of rounding there.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from metaloom.engine.checking.coupling import coupled_tasks, padding_leak
from metaloom.engine.checking.differences import (
    DIFFERENCE_TOLERANCE,
    MetaLoss,
    is_conclusive,
    median_difference,
)
from metaloom.engine.checking.operations import attempt, own_functions_of, refusal
from metaloom.engine.checking.report import ORACLE_TOLERANCE, CheckReport, GroupCheck, Verdict, listed
from metaloom.engine.checking.vectors import cosine, norm, relative_error
from metaloom.engine.hypergradients.base import Hypergradient
from metaloom.engine.hypergradients.unrolled import Unrolled
from metaloom.engine.learner import TaskBatch
from metaloom.engine.unroll import Unroll
from metaloom.errors import CapabilityError

Tensors = Mapping[str, Tensor]
Progress = Callable[[int, int], None]

# The oracle's error in a group whose gradient vanishes (a bias before a norm) is measured against this share
# of the whole gradient: what is left of such a group is rounding.
SMALLEST_SHARE = 1e-6


def check_hypergradient(
    unroll: Unroll,
    hypergradient: Hypergradient,
    meta: Tensors,
    batch: TaskBatch,
    *,
    estimator: str,
    is_exact: bool,
    num_directions: int = 3,
    seed: int = 0,
    progress: Progress | None = None,
) -> CheckReport:
    """Compares a hypergradient with the oracle and with differences, and looks for coupled tasks and for
    padding that has an effect.

    The oracle and the differences keep everything and compute nothing again, whatever the learner says: so
    recomputation and a chunked head are checked with the estimator. An approximate estimator is not judged
    by its distance from the oracle, but the oracle is by its distance from differences.

    Args:
        unroll: the inner problem.
        hypergradient: the estimator.
        meta: where, float64. Gradients that vanish by symmetry (LoRA's with B = 0) hide mistakes: see
            `away_from_symmetry`.
        batch: T tasks; two or more, or no coupling can be seen.
        estimator: the estimator's name, for messages.
        is_exact: whether it claims to be exact.
        num_directions: random directions per group in which differences are taken.
        seed: of the directions.
        progress: called with the number of groups done and of all.

    Raises:
        CapabilityError: the numbers are not float64; or the estimator cannot be computed, since an operation
            of the model lacks a derivative that it needs.
    """
    _require_float64(meta)
    plain = dataclasses.replace(
        unroll, learner=dataclasses.replace(unroll.learner, recompute_blocks=False, head_chunk=None)
    )
    own_functions = own_functions_of(plain, meta, batch)
    oracle, oracle_failure = attempt(Unrolled(), plain, meta, batch)
    gradient, failure = attempt(hypergradient, unroll, meta, batch)
    if gradient is None:
        raise CapabilityError(refusal(estimator, failure, own_functions, oracle_failure is None))
    reference = gradient if oracle is None else oracle
    is_judged = is_exact or oracle is not None
    loss = MetaLoss(plain, batch)
    at_center = loss(meta)
    total_norm = norm(reference.values())
    generator = torch.Generator().manual_seed(seed)
    groups = grouped(meta)
    checked: list[GroupCheck] = []
    for name, members in groups.items():
        error, spread = median_difference(
            loss, at_center, meta, {key: reference[key] for key in members}, num_directions, generator
        )
        own = [gradient[key] for key in members]
        exact = None if oracle is None else [oracle[key] for key in members]
        oracle_error = None if exact is None else relative_error(own, exact, SMALLEST_SHARE * total_norm)
        checked.append(
            GroupCheck(
                name=name,
                num_numbers=sum(value.numel() for value in own),
                norm=norm(own),
                oracle_error=oracle_error,
                cosine=None if exact is None else cosine(own, exact),
                difference_error=error,
                difference_spread=spread,
                verdict=_verdict(
                    oracle_error, error, spread, is_exact=is_exact, is_judged_by_differences=is_judged
                ),
            )
        )
        if progress is not None:
            progress(len(checked), len(groups))
    return CheckReport(
        estimator=estimator,
        is_exact=is_exact,
        groups=tuple(checked),
        couplings=coupled_tasks(plain, meta, batch, seed=seed),
        num_tasks=batch.num_tasks,
        num_directions=num_directions,
        oracle_failure=oracle_failure,
        own_functions=own_functions,
        leak=padding_leak(plain, meta, batch, seed=seed),
    )


def grouped(meta: Tensors) -> dict[str, list[str]]:
    """The names of meta-parameters by group: numbers between dots count as one, `*`."""
    groups: dict[str, list[str]] = {}
    for name in meta:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), []).append(name)
    return groups


def _verdict(
    oracle_error: float | None,
    difference_error: float,
    difference_spread: float,
    *,
    is_exact: bool,
    is_judged_by_differences: bool,
) -> Verdict:
    if oracle_error is not None and not math.isfinite(oracle_error):
        return "wrong"
    if is_judged_by_differences and not difference_error <= DIFFERENCE_TOLERANCE:
        return "wrong" if is_conclusive(difference_error, difference_spread) else "not shown"
    if is_exact and oracle_error is not None and not oracle_error <= ORACLE_TOLERANCE:
        return "wrong"
    return "exact" if is_exact else "approximate"


def _require_float64(meta: Tensors) -> None:
    other = [f"{name} is {value.dtype}" for name, value in meta.items() if value.dtype != torch.float64]
    if other:
        raise CapabilityError(
            f"{listed(other)}: in less than float64 rounding hides lost terms; build the model, the "
            "meta-parameters and the data in float64."
        )
