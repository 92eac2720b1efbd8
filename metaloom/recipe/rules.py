"""The rules that relate several values of a recipe to each other.

A rule yields `(path, text)` for each place where it is broken. It is called also with recipes
that have other mistakes: a value that could not be read raises `Unreadable` when a rule
looks at it, and that rule alone is passed over. Rules that need the data's index are
checked where the data is opened.
"""

import re
from collections.abc import Callable, Iterator

from metaloom.credentials import has_credentials, without_credentials
from metaloom.engine.capabilities import Kind, outer_rehearsal_refusal, refusals, step_weights_refusal
from metaloom.engine.sharding.deepspeed_config import refused_keys
from metaloom.recipe.data import (
    ArrayInputs,
    ClassesData,
    DocumentsData,
    ImageInputs,
    TextInputs,
)
from metaloom.recipe.schema import (
    AdamWRule,
    DeepSpeedZeroSharding,
    FiniteDifferenceHypergradient,
    FullFast,
    GPTModel,
    LoRAFast,
    MLflowTracking,
    MLPModel,
    Recipe,
    SGDRule,
    ShardedSharding,
    TruncatedHypergradient,
)
from metaloom.recipe.tasks import (
    UnknownTaskError,
    data_sets,
    data_urls,
    facts_of,
    rehearsal_facts,
    task_facts,
)

# The estimators that go back over the inner steps one by one, from fast weights that are kept.
SWEEPS = ("auto", "rematerialized", "mixed_mode", "first_order", "truncated")
Broken = Iterator[tuple[str, str]]
READS = {"conv4": "image", "mlp": "array", "gpt": "text"}
GPT_BLOCK_LAYERS = ("attention.qkv", "attention.proj", "mlp.fc_in", "mlp.fc_out")


class Unreadable(Exception):
    """A rule looked at a value that has been reported already."""


class UnreadableValue:
    """Stands for a value that could not be read: any look at it raises `Unreadable`."""

    def _refuse(self, *_: object) -> bool:
        raise Unreadable

    __getattr__ = __eq__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __index__ = __add__ = __radd__ = __mul__ = __rmul__ = __mod__ = __rmod__ = __bool__ = __contains__ = (
        __iter__
    ) = __hash__ = _refuse


def heads_divide_the_width(recipe: Recipe) -> Broken:
    model = recipe.model
    if isinstance(model, GPTModel) and model.width % model.num_heads:
        yield (
            "model.width",
            f"{model.width}; must be a multiple of model.num_heads = {model.num_heads}, "
            f"for example {max(1, round(model.width / model.num_heads)) * model.num_heads}",
        )


def ways_and_shots_are_given(recipe: Recipe) -> Broken:
    for path, data in data_sets(recipe).items():
        if not isinstance(data, ClassesData):
            continue
        for name in ("n_way", "n_shot", "n_query"):
            value = getattr(data, name)
            if data.variable is None and value is None:
                yield (f"{path}.{name}", "missing; give it, or variable for tasks that differ")
            if data.variable is not None and value is not None:
                yield (
                    f"{path}.{name}",
                    f"{value}; has no effect, since {path}.variable draws ways and shots; leave one of the "
                    "two out",
                )


def variable_ways_rise(recipe: Recipe) -> Broken:
    for path, data in data_sets(recipe).items():
        if not isinstance(data, ClassesData) or data.variable is None:
            continue
        variable = data.variable
        if variable.min_way > variable.max_way:
            yield (
                f"{path}.variable.min_way",
                f"{variable.min_way}; must be at most {path}.variable.max_way = {variable.max_way}",
            )
        if variable.max_support < variable.max_way:
            yield (
                f"{path}.variable.max_support",
                f"{variable.max_support}; must be at least {path}.variable.max_way = {variable.max_way}, "
                "since every "
                "class has a support example",
            )


def kept_labels_fit(recipe: Recipe) -> Broken:
    for path, data in data_sets(recipe).items():
        if not isinstance(data, ClassesData) or data.labels != "kept":
            continue
        for name in ("variable", "window"):
            if getattr(data, name) is not None:
                yield (
                    f"{path}.labels",
                    f"kept; every task has a class for each label, and {path}.{name} draws from few or "
                    "varying classes; "
                    f"set {path}.labels to shuffled, or {path}.{name} to null",
                )


