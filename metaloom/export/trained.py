"""A meta-trained model in memory: apart from its run, ready to predict and to adapt.

Shape letters: T tasks, N examples, L tokens, V outputs (classes, vocabulary, numbers).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from metaloom.build import Choices, build_adapter, build_algorithm, build_model, build_unroll
from metaloom.engine.adapters.base import BACKBONE, INIT
from metaloom.engine.algorithms.base import Algorithm
from metaloom.engine.algorithms.erm import Erm
from metaloom.engine.algorithms.posterior import Posterior
from metaloom.engine.learner import TaskBatch
from metaloom.engine.precision import Precision
from metaloom.engine.sharding.replicated import Replicated
from metaloom.engine.unroll import Unroll
from metaloom.errors import CapabilityError, CheckpointError
from metaloom.recipe import HuggingFaceModel, Memory, Recipe, UnrolledHypergradient
from metaloom.result import result_parameters, stored_pretraining, stored_result
from metaloom.run_folder import RunFolder

MODEL = "model."
_CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run's result, computed with on one process.

    Attributes:
        recipe: of the run, but for what has to do with training alone.
        step: the outer step that it is of.
        module: the network. Its weights are those that tasks share and, where fast weights are weights of its
            own, those that adaptation starts at.
        algorithm: how tasks are solved.
        meta: the parameters that it is given: what was meta-learned, and with inner steps all that adaptation
            starts at, learned or not.
        unroll: the inner problem; None where adaptation takes no steps.
        num_steps: inner steps that the start has already gone; 0 but for what was adapted.
    """

    recipe: Recipe
    step: int
    module: nn.Module
    algorithm: Algorithm
    meta: dict[str, Tensor]
    unroll: Unroll | None
    num_steps: int = 0

    def outputs(self, inputs: Tensor) -> Tensor:
        """What the model says where adaptation starts, `[N, ..., V]`: logits, or numbers of a regression.

        Args:
            inputs: images `[N, channels, height, width]`, from 0 to 1, or uint8 `[N, height, width,
                channels]`; arrays `[N, ...]`; tokens `[N, L]`.

        Returns:
            At least float32.

        Raises:
            CapabilityError: what is said of an input depends on more of its task.
        """
        of_task = Precision(self.recipe.precision.compute).on_device(inputs, _CPU)[None]
        # Of what is Gaussian, the means.
        algorithm = self.algorithm.inner if isinstance(self.algorithm, Posterior) else self.algorithm
        with torch.no_grad():
            if self.unroll is not None:
                learner = self.unroll.learner
                found = learner.outputs(self.meta, learner.init(self.meta, 1), of_task, self.num_steps)
            elif type(algorithm) is Erm:
                found = algorithm.model.outputs(self.meta, of_task)
            else:
                raise CapabilityError(
                    f"algorithm.kind: {self.recipe.algorithm.kind} predicts from more of a task than an "
                    "input: take `curve`, with a batch of tasks."
                )
        return found[0].to(torch.promote_types(found.dtype, torch.float32))

    def curve(self, batch: TaskBatch, *, num_steps: int) -> dict[str, Tensor]:
        """The query loss and scores of tasks after 0 .. `num_steps` steps of adaptation, `[T, num_steps + 1]`
        each."""
        return self.algorithm.curve(self.meta, batch, num_steps=num_steps)

    def start(self) -> dict[str, Tensor]:
        """The fast weights that adaptation starts at, by name.

        Raises:
            CapabilityError: adaptation takes no steps.
        """
        if self.unroll is None:
            raise CapabilityError(f"algorithm.kind: {self.recipe.algorithm.kind} has no fast weights.")
        with torch.no_grad():
            return {name: value[0].clone() for name, value in self.unroll.learner.init(self.meta, 1).items()}

    def weights(self) -> dict[str, Tensor]:
        """All of the network's own weights, by their names in it; of tied ones the first name."""
        return {name: value.detach() for name, value in self.module.named_parameters()}

    def moved(self, fast: Mapping[str, Tensor], *, num_steps: int) -> Trained:
        """The same, but starting at adapted fast weights.

        Args:
            fast: by name, without a dim of tasks.
            num_steps: inner steps that they have gone.
        """
        adaptation = self.recipe.adaptation
        # A head that starts at zero in every task starts where this task has brought it.
        learned = adaptation.head.model_copy(update={"init": "learned"})
        recipe = self.recipe.model_copy(
            update={"adaptation": adaptation.model_copy(update={"head": learned})}
        )
        meta = self.meta | {INIT + name: value.detach().clone() for name, value in fast.items()}
        return rebuilt(recipe, self.step, self.weights(), meta, num_steps=num_steps)


