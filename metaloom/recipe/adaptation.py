"""The sections of a recipe that say how a model adapts to one task: the inner loop."""

from typing import Annotated, Literal

from pydantic import Field

from metaloom.recipe.base import BelowOne, Count, CountOrZero, FloatOrZero, PositiveFloat, Section, Text
from metaloom.recipe.data import (
    RehearsalData,
)

SideBySide = Annotated[
    Literal["auto", "loop", "vmap"],
    Field(
        description="how one rank's tasks are computed: loop (one after the other), vmap (all in one "
        "vectorised pass), or auto: what is faster on the first tasks"
    ),
]


class FullFast(Section):
    """Every weight of the model is adapted, one copy per task."""

    kind: Literal["full"] = Field(default="full", description="adapt every weight of the model")
    tasks: SideBySide = "auto"


class DenseSymmetry(Section):
    """U is any matrix: as many rows as a layer has weights, `rank` columns."""

    kind: Literal["dense"] = Field(default="dense", description="any matrix, of so many columns as rank")
    rank: Count = Field(description="numbers of each layer that a task adapts")
    std: PositiveFloat = Field(default=0.01, description="standard deviation of the matrix at the start")


class KroneckerSymmetry(Section):
    """U is a Kronecker product over outputs, inputs and places of the filters: for large layers."""

    kind: Literal["kronecker"] = Field(
        default="kronecker",
        description="a product of square matrices over a layer's outputs, inputs and places of filters; the "
        "identity at the start",
    )


class MSRFast(Section):
    """The weights of chosen layers are vec(W) = U v: U is learned and shared by all tasks, v is adapted
    (Zhou et al. 2021)."""

    kind: Literal["msr"] = Field(
        default="msr",
        description="adapt few numbers, of which a learned symmetry makes the weights of layers (MSR, Zhou "
        "et al. 2021); whatever else the model has is adapted too",
    )
    symmetry: DenseSymmetry | KroneckerSymmetry = Field(
        discriminator="kind", description="how the symmetry U of each layer is kept"
    )
    layers: Annotated[tuple[Text, ...], Field(min_length=1)] | Literal["all"] = Field(
        default="all",
        description="ends of the names of the linear and convolutional layers that are made so, as a list, "
        "or all",
    )
    tasks: SideBySide = "auto"


class LoRAFast(Section):
    """A low-rank adapter beside chosen linear layers is adapted; the backbone is shared by all tasks."""

    kind: Literal["lora"] = Field(default="lora", description="adapt low-rank matrices beside linear layers")
    rank: Count = Field(default=8, description="rank of each adapter")
    alpha: PositiveFloat = Field(
        default=16.0, description="scale of the adapter: its product is times alpha / rank"
    )
    targets: Annotated[tuple[Text, ...], Field(min_length=1)] | Literal["all-linear"] = Field(
        default="all-linear",
        description="ends of the names of the linear layers that get an adapter, or patterns of whole names "
        "(*.0.*.q_proj), as a list; or all-linear "
        "for all but the output head",
    )
    rslora: bool = Field(
        default=False, description="whether the product is times alpha / sqrt(rank) (Kalajdzievski 2023)"
    )
    dropout: BelowOne = Field(
        default=0.0, description="dropout of what the adapter is shown, in adaptation steps; 0 for none"
    )
    modules_to_save: tuple[Text, ...] = Field(
        default=(),
        description="ends of the names, or patterns, of linear layers and norms that are adapted in whole "
        "beside it, such as a classifier's head",
    )


class HeadFast(Section):
    """The output head alone is adapted; all before it is shared by all tasks (ANIL: Raghu et al. 2020)."""

    kind: Literal["head"] = Field(default="head", description="adapt the output head alone")


class NormBiasFast(Section):
    """Norms and biases are adapted; other weights are shared by all tasks (BitFit: Ben Zaken et al. 2022)."""

    kind: Literal["norm_bias"] = Field(default="norm_bias", description="adapt norms and biases")
    norms: bool = Field(default=True, description="whether weights and biases of norms are adapted")
    biases: bool = Field(
        default=True, description="whether biases of linear layers and convolutions are adapted"
    )
    head: bool = Field(default=False, description="whether the output head is adapted as well")


class PartFast(Section):
    """Named parameters of the model are adapted; all others are shared by all tasks."""

    kind: Literal["part"] = Field(default="part", description="adapt some of the model's parameters, by name")
    parameters: Annotated[tuple[Text, ...], Field(min_length=1)] = Field(
        description="patterns of names of parameters, such as blocks.1.* or *.bias"
    )
    tasks: Literal["together", "loop"] = Field(
        default="together",
        description="how one rank's tasks are computed: together (one pass; for weights and biases of linear "
        "layers and norms, and biases of convolutions), or loop (one after the other; for any)",
    )