def windows_hold_a_task(recipe: Recipe) -> Broken:
    for path, data in data_sets(recipe).items():
        if isinstance(data, ClassesData) and data.window is not None:
            ways = facts_of(data).num_outputs
            if ways is not None and data.window.num_classes < ways:
                yield (
                    f"{path}.window.num_classes",
                    f"{data.window.num_classes}; must be at least the {ways} classes of a task, and several "
                    "times that "
                    "for variety",
                )


def images_are_distorted(recipe: Recipe) -> Broken:
    for path, data in data_sets(recipe).items():
        if not isinstance(data, ClassesData) or isinstance(data.inputs, ImageInputs):
            continue
        for name in ("affine", "query_affine"):
            if getattr(data, name) is not None:
                yield (
                    f"{path}.{name}",
                    f"changes images, and {path}.inputs.kind is {data.inputs.kind}; set it to null",
                )


def parts_are_alike(recipe: Recipe) -> Broken:
    sets = data_sets(recipe)
    first_path, *others = sets
    first = facts_of(sets[first_path])
    for path in others:
        facts = facts_of(sets[path])
        if facts.objective != first.objective:
            yield (
                path,
                f"its tasks are {facts.objective}, and those of {first_path} {first.objective}; one model "
                "learns one "
                "of them",
            )
        elif facts.inputs != first.inputs:
            yield (
                path,
                f"its inputs are {_described(facts.inputs)}, and those of {first_path} "
                f"{_described(first.inputs)}; "
                "make them the same",
            )
        elif first.objective == "regression" and facts.num_outputs != first.num_outputs:
            yield (
                path,
                f"its targets have {facts.num_outputs} numbers, and those of {first_path} "
                f"{first.num_outputs}; make "
                "them the same",
            )


def model_reads_the_data(recipe: Recipe) -> Broken:
    reads = READS[recipe.model.kind]
    given = {"data": task_facts(recipe).inputs}
    rehearsed = rehearsal_facts(recipe)
    if rehearsed is not None:
        given["adaptation.rehearsal.data"] = rehearsed.inputs
    for path, inputs in given.items():
        if inputs.kind != reads:
            model = next(kind for kind, read in READS.items() if read == inputs.kind)
            yield (
                "model.kind",
                f"{recipe.model.kind} reads {reads}s, and {path} (kind {_kind_at(recipe, path)}) gives "
                f"{inputs.kind}s; "
                f"set model.kind to {model}, or take other data",
            )
    shown = given["data"]
    if rehearsed is not None and not isinstance(rehearsed.inputs, TextInputs) and rehearsed.inputs != shown:
        yield (
            "adaptation.rehearsal.data.inputs",
            f"{_described(rehearsed.inputs)}; the model is shown "
            f"{_described(shown)} by data; "
            "make them the same",
        )


def models_fit_the_objective(recipe: Recipe) -> Broken:
    objective = task_facts(recipe).objective
    if objective == "regression" and not isinstance(recipe.model, MLPModel):
        yield (
            "model.kind",
            f"{recipe.model.kind} tells classes apart or models text, and the targets are numbers; set "
            "model.kind to "
            "mlp",
        )


def regression_has_no_classes(recipe: Recipe) -> Broken:
    loss = recipe.adaptation.loss
    if task_facts(recipe).objective != "regression":
        return
    for name, neutral in (("temperature", 1.0), ("label_smoothing", 0.0)):
        if getattr(loss, name) != neutral or name in loss.learned:
            yield (
                f"adaptation.loss.{name}",
                f"{getattr(loss, name)}; belongs to the cross-entropy of classes, and the targets are "
                "numbers; leave it "
                "out",
            )


def pretrain_needs_gpt(recipe: Recipe) -> Broken:
    if recipe.pretrain is None:
        return
    if not isinstance(recipe.model, GPTModel):
        yield (
            "pretrain",
            f"only for model.kind = gpt, and model.kind is {recipe.model.kind}; set pretrain to null",
        )
    elif not isinstance(recipe.data, DocumentsData):
        yield (
            "pretrain",
            f"only for data.kind = documents, and data.kind is {recipe.data.kind}; set pretrain to null, "
            "and give "
            "weights that were trained before as model.weights",
        )


