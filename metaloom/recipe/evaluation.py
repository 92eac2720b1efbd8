"""The sections of a recipe that say how results are measured, beside what, and what is recorded."""

from typing import Annotated, Literal

from pydantic import Field

from metaloom.recipe.base import Count, FloatOrZero, PositiveFloat, Section, Text

BestBy = Literal["loss", "accuracy", "worst_group_loss", "worst_group_accuracy"]


class EarlyStopping(Section):
    """Stop when validations no longer improve."""

    patience: Count = Field(description="validations in a row without improvement after which the run stops")
    min_delta: FloatOrZero = Field(
        default=0.0,
        description="smallest improvement that counts, in the unit of what validation.best_by names",
    )


class Validation(Section):
    """Episodes of the validation split, during training."""

    every_steps: Count | None = Field(
        default=None, description="outer steps between validations; null for none"
    )
    num_episodes: Count = Field(default=100, description="episodes per validation")
    best_by: BestBy = Field(
        default="loss",
        description="what says which validation is the best: of all episodes, or of the group where it is "
        "worst. An evaluation takes the best step; its checkpoint is kept",
    )
    early_stopping: EarlyStopping | None = Field(
        default=None, description="when to stop early; null for never"
    )


class Tuning(Section):
    """Choice of each baseline's inner learning rate on validation episodes."""

    rate_factors: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = Field(
        default=(0.1, 0.3, 1.0, 3.0, 10.0),
        description="inner rates tried, as multiples of adaptation.rule.lr",
    )
    num_episodes: Count = Field(default=50, description="validation episodes per rate tried")


class OrdinaryTraining(Section):
    """Ordinary (not meta-) training of the same model, for the baselines."""

    lr: PositiveFloat = Field(default=1e-3, description="peak learning rate of AdamW")
    batch_size: Count = Field(default=64, description="examples or sequences per step")
    weight_decay: FloatOrZero = Field(
        default=0.0, description="decoupled weight decay, per unit of learning rate"
    )


Baseline = Literal[
    "random",
    "ordinary_equal_data",
    "ordinary_equal_compute",
    "pretrained",
    "linear_probe",
    "fine_tuned",
    "in_context",
    "in_context_equal_data",
    "in_context_equal_compute",
]


class Evaluation(Section):
    """Episodes of the test split, after training, against baselines."""

    num_episodes: Count = Field(default=600, description="test episodes")
    num_steps: Count | None = Field(default=None, description="inner steps; null for adaptation.num_steps")
    tuning: Tuning = Field(default=Tuning(), description="choice of the inner learning rate")
    baselines: tuple[Baseline, ...] | None = Field(
        default=None,
        description="what to compare with: random (untrained weights), ordinary_equal_data, "
        "ordinary_equal_compute (ordinary training with as much data, or compute), pretrained (before "
        "meta-training; needs pretrain); null for all of these that apply, [] for none. Where named, also "
        "linear_probe and fine_tuned (pretrained, or ordinary_equal_data where there is no pretrain, which "
        "adapts its head alone, or all weights, whatever adaptation.fast is), and of documents "
        "in_context (the weights before meta-training, with support sequences in front of each query and no "
        "adaptation), in_context_equal_data, in_context_equal_compute (the same after ordinary training)",
    )
    ordinary: OrdinaryTraining = Field(
        default=OrdinaryTraining(), description="ordinary training of the baselines"
    )
    stream: bool = Field(
        default=False,
        description="whether each test group is also gone through as a stream: its inputs come one after "
        "another, and each is predicted by what was seen, unlabelled, before it",
    )


class Checkpoint(Section):
    """When checkpoints are written, besides the one at the end."""

    every_steps: Count | None = Field(
        default=None, description="outer steps between checkpoints; null: not by steps"
    )
    every_minutes: PositiveFloat | None = Field(
        default=10.0, description="minutes between checkpoints; null: not by time"
    )
    url: Text | None = Field(
        default=None,
        description="path or fsspec URL that checkpoints are written to (s3://bucket/name), without "
        "credentials, of this run alone; null for the run folder",
    )
    keep_last: Count = Field(default=2, description="newest checkpoints that are kept")
    keep_every: Count | None = Field(
        default=None,
        description="checkpoints of outer steps that are multiples of it are kept too; null: none",
    )
    keep_best: Count = Field(
        default=1, description="checkpoints that are kept too, of those that validation.best_by says are best"
    )
    patience_minutes: PositiveFloat = Field(
        default=60.0,
        description="how long a run goes on when checkpoints cannot be written; it tries again all the while",
    )


class MLflowTracking(Section):
    """Parameters, metrics and artifacts in an MLflow store."""

    kind: Literal["mlflow"] = Field(default="mlflow", description="record the run with MLflow")
    uri: Text | None = Field(
        default=None,
        description="tracking URI, without credentials (those are in "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD); null for MLFLOW_TRACKING_URI where set, "
        "else a SQLite file in the run folder",
    )
    experiment: Text = Field(default="metaloom", description="name of the MLflow experiment")


class NoTracking(Section):
    """No tracking store; the run folder still has its own record."""

    kind: Literal["none"] = Field(default="none", description="no tracking store")
