"""The sections of a recipe that keep the outer loop from learning the training tasks by heart."""

from typing import Annotated, Literal

from pydantic import Field

from metaloom.recipe.base import PositiveFloat, Section


class WeightsRegularisation(Section):
    """Gaussian meta-parameters with a price in nats (MR-MAML (W): Yin et al. 2020; over init Bayes by
    backprop: Blundell et al. 2015)."""

    kind: Literal["weights"] = Field(
        default="weights",
        description="meta-parameters are drawn from a learned Gaussian, whose divergence from a fixed one "
        "has its price; evaluation is at their means",
    )
    kinds: Annotated[tuple[Literal["backbone", "init"], ...], Field(min_length=1)] = Field(
        default=("backbone",),
        description="what is drawn: backbone, the weights that tasks share (meta-regularisation), or init, "
        "where adaptation starts (Bayes by backprop)",
    )
    beta: PositiveFloat = Field(default=1e-3, description="price of a nat")
    initial_std: PositiveFloat = Field(
        default=0.01, description="where the standard deviations start; they are learned"
    )
    prior_std: PositiveFloat = Field(default=1.0, description="standard deviation of the fixed Gaussian")
    samples: Literal["per_step", "per_task"] = Field(
        default="per_step",
        description="per_step: one draw for all tasks of an outer step; per_task: one for each, tasks one "
        "after the other",
    )


class EntropyRegularisation(Section):
    """No preference before adaptation, certainty after it (TAML: Jamal and Qi 2019)."""

    kind: Literal["entropy"] = Field(
        default="entropy",
        description="the entropy of predictions is to be high before adaptation and low after it",
    )
    weight: PositiveFloat = Field(description="of the entropies in the meta-loss")


class InequalityRegularisation(Section):
    """A start that is as good for one task as for another (TAML: Jamal and Qi 2019)."""

    kind: Literal["inequality"] = Field(
        default="inequality",
        description="the losses before adaptation of the tasks of an outer step are to be alike",
    )
    weight: PositiveFloat = Field(description="of the measure of inequality in the meta-loss")
    measure: Literal["theil", "generalized_entropy", "atkinson", "gini", "variance_of_logarithms"] = Field(
        default="theil", description="how unequal losses are measured"
    )
    alpha: float | None = Field(
        default=None,
        description="the parameter of generalized_entropy and of atkinson (there above 0); null for 1",
    )


Regularisation = WeightsRegularisation | EntropyRegularisation | InequalityRegularisation