def pretrain_warmup_ends(recipe: Recipe) -> Broken:
    pretrain = recipe.pretrain
    if pretrain is not None and pretrain.warmup_steps >= pretrain.num_steps:
        yield (
            "pretrain.warmup_steps",
            f"{pretrain.warmup_steps}; must be less than pretrain.num_steps = {pretrain.num_steps}",
        )


def pretrain_splits_differ(recipe: Recipe) -> Broken:
    if recipe.pretrain is not None:
        yield from _repeated("pretrain.splits", recipe.pretrain.splits)


def lora_needs_gpt(recipe: Recipe) -> Broken:
    if isinstance(recipe.adaptation.fast, LoRAFast) and not isinstance(recipe.model, GPTModel):
        yield (
            "adaptation.fast.kind",
            f"lora adapts linear layers of model.kind = gpt, and model.kind is {recipe.model.kind}; "
            "set adaptation.fast to full",
        )


def lora_targets_exist(recipe: Recipe) -> Broken:
    fast = recipe.adaptation.fast
    if (
        not (isinstance(recipe.model, GPTModel) and isinstance(fast, LoRAFast))
        or fast.targets == "all-linear"
    ):
        return
    layers = [
        f"blocks.{block}.{name}" for block in range(recipe.model.num_layers) for name in GPT_BLOCK_LAYERS
    ]
    layers.append("head")
    endings = ", ".join(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))
    for position, target in enumerate(fast.targets):
        if not any(layer == target or layer.endswith(f".{target}") for layer in layers):
            yield (
                f"adaptation.fast.targets.{position}",
                f"{target!r}; matches no linear layer of the model, which has {endings}",
            )


def lora_rank_is_low(recipe: Recipe) -> Broken:
    fast = recipe.adaptation.fast
    if isinstance(recipe.model, GPTModel) and isinstance(fast, LoRAFast) and fast.rank > recipe.model.width:
        yield (
            "adaptation.fast.rank",
            f"{fast.rank}; must be at most model.width = {recipe.model.width}",
        )


def nesterov_needs_momentum(recipe: Recipe) -> Broken:
    rule = recipe.adaptation.rule
    if isinstance(rule, SGDRule) and rule.nesterov and rule.momentum == 0.0:
        yield (
            "adaptation.rule.nesterov",
            "true; has no effect, since adaptation.rule.momentum is 0; set momentum, or nesterov to false",
        )


def proximal_needs_a_second_step(recipe: Recipe) -> Broken:
    proximal = recipe.adaptation.rule.proximal
    if (
        proximal != 0.0
        and recipe.adaptation.num_steps == 1
        and recipe.evaluation_num_steps == 1
        and recipe.algorithm.hypergradient.kind != "implicit"  # which reads it off the end of adaptation
    ):
        yield (
            "adaptation.rule.proximal",
            f"{proximal}; has no effect, since adaptation.num_steps is 1 and that step starts where it pulls "
            "to; take more steps, or leave it out",
        )


def rates_are_learned(recipe: Recipe) -> Broken:
    if recipe.outer.lr_rates is not None and recipe.adaptation.rule.learned == "none":
        yield (
            "outer.lr_rates",
            f"{recipe.outer.lr_rates}; has no effect, since adaptation.rule.learned is none; leave it out",
        )


def tuning_rates_differ(recipe: Recipe) -> Broken:
    factors = recipe.evaluation.tuning.rate_factors
    if len(set(factors)) < len(factors):
        yield (
            "evaluation.tuning.rate_factors",
            f"{list(factors)}; names a factor twice",
        )


def lora_targets_differ(recipe: Recipe) -> Broken:
    fast = recipe.adaptation.fast
    if isinstance(fast, LoRAFast) and isinstance(fast.targets, tuple):
        yield from _repeated("adaptation.fast.targets", fast.targets)


def rehearsal_has_data(recipe: Recipe) -> Broken:
    rehearsal = recipe.adaptation.rehearsal
    if rehearsal is not None and rehearsal.data is None and not isinstance(recipe.data, DocumentsData):
        yield (
            "adaptation.rehearsal.data",
            "null; only data.kind = documents has a split rehearsal of its own, and data.kind is "
            f"{recipe.data.kind}; "
            "say where the rehearsal data come from",
        )