class SoftPromptFast(Section):
    """Vectors in front of each text are adapted; the model is shared by all tasks (Lester et al. 2021)."""

    kind: Literal["soft_prompt"] = Field(
        default="soft_prompt", description="adapt vectors in front of a text's tokens"
    )
    num_tokens: Count = Field(
        default=8, description="vectors; with the text's tokens at most model.context_length"
    )
    start: Literal["tokens", "normal"] = Field(
        default="tokens",
        description="where the vectors start: tokens (embeddings of tokens drawn from the seed) or normal "
        "(numbers of standard deviation 0.02, drawn from the seed)",
    )


Fast = FullFast | LoRAFast | HeadFast | NormBiasFast | PartFast | SoftPromptFast | MSRFast
# Where every task has whole weights of its own.
WholeFast = FullFast | MSRFast


def shares_passes(fast: Fast) -> bool:
    """Whether all tasks go through a backbone that they share in one pass."""
    return not isinstance(fast, WholeFast) and not (isinstance(fast, PartFast) and fast.tasks == "loop")


class Head(Section):
    """How the output head adapts, where it is among what is adapted."""

    init: Literal["learned", "zero"] = Field(
        default="learned",
        description="where the head starts: learned (with all that is adapted) or zero, in every task (Kao "
        "et al. 2022)",
    )
    first_steps: CountOrZero = Field(
        default=0,
        description="inner steps that move the head alone, before all that is adapted moves (Kumar et al. "
        "2022); fewer than num_steps",
    )


InnerRate = Annotated[
    PositiveFloat,
    Field(description="inner learning rate; the starting value where rates are learned"),
]
InnerWeightDecay = Annotated[FloatOrZero, Field(description="weight decay added to the inner gradient")]
InnerClipNorm = Annotated[
    PositiveFloat | None,
    Field(
        description="largest norm of one task's inner gradient, longer ones are scaled down; "
        "null for no limit"
    ),
]
Proximal = Annotated[
    FloatOrZero,
    Field(
        description="pull towards where the fast weights start: adds proximal / 2 * |phi - phi_0|^2 to the "
        "inner loss; 0 for none"
    ),
]
LearnedRates = Annotated[
    Literal["none", "shared", "per_group", "per_tensor", "per_tensor_per_step", "per_element"],
    Field(
        description="whether the inner rates are meta-parameters: none (fixed), shared (one for all), "
        "per_group (one for the fast weights whose names end alike, such as weight, bias, lora_a), "
        "per_tensor (one for each fast weight), per_tensor_per_step (and for each inner step), "
        "per_element (one for each number of each fast weight)"
    ),
]


class LearnedRateValues(Section):
    """What is learned of the inner rates, and where it starts."""

    scale: Literal["log", "linear"] = Field(
        default="log",
        description="what the outer loop moves: log, the logarithms of the rates, which stay positive, or "
        "linear, the rates themselves, which may become negative (Meta-SGD: Li et al. 2017)",
    )
    spread: tuple[PositiveFloat, PositiveFloat] | None = Field(
        default=None,
        description="the lowest and highest of the rates to start with, drawn evenly from the seed, such as "
        "[0.005, 0.1]; null for all at lr",
    )


RateValues = Annotated[
    LearnedRateValues, Field(description="what is learned of the inner rates, and where it starts")
]
Betas = tuple[BelowOne, BelowOne]
EpsRoot = Annotated[
    PositiveFloat,
    Field(
        description="added to the second moment under its root; without it the hypergradient is not finite "
        "where an inner gradient is exactly zero"
    ),
]


class SGDRule(Section):
    """phi <- phi - lr * m, with m <- momentum * m + g + weight_decay * phi."""

    kind: Literal["sgd"] = Field(default="sgd", description="stochastic gradient descent")
    lr: InnerRate
    momentum: BelowOne = Field(default=0.0, description="momentum, 0 for none")
    nesterov: bool = Field(
        default=False, description="whether momentum is Nesterov's: g + momentum * m in place of m"
    )
    weight_decay: InnerWeightDecay = 0.0
    clip_norm: InnerClipNorm = None
    proximal: Proximal = 0.0
    learned: LearnedRates = "none"
    rates: RateValues = LearnedRateValues()


class AdamRule(Section):
    """Adam: phi <- phi - lr * m_hat / (sqrt(v_hat + eps_root) + eps)."""

    kind: Literal["adam"] = Field(default="adam", description="Adam")
    lr: InnerRate
    betas: Betas = Field(default=(0.9, 0.999), description="decay of the first and second moments")
    eps: PositiveFloat = Field(default=1e-8, description="added to the root of the second moment")
    eps_root: EpsRoot = 1e-8
    weight_decay: InnerWeightDecay = 0.0
    clip_norm: InnerClipNorm = None
    proximal: Proximal = 0.0
    learned: LearnedRates = "none"
    rates: RateValues = LearnedRateValues()


class AdamWRule(Section):
    """Adam with decoupled weight decay: phi is first multiplied by 1 - lr * weight_decay."""

    kind: Literal["adamw"] = Field(default="adamw", description="Adam with decoupled weight decay")
    lr: InnerRate
    betas: Betas = Field(default=(0.9, 0.999), description="decay of the first and second moments")
    eps: PositiveFloat = Field(default=1e-8, description="added to the root of the second moment")
    eps_root: EpsRoot = 1e-8
    weight_decay: FloatOrZero = Field(
        default=0.01, description="decoupled weight decay, per unit of learning rate"
    )
    clip_norm: InnerClipNorm = None
    proximal: Proximal = 0.0
    learned: LearnedRates = "none"
    rates: RateValues = LearnedRateValues()


