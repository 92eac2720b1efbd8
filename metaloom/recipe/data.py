"""The sections of a recipe that say where tasks come from, what they are, and how data are read."""

from typing import Annotated, Literal

from pydantic import Field

from metaloom.recipe.base import BelowOne, Count, CountOrZero, PositiveFloat, Section, Text
from metaloom.recipe.synthetic import SyntheticData

Url = Annotated[Text, Field(description="folder or fsspec URL of the shards")]


# ---------------------------------------------------------------- what a model is shown


class ImageInputs(Section):
    """Images (png, jpg, webp), resized to a square."""

    kind: Literal["image"] = Field(default="image", description="images: png, jpg or webp")
    size: int = Field(
        default=28, ge=4, le=4096, description="height and width that a model is shown, in pixels"
    )
    channels: Literal[1, 3] = Field(default=1, description="1 for grey, 3 for colour")


class ArrayInputs(Section):
    """Arrays of numbers (npy)."""

    kind: Literal["array"] = Field(default="array", description="arrays of numbers: npy")
    shape: Annotated[tuple[Count, ...], Field(min_length=1)] = Field(description="shape of one sample")


class TextInputs(Section):
    """Texts, as bytes or tokens, cut to a length."""

    kind: Literal["text"] = Field(default="text", description="texts: txt, read as bytes, or tokens.npy")
    length: int = Field(default=128, ge=2, description="tokens of a text; at most model.context_length")


Inputs = Annotated[
    ImageInputs | ArrayInputs | TextInputs,
    Field(discriminator="kind", description="what a model is shown of a sample"),
]


# ---------------------------------------------------------------- what it shall say


class ClassTargets(Section):
    """Classes that mean the same in all tasks (cls)."""

    kind: Literal["class"] = Field(default="class", description="classes that mean the same in all tasks")
    num_classes: int = Field(ge=2, description="how many there are")


class NumberTargets(Section):
    """Numbers to come close to (target.npy): regression by mean squared error."""

    kind: Literal["number"] = Field(default="number", description="numbers: regression by mean squared error")
    num_targets: Count = Field(default=1, description="how many numbers per sample")
    task_noise: PositiveFloat | None = Field(
        default=None,
        description="standard deviation of a random number that is added to all targets of a training task "
        "(meta-augmentation); null for none",
    )


class TokenTargets(Section):
    """The next token of a text: language modelling."""

    kind: Literal["next_token"] = Field(default="next_token", description="the next token of a text")


Targets = Annotated[
    ClassTargets | NumberTargets,
    Field(discriminator="kind", description="what a model shall say of a sample"),
]


# ---------------------------------------------------------------- augmentation


class Affine(Section):
    """Random affine change of each image; every range is symmetric about no change."""

    rotate_deg: float = Field(default=0.0, ge=0, le=180, description="largest rotation, in degrees")
    shear_deg: float = Field(default=0.0, ge=0, le=45, description="largest shear, in degrees")
    scale: BelowOne = Field(
        default=0.0, description="largest relative change of size (0.1: 0.9 to 1.1 times)"
    )
    shift_px: float = Field(
        default=0.0, ge=0, le=1024, description="largest shift along each side, in pixels"
    )


# ---------------------------------------------------------------- tasks


class Variable(Section):
    """Ways and shots that differ between tasks, as in Meta-Dataset (Triantafillou et al. 2020)."""

    min_way: int = Field(default=5, ge=2, description="fewest classes per task")
    max_way: int = Field(default=50, ge=2, description="most classes per task")
    max_support: Count = Field(default=500, description="most support examples per task")
    max_shot: Count = Field(default=100, description="most support examples that a class is planned with")
    max_query: Count = Field(default=10, description="most query examples per class")


class Window(Section):
    """Few classes at a time, for data that are larger than caches."""

    num_classes: int = Field(
        ge=2, description="classes that one of the 64 virtual streams draws from at a time"
    )
    num_episodes: Count = Field(
        default=64, description="tasks of a virtual stream until it goes on to other classes"
    )


class ClassesData(Section):
    """Few-shot classification: classes, samples and labels are drawn for every task."""

    kind: Literal["classes"] = Field(
        default="classes", description="class-grouped shards: classes are drawn for every task"
    )
    url: Url
    inputs: Inputs = ImageInputs()
    n_way: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="classes per task; null with data.variable"
    )
    n_shot: Count | None = Field(
        default=None, description="support examples per class; null with data.variable"
    )
    n_query: Count | None = Field(
        default=None, description="query examples per class; null with data.variable"
    )
    variable: Variable | None = Field(
        default=None, description="ways and shots that differ between tasks; null for n_way, n_shot, n_query"
    )
    labels: Literal["shuffled", "kept"] = Field(
        default="shuffled",
        description="shuffled: a class has another label in every task; kept: the same for good, so that "
        "tasks are not mutually exclusive and can be memorised",
    )
    window: Window | None = Field(
        default=None, description="few classes at a time, for large remote data; null for all classes"
    )
    affine: Affine | None = Field(
        default=None, description="random affine change of each image; null for none"
    )
    query_affine: Affine | None = Field(
        default=None,
        description="further random change of query images in training (meta-augmentation); null for none",
    )