def rehearsal_has_an_effect(recipe: Recipe) -> Broken:
    rehearsal = recipe.adaptation.rehearsal
    if rehearsal is not None and rehearsal.ratio == rehearsal.outer_ratio == 0.0:
        yield (
            "adaptation.rehearsal.ratio",
            "0.0; nothing is rehearsed, since adaptation.rehearsal.outer_ratio is 0 too; raise one of them, "
            "or set "
            "adaptation.rehearsal to null",
        )


def the_estimator_takes_outer_rehearsal(recipe: Recipe) -> Broken:
    rehearsal = recipe.adaptation.rehearsal
    if rehearsal is None or rehearsal.outer_ratio == 0.0:
        return
    reason = outer_rehearsal_refusal(recipe.algorithm.hypergradient.kind)
    if reason is not None:
        yield "adaptation.rehearsal.outer_ratio", f"{rehearsal.outer_ratio}; {reason}"


def full_adaptation_has_no_backbone(recipe: Recipe) -> Broken:
    if isinstance(recipe.adaptation.fast, FullFast) and recipe.algorithm.meta_parameters.backbone:
        yield (
            "algorithm.meta_parameters.backbone",
            "true, but adaptation.fast = full adapts every weight and leaves no backbone; "
            "set it to false (init learns all weights)",
        )


def something_is_learned(recipe: Recipe) -> Broken:
    learned = recipe.algorithm.meta_parameters
    if not (
        learned.init
        or learned.backbone
        or recipe.adaptation.rule.learned != "none"
        or recipe.adaptation.loss.learned
    ):
        yield (
            "algorithm.meta_parameters",
            "init and backbone are both false, adaptation.rule.learned is none and adaptation.loss.learned "
            "is empty, so that nothing is learned; set one of them",
        )


def the_estimator_gives_what_is_learned(recipe: Recipe) -> Broken:
    learned = recipe.algorithm.meta_parameters
    kinds: dict[Kind, bool] = {
        "init": learned.init,
        "backbone": learned.backbone,
        "rates": recipe.adaptation.rule.learned != "none",
        "loss": bool(recipe.adaptation.loss.learned),
    }
    for refusal in refusals(
        recipe.algorithm.hypergradient.kind,
        [kind for kind, is_learned in kinds.items() if is_learned],
        has_proximal=recipe.adaptation.rule.proximal > 0.0,
    ):
        yield "algorithm.hypergradient.kind", refusal


def the_estimator_takes_the_step_weights(recipe: Recipe) -> Broken:
    if recipe.algorithm.step_weights != "last" and recipe.adaptation.num_steps > 1:
        refusal = step_weights_refusal(recipe.algorithm.hypergradient.kind)
        if refusal is not None:
            yield "algorithm.step_weights", f"{recipe.algorithm.step_weights}; {refusal}"


def finite_differences_need_digits(recipe: Recipe) -> Broken:
    compute = recipe.precision.compute
    is_half = compute in ("bfloat16", "float16")
    if isinstance(recipe.algorithm.hypergradient, FiniteDifferenceHypergradient) and is_half:
        yield (
            "precision.compute",
            f"{compute}; algorithm.hypergradient = finite_difference compares gradients at weights a little "
            f"apart, which {compute} rounds to the same; set it to float32",
        )


def a_difference_is_taken(recipe: Recipe) -> Broken:
    estimator = recipe.algorithm.hypergradient
    if (
        isinstance(estimator, FiniteDifferenceHypergradient)
        and estimator.epsilon != FiniteDifferenceHypergradient().epsilon
        and not (recipe.algorithm.meta_parameters.backbone or recipe.adaptation.loss.learned)
    ):
        yield (
            "algorithm.hypergradient.epsilon",
            f"{estimator.epsilon}; has no effect, since the initialisation alone is learned, for which "
            "finite_difference takes no difference; leave it out",
        )


def implicit_has_no_scales(recipe: Recipe) -> Broken:
    if recipe.algorithm.hypergradient.kind == "implicit" and recipe.precision.compute == "float16":
        yield (
            "precision.compute",
            "float16; algorithm.hypergradient = implicit has no scaling of what vanishes or overflows in it; "
            "set it to bfloat16 or float32",
        )