def rebuilt(
    recipe: Recipe,
    step: int,
    weights: Mapping[str, Tensor],
    meta: Mapping[str, Tensor],
    *,
    num_steps: int = 0,
) -> Trained:
    """A result from its tensors.

    Args:
        weights: the network's own, by name; those that `meta` has too are taken from there.
        meta: as in `Trained`.

    Raises:
        CheckpointError: tensors are missing, or have other shapes.
    """
    recipe = _alone(recipe)
    model = build_model(recipe, _CPU, Replicated())
    own = _own_weights(model.values(), weights, meta)
    model.load(own)
    algorithm = build_algorithm(recipe, model, Choices(), _CPU)
    unroll, expected = None, algorithm.meta_parameters() | algorithm.tracked()
    if recipe.maml is not None:
        rule = recipe.adaptation.rule
        adapter = build_adapter(recipe, model, Choices())
        unroll = build_unroll(recipe, adapter, rate=rule.lr, grain=rule.learned)
        expected = adapter.meta_parameters(init=True, backbone=False) | expected
    _require(expected, meta, what="the parameters")
    return Trained(recipe, step, model.module, algorithm, dict(meta), unroll, num_steps)


def result_of_run(
    folder: RunFolder, recipe: Recipe, step: int | None, warn: Callable[[str], None]
) -> Trained:
    """A run's result: of the step with the best validation, or the newest where there was no
    validation. Needs no data.

    Args:
        step: another step, whose checkpoint is kept.
        warn: told of checkpoints that were passed over.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    checkpoint = stored_result(recipe, folder, step, warn)
    alone = _alone(recipe, keeps_source=True)
    model = build_model(alone, _CPU, Replicated())
    if recipe.pretrain is not None:
        model.load(stored_pretraining(recipe, folder, recipe.pretrain.num_steps, warn))
    algorithm = build_algorithm(alone, model, Choices(), _CPU)
    meta = result_parameters(recipe, algorithm, checkpoint.tensors, torch.clone)
    if recipe.maml is not None:
        # What adaptation starts at is taken along, learned or not.
        adapter = build_adapter(alone, model, Choices())
        meta = adapter.meta_parameters(init=True, backbone=False) | meta
    return rebuilt(recipe, checkpoint.step, model.values(), meta)


def _alone(recipe: Recipe, *, keeps_source: bool = False) -> Recipe:
    """The recipe without what has to do with training, or its machine, alone.

    Args:
        keeps_source: whether weights that the recipe names are read; else they are at hand.
    """
    changes: dict[str, object] = {"memory": Memory()}
    if not keeps_source:
        is_folder = isinstance(recipe.model, HuggingFaceModel)
        without: dict[str, object] = {"start": "random"} if is_folder else {"weights": None}
        changes["model"] = recipe.model.model_copy(update=without)
    if recipe.maml is not None:
        exact = {"hypergradient": UnrolledHypergradient()}
        changes["algorithm"] = recipe.maml.model_copy(update=exact)
    return recipe.model_copy(update=changes)


def _own_weights(
    values: Mapping[str, Tensor], weights: Mapping[str, Tensor], meta: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The network's weights: what is meta-learned of them, and the others."""
    found: dict[str, Tensor] = {}
    for name in values:
        for source, key in ((weights, name), (meta, INIT + name), (meta, BACKBONE + name)):
            if key in source:
                found[name] = source[key]
    _require(values, found, what="the network's weights")
    return found


def _require(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], *, what: str) -> None:
    problems = [
        f"  {name}: {'missing' if name not in found else f'shape {list(found[name].shape)}'}, and "
        f"{list(value.shape)} is expected"
        for name, value in expected.items()
        if name not in found or found[name].shape != value.shape
    ]
    if problems:
        raise CheckpointError(f"{what} are not those of this recipe:\n" + "\n".join(problems))
