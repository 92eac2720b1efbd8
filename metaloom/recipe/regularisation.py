"""The sections of a recipe that keep the outer loop from learning the training tasks by heart."""

from typing import Annotated, Literal

from pydantic import Field

from metaloom.recipe.base import Count, PositiveFloat, Section


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


class ActivationsRegularisation(Section):
    """A stochastic layer that pays for what it tells of query inputs (MR-MAML (A): Yin et al. 2020)."""

    kind: Literal["activations"] = Field(
        default="activations",
        description="the model (mlp or conv4) has a stochastic layer, and what it tells of a query input has "
        "its price; what is adapted should lie behind it",
    )
    beta: PositiveFloat = Field(default=1e-3, description="price of a nat, per query example")
    width: Count = Field(default=5, description="units of the stochastic layer")
    after: Count | None = Field(
        default=None,
        description="hidden layers before it (mlp; conv4 has it before the head); null for all of them",
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


Regularisation = (
    WeightsRegularisation | ActivationsRegularisation | EntropyRegularisation | InequalityRegularisation
)