def implicit_needs_a_minimum(recipe: Recipe) -> Broken:
    rule = recipe.adaptation.rule
    is_implicit = recipe.algorithm.hypergradient.kind == "implicit"
    if is_implicit and isinstance(rule, AdamWRule) and rule.weight_decay != 0.0:
        yield (
            "adaptation.rule.weight_decay",
            f"{rule.weight_decay}; is decoupled under adamw, so no term of what is minimised, and "
            "algorithm.hypergradient = implicit takes the end of adaptation for a minimum; set it to 0, or "
            "take adam",
        )


def truncation_is_within_adaptation(recipe: Recipe) -> Broken:
    estimator = recipe.algorithm.hypergradient
    if isinstance(estimator, TruncatedHypergradient) and estimator.num_steps > recipe.adaptation.num_steps:
        yield (
            "algorithm.hypergradient.num_steps",
            f"{estimator.num_steps}; must be at most adaptation.num_steps = {recipe.adaptation.num_steps}",
        )


def snapshots_have_a_use(recipe: Recipe) -> Broken:
    kept, estimator = recipe.memory.snapshots.kind, recipe.algorithm.hypergradient.kind
    if kept != "all" and estimator not in SWEEPS:
        yield (
            "memory.snapshots.kind",
            f"{kept}; has no effect, since algorithm.hypergradient = {estimator} does not go back over the "
            f"inner steps one by one, as {', '.join(SWEEPS)} do; set it to all",
        )


def vmap_recomputes_nothing(recipe: Recipe) -> Broken:
    fast = recipe.adaptation.fast
    if not (isinstance(fast, FullFast) and fast.tasks == "vmap"):
        return
    asked = [name for name in ("recompute_blocks", "head_chunk") if getattr(recipe.memory, name)]
    for name in asked:
        yield (
            f"memory.{name}",
            f"{getattr(recipe.memory, name)}; adaptation.fast.tasks = vmap recomputes nothing; set that to "
            "loop",
        )
    if isinstance(recipe.model, GPTModel) and recipe.model.dropout > 0.0:
        yield (
            "model.dropout",
            f"{recipe.model.dropout}; is not drawn under adaptation.fast.tasks = vmap; set that to loop",
        )


def a_learned_smoothing_starts_above_zero(recipe: Recipe) -> Broken:
    loss = recipe.adaptation.loss
    if "label_smoothing" in loss.learned and loss.label_smoothing == 0.0:
        yield (
            "adaptation.loss.label_smoothing",
            "0.0; is learned as a logit, which has no value at 0; start above it, for example at 0.05",
        )
    yield from _repeated("adaptation.loss.learned", loss.learned)


def loss_parameters_are_learned(recipe: Recipe) -> Broken:
    if recipe.outer.lr_loss is not None and not recipe.adaptation.loss.learned:
        yield (
            "outer.lr_loss",
            f"{recipe.outer.lr_loss}; has no effect, since adaptation.loss.learned is empty; leave it out",
        )


def zero_has_two_stages(recipe: Recipe) -> Broken:
    sharding = recipe.sharding
    if isinstance(sharding, DeepSpeedZeroSharding) and sharding.stage == 3:
        yield (
            "sharding.stage",
            "3; shards the weights too, and DeepSpeed gathers them in hooks that autograd does not see: "
            "no hypergradient passes through them; set it to 2, or sharding.kind to sharded",
        )


def zero_keeps_float32(recipe: Recipe) -> Broken:
    if isinstance(recipe.sharding, DeepSpeedZeroSharding) and recipe.precision.compute == "float64":
        yield (
            "precision.compute",
            "float64; DeepSpeed keeps optimizer states and master weights in float32, and would round to it; "
            "set it to float32, or sharding.kind to replicated",
        )


def extra_keys_are_left_open(recipe: Recipe) -> Broken:
    if isinstance(recipe.sharding, DeepSpeedZeroSharding):
        for key, reason in refused_keys(recipe.sharding.extra):
            yield f"sharding.extra.{key}", f"is refused, since {reason}; leave it out"


def warmup_ends(recipe: Recipe) -> Broken:
    warmup_steps, num_steps = recipe.outer.schedule.warmup_steps, recipe.outer.num_steps
    if warmup_steps >= num_steps:
        yield (
            "outer.schedule.warmup_steps",
            f"{warmup_steps}; must be less than outer.num_steps = {num_steps}",
        )


