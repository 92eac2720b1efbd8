"""Rules about tasks and data, and the models that read them."""

from metaloom.credentials import has_credentials
from metaloom.recipe.adaptation import SoftPromptFast
from metaloom.recipe.data import (
    ArrayInputs,
    ClassesData,
    DocumentsData,
    ImageInputs,
    Loading,
    TextInputs,
)
from metaloom.recipe.model import ConfigError, CustomModel, HuggingFaceModel, MLPModel, SingleLayerModel
from metaloom.recipe.rules.base import Broken, Rule
from metaloom.recipe.schema import Recipe
from metaloom.recipe.synthetic import Equivariant1dTask, Equivariant2dTask, SyntheticData
from metaloom.recipe.tasks import (
    context_length,
    data_sets,
    data_urls,
    facts_of,
    rehearsal_facts,
    task_facts,
)

READS = {"conv4": "image", "mlp": "array", "single_layer": "array", "gpt": "text"}
# Keys of `loading` that say how files are read.
FOR_FILES = ("max_broken", "cache_folder", "cache_gib", "num_connections", "num_attempts", "timeout_s")


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
                "since every class has a support example",
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
                    f"varying classes; set {path}.labels to shuffled, or {path}.{name} to null",
                )


def windows_hold_a_task(recipe: Recipe) -> Broken:
    for path, data in data_sets(recipe).items():
        if isinstance(data, ClassesData) and data.window is not None:
            ways = facts_of(data).num_outputs
            if ways is not None and data.window.num_classes < ways:
                yield (
                    f"{path}.window.num_classes",
                    f"{data.window.num_classes}; must be at least the {ways} classes of a task, and several "
                    "times that for variety",
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
                "learns one of them",
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
    reads = _what_is_read(recipe)
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
                f"{inputs.kind}s; set model.kind to {model}, or take other data",
            )
    shown = given["data"]
    if rehearsed is not None and not isinstance(rehearsed.inputs, TextInputs) and rehearsed.inputs != shown:
        yield (
            "adaptation.rehearsal.data.inputs",
            f"{_described(rehearsed.inputs)}; the model is shown "
            f"{_described(shown)} by data; "
            "make them the same",
        )


def _what_is_read(recipe: Recipe) -> str:
    model = recipe.model
    if isinstance(model, CustomModel):
        return task_facts(recipe).inputs.kind
    if not isinstance(model, HuggingFaceModel):
        return READS[model.kind]
    try:
        return model.reads
    except ConfigError:  # of another machine: where it is trained tells
        return task_facts(recipe).inputs.kind


def tasks_of_transformers_fit(recipe: Recipe) -> Broken:
    model, objective = recipe.model, task_facts(recipe).objective
    if not isinstance(model, HuggingFaceModel):
        return
    if model.task == "feature-extraction" and objective == "language_modelling":
        yield "model.task", f"{model.task}; the tasks are {objective}; set it to causal-lm"
    elif model.task == "feature-extraction" or objective == "regression":
        return
    elif (model.task == "causal-lm") != (objective == "language_modelling"):
        wanted = "causal-lm" if objective == "language_modelling" else "sequence-classification"
        yield "model.task", f"{model.task}; the tasks are {objective}; set it to {wanted}"


def models_fit_the_objective(recipe: Recipe) -> Broken:
    objective = task_facts(recipe).objective
    if objective != "regression" or isinstance(recipe.model, MLPModel | SingleLayerModel | CustomModel):
        return
    if isinstance(recipe.model, HuggingFaceModel):
        if recipe.model.task != "feature-extraction":
            yield (
                "model.task",
                f"{recipe.model.task} tells classes apart or models text, and the targets are numbers; "
                "set it to feature-extraction",
            )
    else:
        yield (
            "model.kind",
            f"{recipe.model.kind} tells classes apart or models text, and the targets are numbers; set "
            "model.kind to mlp",
        )


def parts_of_texts_are_of_texts(recipe: Recipe) -> Broken:
    model = recipe.model
    kind = task_facts(recipe).inputs.kind
    if not isinstance(model, CustomModel) or kind == "text":
        return
    for name in ("embedding", "vocabulary", "context_length"):
        given = getattr(model, name)
        if given != CustomModel.model_fields[name].default:
            yield (
                f"model.{name}",
                f"{given}; has no effect, since the tasks' inputs are {kind}s and no texts; leave it out",
            )


def sequences_fit_the_context(recipe: Recipe) -> Broken:
    longest = context_length(recipe)
    if longest is None:
        return
    is_own = not isinstance(recipe.model, HuggingFaceModel)
    name = "model.context_length" if is_own else "the positions that model.hf has"
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
    fast = recipe.adaptation.fast
    num_prompt = fast.num_tokens if isinstance(fast, SoftPromptFast) else 0
    behind = f" - adaptation.fast.num_tokens = {num_prompt}" if num_prompt else ""
    for path, length in lengths.items():
        if length + num_prompt > longest:
            yield (
                path,
                f"{length}; must be at most {name} = {longest}{behind}; shorten the sequences"
                + (f" or raise {name}" if is_own else ""),
            )


def filters_fit_into_inputs(recipe: Recipe) -> Broken:
    for path, data in data_sets(recipe).items():
        if not isinstance(data, SyntheticData):
            continue
        task = data.task
        if isinstance(task, Equivariant1dTask | Equivariant2dTask):
            key = "length" if isinstance(task, Equivariant1dTask) else "size"
            room = task.input_shape[-1]
            if task.filter_size > room:
                yield (
                    f"{path}.task.filter_size",
                    f"{task.filter_size}; must be at most {path}.task.{key} = {room}",
                )
        if isinstance(task, Equivariant2dTask) and task.turns == 8 and task.filter_size != 3:
            yield (
                f"{path}.task.filter_size",
                f"{task.filter_size}; must be 3, since {path}.task.turns is 8: filters are turned by 45 "
                "degrees",
            )


def every_group_has_a_task(recipe: Recipe) -> Broken:
    for path, data in data_sets(recipe).items():
        if not isinstance(data, SyntheticData):
            continue
        for split in ("train", "validation", "test"):
            count = getattr(data, f"num_{split}_tasks")
            if count is not None and count < len(data.groups):
                yield (
                    f"{path}.num_{split}_tasks",
                    f"{count}; leaves groups of {path}.task without one, which has {len(data.groups)}; raise "
                    "it, or set it to null",
                )


def reading_is_for_files(recipe: Recipe) -> Broken:
    if data_urls(recipe):
        return
    plain = Loading()
    for name in FOR_FILES:
        value = getattr(recipe.loading, name)
        if value != getattr(plain, name):
            yield (
                f"loading.{name}",
                f"{value}; has no effect, since synthetic data are computed, and no files are read; leave it "
                "out",
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


RULES: tuple[Rule, ...] = (
    ways_and_shots_are_given,
    variable_ways_rise,
    kept_labels_fit,
    windows_hold_a_task,
    images_are_distorted,
    parts_are_alike,
    model_reads_the_data,
    models_fit_the_objective,
    tasks_of_transformers_fit,
    parts_of_texts_are_of_texts,
    sequences_fit_the_context,
    filters_fit_into_inputs,
    every_group_has_a_task,
    reading_is_for_files,
    data_urls_have_no_secret,
)
