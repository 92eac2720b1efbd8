"""The sections of a recipe that say what computes, in which numbers, and where things lie."""

from typing import Annotated, Literal

from pydantic import Field

from metaloom.recipe.base import Count, CountOrZero, Keys, Options, PositiveFloat, Section, Text


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
    extra: Options = Field(
        default_factory=Keys,
        description="further keys of DeepSpeed's configuration, for example zero_optimization: "
        "{reduce_bucket_size: 1000000}; none that this recipe decides",
    )


class Hosts(Section):
    """Several hosts: the same command is started on each of them."""

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
    own_folders: bool = Field(
        default=False,
        description="whether each host has a run folder of its own: that of the endpoint's host is the "
        "run's, and checkpoints are where all can read them (checkpoint.url); false: all see one folder",
    )


class Notice(Section):
    """What tells that this host is about to be taken away: it is looked at every few seconds."""

    file: Text | None = Field(default=None, description="a file that is there then; null for none")
    url: Text | None = Field(
        default=None, description="an http URL that answers with status 200 then; null for none"
    )
    pattern: Text | None = Field(
        default=None,
        description="regular expression that the answer has to match besides, TRUE for example; null: none",
    )
    header: Text | None = Field(
        default=None, description="header of the request, for example 'Metadata-Flavor: Google'; null: none"
    )
    every_s: float = Field(default=5.0, ge=0.1, le=3600, description="seconds between two looks")


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
    stop_within_s: float = Field(
        default=25.0,
        ge=1,
        le=1e5,
        description="how long the ranks have to save what they did and end, when the job is asked to stop, "
        "in seconds; clusters kill what takes longer than they grant, often 30",
    )
    show_all_ranks: bool = Field(
        default=False,
        description="whether the command shows what all ranks on its host print, each line after its rank, "
        "and not only what rank 0 tells people; the run's logs have it either way",
    )
    notice: Notice | None = Field(
        default=None,
        description="what announces that a host is taken away, so that the job stops; null: none",
    )
    hosts: Hosts | None = Field(default=None, description="several hosts; null for this machine alone")