def sequences_fit_the_context(recipe: Recipe) -> Broken:
    model = recipe.model
    if not isinstance(model, GPTModel):
        return
    lengths = {}
    for path, data in data_sets(recipe).items():
        inputs = facts_of(data).inputs
        if isinstance(inputs, TextInputs):
            key = "sequence_length" if isinstance(data, DocumentsData) else "inputs.length"
            lengths[f"{path}.{key}"] = inputs.length
    rehearsed = rehearsal_facts(recipe)
    if rehearsed is not None and isinstance(rehearsed.inputs, TextInputs):
        is_document = rehearsed.objective == "language_modelling"
        key = "sequence_length" if is_document else "inputs.length"
        lengths[f"adaptation.rehearsal.data.{key}"] = rehearsed.inputs.length
    for path, length in lengths.items():
        if length > model.context_length:
            yield (
                path,
                f"{length}; must be at most model.context_length = "
                f"{model.context_length}; shorten the sequences or raise model.context_length",
            )


def early_stopping_needs_validation(recipe: Recipe) -> Broken:
    if recipe.validation.early_stopping is not None and recipe.validation.every_steps is None:
        yield (
            "validation.early_stopping",
            "counts validations, and validation.every_steps is null, so there are none; "
            "set validation.every_steps, or validation.early_stopping to null",
        )


def rates_exist_for_each_evaluation_step(recipe: Recipe) -> Broken:
    if recipe.adaptation.rule.learned == "per_tensor_per_step" and recipe.evaluation.num_steps is not None:
        trained, evaluated = recipe.adaptation.num_steps, recipe.evaluation.num_steps
        if evaluated > trained:
            yield (
                "evaluation.num_steps",
                f"{evaluated}; adaptation.rule.learned = per_tensor_per_step has rates for "
                f"adaptation.num_steps = {trained} steps only; lower it, or learn per_tensor rates",
            )


def pretrained_baseline_needs_pretrain(recipe: Recipe) -> Broken:
    if "pretrained" in (recipe.evaluation.baselines or ()) and recipe.pretrain is None:
        yield (
            "evaluation.baselines",
            "'pretrained' needs a pretrain section, and pretrain is null; remove it from the list",
        )


def baselines_differ(recipe: Recipe) -> Broken:
    yield from _repeated("evaluation.baselines", recipe.evaluation.baselines or ())


def tracking_uri_has_no_secret(recipe: Recipe) -> Broken:
    tracking = recipe.tracking
    if isinstance(tracking, MLflowTracking) and tracking.uri is not None and has_credentials(tracking.uri):
        yield (
            "tracking.uri",
            "holds a user name, password or token (not shown), and a recipe is stored with each run; "
            "remove it, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
            "or MLFLOW_TRACKING_TOKEN, in the environment",
        )


def data_urls_have_no_secret(recipe: Recipe) -> Broken:
    for path, url in data_urls(recipe).items():
        if has_credentials(url):
            yield (
                path,
                "holds a user name, password or token (not shown), and a recipe is stored with each run; "
                "remove it, and give the credentials in the file system's own settings or environment "
                "variables",
            )


def shards_divide_the_ranks(recipe: Recipe) -> Broken:
    sharding, launcher = recipe.sharding, recipe.launcher
    size = sharding.shard_size if isinstance(sharding, ShardedSharding) else None
    num_hosts = 1 if launcher.hosts is None else launcher.hosts.num_hosts
    if size is not None and num_hosts * launcher.num_processes % size:
        of_hosts = "" if launcher.hosts is None else f" on each of {num_hosts} hosts"
        yield (
            "sharding.shard_size",
            f"{size}; must divide the number of ranks, launcher.num_processes = {launcher.num_processes}"
            f"{of_hosts}",
        )


def shards_are_of_a_shared_backbone(recipe: Recipe) -> Broken:
    if isinstance(recipe.sharding, ShardedSharding) and isinstance(recipe.adaptation.fast, FullFast):
        yield (
            "sharding.kind",
            "sharded divides the weights that tasks share, and with adaptation.fast.kind = full every task "
            "has a whole copy of all weights; set sharding.kind to replicated, or adaptation.fast to lora",
        )


def shards_are_gathered_again(recipe: Recipe) -> Broken:
    if isinstance(recipe.sharding, ShardedSharding) and not recipe.memory.recompute_blocks:
        yield (
            "memory.recompute_blocks",
            "false; with sharding.kind = sharded a block is computed again when it is differentiated, or its "
            "whole weights would be kept until then; set it to true, or sharding.kind to replicated",
        )


