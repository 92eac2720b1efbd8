"""Whether a hypergradient is what it claims to be, on the user's own model and data.

Two witnesses. The *oracle* is `unrolled`, the whole graph differentiated once. *Differences* of the meta-loss
need forward passes and first-order inner gradients alone, so that they see what every way of differentiating
twice would lose alike: a tensor that was detached, a backward pass that is computed from constants or marked
`once_differentiable`, whose second derivative torch.autograd.grad leaves out without a word.

Tasks are looked at, too: the engine takes the gradient of the summed losses for the stack of the tasks' own,
which is wrong where one task's data or fast weights reach the loss of another.

All of it is meant for float64: the tolerances are those of rounding there. Shape letters: T tasks.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from metaloom.engine.hypergradients.base import Hypergradient, query_losses
from metaloom.engine.hypergradients.missing import operation_in
from metaloom.engine.hypergradients.unrolled import Unrolled
from metaloom.engine.learner import TaskBatch
from metaloom.engine.unroll import Unroll, adapt, first_snapshot, leaves
from metaloom.errors import CapabilityError

Tensors = Mapping[str, Tensor]
Verdict = Literal["exact", "approximate", "wrong", "not shown"]
Progress = Callable[[int, int], None]

# Exact ways differ by the order of sums alone: 1e-12 or less is usual, a lost term is 1e-3 and more.
ORACLE_TOLERANCE = 1e-7
# What differences resolve over a kinked (ReLU) network, where distances have to be short.
DIFFERENCE_TOLERANCE = 1e-5
# The same kernels on the same numbers; libraries may split a product of other values otherwise.
COUPLING_TOLERANCE = 1e-12
# The oracle's error in a group whose gradient vanishes (a bias before a norm) is measured against this share
# of the whole gradient: what is left of such a group is rounding.
SMALLEST_SHARE = 1e-6
# Rounding errors of a meta-loss, in units of its last place.
LOSS_ROUNDING = 8.0 * torch.finfo(torch.float64).eps
# Pairs of distances, relative to the parameters, in the order in which they are tried.
DISTANCES = ((1e-4, 1e-5), (1e-5, 1e-6), (1e-6, 1e-7), (1e-7, 1e-8), (1e-3, 1e-4))
# Spread over this share of the error leaves open whose error it is.
CONCLUSIVE_SHARE = 1.0 / 3.0


@dataclasses.dataclass(frozen=True)
class GroupCheck:
    """One group of meta-parameters: those whose names differ by the numbers in them alone.

    Attributes:
        name: `init.blocks.*.conv.weight`.
        num_numbers: how many numbers the group holds.
        norm: of the estimator's gradient.
        oracle_error: |estimator - oracle| / |oracle|, Euclidean; None where the oracle cannot be computed.
        cosine: between the two; None as before, and where one of them is zero.
        difference_error: of the oracle's slopes (the estimator's, where there is no oracle) from
            differences: in more than half of the random directions at most so much (where it is beyond the
            tolerance: at least), relative to the root mean square of a slope.
        difference_spread: how far differences at two distances are apart in that direction, likewise.
        verdict: `exact` or `approximate` as the estimator claims; `wrong`; or `not shown`, where the
            differences are too far apart to tell.
    """

    name: str
    num_numbers: int
    norm: float
    oracle_error: float | None
    cosine: float | None
    difference_error: float
    difference_spread: float
    verdict: Verdict


@dataclasses.dataclass(frozen=True)
class Coupling:
    """Another task has moved when one was changed.

    Attributes:
        changed: position of the task whose data and fast weights were changed.
        moved: position of the other task that moved most.
        quantity: the first that moved: `inner loss`, `inner gradient`, `inner step`, `query loss` or
            `query gradient`.
        movement: relative to the quantity's norm.
    """

    changed: int
    moved: int
    quantity: str
    movement: float


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """What a check has found.

    Attributes:
        estimator: name of the estimator.
        is_exact: whether it claims to be exact.
        groups: one entry per group of meta-parameters.
        couplings: one entry per task that others depend on; empty where there is none.
        num_tasks: T; with one task no coupling can be seen.
        num_directions: random directions per group.
        oracle_failure: why `unrolled` cannot be computed, or None.
        own_functions: names of the autograd functions that the model brings along.
    """

    estimator: str
    is_exact: bool
    groups: tuple[GroupCheck, ...]
    couplings: tuple[Coupling, ...]
    num_tasks: int
    num_directions: int
    oracle_failure: str | None
    own_functions: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return not self.findings()

    def findings(self) -> list[str]:
        """What is wrong, one text for each kind of mistake, with values, the rule and the fix."""
        return [
            text
            for text in (
                self._not_finite(),
                self._lost_terms(),
                self._wrong_estimator(),
                self._not_shown(),
                self._coupled(),
            )
            if text
        ]

    def _not_finite(self) -> str:
        names = [group.name for group in self.groups if not _is_finite(group)]
        if not names:
            return ""
        return (
            f"the hypergradient of {_listed(names)} is not finite: a derivative in the inner loop is "
            "infinite (a root or a norm at zero), or a loss is; put an epsilon under the root "
            "(adaptation.rule.eps_root), or lower the inner rate."
        )

    def _lost_terms(self) -> str:
        wrong = [group for group in self._finite("wrong") if group.difference_error > DIFFERENCE_TOLERANCE]
        if not wrong:
            return ""
        source = "`unrolled`" if self.oracle_failure is None else f"`{self.estimator}`"
        worst = max(group.difference_error for group in wrong)
        own = (
            f" Look first at the model's own autograd functions: {', '.join(self.own_functions)}."
            if self.own_functions
            else ""
        )
        return (
            f"the hypergradient of {_listed([group.name for group in wrong])} by {source} differs from "
            f"differences of the meta-loss by up to {worst:.1e} (at most {DIFFERENCE_TOLERANCE:g} is "
            "rounding): differentiating the model loses terms. Something in it is detached (.detach(), "
            ".data, .item(), torch.no_grad), or has a backward pass that is wrong, computed from "
            "constants or marked once_differentiable; compute it with operations that can be differentiated "
            f"twice.{own}"
        )

    def _wrong_estimator(self) -> str:
        wrong = [group for group in self._finite("wrong") if group.difference_error <= DIFFERENCE_TOLERANCE]
        if not wrong:
            return ""
        worst = max(group.oracle_error or 0.0 for group in wrong)
        return (
            f"`{self.estimator}` as the recipe has it differs from plain `unrolled`, which agrees with "
            f"differences of the meta-loss, by up to {worst:.1e} in "
            f"{_listed([group.name for group in wrong])} (at most {ORACLE_TOLERANCE:g} is rounding): an "
            "operation of the model has derivatives that contradict "
            "each other (its jvp and its backward pass), or depends on what is not its input. Set "
            "algorithm.hypergradient to another estimator, or mend the operation."
        )

    def _not_shown(self) -> str:
        names = [group.name for group in self.groups if group.verdict == "not shown"]
        if not names:
            return ""
        return (
            f"nothing can be said about {_listed(names)}: differences of the meta-loss at two distances "
            "disagree among themselves. The model has too many kinks near this point, draws random numbers, "
            "or computes a part in less than float64. Try another seed, or a smaller model or batch."
        )

    def _coupled(self) -> str:
        if not self.couplings:
            return ""
        each = "; ".join(
            f"changing task {coupling.changed} moves the {coupling.quantity} of task {coupling.moved} by "
            f"{coupling.movement:.1e}"
            for coupling in self.couplings
        )
        return (
            f"tasks are coupled: {each} (at most {COUPLING_TOLERANCE:g} is rounding). What adapts to one "
            "task must not see another's data: replace what mixes examples of different tasks (batch norm "
            "over all of them, in-batch losses) by layer or group norm and losses per example, or set "
            "adaptation.fast to full, which runs one task at a time."
        )

    def _finite(self, verdict: Verdict) -> list[GroupCheck]:
        return [group for group in self.groups if group.verdict == verdict and _is_finite(group)]


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
    """Compares a hypergradient with the oracle and with differences, and looks for coupled tasks.

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
    own_functions = _own_functions(plain, meta, batch)
    oracle, oracle_failure = _attempt(Unrolled(), plain, meta, batch)
    gradient, failure = _attempt(hypergradient, unroll, meta, batch)
    if gradient is None:
        raise CapabilityError(_refusal(estimator, failure, own_functions, oracle_failure is None))
    reference = gradient if oracle is None else oracle
    is_judged = is_exact or oracle is not None
    loss = _MetaLoss(plain, batch)
    at_center = loss(meta)
    total_norm = _norm(reference.values())
    generator = torch.Generator().manual_seed(seed)
    groups = grouped(meta)
    checked: list[GroupCheck] = []
    for name, members in groups.items():
        error, spread = _median_difference(
            loss, at_center, meta, {key: reference[key] for key in members}, num_directions, generator
        )
        own = [gradient[key] for key in members]
        exact = None if oracle is None else [oracle[key] for key in members]
        oracle_error = None if exact is None else _relative_error(own, exact, SMALLEST_SHARE * total_norm)
        checked.append(
            GroupCheck(
                name=name,
                num_numbers=sum(value.numel() for value in own),
                norm=_norm(own),
                oracle_error=oracle_error,
                cosine=None if exact is None else _cosine(own, exact),
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
    )


def away_from_symmetry(meta: Tensors, *, seed: int) -> dict[str, Tensor]:
    """The meta-parameters with noise: a tenth of a tensor's root mean square, 0.05 where it is zero.

    At initial values much vanishes or coincides: LoRA's B is zero, and with it the gradient of A; rates are
    equal; norms are one. What is zero on both sides of a comparison says nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + (0.1 * _root_mean_square(value) or 0.05) * _normal(value, generator)
        for name, value in meta.items()
    }


def grouped(meta: Tensors) -> dict[str, list[str]]:
    """The names of meta-parameters by group: numbers between dots count as one, `*`."""
    groups: dict[str, list[str]] = {}
    for name in meta:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), []).append(name)
    return groups


# ---------------------------------------------------------------- differences


class _MetaLoss:
    """theta -> the summed meta-loss of a batch: K inner steps, no graph kept, first derivatives alone."""

    def __init__(self, unroll: Unroll, batch: TaskBatch) -> None:
        self._unroll, self._batch = unroll, batch

    def __call__(self, meta: Tensors) -> float:
        total = 0.0
        states = adapt(self._unroll, meta, self._batch, num_steps=self._unroll.num_steps)
        for step, at in enumerate(states):
            with torch.no_grad():
                losses, _ = query_losses(self._unroll, meta, at.fast, self._batch, step)
            if losses is not None:
                total += self._unroll.step_weights[step] * float(losses.double().sum())
        return total


@dataclasses.dataclass(frozen=True)
class Slope:
    """A slope by differences.

    Attributes:
        value: the slope.
        spread: how far those at the two distances are apart.
        rounding: what rounding of the loss can make of it.
    """

    value: float
    spread: float
    rounding: float


def slope_by_differences(
    loss: Callable[[float], float],
    at_center: float,
    *,
    enough: float,
    distances: Sequence[tuple[float, float]],
) -> Slope:
    """The slope of `loss` at 0, by Richardson's extrapolation of central differences.

    For a pair of distances h > h', with r = h / h' and D(h) = (loss(h) - loss(-h)) / 2h:

        (r^2 D(h') - D(h)) / (r^2 - 1)          error O(h^4); spread |D(h) - D(h')|

    Curvature shows at long distances, rounding at short ones, a kink or a jump at those that reach it: in
    each case the two differences part. Pairs are tried until they are no further apart than is enough,
    or than rounding makes them; if none is, the pair that is closest counts.

    Args:
        loss: along a line.
        at_center: loss(0), for the size of its rounding.
        enough: the spread at which to stop.
        distances: pairs, the longer first.
    """
    known: dict[float, float] = {}

    def central(distance: float) -> float:
        if distance not in known:
            known[distance] = (loss(distance) - loss(-distance)) / (2.0 * distance)
        return known[distance]

    found: list[Slope] = []
    for wide, narrow in distances:
        ratio = (wide / narrow) ** 2
        spread = abs(central(wide) - central(narrow))
        value = (ratio * central(narrow) - central(wide)) / (ratio - 1.0)
        found.append(Slope(value, spread, LOSS_ROUNDING * abs(at_center) / narrow))
        if spread <= max(enough, found[-1].rounding):
            return found[-1]
    return min(found, key=lambda slope: _or_infinite(slope.spread))


def _median_difference(
    loss: _MetaLoss,
    at_center: float,
    meta: Tensors,
    gradient: Tensors,
    num_directions: int,
    generator: torch.Generator,
) -> tuple[float, float]:
    """Error of a group's slopes from differences, the median over directions or its bound on the tolerance's
    side, and the spread there.

    Few directions suffice: that a lost term of 1e-3 is missed by two takes a chance of 1e-4. More than
    half of `num_directions` have to be on one side of the tolerance; those in which kinks leave the
    differences undecided do not count, up to as many again.

    A direction is uniform on a sphere, scaled by each tensor's root mean square s: the slope's root
    mean square over directions is then |s * gradient|, against which errors are measured.
    """
    scales = {name: _root_mean_square(meta[name]) or 1.0 for name in gradient}
    num_numbers = sum(value.numel() for value in gradient.values())
    typical = _norm([scales[name] * value for name, value in gradient.items()])
    # One number has one direction.
    num_needed, limit = (num_directions // 2 + 1, 2 * num_directions) if num_numbers > 1 else (1, 1)
    within: list[tuple[float, float]] = []
    beyond: list[tuple[float, float]] = []
    vague: list[tuple[float, float]] = []
    for _ in range(limit):
        normal = {name: _normal(value, generator) for name, value in gradient.items()}
        length = math.sqrt(num_numbers) / _norm(normal.values())
        direction = {name: length * scales[name] * value for name, value in normal.items()}
        expected = sum(float((gradient[name] * value).sum()) for name, value in direction.items())

        def along(distance: float, direction: Tensors = direction) -> float:
            moved = {name: meta[name] + distance * value for name, value in direction.items()}
            return loss({**meta, **moved})

        slope = slope_by_differences(
            along, at_center, enough=0.1 * DIFFERENCE_TOLERANCE * typical, distances=DISTANCES
        )
        scale = max(typical, abs(slope.value), slope.rounding / DIFFERENCE_TOLERANCE)
        error, spread = (_or_infinite(value / scale) for value in (abs(slope.value - expected), slope.spread))
        if error <= DIFFERENCE_TOLERANCE:
            within.append((error, spread))
        else:
            (beyond if _is_conclusive(error, spread) else vague).append((error, spread))
        if len(within) == num_needed:
            return max(within)
        if len(beyond) == num_needed:
            return min(beyond)
    return min(vague)


# ---------------------------------------------------------------- coupling


def coupled_tasks(unroll: Unroll, meta: Tensors, batch: TaskBatch, *, seed: int) -> tuple[Coupling, ...]:
    """What moves in other tasks when one task's data and fast weights change; empty where nothing does.

    A task gets the support, query and rehearsal data of the next one, and other fast weights; then the
    losses, gradients and first inner step of the others are compared.
    """
    fast = away_from_symmetry(first_snapshot(unroll, meta, batch.num_tasks).fast, seed=seed)
    others = away_from_symmetry(fast, seed=seed + 1)
    before = _task_quantities(unroll, meta, fast, batch)
    found = []
    for task in range(batch.num_tasks if batch.num_tasks > 1 else 0):
        changed = {name: _with_row(value, others[name], task, task) for name, value in fast.items()}
        after = _task_quantities(unroll, meta, changed, _with_next_data(batch, task))
        for quantity, values in before.items():
            movements = _movements(values, after[quantity])
            movements[task] = 0.0
            moved = max(range(len(movements)), key=lambda position: movements[position])
            if movements[moved] > COUPLING_TOLERANCE:
                found.append(Coupling(task, moved, quantity, movements[moved]))
                break
    return tuple(found)


def _task_quantities(
    unroll: Unroll, meta: Tensors, fast: Tensors, batch: TaskBatch
) -> dict[str, list[Tensor]]:
    """Losses, gradients and the first inner step: tensors `[T, ...]` by quantity, what comes first first."""
    at = leaves(fast)
    with torch.enable_grad():
        losses, _ = unroll.learner.losses("support", meta, at, batch, 0)
        grads = torch.autograd.grad(losses.sum(), list(at.values()))
    with torch.no_grad():
        rates = unroll.rates.at(meta, fast, 0)
        named = dict(zip(fast, grads, strict=True))
        stepped, _ = unroll.rule.update(fast, unroll.rule.init_state(fast), named, rates)
    after = leaves(stepped)
    with torch.enable_grad():
        query, _ = unroll.learner.losses("query", meta, after, batch, 0)
        query_grads = torch.autograd.grad(query.sum(), list(after.values()))
    return {
        "inner loss": [losses.detach()],
        "inner gradient": list(grads),
        "inner step": list(stepped.values()),
        "query loss": [query.detach()],
        "query gradient": list(query_grads),
    }


def _movements(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[float]:
    """How far each task has moved, relative to its own norm over all tensors `[T, ...]`."""
    movements = []
    for task in range(before[0].shape[0]):
        old = [value[task] for value in before]
        movements.append(_relative_error([value[task] for value in after], old, 0.0))
    return movements


def _with_next_data(batch: TaskBatch, task: int) -> TaskBatch:
    """The batch with one task's data replaced by that of the next; its number, and so its draws, stay."""
    following = (task + 1) % batch.num_tasks

    def replaced(part: Tensors) -> dict[str, Tensor]:
        return {name: _with_row(value, value, task, following) for name, value in part.items()}

    return dataclasses.replace(
        batch,
        support=replaced(batch.support),
        query=replaced(batch.query),
        rehearsal=None if batch.rehearsal is None else replaced(batch.rehearsal),
    )


def _with_row(tensor: Tensor, source: Tensor, row: int, source_row: int) -> Tensor:
    """A copy of the tensor with one row from another."""
    copy = tensor.clone()
    copy[row] = source[source_row]
    return copy


# ---------------------------------------------------------------- what cannot be differentiated


def _attempt(
    hypergradient: Hypergradient, unroll: Unroll, meta: Tensors, batch: TaskBatch
) -> tuple[dict[str, Tensor] | None, str | None]:
    """The gradient; or None, and what torch says of why there is none."""
    try:
        return hypergradient.meta_gradient(unroll, meta, batch).gradient, None
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, CapabilityError) as error:  # NotImplementedError is a RuntimeError
        said = error.__cause__ or error  # what torch said, where it was put into other words
        return None, (str(said).strip().splitlines() or [type(said).__name__])[0]


def _refusal(estimator: str, failure: str | None, own_functions: tuple[str, ...], has_oracle: bool) -> str:
    """Which estimator, which operation, and what to do."""
    failure = failure or ""
    named = operation_in(failure)
    if named is not None:
        operation = named
    elif own_functions:
        operation = f"one of the model's own autograd functions ({', '.join(own_functions)})"
    else:
        operation = "an operation of the model"
    if has_oracle:
        fix = "Set algorithm.hypergradient to rematerialized or unrolled, which this model can do"
    else:
        fix = (
            "Replace the operation by one that can be differentiated twice (eager attention for a fused one, "
            "differentiable operations in the backward of an autograd function), or set "
            "algorithm.hypergradient to first_order, which needs no second derivative and is approximate"
        )
    return (
        f"`{estimator}` cannot be computed: {operation} lacks a derivative that it needs (torch: {failure}). "
        f"{fix}."
    )


def _own_functions(unroll: Unroll, meta: Tensors, batch: TaskBatch) -> tuple[str, ...]:
    """Names of the autograd functions in the inner loss that are not metaloom's."""
    at = leaves(first_snapshot(unroll, meta, batch.num_tasks).fast)
    with torch.enable_grad():
        losses, _ = unroll.learner.losses("support", leaves(meta), at, batch, 0, derivative="reverse")
    names = {
        type(node)._forward_cls.__name__  # type: ignore[attr-defined]
        for node in _graph(losses)
        if isinstance(node, BackwardCFunction)
        and not type(node)._forward_cls.__module__.startswith("metaloom.")  # type: ignore[attr-defined]
    }
    return tuple(sorted(names))


def _graph(output: Tensor) -> Iterator[object]:
    """Every node of the graph that a tensor hangs on."""
    waiting, seen = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions]


