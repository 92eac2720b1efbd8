"""Which estimator of the hypergradient gives the gradient of which kind of meta-parameter.

One table, read by the engine before each estimate and by the recipe's rules before anything starts: hence
no torch here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

from metaloom.errors import CapabilityError

Kind = Literal["init", "backbone", "rates", "loss"]
KINDS: tuple[Kind, ...] = get_args(Kind)
KIND_NAMES: Mapping[Kind, str] = {
    "init": "the initialisation",
    "backbone": "the backbone",
    "rates": "learned inner rates",
    "loss": "loss parameters",
}
# Norms of each inner step, of kind backbone: tasks share them.
PER_STEP = "backbone.per_step."
# What is counted in training beside what is learned, and has no gradient.
TRACKED = "tracked."


@dataclasses.dataclass(frozen=True)
class Capability:
    """How well an estimator gives the gradient of one kind of meta-parameter.

    Attributes:
        degree: `exact` (to rounding), `approximate`, or `refused`.
        because: what is left out, or why there is nothing to give; empty where exact.
        needs_proximal: given only where the inner rule has a proximal term.
    """

    degree: Literal["exact", "approximate", "refused"]
    because: str = ""
    needs_proximal: bool = False


@dataclasses.dataclass(frozen=True)
class Estimator:
    """One row of the table.

    Attributes:
        of: its capability by kind.
        end_only: it looks at the fully adapted weights alone, so that a meta-loss with terms at earlier
            inner steps (`step_weights` other than `last`) is refused.
        ignores_meta_loss: it does not look at the meta-loss at all, so that rehearsal in it is refused.
    """

    of: Mapping[Kind, Capability]
    end_only: bool = False
    ignores_meta_loss: bool = False


def _same(capability: Capability) -> dict[Kind, Capability]:
    return dict.fromkeys(KINDS, capability)


_EXACT = Estimator(_same(Capability("exact")))
_REPTILE_REFUSAL = Capability(
    "refused", "it moves the initialisation towards the adapted weights and differentiates nothing"
)

ESTIMATORS: Mapping[str, Estimator] = {
    "unrolled": _EXACT,
    "rematerialized": _EXACT,
    "mixed_mode": _EXACT,
    "auto": _EXACT,
    "first_order": Estimator(
        {
            "init": Capability("approximate", "the inner gradients count as constants"),
            "backbone": Capability("approximate", "the query losses' own part alone"),
            "rates": Capability("approximate", "a rate's effect on later inner gradients is left out"),
            "loss": Capability(
                "refused",
                "loss parameters act through the inner gradients alone, which it holds constant",
            ),
        }
    ),
    "truncated": Estimator(_same(Capability("approximate", "earlier inner steps count as the identity"))),
    "implicit": Estimator(
        {
            "init": Capability(
                "approximate",
                "through the proximal term alone, as if adaptation ended in a minimum",
                needs_proximal=True,
            ),
            "backbone": Capability("approximate", "as if adaptation ended in a minimum"),
            "rates": Capability("refused", "a minimum does not depend on the rates that led to it"),
            "loss": Capability("approximate", "as if adaptation ended in a minimum"),
        },
        end_only=True,
    ),
    "finite_difference": Estimator(
        {
            "init": Capability("approximate", "adaptation counts as the identity"),
            "backbone": Capability("approximate", "the query losses' own part and the last inner step's"),
            "rates": Capability(
                "refused", "where its last step has come to rest, the rates no longer have an effect"
            ),
            "loss": Capability("approximate", "the last inner step's part"),
        },
        end_only=True,
    ),
    "reptile": Estimator(
        {
            "init": Capability("approximate", "the way from the adapted weights back, not a gradient"),
            "backbone": _REPTILE_REFUSAL,
            "rates": _REPTILE_REFUSAL,
            "loss": _REPTILE_REFUSAL,
        },
        end_only=True,
        ignores_meta_loss=True,
    ),
}


def kind_of(name: str) -> Kind:
    """The kind of a meta-parameter, which its name begins with: `init.head.weight` is of kind `init`.

    Raises:
        CapabilityError: the name begins with no kind.
    """
    for kind in KINDS:
        if name.startswith(f"{kind}."):
            return kind
    prefixes = ", ".join(f"'{kind}.'" for kind in KINDS)
    raise CapabilityError(f"meta-parameter {name!r} is of no kind; a name begins with one of {prefixes}.")


def givers(kind: Kind) -> list[str]:
    """The estimators that give the gradient of a kind."""
    return [name for name, row in ESTIMATORS.items() if row.of[kind].degree != "refused"]


def refusals(estimator: str, kinds: Iterable[Kind], *, has_proximal: bool) -> list[str]:
    """What an estimator cannot give of what is learned: for each such kind why, and which ones can.

    Args:
        estimator: a name in `ESTIMATORS`.
        kinds: the kinds of what is learned.
        has_proximal: whether the inner rule has a proximal term.
    """
    problems = []
    for kind in kinds:
        capability = ESTIMATORS[estimator].of[kind]
        if capability.degree == "refused":
            problems.append(
                f"{estimator} gives no gradient of {KIND_NAMES[kind]}: {capability.because}; "
                f"{', '.join(givers(kind))} do"
            )
        elif capability.needs_proximal and not has_proximal:
            others = ", ".join(name for name in givers(kind) if name != estimator)
            problems.append(
                f"{estimator} gives the gradient of {KIND_NAMES[kind]} through the proximal term alone, and "
                f"the inner rule has none; give it one (proximal above 0), or take one of {others}"
            )
    return problems


def step_weights_refusal(estimator: str) -> str | None:
    """Why an estimator takes no meta-loss with terms at earlier inner steps; None where it does."""
    if not ESTIMATORS[estimator].end_only:
        return None
    return (
        f"{estimator} looks at the fully adapted weights alone, so the query loss counts after the last "
        "inner step only; set step_weights to last"
    )


def outer_rehearsal_refusal(estimator: str) -> str | None:
    """Why an estimator takes no rehearsal in the meta-loss; None where it does."""
    if not ESTIMATORS[estimator].ignores_meta_loss:
        return None
    others = ", ".join(name for name, row in ESTIMATORS.items() if not row.ignores_meta_loss)
    return (
        f"{estimator} does not look at the meta-loss, so rehearsal in it has no effect; set outer_ratio to "
        f"0, or take one of {others}"
    )


def require(
    estimator: str,
    names: Iterable[str],
    *,
    has_proximal: bool,
    end_only: bool,
    rehearses_outside: bool = False,
) -> None:
    """Passes where an estimator gives the gradient of every meta-parameter named.

    Args:
        names: of the meta-parameters.
        has_proximal: whether the inner rule has a proximal term.
        end_only: whether the meta-loss is that after the last inner step alone.
        rehearses_outside: whether the meta-loss has rehearsal in it.

    Raises:
        CapabilityError: it does not; names estimator, kinds, reasons, and estimators that do. Or the
            estimator has no row in the table.
    """
    if estimator not in ESTIMATORS:
        raise CapabilityError(
            f"the estimator {estimator!r} has no row in metaloom.engine.capabilities, which says what each "
            f"one gives; add it (there are {', '.join(ESTIMATORS)})."
        )
    kinds = {kind_of(name): None for name in names}
    problems = refusals(estimator, kinds, has_proximal=has_proximal)
    refusal = None if end_only else step_weights_refusal(estimator)
    if refusal is not None:
        problems.append(refusal)
    refusal = outer_rehearsal_refusal(estimator) if rehearses_outside else None
    if refusal is not None:
        problems.append(refusal)
    if problems:
        raise CapabilityError(". ".join(problems) + ".")