def fewer_hosts_are_not_more(recipe: Recipe) -> Broken:
    hosts = recipe.launcher.hosts
    if hosts is not None and hosts.min_hosts is not None and hosts.min_hosts > hosts.num_hosts:
        yield (
            "launcher.hosts.min_hosts",
            f"{hosts.min_hosts}; must be at most launcher.hosts.num_hosts = {hosts.num_hosts}",
        )


def hosts_meet_at_one_of_them(recipe: Recipe) -> Broken:
    hosts = recipe.launcher.hosts
    if hosts is None:
        return
    path, shown = "launcher.hosts.endpoint", repr(without_credentials(hosts.endpoint))
    host, _, port = hosts.endpoint.rpartition(":")
    if not re.fullmatch(r"\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+", host) or not re.fullmatch("[0-9]+", port):
        yield path, f"{shown}; must be host:port, for example node-0:29400"
    elif not 1 <= int(port) <= 65535:
        yield path, f"{shown}; the port must be from 1 to 65535, for example 29400"
    elif host in ("0.0.0.0", "[::]", "localhost"):
        yield path, f"{shown}; is another machine on each host; name one that all of them reach"


RULES: tuple[Callable[[Recipe], Broken], ...] = (
    heads_divide_the_width,
    ways_and_shots_are_given,
    variable_ways_rise,
    kept_labels_fit,
    windows_hold_a_task,
    images_are_distorted,
    parts_are_alike,
    model_reads_the_data,
    models_fit_the_objective,
    regression_has_no_classes,
    pretrain_needs_gpt,
    pretrain_warmup_ends,
    pretrain_splits_differ,
    lora_needs_gpt,
    lora_targets_differ,
    lora_targets_exist,
    lora_rank_is_low,
    nesterov_needs_momentum,
    proximal_needs_a_second_step,
    rates_are_learned,
    tuning_rates_differ,
    rehearsal_has_data,
    rehearsal_has_an_effect,
    the_estimator_takes_outer_rehearsal,
    full_adaptation_has_no_backbone,
    something_is_learned,
    the_estimator_gives_what_is_learned,
    the_estimator_takes_the_step_weights,
    finite_differences_need_digits,
    a_difference_is_taken,
    implicit_has_no_scales,
    implicit_needs_a_minimum,
    truncation_is_within_adaptation,
    snapshots_have_a_use,
    vmap_recomputes_nothing,
    a_learned_smoothing_starts_above_zero,
    loss_parameters_are_learned,
    zero_has_two_stages,
    zero_keeps_float32,
    extra_keys_are_left_open,
    warmup_ends,
    sequences_fit_the_context,
    early_stopping_needs_validation,
    rates_exist_for_each_evaluation_step,
    pretrained_baseline_needs_pretrain,
    baselines_differ,
    shards_divide_the_ranks,
    shards_are_of_a_shared_backbone,
    shards_are_gathered_again,
    fewer_hosts_are_not_more,
    hosts_meet_at_one_of_them,
    tracking_uri_has_no_secret,
    data_urls_have_no_secret,
)


def broken_rules(recipe: Recipe) -> list[tuple[str, str]]:
    """`(path, text)` of every broken rule among those whose values could all be read."""
    broken: list[tuple[str, str]] = []
    for rule in RULES:
        try:
            broken.extend(rule(recipe))
        except (Unreadable, UnknownTaskError):
            continue
    return broken


def _repeated(path: str, values: tuple[str, ...]) -> Broken:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            yield path, f"'{value}' is listed twice; list it once"
        seen.add(value)


def _kind_at(recipe: Recipe, path: str) -> str:
    if path == "data":
        return recipe.data.kind
    rehearsal = recipe.adaptation.rehearsal
    return "documents" if rehearsal is None or rehearsal.data is None else rehearsal.data.kind


def _described(inputs: ImageInputs | ArrayInputs | TextInputs) -> str:
    match inputs:
        case ImageInputs(size=size, channels=channels):
            return f"{size} x {size} images of {channels} channel{'s' if channels > 1 else ''}"
        case ArrayInputs(shape=shape):
            return f"arrays of shape {list(shape)}"
        case TextInputs(length=length):
            return f"texts of {length} tokens"