class RMSPropRule(Section):
    """phi <- phi - lr * m, with m <- momentum * m + g / (sqrt(v + eps_root) + eps)."""

    kind: Literal["rmsprop"] = Field(default="rmsprop", description="RMSProp")
    lr: InnerRate
    alpha: BelowOne = Field(default=0.99, description="decay of the running mean of the squared gradient")
    eps: PositiveFloat = Field(default=1e-8, description="added to the root of the running mean")
    eps_root: EpsRoot = 1e-8
    momentum: BelowOne = Field(default=0.0, description="momentum of the scaled gradient, 0 for none")
    centered: bool = Field(
        default=False, description="whether the gradient's running mean is taken off before squaring"
    )
    weight_decay: InnerWeightDecay = 0.0
    clip_norm: InnerClipNorm = None
    proximal: Proximal = 0.0
    learned: LearnedRates = "none"
    rates: RateValues = LearnedRateValues()


InnerRule = SGDRule | AdamRule | AdamWRule | RMSPropRule


class Norms(Section):
    """What norms have for each inner step (MAML++, Antoniou et al. 2019)."""

    weights: Literal["fast", "per_step"] = Field(
        default="fast",
        description="weights and biases of norms: fast (adapted as all others), or per_step (learned for "
        "each inner step, shared by the tasks, and not adapted)",
    )
    statistics: Literal["batch", "per_step"] = Field(
        default="batch",
        description="what batch norm normalises by outside of training: batch (the examples at hand), or "
        "per_step (running means of training, for each inner step)",
    )


class Rehearsal(Section):
    """Data of the pre-training kind mixed into adaptation, so that the model forgets less."""

    ratio: BelowOne = Field(
        default=0.1,
        description="weight of the rehearsal loss in each inner step; the support loss has the rest",
    )
    num_samples: Count = Field(default=1, description="samples of rehearsal data per inner step and task")
    outer_ratio: BelowOne = Field(
        default=0.0,
        description="weight of the rehearsal loss, at the adapted weights, in the meta-loss; the query loss "
        "has the rest",
    )
    outer_samples: Count = Field(
        default=4,
        description="samples of rehearsal data per task for the meta-loss, where outer_ratio is above 0",
    )
    data: RehearsalData | None = Field(
        default=None,
        discriminator="kind",
        description="where the rehearsal data come from, and what they are; null for the split rehearsal of "
        "the tasks' own data (documents)",
    )


LossParameter = Literal["temperature", "label_smoothing", "class_weights", "group_weights"]


class SupportLoss(Section):
    """The loss that tasks adapt by; what is learned of it acts through adaptation alone."""

    temperature: PositiveFloat = Field(
        default=1.0, description="what the logits are divided by; the starting value where it is learned"
    )
    label_smoothing: BelowOne = Field(
        default=0.0, description="share of the target spread over all classes; above 0 where it is learned"
    )
    learned: tuple[LossParameter, ...] = Field(
        default=(),
        description="what is learned of it: temperature; label_smoothing; class_weights, what a support "
        "example counts by its class, for classes that mean the same in all tasks; group_weights, what a "
        "task's support data count by its group",
    )
    groups: Annotated[tuple[Text, ...], Field(min_length=1)] | None = Field(
        default=None,
        description="the names of the groups of training tasks, where group_weights are learned; others have "
        "weight 1; null for those of a synthetic task",
    )


class LearnedLoss(Section):
    """A network of a model's outputs that tasks adapt by, without labels (ARM-LL, Zhang et al. 2021)."""

    width: Count = Field(default=32, description="units of each hidden layer")
    num_layers: Count = Field(default=3, description="hidden layers")


class Adaptation(Section):
    """How a model adapts to one task: what is fast, by which rule, for how many steps."""

    fast: Fast = Field(discriminator="kind", description="the fast weights: what a task adapts")
    head: Head = Field(default=Head(), description="how the output head adapts, where it is among them")
    rule: InnerRule = Field(discriminator="kind", description="the inner update rule")
    num_steps: Count = Field(description="inner steps K per task")
    norms: Norms = Field(default=Norms(), description="norms, by inner step")
    loss: SupportLoss = Field(default=SupportLoss(), description="the loss that tasks adapt by")
    learned_loss: LearnedLoss | None = Field(
        default=None,
        description="a network of the outputs whose value tasks adapt by, so that no label of support data "
        "is read, learned by the outer loop (ARM-LL); null for the loss of the labels",
    )
    rehearsal: Rehearsal | None = Field(
        default=None, description="rehearsal during adaptation; null for none"
    )

    @property
    def learns_loss(self) -> bool:
        """Whether anything of the loss that tasks adapt by is a meta-parameter."""
        return bool(self.loss.learned) or self.learned_loss is not None
