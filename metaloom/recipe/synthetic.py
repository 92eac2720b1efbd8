"""The sections of a recipe for tasks that are computed, not read: the problems of the literature."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from metaloom.recipe.base import Count, FloatOrZero, PositiveFloat, Section

NumTasks = Annotated[int, Field(ge=1, le=10_000_000)]


class SinusoidTask(Section):
    """Sinusoids of random amplitude and phase (Finn et al. 2017, section 5.1)."""

    kind: Literal["sinusoid"] = Field(
        default="sinusoid", description="sinusoids of random amplitude and phase (Finn et al. 2017)"
    )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of an input: x."""
        return (1,)

    @property
    def num_targets(self) -> int:
        """Numbers of a target: y."""
        return 1


class NonExclusiveSinusoidTask(Section):
    """Sinusoids whose input tells the amplitude, so that training tasks can be memorised (Yin et al. 2020,
    section 6.1)."""

    kind: Literal["sinusoid_non_exclusive"] = Field(
        default="sinusoid_non_exclusive",
        description="sinusoids whose input tells the amplitude: training tasks can be memorised "
        "(Yin et al. 2020)",
    )
    num_amplitudes: int = Field(
        default=20, ge=2, description="amplitudes of training tasks: equally spaced from 0.1 to 4"
    )
    noise_std: FloatOrZero = Field(
        default=0.1, description="standard deviation of the noise of the targets; 0 for none"
    )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of an input: x, and which amplitude."""
        return (1 + self.num_amplitudes,)

    @property
    def num_targets(self) -> int:
        """Numbers of a target: y."""
        return 1


class Equivariant1dTask(Section):
    """A linear layer with the symmetry of shifts, in full or in part (Zhou et al. 2021, section 5.1)."""

    kind: Literal["equivariant_1d"] = Field(
        default="equivariant_1d",
        description="linear layers with the symmetry of shifts, in full or in part (Zhou et al. 2021)",
    )
    rank: Count = Field(
        default=1,
        description="filters that the one of each position is mixed of: 1 for a convolution; 2 and 5 in the "
        "paper for symmetries that hold in part",
    )
    length: Count = Field(default=70, description="numbers of an input")
    filter_size: Count = Field(default=3, description="neighbouring numbers that an output depends on")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of an input."""
        return (self.length,)

    @property
    def num_targets(self) -> int:
        """Numbers of a target: the places where a filter fits."""
        return self.length - self.filter_size + 1


class Equivariant2dTask(Section):
    """A convolution with the symmetry of rotations, and of flips (Zhou et al. 2021, section 5.2)."""

    kind: Literal["equivariant_2d"] = Field(
        default="equivariant_2d",
        description="convolutions of images with the symmetry of rotations, and of flips (Zhou et al. 2021)",
    )
    turns: Literal[4, 8] = Field(
        default=4,
        description="rotations to a full one: 4, by 90 degrees, exact on a grid, of filters of any numbers; "
        "8, by 45 degrees as in the paper, of 3 x 3 filters of six numbers",
    )
    flips: bool = Field(default=False, description="whether flips are a symmetry, too")
    size: Count = Field(default=32, description="height and width of an input")
    num_filters: Count = Field(
        default=3,
        description="filters, each in as many orientations as there are turns, with flips twice as many: so "
        "many channels each",
    )
    filter_size: Count = Field(default=3, description="height and width of a filter")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of an input: channels, height, width."""
        return (1, self.size, self.size)

    @property
    def num_targets(self) -> int:
        """Numbers of a target: channels and the places where a filter fits."""
        side = self.size - self.filter_size + 1
        return self.num_filters * self.turns * (2 if self.flips else 1) * side * side


class UnequalScalesTask(Section):
    """A few regressions of the same inputs, large and small (Chen et al. 2018, section 4)."""

    kind: Literal["unequal_scales"] = Field(
        default="unequal_scales",
        description="a few regressions of the same inputs that have much in common and are of unequal size "
        "(Chen et al. 2018): each is a group",
    )
    scales: Annotated[tuple[PositiveFloat, ...], Field(min_length=2)] = Field(
        default=(1.0, 100.0), description="of each regression's targets"
    )
    length: Count = Field(default=250, description="numbers of an input")
    num_targets: Count = Field(default=100, description="numbers of a target")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of an input."""
        return (self.length,)

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of the regressions: by their scales, and where these repeat by their numbers too."""
        names = [f"scale {scale:g}" for scale in self.scales]
        if len(set(names)) < len(names):
            names = [f"{number}, {name}" for number, name in enumerate(names, start=1)]
        return tuple(names)


SyntheticTask = (
    SinusoidTask | NonExclusiveSinusoidTask | Equivariant1dTask | Equivariant2dTask | UnequalScalesTask
)


def _of_the_paper(of_sinusoids: Any, of_symmetries: Any, of_flips: Any) -> Callable[[dict[str, Any]], Any]:
    """A default that depends on the task."""

    def default(values: dict[str, Any]) -> Any:
        match values.get("task"):
            case Equivariant2dTask(flips=True):
                return of_flips
            case Equivariant1dTask() | Equivariant2dTask():
                return of_symmetries
            case _:  # also of a recipe with mistakes
                return of_sinusoids

    return default


class SyntheticData(Section):
    """Tasks that are computed from their numbers: no files are read."""

    kind: Literal["synthetic"] = Field(
        default="synthetic", description="tasks that are computed, without any files: regression"
    )
    task: SyntheticTask = Field(discriminator="kind", description="what is to be learned")
    num_support: Count = Field(
        default_factory=_of_the_paper(10, 1, 1),
        description="support examples per task; left out, those of the paper: 10 of sinusoids, 1 of "
        "equivariant_1d and equivariant_2d",
    )
    num_query: Count = Field(
        default_factory=_of_the_paper(10, 19, 19),
        description="query examples per task; left out, those of the paper: 10 of sinusoids, 19 of "
        "equivariant_1d and equivariant_2d",
    )
    num_train_tasks: NumTasks | None = Field(
        default_factory=_of_the_paper(None, 8000, 1600),
        description="training tasks, each with num_support + num_query examples for good; null for new ones "
        "without end; left out, those of the paper: null of sinusoids, 8000 of equivariant_1d and "
        "equivariant_2d, 1600 with flips",
    )
    num_validation_tasks: NumTasks | None = Field(
        default=None, description="validation tasks, likewise; null for new ones without end"
    )
    num_test_tasks: NumTasks | None = Field(
        default_factory=_of_the_paper(None, 2000, 400),
        description="test tasks, likewise; left out, those of the paper: null of sinusoids, 2000 of "
        "equivariant_1d and equivariant_2d, 400 with flips",
    )
    task_noise: PositiveFloat | None = Field(
        default=None,
        description="standard deviation of a random number that is added to all targets of a training task, "
        "a number for each of a target's (meta-augmentation); null for none",
    )

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that tasks are of, one after the other; none where they have no group."""
        return self.task.groups if isinstance(self.task, UnequalScalesTask) else ()
