"""The sections of a recipe: everything that a run is made of, typed, immutable and described.

Each section is one class. Where a section comes in several kinds, its key `kind` names
the class. A class states the type and range of each value; what relates several values to
each other is in `rules.py`, so that every broken rule can be reported at once.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue, WithJsonSchema

from metaloom.recipe.base import BelowOne, Count, CountOrZero, FloatOrZero, Keys, PositiveFloat, Section, Text
from metaloom.recipe.data import (
    ClassesData,
    DocumentsData,
    EpisodesData,
    GroupsData,
    Loading,
    MixtureData,
    RehearsalData,
)

# ---------------------------------------------------------------- model


WEIGHTS = (
    "safetensors file to start from, or a folder with model.safetensors or several and their index; "
    "null for random weights"
)


class Conv4Model(Section):
    """The convolutional network of the few-shot literature; as many outputs as a task has classes."""

    kind: Literal["conv4"] = Field(default="conv4", description="convolutional network for images")
    width: Count = Field(default=32, description="channels of each block")
    num_blocks: int = Field(
        default=4,
        ge=1,
        le=4,
        description="blocks of convolution with stride 2, norm and ReLU, each halving the image",
    )
    norm: Literal["batch", "none"] = Field(
        default="batch", description="normalisation in each block: batch (statistics per task) or none"
    )
    weights: str | None = Field(default=None, description=WEIGHTS)


class MLPModel(Section):
    """A fully connected network, for arrays of numbers."""

    kind: Literal["mlp"] = Field(default="mlp", description="fully connected network for arrays of numbers")
    width: Count = Field(default=40, description="units of each hidden layer")
    num_layers: Count = Field(default=2, description="hidden layers")
    activation: Literal["relu", "tanh"] = Field(default="relu", description="after each hidden layer")
    weights: str | None = Field(default=None, description=WEIGHTS)


class GPTModel(Section):
    """A decoder-only transformer over bytes or tokens; for classification with a head on the last token."""

    kind: Literal["gpt"] = Field(default="gpt", description="decoder-only transformer over bytes or tokens")
    vocabulary: int = Field(
        default=256, ge=2, description="tokens that texts are made of; 256 where they are read as bytes"
    )
    num_layers: Count = Field(default=4, description="transformer blocks")
    width: Count = Field(default=128, description="width of the residual stream; a multiple of num_heads")
    num_heads: Count = Field(default=4, description="attention heads per block")
    context_length: Count = Field(default=128, description="most positions in one sequence, in tokens")
    tied_embeddings: bool = Field(
        default=True, description="whether the output head shares the embedding's weight"
    )
    dropout: BelowOne = Field(
        default=0.0,
        description="dropout of activations in ordinary training and in adaptation steps, 0 for none",
    )
    weights: str | None = Field(default=None, description=WEIGHTS)


class Pretrain(Section):
    """Ordinary training of the backbone before meta-training."""

    num_steps: Count = Field(description="optimizer steps")
    batch_size: Count = Field(description="sequences per step, over all ranks")
    lr: PositiveFloat = Field(description="peak learning rate of AdamW")
    warmup_steps: CountOrZero = Field(default=0, description="steps of linear warm-up; fewer than num_steps")
    weight_decay: FloatOrZero = Field(
        default=0.0, description="decoupled weight decay, per unit of learning rate"
    )
    splits: Annotated[tuple[Literal["train", "rehearsal"], ...], Field(min_length=1)] = Field(
        default=("train", "rehearsal"), description="splits of the data trained on"
    )


# ---------------------------------------------------------------- adaptation


class FullFast(Section):
    """Every weight of the model is adapted, one copy per task."""

    kind: Literal["full"] = Field(default="full", description="adapt every weight of the model")
    tasks: Literal["auto", "loop", "vmap"] = Field(
        default="auto",
        description="how one rank's tasks are computed: loop (one after the other), vmap (all in one "
        "vectorised pass), or auto: what is faster on the first tasks",
    )


class LoRAFast(Section):
    """A low-rank adapter beside chosen linear layers is adapted; the backbone is shared by all tasks."""

    kind: Literal["lora"] = Field(default="lora", description="adapt low-rank matrices beside linear layers")
    rank: Count = Field(default=8, description="rank of each adapter")
    alpha: PositiveFloat = Field(
        default=16.0, description="scale of the adapter: its product is times alpha / rank"
    )
    targets: Annotated[tuple[Text, ...], Field(min_length=1)] | Literal["all-linear"] = Field(
        default="all-linear",
        description="ends of the names of the linear layers that get an adapter, as a list, or all-linear "
        "for all but the output head",
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


InnerRule = SGDRule | AdamRule | AdamWRule | RMSPropRule


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


class SupportLoss(Section):
    """The cross-entropy that tasks adapt by; what is learned of it acts through adaptation alone."""

    temperature: PositiveFloat = Field(
        default=1.0, description="what the logits are divided by; the starting value where it is learned"
    )
    label_smoothing: BelowOne = Field(
        default=0.0, description="share of the target spread over all classes; above 0 where it is learned"
    )
    learned: tuple[Literal["temperature", "label_smoothing"], ...] = Field(
        default=(), description="which of the two are meta-parameters"
    )


class Adaptation(Section):
    """How a model adapts to one task: what is fast, by which rule, for how many steps."""

    fast: FullFast | LoRAFast = Field(
        discriminator="kind", description="the fast weights: what a task adapts"
    )
    rule: InnerRule = Field(discriminator="kind", description="the inner update rule")
    num_steps: Count = Field(description="inner steps K per task")
    loss: SupportLoss = Field(default=SupportLoss(), description="the loss that tasks adapt by")
    rehearsal: Rehearsal | None = Field(
        default=None, description="rehearsal during adaptation; null for none"
    )


# ---------------------------------------------------------------- algorithm


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
    backbone: bool = Field(
        default=False, description="learn the weights that tasks share (only beside an adapter)"
    )


class MAMLAlgorithm(Section):
    """Gradient of the query loss after adaptation (Finn et al. 2017)."""

    kind: Literal["maml"] = Field(default="maml", description="model-agnostic meta-learning")
    hypergradient: Hypergradient = Field(
        default=AutoHypergradient(),
        discriminator="kind",
        description="how the gradient through the adaptation is computed",
    )
    step_weights: Literal["last", "uniform"] = Field(
        default="last",
        description="weights of the query losses after each inner step: the last only, or all alike",
    )
    meta_parameters: MetaParameters = Field(
        default=MetaParameters(), description="what the outer loop learns"
    )


# ---------------------------------------------------------------- outer loop


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
    optimizer: AdamOptimizer | SGDOptimizer = Field(
        default=AdamOptimizer(), discriminator="kind", description="the outer optimizer"
    )
    lr_rates: PositiveFloat | None = Field(
        default=None,
        description="peak learning rate of the logarithms of learned inner rates; null for optimizer.lr",
    )
    lr_loss: PositiveFloat | None = Field(
        default=None,
        description="peak learning rate of learned loss parameters; null for optimizer.lr",
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


# ---------------------------------------------------------------- machine


class Precision(Section):
    """Number formats."""

    compute: Literal["float32", "bfloat16", "float16", "float64"] = Field(
        default="float32",
        description="format of the forward and backward passes; weights and optimizer states are float32 "
        "in all but float64",
    )


class AllSnapshots(Section):
    """The fast weights before every inner step are kept."""

    kind: Literal["all"] = Field(default="all", description="one copy of the fast weights per inner step")


class BinomialSnapshots(Section):
    """Some are kept, and the steps between them are computed again (Griewank and Walther 2000)."""

    kind: Literal["binomial"] = Field(
        default="binomial", description="a given number of copies; the rest is computed again"
    )
    num_slots: Count = Field(
        description="copies kept beside the first; 9 suffice for 65 steps that are computed twice"
    )


class HostSnapshots(Section):
    """Every one is kept, in the memory of the host."""

    kind: Literal["host"] = Field(default="host", description="one copy per inner step, in the host's memory")


class Memory(Section):
    """What is kept for the backward passes, and what is computed again."""

    recompute_blocks: bool = Field(
        default=False,
        description="whether the model's blocks keep their inputs alone and are computed again when "
        "differentiated: less memory, more time",
    )
    head_chunk: Count | None = Field(
        default=None,
        description="tokens per task whose logits exist at a time, for large vocabularies; null for all",
    )
    snapshots: AllSnapshots | BinomialSnapshots | HostSnapshots = Field(
        default=AllSnapshots(),
        discriminator="kind",
        description="which fast weights are kept for the way back over the inner steps",
    )


class ShardedSharding(Section):
    """The backbone's weights, gradients and optimizer states in shards (ZeRO stage 3), exactly
    differentiated."""

    kind: Literal["sharded"] = Field(
        default="sharded", description="each rank holds a part of every weight of the backbone"
    )
    shard_size: Count | None = Field(
        default=None,
        description="ranks that share one copy of the weights, those of one node say; null for all ranks",
    )


class ReplicatedSharding(Section):
    """Every rank holds all of theta; gradients cross ranks once per outer step."""

    kind: Literal["replicated"] = Field(
        default="replicated", description="every rank holds all meta-parameters"
    )
    bucket_mib: PositiveFloat = Field(
        default=25.0,
        description="gradients that cross ranks together, in MiB: as soon as so much is complete, while "
        "the rest is computed",
    )


class DeepSpeedZeroSharding(Section):
    """Every rank holds all of theta; DeepSpeed shards the optimizer's states (stage 1), gradients too (2)."""

    kind: Literal["deepspeed_zero"] = Field(
        default="deepspeed_zero", description="DeepSpeed's ZeRO: each rank moves its share of theta"
    )
    stage: Annotated[int, Field(ge=1, le=3)] = Field(
        default=2,
        description="what is sharded: 1, the optimizer's states; 2, gradients too; 3 is refused",
    )
    offload_optimizer: bool = Field(
        default=False, description="whether optimizer states are kept, and updated, in the host's memory"
    )
    extra: Annotated[dict[str, JsonValue], AfterValidator(Keys), WithJsonSchema({"type": "object"})] = Field(
        default_factory=Keys,
        description="further keys of DeepSpeed's configuration, for example zero_optimization: "
        "{reduce_bucket_size: 1000000}; none that this recipe decides",
    )


