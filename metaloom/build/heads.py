"""A recipe's linear head, fitted to each task's features."""

from __future__ import annotations

from metaloom.build.model import task_output
from metaloom.engine.algorithms.linear_head import LinearHead
from metaloom.engine.backbone import Backbone
from metaloom.engine.heads.base import HeadSolver
from metaloom.engine.heads.logistic import LogisticSolver
from metaloom.engine.heads.parameters import HeadParameters
from metaloom.engine.heads.ridge import RidgeSolver
from metaloom.engine.heads.svm import SvmSolver
from metaloom.recipe import LogisticAlgorithm, Recipe, RidgeAlgorithm, SVMAlgorithm
from metaloom.recipe.tasks import task_facts


def build_linear_head(
    recipe: Recipe, section: RidgeAlgorithm | LogisticAlgorithm | SVMAlgorithm, backbone: Backbone
) -> LinearHead:
    """The head that `section` describes, on the features of a model."""
    num_outputs = task_facts(recipe).num_outputs
    assert num_outputs is not None, "a rule of the recipe has seen to it"
    bias = section.bias if isinstance(section, RidgeAlgorithm) else 0.0
    return LinearHead(
        backbone,
        _build_solver(section),
        HeadParameters(section.regulariser, section.scale, bias, section.learned),
        task_output(recipe).criterion,
        num_outputs,
    )


def _build_solver(section: RidgeAlgorithm | LogisticAlgorithm | SVMAlgorithm) -> HeadSolver:
    match section:
        case RidgeAlgorithm():
            return RidgeSolver()
        case LogisticAlgorithm(num_steps=num_steps):
            return LogisticSolver(num_steps)
        case SVMAlgorithm():
            return SvmSolver()
