"""Every way to a hypergradient that a run can take, each on a small problem with all that it gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from metaloom.engine.adapters.base import Adapter
from metaloom.engine.adapters.model import Structure
from metaloom.engine.adapters.part import PartAdapter
from metaloom.engine.adapters.selection import head_parameters, norm_and_bias_parameters
from metaloom.engine.adapters.soft_prompt import SoftPromptAdapter
from metaloom.engine.hypergradients.base import Hypergradient
from metaloom.engine.hypergradients.finite_difference import FiniteDifference
from metaloom.engine.hypergradients.first_order import FirstOrder
from metaloom.engine.hypergradients.implicit import Implicit
from metaloom.engine.hypergradients.mixed_mode import MixedMode
from metaloom.engine.hypergradients.rematerialized import Rematerialized
from metaloom.engine.hypergradients.reptile import Reptile
from metaloom.engine.hypergradients.solvers import ConjugateGradient, Neumann
from metaloom.engine.hypergradients.truncated import Truncated
from metaloom.engine.hypergradients.unrolled import Unrolled
from metaloom.engine.inner_loops.adam import Adam
from metaloom.engine.inner_loops.base import InnerRule
from metaloom.engine.inner_loops.gradient_terms import GradientTerms
from metaloom.engine.inner_loops.rates import Grain
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.losses import SupportLoss
from metaloom.engine.precision import Scales
from metaloom.engine.snapshots import Binomial
from tests.numerics.msr_problems import msr_problem
from tests.numerics.problems import (
    CLIPPED,
    HEAVY,
    PLAIN,
    TOKENS,
    Problem,
    conv4_problem,
    gpt_problem,
    last,
    perturbed,
    small_gpt,
)

PULLED = Sgd(GradientTerms(proximal=0.3))
UNIFORM = (0.0, 0.5, 0.5)
Way = tuple[Hypergradient, Callable[[int], Problem]]


def gpt(
    rule: InnerRule = PLAIN, *, grain: Grain = "per_tensor", backbone: bool = True
) -> Callable[[int], Problem]:
    return lambda num_tasks: gpt_problem(
        step_weights=last(3),
        rule=rule,
        grain=grain,
        backbone=backbone,
        tied_embeddings=True,
        num_tasks=num_tasks,
        num_layers=2,
    )


def conv4(rule: InnerRule = PLAIN) -> Callable[[int], Problem]:
    return lambda num_tasks: conv4_problem(
        step_weights=UNIFORM, rule=rule, grain="per_element", num_tasks=num_tasks
    )


def part(rule: InnerRule = PLAIN, *, norms: bool = False) -> Callable[[int], Problem]:
    """The head of images' network, with norms and biases or alone."""

    def made(num_tasks: int) -> Problem:
        problem = conv4_problem(
            step_weights=UNIFORM, rule=rule, grain="per_element", num_tasks=num_tasks, norm="batch"
        )
        structure = Structure(tuple(f"blocks.{block}" for block in range(3)), "head")
        names = head_parameters(problem.model, structure, None)
        if norms:
            names = [*norm_and_bias_parameters(problem.model, norms=True, biases=False), *names]
        return with_adapter(problem, PartAdapter(problem.model, names=names, structure=structure))

    return made


def soft_prompt(rule: InnerRule = PLAIN) -> Callable[[int], Problem]:
    def made(num_tasks: int) -> Problem:
        problem = gpt(rule)(num_tasks)
        model = small_gpt(tied_embeddings=True, num_layers=2, context_length=TOKENS + 2)
        generator = torch.Generator().manual_seed(3)
        structure = Structure(("blocks.0", "blocks.1"), "head", "token_embedding")
        adapter = SoftPromptAdapter(
            model, num_tokens=2, start="tokens", generator=generator, structure=structure
        )
        return with_adapter(dataclasses.replace(problem, model=model), adapter)

    return made


def with_adapter(problem: Problem, adapter: Adapter) -> Problem:
    """The same tasks with something else fast."""
    learner = dataclasses.replace(problem.unroll.learner, adapter=adapter)
    unroll = dataclasses.replace(problem.unroll, learner=learner)
    meta = adapter.meta_parameters(init=True, backbone=True)
    meta |= unroll.rates.meta_parameters(adapter.init({}, 1))
    return dataclasses.replace(problem, unroll=unroll, meta=perturbed(meta, scale=0.1))


