"""From a recipe to the parts of the engine."""

from metaloom.build.adaptation import build_adapter, build_rule, build_unroll
from metaloom.build.algorithm import (
    build_algorithm,
    build_hypergradient,
    build_maml,
    build_snapshots,
    initial_meta,
)
from metaloom.build.batches import as_tensors, task_batch
from metaloom.build.choices import Choices, Tasks
from metaloom.build.model import Output, build_model, build_sharding, model_structure, task_output
from metaloom.build.outer import ordinary_settings, outer_settings
from metaloom.build.set_learners import build_in_context

__all__ = [
    "Choices",
    "Output",
    "Tasks",
    "as_tensors",
    "build_adapter",
    "build_algorithm",
    "build_hypergradient",
    "build_in_context",
    "build_maml",
    "build_model",
    "build_rule",
    "build_sharding",
    "build_snapshots",
    "build_unroll",
    "initial_meta",
    "model_structure",
    "ordinary_settings",
    "outer_settings",
    "task_batch",
    "task_output",
]
