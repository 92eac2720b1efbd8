"""The sections of a recipe that say how the outer loop learns from adaptations."""

from typing import Annotated, Literal

from pydantic import Field

from metaloom.recipe.base import (
    BelowOne,
    Count,
    CountOrZero,
    FloatOrZero,
    ImportPath,
    Keys,
    Options,
    PositiveFloat,
    Section,
    Text,
)
from metaloom.recipe.heads import FeatureChunk, LogisticAlgorithm, RidgeAlgorithm, SVMAlgorithm


class UnrolledHypergradient(Section):
    """Exact; keeps the graph of all inner steps: memory grows with K."""

    kind: Literal["unrolled"] = Field(
        default="unrolled", description="exact, through the whole graph; memory grows with K"
    )


class RematerializedHypergradient(Section):
    """Exact; one snapshot per inner step, reverse over reverse within one step."""

    kind: Literal["rematerialized"] = Field(
        default="rematerialized", description="exact, one step's graph at a time, reverse over reverse"
    )


class MixedModeHypergradient(Section):
    """Exact; one snapshot per inner step, forward over reverse within one step."""

    kind: Literal["mixed_mode"] = Field(
        default="mixed_mode", description="exact, one step's graph at a time, forward over reverse"
    )


class FirstOrderHypergradient(Section):
    """Drops the second derivatives (FOMAML)."""

    kind: Literal["first_order"] = Field(
        default="first_order", description="approximate: second derivatives are dropped"
    )


class AutoHypergradient(Section):
    """Exact; the fastest of the exact ways on the first tasks, within a limit on memory."""

    kind: Literal["auto"] = Field(
        default="auto",
        description="exact: times rematerialized, mixed_mode and the graph of whole steps on the first "
        "tasks, takes the fastest, and keeps to it",
    )
    limit_gib: PositiveFloat | None = Field(
        default=None,
        description="memory for graphs that are kept, per rank, in GiB; null for half of what is free at the "
        "start",
    )


class TruncatedHypergradient(Section):
    """Back-propagation through the last inner steps alone (Shaban et al. 2019)."""

    kind: Literal["truncated"] = Field(
        default="truncated", description="approximate: the last inner steps alone are differentiated"
    )
    num_steps: Count = Field(description="how many of the last inner steps; at most adaptation.num_steps")
    by: Literal["rematerialized", "mixed_mode"] = Field(
        default="rematerialized", description="how each of those is differentiated"
    )


class ConjugateGradientSolver(Section):
    """Conjugate gradients: fast where the Hessian is positive definite, and tells where it is not."""

    kind: Literal["conjugate_gradient"] = Field(
        default="conjugate_gradient", description="conjugate gradients; stops at negative curvature"
    )
    num_iterations: Count = Field(default=10, description="most Hessian-vector products")
    tolerance: FloatOrZero = Field(
        default=1e-6, description="a task stops at a residual of this, relative to the right-hand side"
    )


class NeumannSolver(Section):
    """The first terms of the Neumann series of the inverse Hessian."""

    kind: Literal["neumann"] = Field(default="neumann", description="terms of the inverse's Neumann series")
    num_terms: Count = Field(default=10, description="terms of the series")
    step_size: PositiveFloat = Field(
        default=0.1, description="of the series; it diverges above 2 / the Hessian's largest eigenvalue"
    )


class ImplicitHypergradient(Section):
    """Takes the adapted weights for a minimum of the inner loss (iMAML, Rajeswaran et al. 2019)."""

    kind: Literal["implicit"] = Field(
        default="implicit",
        description="approximate: as if adaptation ended in a minimum; memory is the same for any K",
    )
    solver: ConjugateGradientSolver | NeumannSolver = Field(
        default=ConjugateGradientSolver(),
        discriminator="kind",
        description="how the linear system with the Hessian is solved",
    )
    damping: FloatOrZero = Field(default=0.0, description="added to the Hessian's diagonal")


class FiniteDifferenceHypergradient(Section):
    """Finite differences of first-order gradients at the adapted weights (SAMA, Choe et al. 2023)."""

    kind: Literal["finite_difference"] = Field(
        default="finite_difference",
        description="approximate: the last inner step alone, by differences of first-order gradients",
    )
    epsilon: PositiveFloat = Field(
        default=0.01,
        description="how far a task's fast weights are moved either way, in their norm, where more than the "
        "initialisation is learned",
    )


class ReptileHypergradient(Section):
    """The way from the adapted weights back to the initialisation (Nichol et al. 2018)."""

    kind: Literal["reptile"] = Field(
        default="reptile", description="no gradient: the initialisation minus the adapted weights"
    )


Hypergradient = (
    UnrolledHypergradient
    | RematerializedHypergradient
    | MixedModeHypergradient
    | AutoHypergradient
    | FirstOrderHypergradient
    | TruncatedHypergradient
    | ImplicitHypergradient
    | FiniteDifferenceHypergradient
    | ReptileHypergradient
)


class MetaParameters(Section):
    """What the outer loop learns, besides the inner rates (see adaptation.rule.learned)."""

    init: bool = Field(default=True, description="learn where the fast weights start")
    backbone: bool | Annotated[tuple[Text, ...], Field(min_length=1)] = Field(
        default=False,
        description="learn the weights that tasks share (only beside an adapter): true for all, or patterns "
        "of the names of those that are learned",
    )


