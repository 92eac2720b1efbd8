"""A recipe: everything that a run is made of, typed, immutable and described.

Each section is one class, of the modules beside this one. Where a section comes in several kinds, its key
`kind` names the class. A class states the type and range of each value; what relates several values to
each other is in `rules`, so that every broken rule can be reported at once.
"""

from typing import Literal

from pydantic import Field

from metaloom.errors import CapabilityError
from metaloom.recipe.adaptation import Adaptation, WholeFast
from metaloom.recipe.algorithm import (
    Algorithm,
    MAMLAlgorithm,
    UnlabelledAlgorithm,
)
from metaloom.recipe.base import Section
from metaloom.recipe.data import (
    ClassesData,
    DocumentsData,
    EpisodesData,
    GroupsData,
    Loading,
    MixtureData,
)
from metaloom.recipe.evaluation import (
    Baseline,
    Checkpoint,
    Evaluation,
    MLflowTracking,
    NoTracking,
    Validation,
)
from metaloom.recipe.machine import (
    DeepSpeedZeroSharding,
    LocalLauncher,
    Memory,
    Precision,
    ReplicatedSharding,
    ShardedSharding,
)
from metaloom.recipe.model import (
    Conv4Model,
    CustomModel,
    GPTModel,
    HuggingFaceModel,
    MLPModel,
    Pretrain,
    SingleLayerModel,
)
from metaloom.recipe.outer import Outer
from metaloom.recipe.regularisation import Regularisation
from metaloom.recipe.synthetic import SyntheticData


class Recipe(Section):
    """Everything that a run is made of; `load_recipe` and `recipe_from_dict` make it and check its rules."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        max_length=100,
        description="name of the run: letters, digits, '-', '_' and '.', the first a letter or digit",
    )
    seed: int = Field(
        default=0, ge=0, le=2**32 - 1, description="every random draw of the run follows from it"
    )
    model: Conv4Model | MLPModel | SingleLayerModel | GPTModel | HuggingFaceModel | CustomModel = Field(
        discriminator="kind", description="the network"
    )
    data: ClassesData | GroupsData | DocumentsData | EpisodesData | SyntheticData | MixtureData = Field(
        discriminator="kind", description="where the tasks come from"
    )
    loading: Loading = Field(default=Loading(), description="how data are read")
    pretrain: Pretrain | None = Field(
        default=None,
        description="ordinary training of the backbone before meta-training (gpt only); null for none",
    )
    adaptation: Adaptation = Field(description="how the model adapts to one task: the inner loop")
    algorithm: Algorithm = Field(
        default=MAMLAlgorithm(),
        discriminator="kind",
        description="how the outer loop learns from tasks; where its adaptation takes no steps, the section "
        "adaptation is for the baselines",
    )
    regularisation: Regularisation | None = Field(
        default=None,
        discriminator="kind",
        description="what keeps the training tasks from being learned by heart; null for nothing",
    )
    outer: Outer = Field(description="the outer loop")
    precision: Precision = Field(default=Precision(), description="number formats")
    memory: Memory = Field(default=Memory(), description="what is kept and what is computed again")
    sharding: ReplicatedSharding | ShardedSharding | DeepSpeedZeroSharding = Field(
        default=ReplicatedSharding(),
        discriminator="kind",
        description="how the meta-parameters lie on the ranks",
    )
    launcher: LocalLauncher = Field(default=LocalLauncher(), description="how the ranks are started")
    validation: Validation = Field(default=Validation(), description="validation during training")
    evaluation: Evaluation = Field(default=Evaluation(), description="evaluation after training")
    checkpoint: Checkpoint = Field(default=Checkpoint(), description="when checkpoints are written")
    tracking: MLflowTracking | NoTracking = Field(
        default=MLflowTracking(), discriminator="kind", description="where the run is recorded"
    )

    @property
    def maml(self) -> MAMLAlgorithm | None:
        """The algorithm, where it adapts by inner steps; None where it takes none."""
        return self.algorithm if isinstance(self.algorithm, MAMLAlgorithm) else None

    @property
    def task_ways(self) -> tuple[Literal["loop", "vmap"], ...]:
        """How tasks may be put side by side where each has whole weights; of several, the faster is taken."""
        fast = self.adaptation.fast
        if not isinstance(fast, WholeFast) or self.maml is None:
            return ("loop",)
        if fast.tasks != "auto":
            return (fast.tasks,)
        is_counted = self.adaptation.norms.statistics == "per_step"  # which vmap cannot
        return ("loop",) if is_counted else ("loop", "vmap")

    @property
    def adapts_without_labels(self) -> bool:
        """Whether the labels of support data have no part in adaptation."""
        if isinstance(self.algorithm, MAMLAlgorithm):
            return self.adaptation.learned_loss is not None
        return isinstance(self.algorithm, UnlabelledAlgorithm)

    @property
    def evaluation_num_steps(self) -> int:
        """Inner steps at evaluation: evaluation.num_steps, or adaptation.num_steps where that is null."""
        return self.evaluation.num_steps or self.adaptation.num_steps

    @property
    def baselines(self) -> tuple[Baseline, ...]:
        """The baselines to evaluate: evaluation.baselines, or all that apply where that is null. They adapt
        to labelled support data: where these have no labels, none applies."""
        if self.evaluation.baselines is not None:
            return self.evaluation.baselines
        if self.adapts_without_labels:
            return ()
        always: tuple[Baseline, ...] = ("random", "ordinary_equal_data", "ordinary_equal_compute")
        return always if self.pretrain is None else (*always, "pretrained")

    @property
    def transferred(self) -> Baseline:
        """The baseline whose weights linear_probe and fine_tuned adapt in ways of their own."""
        return "ordinary_equal_data" if self.pretrain is None else "pretrained"


def maml_of(recipe: Recipe) -> MAMLAlgorithm:
    """The algorithm of a recipe that adapts by inner steps.

    Raises:
        CapabilityError: it takes none.
    """
    if recipe.maml is None:
        raise CapabilityError(
            f"algorithm.kind: {recipe.algorithm.kind} adapts without inner steps, and `metaloom plan` and "
            "`metaloom check` look at gradients through inner steps: its gradient is plain back-propagation; "
            "train it with `metaloom train`."
        )
    return recipe.maml