class Hosts(Section):
    """Several hosts: the same command is started on each of them, and all see the run's folder."""

    endpoint: Text = Field(
        description="name or address of one of the hosts and a free port of it, as host:port; all hosts "
        "meet there, and rank 0 runs there",
    )
    num_hosts: Count = Field(description="hosts to run on, at most")
    min_hosts: Count | None = Field(
        default=None, description="hosts with which the run goes on when some are lost; null for num_hosts"
    )
    wait_s: float = Field(
        default=600.0,
        ge=1,
        le=1e6,
        description="how long a host waits for min_hosts to come, at the start and after a loss, in seconds",
    )
    silence_s: float = Field(
        default=60.0,
        ge=4,
        le=1e5,
        description="how long a host may be silent before it counts as lost, in seconds",
    )


class LocalLauncher(Section):
    """Processes on this machine, and on others where the same command is started."""

    kind: Literal["local"] = Field(default="local", description="processes on this machine")
    num_processes: Count = Field(default=1, description="ranks (on each host)")
    threads_per_process: Count = Field(default=1, description="threads that each rank computes with")
    timeout_s: float = Field(
        default=600.0,
        ge=1,
        le=1e6,
        description="how long a collective waits for the other ranks before it fails, in seconds",
    )
    max_restarts: CountOrZero = Field(
        default=3,
        description="how often the ranks start again from the last checkpoint when one of them is killed, "
        "crashes or hangs; mistakes in the recipe or the data are not tried again",
    )
    hosts: Hosts | None = Field(default=None, description="several hosts; null for this machine alone")