class MAMLAlgorithm(Section):
    """Gradient of the query loss after adaptation (Finn et al. 2017)."""

    kind: Literal["maml"] = Field(default="maml", description="model-agnostic meta-learning")
    hypergradient: Hypergradient = Field(
        default=AutoHypergradient(),
        discriminator="kind",
        description="how the gradient through the adaptation is computed",
    )
    step_weights: Literal["last", "uniform", "annealed"] = Field(
        default="last",
        description="weights of the query losses after each inner step: last (that step's only), uniform "
        "(all alike), or annealed (all alike at first, then more and more the last: MAML++)",
    )
    annealing_steps: Count | None = Field(
        default=None,
        description="outer steps after which annealed weights are those of the last step only; null for half "
        "of outer.num_steps",
    )
    first_order_steps: CountOrZero = Field(
        default=0,
        description="outer steps at the start that drop second derivatives (derivative-order annealing: "
        "MAML++)",
    )
    meta_parameters: MetaParameters = Field(
        default=MetaParameters(), description="what the outer loop learns"
    )


class ProtonetAlgorithm(Section):
    """Nearest class mean of learned features (Snell et al. 2017)."""

    kind: Literal["protonet"] = Field(default="protonet", description="prototypical networks")
    feature_chunk: FeatureChunk = None


class CustomAlgorithm(Section):
    """An algorithm of your own: see docs/extending.md."""

    kind: Literal["custom"] = Field(default="custom", description="an algorithm of your own")
    factory: ImportPath = Field(
        description="module and function that build it, as module:function; the module is looked for in the "
        "working folder and among what is installed"
    )
    options: Options = Field(
        default_factory=Keys, description="what the function is given beside the recipe's parts"
    )


class CNPAlgorithm(Section):
    """A support set encoded as the mean over its examples (Garnelo et al. 2018)."""

    kind: Literal["cnp"] = Field(default="cnp", description="conditional neural processes")
    width: Count = Field(
        default=128,
        description="of what a support set (of classification, a class) is encoded as, and of hidden layers",
    )
    num_layers: Count = Field(default=3, description="linear layers of the encoder, and of the decoder")
    min_std: BelowOne = Field(
        default=0.1,
        description="of regression: the least standard deviation that is predicted, in units of the targets",
    )


class AttentionLearnerAlgorithm(Section):
    """A transformer over examples, which answers queries after attending to the support set."""

    kind: Literal["attention_learner"] = Field(
        default="attention_learner",
        description="black box: a transformer that is given the support set and says the queries' labels",
    )
    width: Count = Field(default=128, description="width of the residual stream; a multiple of num_heads")
    num_layers: Count = Field(default=3, description="transformer blocks")
    num_heads: Count = Field(default=4, description="attention heads per block")


class RecurrentLearnerAlgorithm(Section):
    """An LSTM that reads the support examples one by one (Hochreiter et al. 2001)."""

    kind: Literal["recurrent_learner"] = Field(
        default="recurrent_learner",
        description="black box: an LSTM that reads the support set and says the queries' labels",
    )
    width: Count = Field(default=128, description="of the LSTM's state")
    num_layers: Count = Field(default=1, description="LSTM cells, one on top of the other")


class InContextAlgorithm(Section):
    """A language model trained on queries behind their support sequences (MetaICL, Min et al. 2022)."""

    kind: Literal["in_context"] = Field(
        default="in_context",
        description="language modelling of queries with the support sequences in front of them",
    )


class ERMAlgorithm(Section):
    """The query loss of the model as it is: no adaptation."""

    kind: Literal["erm"] = Field(
        default="erm", description="empirical risk minimisation: the query loss without adaptation"
    )


class MultiTaskAlgorithm(Section):
    """One network for groups that ask different things of the same inputs, with parts of each group's own."""

    kind: Literal["multi_task"] = Field(
        default="multi_task",
        description="one network (mlp or conv4) for a few groups, with parts of each group's own: the query "
        "loss without adaptation",
    )
    architecture: Literal["multi_head", "film", "cross_stitch"] = Field(
        default="multi_head",
        description="what a group has of its own: multi_head, the last layer; film, a scale and a shift of "
        "each channel behind each block (Perez et al. 2018); cross_stitch, a whole network, whose blocks "
        "are given mixtures of what all networks' blocks have made (Misra et al. 2016)",
    )
    groups: Annotated[tuple[Text, ...], Field(min_length=2)] | None = Field(
        default=None,
        description="the names of the groups, in all splits; null for those of a synthetic task",
    )


class ARMCMLAlgorithm(Section):
    """The mean over a task's unlabelled inputs of a context network (Zhang et al. 2021)."""

    kind: Literal["arm_cml"] = Field(
        default="arm_cml",
        description="adaptive risk minimisation by context: each input is shown beside the mean of what a "
        "second network says of the task's unlabelled inputs",
    )
    num_context: Count = Field(
        default=12, description="channels of the context beside an image's, or numbers beside an array's"
    )
    width: Count = Field(default=64, description="channels, or units, of the context network's layers")


class ARMBNAlgorithm(Section):
    """Batch norm by the statistics of a task's unlabelled inputs (Zhang et al. 2021)."""

    kind: Literal["arm_bn"] = Field(
        default="arm_bn",
        description="adaptive risk minimisation by batch norm, whose statistics are those of the task's "
        "unlabelled inputs",
    )


# They read no labels of support data.
UnlabelledAlgorithm = ERMAlgorithm | MultiTaskAlgorithm | ARMCMLAlgorithm | ARMBNAlgorithm

Algorithm = (
    MAMLAlgorithm
    | ProtonetAlgorithm
    | RidgeAlgorithm
    | LogisticAlgorithm
    | SVMAlgorithm
    | CNPAlgorithm
    | AttentionLearnerAlgorithm
    | RecurrentLearnerAlgorithm
    | InContextAlgorithm
    | UnlabelledAlgorithm
    | CustomAlgorithm
)