# ---------------------------------------------------------------- numbers


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
        return "wrong" if _is_conclusive(difference_error, difference_spread) else "not shown"
    if is_exact and oracle_error is not None and not oracle_error <= ORACLE_TOLERANCE:
        return "wrong"
    return "exact" if is_exact else "approximate"


def _is_conclusive(difference_error: float, difference_spread: float) -> bool:
    """Whether an error beyond the tolerance is the gradient's, and not that of the differences."""
    return math.isinf(difference_error) or difference_spread <= CONCLUSIVE_SHARE * difference_error


def _is_finite(group: GroupCheck) -> bool:
    return all(
        math.isfinite(value) for value in (group.norm, group.oracle_error or 0.0, group.difference_error)
    )


def _require_float64(meta: Tensors) -> None:
    other = [f"{name} is {value.dtype}" for name, value in meta.items() if value.dtype != torch.float64]
    if other:
        raise CapabilityError(
            f"{_listed(other)}: in less than float64 rounding hides lost terms; build the model, the "
            "meta-parameters and the data in float64."
        )


def _listed(names: Sequence[str], limit: int = 6) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _norm(tensors: Iterable[Tensor]) -> float:
    """The Euclidean norm over all of them."""
    return math.sqrt(sum(float(value.square().sum()) for value in tensors))


def _relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor], smallest: float) -> float:
    """|actual - expected| / max(|expected|, smallest); 0 where they are equal."""
    distance = _norm([left - right for left, right in zip(actual, expected, strict=True)])
    scale = max(_norm(expected), smallest)
    return distance / scale if scale > 0.0 else (0.0 if distance == 0.0 else math.inf)


def _cosine(left: Sequence[Tensor], right: Sequence[Tensor]) -> float | None:
    product = _norm(left) * _norm(right)
    inner = sum(float((one * other).sum()) for one, other in zip(left, right, strict=True))
    return inner / product if product > 0.0 else None


def _root_mean_square(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers of a tensor's shape, the same on every device."""
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)


def _or_infinite(value: float) -> float:
    """Infinity in place of NaN, which has no place in an order."""
    return math.inf if math.isnan(value) else value
