"""The sections of a recipe whose algorithm fits a linear head to each task's features."""

from typing import Annotated, Literal

from pydantic import Field

from metaloom.recipe.base import Count, PositiveFloat, Section

FeatureChunk = Annotated[
    Count | None,
    Field(
        description="examples of a task whose features are computed at a time, without a graph, and again "
        "with one when they are differentiated: less memory, more time, the same result; null for all at "
        "once",
    ),
]
Regulariser = Annotated[
    PositiveFloat,
    Field(description="lambda of the head's problem; the starting value where it is learned"),
]
Scale = Annotated[
    PositiveFloat,
    Field(description="what the head's outputs are multiplied by; the starting value where it is learned"),
]


class RidgeAlgorithm(Section):
    """Ridge regression on learned features (R2-D2, Bertinetto et al. 2019): classes, or numbers."""

    kind: Literal["ridge"] = Field(
        default="ridge",
        description="a head by ridge regression, in closed form, through which features learn",
    )
    regulariser: Regulariser = 1.0
    scale: Scale = 1.0
    bias: float = Field(
        default=0.0,
        description="added to the head's outputs (regression only); the starting value where it is learned",
    )
    learned: tuple[Literal["regulariser", "scale", "bias"], ...] = Field(
        default=("regulariser", "scale"),
        description="which of these are meta-parameters, beside the weights before the head",
    )
    feature_chunk: FeatureChunk = None


class LogisticAlgorithm(Section):
    """Logistic regressions on learned features, one per class (LR-D2, Bertinetto et al. 2019)."""

    kind: Literal["logistic"] = Field(
        default="logistic",
        description="a head by Newton steps on a logistic regression per class, through which features learn",
    )
    num_steps: Count = Field(default=5, description="Newton steps")
    regulariser: Regulariser = 1.0
    scale: Scale = 1.0
    learned: tuple[Literal["regulariser", "scale"], ...] = Field(
        default=("regulariser", "scale"),
        description="which of these are meta-parameters, beside the weights before the head",
    )
    feature_chunk: FeatureChunk = None


class SVMAlgorithm(Section):
    """A multi-class support vector machine on learned features (MetaOptNet, Lee et al. 2019)."""

    kind: Literal["svm"] = Field(
        default="svm", description="a head by a support vector machine, through which features learn"
    )
    regulariser: PositiveFloat = Field(
        default=10.0,
        description="1 / C, where C is the price of a margin's violation; the starting value where it is "
        "learned",
    )
    scale: Scale = 1.0
    learned: tuple[Literal["regulariser", "scale"], ...] = Field(
        default=("scale",),
        description="which of these are meta-parameters, beside the weights before the head",
    )
    feature_chunk: FeatureChunk = None