# ---------------------------------------------------------------- validation, evaluation


class EarlyStopping(Section):
    """Stop when the validation loss no longer improves."""

    patience: Count = Field(description="validations in a row without improvement after which the run stops")
    min_delta: FloatOrZero = Field(
        default=0.0, description="smallest fall of the validation loss that counts"
    )


class Validation(Section):
    """Episodes of the validation split, during training."""

    every_steps: Count | None = Field(
        default=None, description="outer steps between validations; null for none"
    )
    num_episodes: Count = Field(default=100, description="episodes per validation")
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


Baseline = Literal["random", "ordinary_equal_data", "ordinary_equal_compute", "pretrained"]


class Evaluation(Section):
    """Episodes of the test split, after training, against baselines."""

    num_episodes: Count = Field(default=600, description="test episodes")
    num_steps: Count | None = Field(default=None, description="inner steps; null for adaptation.num_steps")
    tuning: Tuning = Field(default=Tuning(), description="choice of the inner learning rate")
    baselines: tuple[Baseline, ...] | None = Field(
        default=None,
        description="what to compare with: random (untrained weights), ordinary_equal_data, "
        "ordinary_equal_compute (ordinary training with as much data, or compute), pretrained (before "
        "meta-training; needs pretrain); null for all that apply, [] for none",
    )
    ordinary: OrdinaryTraining = Field(
        default=OrdinaryTraining(), description="ordinary training of the baselines"
    )


# ---------------------------------------------------------------- record


class Checkpoint(Section):
    """When checkpoints are written, besides the one at the end."""

    every_steps: Count | None = Field(
        default=None, description="outer steps between checkpoints; null: not by steps"
    )
    every_minutes: PositiveFloat | None = Field(
        default=None, description="minutes between checkpoints; null: not by time"
    )
    keep_last: Count = Field(default=2, description="checkpoints kept; older ones are removed")


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


# ---------------------------------------------------------------- the recipe


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
    model: Conv4Model | MLPModel | GPTModel = Field(discriminator="kind", description="the network")
    data: ClassesData | GroupsData | DocumentsData | EpisodesData | MixtureData = Field(
        discriminator="kind", description="where the tasks come from"
    )
    loading: Loading = Field(default=Loading(), description="how data are read")
    pretrain: Pretrain | None = Field(
        default=None,
        description="ordinary training of the backbone before meta-training (gpt only); null for none",
    )
    adaptation: Adaptation = Field(description="how the model adapts to one task: the inner loop")
    algorithm: MAMLAlgorithm = Field(
        default=MAMLAlgorithm(), description="how the outer loop learns from adaptations"
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
    def evaluation_num_steps(self) -> int:
        """Inner steps at evaluation: evaluation.num_steps, or adaptation.num_steps where that is null."""
        return self.evaluation.num_steps or self.adaptation.num_steps

    @property
    def baselines(self) -> tuple[Baseline, ...]:
        """The baselines to evaluate: evaluation.baselines, or all that apply where that is null."""
        if self.evaluation.baselines is not None:
            return self.evaluation.baselines
        always: tuple[Baseline, ...] = ("random", "ordinary_equal_data", "ordinary_equal_compute")
        return always if self.pretrain is None else (*always, "pretrained")
