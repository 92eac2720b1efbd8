"""What keeps training tasks from being learned by heart, around an algorithm or in its meta-loss."""

from __future__ import annotations

from metaloom.engine.algorithms.base import Algorithm
from metaloom.engine.algorithms.inequality import Inequality
from metaloom.engine.algorithms.maml import Maml
from metaloom.engine.algorithms.posterior import Posterior
from metaloom.engine.inequality import Measure
from metaloom.engine.terms import EntropyReduction, MetaTerm
from metaloom.recipe import (
    ActivationsRegularisation,
    EntropyRegularisation,
    InequalityRegularisation,
    Recipe,
    WeightsRegularisation,
)


def regularised(recipe: Recipe, algorithm: Algorithm) -> Algorithm:
    """An algorithm under the recipe's regularisation; terms of its own it has already."""
    match recipe.regularisation:
        case WeightsRegularisation() as section:
            return Posterior(
                algorithm,
                tuple(f"{kind}." for kind in section.kinds),
                section.beta,
                initial_std=section.initial_std,
                prior_std=section.prior_std,
                samples=section.samples,
                seed=recipe.seed,
            )
        case InequalityRegularisation() as section:
            assert isinstance(algorithm, Maml), "a rule of the recipe has seen to it"
            alpha = 1.0 if section.alpha is None else section.alpha
            return Inequality(algorithm, Measure(section.measure, alpha), section.weight)
    return algorithm


def nat_price(recipe: Recipe) -> float | None:
    """What a nat costs that a stochastic layer tells; None where there is none."""
    section = recipe.regularisation
    return section.beta if isinstance(section, ActivationsRegularisation) else None


def meta_terms(recipe: Recipe) -> tuple[MetaTerm, ...]:
    """What the recipe adds to the meta-loss of each task."""
    section = recipe.regularisation
    return (EntropyReduction(section.weight),) if isinstance(section, EntropyRegularisation) else ()
