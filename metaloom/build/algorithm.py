"""The algorithm of a recipe, and the estimator of its hypergradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metaloom.build.adaptation import build_adapter, build_unroll
from metaloom.build.choices import Choices
from metaloom.build.heads import build_linear_head
from metaloom.build.imported import imported
from metaloom.build.model import model_structure, task_output
from metaloom.build.regularisation import regularised
from metaloom.build.set_learners import build_in_context, build_set_learner
from metaloom.build.unlabelled import build_unlabelled
from metaloom.engine.adapters.base import BACKBONE
from metaloom.engine.algorithms.base import Algorithm
from metaloom.engine.algorithms.custom import Factory, Parts
from metaloom.engine.algorithms.maml import Maml, MultiStepAnnealing
from metaloom.engine.algorithms.protonet import Protonet
from metaloom.engine.backbone import Backbone
from metaloom.engine.capabilities import PER_STEP
from metaloom.engine.choice import EXACT_AND_FLAT
from metaloom.engine.hypergradients.base import Hypergradient
from metaloom.engine.hypergradients.finite_difference import FiniteDifference
from metaloom.engine.hypergradients.first_order import FirstOrder
from metaloom.engine.hypergradients.implicit import Implicit
from metaloom.engine.hypergradients.mixed_mode import MixedMode
from metaloom.engine.hypergradients.rematerialized import Rematerialized
from metaloom.engine.hypergradients.reptile import Reptile
from metaloom.engine.hypergradients.solvers import ConjugateGradient, Neumann, Solver
from metaloom.engine.hypergradients.truncated import Truncated
from metaloom.engine.hypergradients.unrolled import Unrolled
from metaloom.engine.precision import Precision
from metaloom.engine.sharding.base import Sharding
from metaloom.engine.snapshots import Binomial, HostMemory, KeepAll, SnapshotPlan
from metaloom.engine.stopping import StopPoints
from metaloom.engine.unroll import Unroll
from metaloom.errors import CapabilityError
from metaloom.recipe import (
    AllSnapshots,
    ARMBNAlgorithm,
    ARMCMLAlgorithm,
    AttentionLearnerAlgorithm,
    AutoHypergradient,
    BinomialSnapshots,
    CNPAlgorithm,
    ConjugateGradientSolver,
    CustomAlgorithm,
    ERMAlgorithm,
    FiniteDifferenceHypergradient,
    FirstOrderHypergradient,
    HostSnapshots,
    ImplicitHypergradient,
    InContextAlgorithm,
    LogisticAlgorithm,
    MAMLAlgorithm,
    MixedModeHypergradient,
    MultiTaskAlgorithm,
    NeumannSolver,
    ProtonetAlgorithm,
    Recipe,
    RecurrentLearnerAlgorithm,
    RematerializedHypergradient,
    ReptileHypergradient,
    RidgeAlgorithm,
    SVMAlgorithm,
    TruncatedHypergradient,
    UnrolledHypergradient,
)
from metaloom.recipe.schema import maml_of
from metaloom.recipe.tasks import task_facts
from metaloom.weights import HeldModel


def build_algorithm(
    recipe: Recipe,
    model: HeldModel,
    choices: Choices,
    device: torch.device,
    *,
    sharding: Sharding | None = None,
    points: StopPoints | None = None,
) -> Algorithm:
    """The algorithm of a recipe, under its regularisation.

    Args:
        sharding: what the ranks that compute together agree by; None for a rank alone.
        points: where its inner loop may be broken off; None for nowhere.
    """
    return regularised(recipe, _plain(recipe, model, choices, device, sharding=sharding, points=points))


def _plain(
    recipe: Recipe,
    model: HeldModel,
    choices: Choices,
    device: torch.device,
    *,
    sharding: Sharding | None,
    points: StopPoints | None,
) -> Algorithm:
    match recipe.algorithm:
        case MAMLAlgorithm():
            maml = recipe.algorithm
            return build_maml(recipe, maml, model, choices, device, sharding=sharding, points=points)
        case ProtonetAlgorithm():
            backbone = build_backbone(recipe, model, chunk=recipe.algorithm.feature_chunk)
            return Protonet(backbone, num_classes(recipe))
        case RidgeAlgorithm() | LogisticAlgorithm() | SVMAlgorithm():
            backbone = build_backbone(recipe, model, chunk=recipe.algorithm.feature_chunk)
            return build_linear_head(recipe, recipe.algorithm, backbone)
        case CNPAlgorithm() | AttentionLearnerAlgorithm() | RecurrentLearnerAlgorithm():
            return build_set_learner(recipe, recipe.algorithm, build_backbone(recipe, model))
        case InContextAlgorithm():
            return build_in_context(recipe, model)
        case CustomAlgorithm():
            return build_custom(recipe, recipe.algorithm, model, choices, points=points)
        case ERMAlgorithm() | MultiTaskAlgorithm() | ARMCMLAlgorithm() | ARMBNAlgorithm():
            return build_unlabelled(recipe, recipe.algorithm, model, device)


def build_maml(
    recipe: Recipe,
    section: MAMLAlgorithm,
    model: HeldModel,
    choices: Choices,
    device: torch.device,
    *,
    sharding: Sharding | None = None,
    points: StopPoints | None = None,
) -> Maml:
    """An algorithm that adapts by inner steps, with the estimator of its hypergradient; `sharding` and
    `points` as in `build_algorithm`."""
    rule, learned = recipe.adaptation.rule, section.meta_parameters
    adapter = build_adapter(recipe, model, choices)
    unroll = build_unroll(recipe, adapter, rate=rule.lr, grain=rule.learned, points=points)
    algorithm = Maml(
        unroll,
        build_hypergradient(recipe, choices, device, sharding=sharding),
        init=learned.init,
        backbone=learned.backbone,
        annealing=_annealing(recipe, section),
        first_order=FirstOrder(build_snapshots(recipe, device)) if section.first_order_steps else None,
        num_first_order=section.first_order_steps,
    )
    _require_effects(section, algorithm)
    return algorithm


def _require_some(learned: Mapping[str, Tensor]) -> None:
    if not learned:
        raise CapabilityError(
            "algorithm.meta_parameters: nothing is learned: what adaptation.fast adapts starts at fixed "
            "values, and no weight that tasks share, rate or loss parameter is asked for; set backbone to "
            "true, or adaptation.head.init to learned."
        )


def _require_effects(section: MAMLAlgorithm, algorithm: Maml) -> None:
    """Passes where what the recipe asks to be learned is there, which the model's own parameters decide.

    Raises:
        CapabilityError: it is not.
    """
    learned, unroll = algorithm.meta_parameters(), algorithm.unroll
    _require_some(learned)
    shared = [name for name in learned if name.startswith(BACKBONE) and not name.startswith(PER_STEP)]
    if section.meta_parameters.backbone and not shared:
        raise CapabilityError(
            "algorithm.meta_parameters.backbone: given; has no effect, since adaptation.fast adapts every "
            "weight and leaves none to share: set it to false, or adapt fewer."
        )
    fast = set(unroll.learner.init({}, 1))
    if unroll.head_first is not None and fast <= unroll.head_first.names:
        raise CapabilityError(
            "adaptation.head.first_steps: has no effect, since adaptation.fast adapts nothing but the head: "
            "leave it out."
        )


def _annealing(recipe: Recipe, section: MAMLAlgorithm) -> MultiStepAnnealing | None:
    if section.step_weights != "annealed":
        return None
    return MultiStepAnnealing(section.annealing_steps or max(1, recipe.outer.num_steps // 2))


def build_custom(
    recipe: Recipe,
    section: CustomAlgorithm,
    model: HeldModel,
    choices: Choices,
    *,
    points: StopPoints | None = None,
) -> Algorithm:
    """The algorithm that a function outside of metaloom builds; `points` as in `build_algorithm`.

    Raises:
        CapabilityError: there is no such function, or what it returns is no algorithm.
    """
    factory: Factory = imported(section.factory, key="algorithm.factory")
    rule, facts = recipe.adaptation.rule, task_facts(recipe)
    adapter = build_adapter(recipe, model, choices)
    parts = Parts(
        backbone=build_backbone(recipe, model),
        unroll=build_unroll(recipe, adapter, rate=rule.lr, grain=rule.learned, points=points),
        num_classes=facts.num_outputs if facts.objective == "classification" else None,
        seed=recipe.seed,
        options=section.options,
    )
    algorithm = factory(parts)
    if not isinstance(algorithm, Algorithm):
        raise CapabilityError(
            f"algorithm.factory: {section.factory} returned a {type(algorithm).__name__}; it has to return a "
            "metaloom.engine.algorithms.base.Algorithm."
        )
    return algorithm


def build_backbone(recipe: Recipe, model: HeldModel, *, chunk: int | None = None) -> Backbone:
    """The model before its head, for algorithms that put something else in the head's place; `chunk` as in
    `Backbone`."""
    return Backbone(
        model.module,
        model_structure(model.module),
        task_output(recipe).head,
        Precision(recipe.precision.compute),
        recompute_blocks=recipe.memory.recompute_blocks,
        chunk=chunk,
    )


def num_classes(recipe: Recipe) -> int:
    """The classes of a task, at most."""
    facts = task_facts(recipe)
    assert facts.objective == "classification", "a rule of the recipe has seen to it"
    assert facts.num_outputs is not None
    return facts.num_outputs


def build_hypergradient(
    recipe: Recipe, choices: Choices, device: torch.device, *, sharding: Sharding | None = None
) -> Hypergradient:
    """The estimator with its options; `sharding` as in `build_algorithm`."""
    snapshots = build_snapshots(recipe, device)
    match maml_of(recipe).hypergradient:
        case AutoHypergradient():
            assert choices.estimator is not None, "auto is chosen before anything is built with it"
            return choices.estimator.build(snapshots)
        case RematerializedHypergradient():
            return Rematerialized(snapshots)
        case MixedModeHypergradient():
            return MixedMode(snapshots)
        case FirstOrderHypergradient():
            return FirstOrder(snapshots)
        case TruncatedHypergradient(num_steps=num_steps, by=by):
            return Truncated(snapshots, num_steps=num_steps, exact=EXACT_AND_FLAT[by]())
        case ImplicitHypergradient(solver=solver, damping=damping):
            return Implicit(_build_solver(solver, sharding), damping)
        case FiniteDifferenceHypergradient(epsilon=epsilon):
            return FiniteDifference(epsilon)
        case ReptileHypergradient():
            return Reptile()
        case UnrolledHypergradient():
            return Unrolled()


def build_snapshots(recipe: Recipe, device: torch.device) -> SnapshotPlan:
    """Which fast weights are kept.

    Raises:
        CapabilityError: they are to go to the host's memory, and are there already.
    """
    match recipe.memory.snapshots:
        case BinomialSnapshots(num_slots=num_slots):
            return Binomial(num_slots)
        case HostSnapshots():
            if device.type == "cpu":
                raise CapabilityError(
                    "memory.snapshots.kind: host; has no effect, since this run computes on a CPU, whose "
                    "memory is the host's: set it to all or binomial, or run on a GPU."
                )
            return HostMemory(device)
        case AllSnapshots():
            return KeepAll()


def _build_solver(solver: ConjugateGradientSolver | NeumannSolver, sharding: Sharding | None) -> Solver:
    match solver:
        case ConjugateGradientSolver():
            any_rank = sharding.any_rank if sharding is not None and sharding.is_lockstep else bool
            return ConjugateGradient(solver.num_iterations, solver.tolerance, any_rank)
        case NeumannSolver():
            return Neumann(solver.num_terms, solver.step_size)


def initial_meta(recipe: Recipe, unroll: Unroll) -> dict[str, Tensor]:
    """The meta-parameters that the recipe learns, at their initial values.

    Raises:
        CapabilityError: there are none.
    """
    learned = maml_of(recipe).meta_parameters
    meta = unroll.meta_parameters(init=learned.init, backbone=learned.backbone)
    _require_some(meta)
    return meta
