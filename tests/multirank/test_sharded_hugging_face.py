"""A Llama in shards, with norms and embeddings of each task's own: language models, and features of texts."""

from __future__ import annotations

import torch
from torch import Tensor

from metaloom.engine.adapters.lora import LoraAdapter
from metaloom.engine.adapters.model import Shards, Structure
from metaloom.engine.hypergradients.base import Hypergradient
from metaloom.engine.hypergradients.mixed_mode import MixedMode
from metaloom.engine.hypergradients.rematerialized import Rematerialized
from metaloom.engine.inner_loops.rates import Rates
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import Learner, TaskBatch
from metaloom.engine.precision import Precision
from metaloom.engine.sharding.sharded import Sharded
from metaloom.engine.unroll import Unroll
from metaloom.models.hugging_face import OfTransformers
from tests.multirank.processes import run_ranks
from tests.multirank.sharded_problems import full, in_shards
from tests.numerics.hugging_face_problems import examples, small_model, structure_of
from tests.numerics.problems import Problem, last, perturbed, relative_error

NUM_TASKS = 2
CASES: tuple[tuple[str, Hypergradient], ...] = (
    ("Llama", Rematerialized()),
    ("Llama", MixedMode()),
    ("Llama, features", MixedMode()),
)


def adapter_of(model: OfTransformers, shards: Shards | None = None) -> LoraAdapter:
    """Beside LoRA the embedding, a norm in each block and the last one are fast in whole."""
    return LoraAdapter(
        model,
        targets=["q_proj", "down_proj"],
        rank=2,
        alpha=4,
        generator=torch.Generator().manual_seed(3),
        whole_modules=["embed_tokens", "input_layernorm", "norm"],
        structure=structure_of(model),
        shards=shards,
    )


def problem_of(case: str, tasks: range) -> tuple[Problem, OfTransformers]:
    model = small_model(case)
    adapter = adapter_of(model)
    unroll = Unroll(Learner(adapter, Precision("float64")), Sgd(), Rates(0.2, "none", 2), last(2))
    meta = perturbed(adapter.meta_parameters(init=True, backbone=True), scale=0.3)
    support, query = (
        {name: value[tasks.start : tasks.stop] for name, value in part.items()}
        for part in (examples(case, NUM_TASKS, 3, seed=4), examples(case, NUM_TASKS, 2, seed=5))
    )
    return Problem(unroll, meta, TaskBatch(tuple(tasks), support, query), model), model


def differentiated() -> list[dict[str, Tensor]]:
    """The whole hypergradient of all ranks' tasks, of each case."""
    results = []
    for case, estimator in CASES:
        sharding = Sharded(torch.device("cpu"))
        whole, model = problem_of(case, range(sharding.rank, sharding.rank + 1))

        def adapt(structure: Structure, shards: Shards, model: OfTransformers = model) -> LoraAdapter:
            return adapter_of(model, shards)

        problem = in_shards(whole, sharding, structure=structure_of(model), adapt=adapt)
        found = estimator.meta_gradient(problem.unroll, problem.meta, problem.batch)
        gradient = sharding.sum_gradients(found.gradient)
        results.append({name: full(sharding, name, value) for name, value in gradient.items()})
    return results


def test_norms_and_embeddings_of_a_llama_in_shards_are_adapted_as_of_one_process() -> None:
    on_ranks = run_ranks(2, differentiated)
    for position, (case, _) in enumerate(CASES):
        problem, _ = problem_of(case, range(NUM_TASKS))
        expected = MixedMode().meta_gradient(problem.unroll, problem.meta, problem.batch).gradient
        assert {name.rpartition(".")[0].rpartition(".")[2] for name in expected} >= {"norm", "embed_tokens"}
        for rank in on_ranks:
            gradient = rank[position]
            assert gradient.keys() == expected.keys()
            found, wanted = (
                torch.cat([values[name].flatten() for name in expected]) for values in (gradient, expected)
            )
            # Its norms compute in float32.
            assert relative_error(found, wanted) < 1e-5