class GroupsData(Section):
    """A task is a user, a domain, a corruption; targets mean the same in all tasks."""

    kind: Literal["groups"] = Field(
        default="groups", description="samples of one group (user, domain, corruption) per task"
    )
    url: Url
    inputs: Inputs
    targets: Targets
    num_support: Count = Field(description="support examples per task")
    num_query: Count | None = Field(
        default=None, description="query examples per task; null with query_is_support"
    )
    query_is_support: bool = Field(
        default=False,
        description="whether a task's query examples are its support examples: for methods that adapt to the "
        "inputs that they then predict, without their labels",
    )
    drawn_by: Literal["group", "sample"] = Field(
        default="group",
        description="which groups training tasks are of: group (each equally often) or sample (as often as a "
        "group has samples)",
    )


class DocumentsData(Section):
    """Next-token prediction on one document per task."""

    kind: Literal["documents"] = Field(
        default="documents", description="next-token prediction on one document per task"
    )
    url: Url
    num_support: Count = Field(default=8, description="support sequences per task")
    num_query: Count = Field(default=8, description="query sequences per task")
    sequence_length: int = Field(
        default=128, ge=2, description="tokens per sequence; at most model.context_length"
    )


class EpisodesData(Section):
    """Tasks that were made before: support, query and metadata together."""

    kind: Literal["episodes"] = Field(default="episodes", description="ready episodes, one per sample")
    url: Url
    inputs: Inputs
    targets: ClassTargets | NumberTargets | TokenTargets = Field(
        discriminator="kind", description="what a model shall say of an example"
    )
    num_support: Count = Field(description="support examples per task; the most, where ragged")
    num_query: Count = Field(description="query examples per task; the most, where ragged")
    ragged: bool = Field(
        default=False, description="whether tasks may have fewer examples; else such a task is broken"
    )


class Part(Section):
    """One of several data sets."""

    weight: PositiveFloat = Field(
        default=1.0, description="share of the tasks, beside the other parts' weights"
    )
    data: ClassesData | GroupsData | DocumentsData | EpisodesData | SyntheticData = Field(
        discriminator="kind", description="the data set"
    )


class MixtureData(Section):
    """Tasks of several data sets, each with its share."""

    kind: Literal["mixture"] = Field(default="mixture", description="several data sets, with weights")
    parts: Annotated[tuple[Part, ...], Field(min_length=2)] = Field(description="the data sets")


# ---------------------------------------------------------------- rehearsal


class DocumentsRehearsal(Section):
    """Random stretches of texts, by next-token prediction."""

    kind: Literal["documents"] = Field(default="documents", description="texts, by next-token prediction")
    url: Url
    split: Text = Field(default="train", description="split of the data")
    sequence_length: int = Field(
        default=128, ge=2, description="tokens per sample; at most model.context_length"
    )


class ClassesRehearsal(Section):
    """Samples of all classes of a split, by classification with a head of their own."""

    kind: Literal["classes"] = Field(
        default="classes", description="samples of all classes, by classification with a head of their own"
    )
    url: Url
    split: Text = Field(default="train", description="split of the data")
    num_classes: int = Field(ge=2, description="classes of that split")
    inputs: Inputs = ImageInputs()


RehearsalData = DocumentsRehearsal | ClassesRehearsal


# ---------------------------------------------------------------- reading


class Loading(Section):
    """How data are read: what tasks are drawn does not depend on it."""

    num_workers: CountOrZero = Field(
        default=0, description="processes per rank that read and decode; 0 for a thread"
    )
    read_ahead: Count = Field(default=2, description="outer steps whose tasks are kept ready")
    max_broken: CountOrZero = Field(
        default=100,
        description="damaged samples that a run may meet, all ranks together, until it stops; each is named "
        "in the run's folder, and another takes its place",
    )
    cache_folder: Text | None = Field(
        default=None,
        description="folder on a local disk that keeps blocks of remote data, for all processes of a host; "
        "null for metaloom's folder of the user's cache",
    )
    cache_gib: Annotated[float, Field(ge=0)] = Field(
        default=20.0, description="most that is kept there, in GiB; 0 for no cache"
    )
    num_connections: Annotated[int, Field(ge=1, le=256)] = Field(
        default=8, description="requests to an object store at once, per process"
    )
    num_attempts: Annotated[int, Field(ge=1, le=100)] = Field(
        default=6, description="attempts at a request before the run stops; pauses between them double"
    )
    timeout_s: PositiveFloat = Field(
        default=60.0, description="longest wait for the answer to one request, in seconds"
    )
