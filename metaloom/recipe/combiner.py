"""The sections of a recipe that say how the meta-gradients of tasks are combined."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from metaloom.recipe.base import Count, FloatOrZero, PositiveFloat, Section, Text

Of = Annotated[
    tuple[Text, ...],
    Field(
        description="kinds of meta-parameters (init, backbone, rates, loss) or patterns of their names "
        "(init.*.A) that are combined, the others are averaged; empty for all",
    ),
]
LogCosines = Annotated[
    bool,
    Field(
        description="whether the cosines between the tasks' gradients are measured, which takes the storage "
        "of one gradient per task of a rank"
    ),
]


class CombinerSection(Section):
    """What all kinds have."""

    weighs_groups: ClassVar[bool] = False

    @property
    def is_per_task(self) -> bool:
        """Whether single tasks are differentiated, and their gradients stored."""
        return True

    @property
    def combined(self) -> tuple[str, ...]:
        """The kinds and patterns of `of`, where a kind has it; empty for all meta-parameters."""
        return getattr(self, "of", ())

    @property
    def measures_cosines(self) -> bool:
        """Whether cosines are asked for."""
        return getattr(self, "log_cosines", False)


class MeanCombiner(CombinerSection):
    """All tasks alike."""

    kind: Literal["mean"] = Field(default="mean", description="the mean over tasks")
    log_cosines: LogCosines = False

    @property
    def is_per_task(self) -> bool:
        return self.log_cosines


class PCGradCombiner(CombinerSection):
    """Gradient surgery (Yu et al. 2020)."""

    kind: Literal["pcgrad"] = Field(
        default="pcgrad", description="what conflicts with other tasks' gradients is projected away"
    )
    of: Of = ()


class MGDACombiner(CombinerSection):
    """Multiple-gradient descent (Sener and Koltun 2018)."""

    kind: Literal["mgda"] = Field(
        default="mgda", description="the shortest convex combination of the tasks' gradients"
    )
    of: Of = ()


class QFFLCombiner(CombinerSection):
    """Fair resource allocation (Li et al. 2020)."""

    kind: Literal["q_ffl"] = Field(
        default="q_ffl", description="tasks weighed by a power of their meta-loss, the worst ones most"
    )
    q: PositiveFloat = Field(default=1.0, description="the power; the mean as it goes to 0")
    of: Of = ()
    log_cosines: LogCosines = False


class GroupDROCombiner(CombinerSection):
    """Distributionally robust optimisation over groups (Sagawa et al. 2020)."""

    weighs_groups: ClassVar[bool] = True

    kind: Literal["group_dro"] = Field(
        default="group_dro", description="weights of groups that rise exponentially with their losses"
    )
    step_size: PositiveFloat = Field(
        default=0.01, description="what a group's loss raises the logarithm of its weight by, per outer step"
    )
    of: Of = ()
    log_cosines: LogCosines = False


class GradNormCombiner(CombinerSection):
    """Gradient normalisation (Chen et al. 2018)."""

    weighs_groups: ClassVar[bool] = True

    kind: Literal["gradnorm"] = Field(
        default="gradnorm",
        description="weights of groups that even out how fast they train, by the norms of their gradients; "
        "of names what these are taken of",
    )
    alpha: FloatOrZero = Field(
        default=1.5, description="how strongly training rates are evened out; 0 for equal norms"
    )
    lr: PositiveFloat = Field(default=0.025, description="learning rate of the weights' logarithms")
    of: Of = ()


class UncertaintyCombiner(CombinerSection):
    """Homoscedastic uncertainty (Kendall et al. 2018)."""

    weighs_groups: ClassVar[bool] = True

    kind: Literal["uncertainty"] = Field(
        default="uncertainty", description="weights of groups by their learned noise, in a regression's form"
    )
    lr: PositiveFloat = Field(default=0.025, description="learning rate of the log-variances")

    @property
    def is_per_task(self) -> bool:
        return False


class DWACombiner(CombinerSection):
    """Dynamic weight average (Liu et al. 2019)."""

    weighs_groups: ClassVar[bool] = True

    kind: Literal["dwa"] = Field(
        default="dwa", description="weights of groups by how slowly their losses fall"
    )
    temperature: PositiveFloat = Field(default=2.0, description="the higher, the more even the weights")
    num_steps: Count = Field(
        default=50, description="outer steps whose mean loss is compared with that of as many before them"
    )

    @property
    def is_per_task(self) -> bool:
        return False


class UpweightingCombiner(CombinerSection):
    """Inverse frequency."""

    weighs_groups: ClassVar[bool] = True

    kind: Literal["upweighting"] = Field(
        default="upweighting", description="weights of groups by how rarely they came so far"
    )

    @property
    def is_per_task(self) -> bool:
        return False


Combiner = (
    MeanCombiner
    | PCGradCombiner
    | MGDACombiner
    | QFFLCombiner
    | GroupDROCombiner
    | GradNormCombiner
    | UncertaintyCombiner
    | DWACombiner
    | UpweightingCombiner
)