def with_a_learned_loss(make: Callable[[int], Problem]) -> Callable[[int], Problem]:
    def made(num_tasks: int) -> Problem:
        problem = make(num_tasks)
        loss = SupportLoss(1.3, 0.1, learned=("temperature", "label_smoothing"))
        learner = dataclasses.replace(problem.unroll.learner, support_loss=loss)
        meta = problem.meta | loss.meta_parameters(next(iter(problem.meta.values())))
        return dataclasses.replace(
            problem, unroll=dataclasses.replace(problem.unroll, learner=learner), meta=meta
        )

    return made


def with_scales(make: Callable[[int], Problem]) -> Callable[[int], Problem]:
    """As half precision has them; they change no result."""

    def made(num_tasks: int) -> Problem:
        problem = make(num_tasks)
        return dataclasses.replace(
            problem, unroll=dataclasses.replace(problem.unroll, scales=Scales(64.0, 16.0))
        )

    return made


def recomputed(make: Callable[[int], Problem]) -> Callable[[int], Problem]:
    """Blocks and head are computed again in every backward pass."""

    def made(num_tasks: int) -> Problem:
        problem = make(num_tasks)
        learner = dataclasses.replace(problem.unroll.learner, recompute_blocks=True, head_chunk=4)
        return dataclasses.replace(problem, unroll=dataclasses.replace(problem.unroll, learner=learner))

    return made


SWEEPS: dict[str, Way] = {
    "unrolled": (Unrolled(), with_a_learned_loss(gpt(HEAVY))),
    "unrolled, every weight fast": (Unrolled(), conv4()),
    "rematerialized": (Rematerialized(), with_a_learned_loss(gpt(HEAVY))),
    "rematerialized, proximal": (Rematerialized(), gpt(PULLED)),
    "rematerialized, scaled": (Rematerialized(), with_scales(gpt(Adam()))),
    "rematerialized, every weight fast": (Rematerialized(Binomial(1)), conv4(HEAVY)),
    "rematerialized, symmetries": (
        Rematerialized(),
        lambda num_tasks: msr_problem("dense", step_weights=UNIFORM, num_tasks=num_tasks),
    ),
    "rematerialized, recomputed": (Rematerialized(), recomputed(gpt())),
    "mixed_mode, recomputed": (MixedMode(), recomputed(gpt())),
    "some graphs": (Rematerialized(num_graph_steps=1), gpt()),
    "all graphs": (Rematerialized(num_graph_steps=3), with_scales(with_a_learned_loss(gpt(PULLED)))),
    "mixed_mode": (MixedMode(), with_a_learned_loss(gpt(HEAVY))),
    "mixed_mode, clipped": (MixedMode(), with_scales(gpt(CLIPPED))),
    "mixed_mode, every weight fast": (MixedMode(), conv4(PULLED)),
    "rematerialized, head fast": (Rematerialized(), part(HEAVY)),
    "mixed_mode, norms and head fast": (MixedMode(), part(norms=True)),
    "mixed_mode, soft prompt": (MixedMode(), soft_prompt(HEAVY)),
    "truncated": (Truncated(num_steps=1, exact=MixedMode()), gpt()),
    "truncated, with earlier losses": (Truncated(num_steps=1, exact=Rematerialized()), conv4()),
    "first_order": (FirstOrder(), gpt(HEAVY)),
}
AT_THE_END: dict[str, Way] = {
    "implicit": (Implicit(ConjugateGradient(5, 0.0)), with_a_learned_loss(gpt(PULLED, grain="none"))),
    "implicit, neumann": (Implicit(Neumann(4, 0.2)), gpt(PULLED, grain="none")),
    "finite_difference": (FiniteDifference(), with_a_learned_loss(gpt(grain="none"))),
    "reptile": (Reptile(), gpt(grain="none", backbone=False)),
}
WAYS: dict[str, Way] = SWEEPS | AT_THE_END
