"""The sections of a recipe that say how the meta-parameters are moved: the outer loop."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, WithJsonSchema

from metaloom.recipe.base import BelowOne, Count, CountOrZero, FloatOrZero, Keys, PositiveFloat, Section, Text
from metaloom.recipe.combiner import Combiner, MeanCombiner


class AdamOptimizer(Section):
    """Adam with decoupled weight decay."""

    kind: Literal["adam"] = Field(default="adam", description="Adam with decoupled weight decay")
    lr: PositiveFloat = Field(default=1e-3, description="peak learning rate")
    betas: tuple[BelowOne, BelowOne] = Field(
        default=(0.9, 0.999), description="decay of the first and second moments"
    )
    eps: PositiveFloat = Field(default=1e-8, description="added to the root of the second moment")
    weight_decay: FloatOrZero = Field(
        default=0.0, description="decoupled weight decay, per unit of learning rate"
    )


class SGDOptimizer(Section):
    """Stochastic gradient descent with momentum."""

    kind: Literal["sgd"] = Field(default="sgd", description="stochastic gradient descent")
    lr: PositiveFloat = Field(description="peak learning rate")
    momentum: BelowOne = Field(default=0.0, description="momentum, 0 for none")
    weight_decay: FloatOrZero = Field(default=0.0, description="weight decay added to the gradient")


class Schedule(Section):
    """The outer learning rate over time: linear warm-up, then decay."""

    warmup_steps: CountOrZero = Field(
        default=0, description="outer steps of linear warm-up; fewer than outer.num_steps"
    )
    decay: Literal["cosine", "constant"] = Field(default="cosine", description="course after the warm-up")
    final_ratio: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="learning rate at the end of a cosine decay, as a fraction of the peak",
    )


class Outer(Section):
    """The outer loop: how many tasks and steps, and how theta is updated."""

    num_steps: Count = Field(description="outer steps of the whole run")
    tasks_per_step: Count = Field(description="tasks per outer step, over all ranks")
    micro_batch: Count | None = Field(
        default=None, description="tasks that one rank computes side by side; null for all of its tasks"
    )
    combiner: Combiner = Field(
        default=MeanCombiner(),
        discriminator="kind",
        description="how the tasks' meta-gradients become one",
    )
    optimizer: AdamOptimizer | SGDOptimizer = Field(
        default=AdamOptimizer(), discriminator="kind", description="the outer optimizer"
    )
    lr_rates: PositiveFloat | None = Field(
        default=None,
        description="peak learning rate of learned inner rates, or of their logarithms, as "
        "adaptation.rule.rates.scale has it; null for optimizer.lr",
    )
    lr_loss: PositiveFloat | None = Field(
        default=None,
        description="peak learning rate of learned loss parameters; null for optimizer.lr",
    )
    lr_posterior: PositiveFloat | None = Field(
        default=None,
        description="peak learning rate of the logarithms of standard deviations (regularisation = weights); "
        "null for optimizer.lr",
    )
    lr_parts: Annotated[
        dict[Text, PositiveFloat],
        AfterValidator(Keys),
        WithJsonSchema({"type": "object", "additionalProperties": {"type": "number", "exclusiveMinimum": 0}}),
    ] = Field(
        default_factory=Keys,
        description="peak learning rates of parts of what is learned, by kinds (init, backbone) or patterns "
        "of their names (backbone.*embed*), none of which may be in two; the rest has optimizer.lr",
    )
    schedule: Schedule = Field(default=Schedule(), description="course of the outer learning rate")
    clip_norm: PositiveFloat | None = Field(
        default=None,
        description="largest norm of the meta-gradient, longer ones are scaled down; null for no limit",
    )
    ema: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="decay per outer step of a running average of theta; null for none",
    )

    @property
    def side_by_side(self) -> int | None:
        """Most tasks that one rank computes side by side; None for all of its tasks."""
        return 1 if self.combiner.is_per_task else self.micro_batch
