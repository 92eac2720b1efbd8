"""What a check has found, in numbers and in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from metaloom.engine.checking.coupling import COUPLING_TOLERANCE, Coupling, Leak
from metaloom.engine.checking.differences import DIFFERENCE_TOLERANCE

Verdict = Literal["exact", "approximate", "wrong", "not shown"]

# Exact ways differ by the order of sums alone: 1e-12 or less is usual, a lost term is 1e-3 and more.
ORACLE_TOLERANCE = 1e-7


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
        leak: what padding reaches; None where that is nothing, or there is none.
    """

    estimator: str
    is_exact: bool
    groups: tuple[GroupCheck, ...]
    couplings: tuple[Coupling, ...]
    num_tasks: int
    num_directions: int
    oracle_failure: str | None
    own_functions: tuple[str, ...]
    leak: Leak | None = None

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
                self._leaking(),
            )
            if text
        ]

    def _not_finite(self) -> str:
        names = [group.name for group in self.groups if not _is_finite(group)]
        if not names:
            return ""
        return (
            f"the hypergradient of {listed(names)} is not finite: a derivative in the inner loop is "
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
            f"the hypergradient of {listed([group.name for group in wrong])} by {source} differs from "
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
            f"{listed([group.name for group in wrong])} (at most {ORACLE_TOLERANCE:g} is rounding): an "
            "operation of the model has derivatives that contradict "
            "each other (its jvp and its backward pass), or depends on what is not its input. Set "
            "algorithm.hypergradient to another estimator, or mend the operation."
        )

    def _not_shown(self) -> str:
        names = [group.name for group in self.groups if group.verdict == "not shown"]
        if not names:
            return ""
        return (
            f"nothing can be said about {listed(names)}: differences of the meta-loss at two distances "
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
            "task must not see another's data: replace what mixes examples of different tasks (a norm "
            "over all of them that is not torch's batch norm, in-batch losses) by torch's norms and losses "
            "per example, or set adaptation.fast to full, which runs one task at a time."
        )

    def _leaking(self) -> str:
        if self.leak is None:
            return ""
        return (
            f"padding is not without effect: other inputs of examples of weight 0 move the "
            f"{self.leak.quantity} of task {self.leak.moved} by {self.leak.movement:.1e} (at most "
            f"{COUPLING_TOLERANCE:g} is rounding). Something in the model mixes a task's examples: replace "
            "it by torch.nn.functional.batch_norm with tracked statistics off, which leaves padding out, or "
            "by layer or group norm."
        )

    def _finite(self, verdict: Verdict) -> list[GroupCheck]:
        return [group for group in self.groups if group.verdict == verdict and _is_finite(group)]


def _is_finite(group: GroupCheck) -> bool:
    return all(
        math.isfinite(value) for value in (group.norm, group.oracle_error or 0.0, group.difference_error)
    )


def listed(names: Sequence[str], limit: int = 6) -> str:
    """The names in a sentence; of many the first, and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
