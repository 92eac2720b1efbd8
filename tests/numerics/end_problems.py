"""Inner problems whose losses are written out a second time, in plain torch and for one task, so that
`torch.func` can give their dense second derivatives.

Shape letters: T tasks, N examples, D fast weights of one task, E backbone weights, C classes, F features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd

from metaloom.engine.adapters.base import Adapter, Learned, broadcast_init
from metaloom.engine.adapters.model import Readout
from metaloom.engine.forward_pass import ForwardPass
from metaloom.engine.inner_loops.base import InnerRule
from metaloom.engine.inner_loops.rates import Grain, Rates
from metaloom.engine.learner import Learner, Rehearsal, TaskBatch
from metaloom.engine.precision import Precision
from metaloom.engine.unroll import Snapshot, Unroll, adapt
from tests.numerics.problems import last
from tests.numerics.test_hypergradients_quadratic import FAST, OFFSET, QuadraticAdapter

T, C, F, W = 3, 3, 4, 2
D_QUADRATIC, E_QUADRATIC = sum(FAST.values()), 2
# How steep each task's loss is: solvers must not mix them up.
STEEPNESS = torch.tensor([0.4, 1.0, 1.7], dtype=torch.float64)

Loss = Callable[[Tensor, Tensor, int], Tensor]


@dataclasses.dataclass(frozen=True)
class EndProblem:
    """What an estimator takes, and the losses again: (phi `[D]`, omega, task) -> scalar.

    Attributes:
        inner: the inner loss of the last step.
        outer: the query loss.
        omega: the name of the one backbone tensor.
    """

    unroll: Unroll
    meta: dict[str, Tensor]
    batch: TaskBatch
    inner: Loss
    outer: Loss
    omega: str

    def adapted(self) -> Tensor:
        """phi_K, `[T, D]`."""
        return flat(self.path()[-1].fast)

    def path(self) -> list[Snapshot]:
        """(phi_k, s_k) for k = 0 .. K."""
        return list(adapt(self.unroll, self.meta, self.batch, num_steps=self.unroll.num_steps))

    def start(self) -> Tensor:
        """phi_0, `[D]`."""
        return torch.cat([value.flatten() for name, value in self.meta.items() if name.startswith("init.")])

    def learning(self, prefix: str) -> EndProblem:
        """The same problem where only meta-parameters of one kind are learned; the others stay."""
        learner = dataclasses.replace(self.unroll.learner, adapter=_WithConstants(self))
        meta = {name: value for name, value in self.meta.items() if name.startswith(prefix)}
        return dataclasses.replace(self, meta=meta, unroll=dataclasses.replace(self.unroll, learner=learner))

    def named(self, init: Tensor, omega: Tensor) -> dict[str, Tensor]:
        """A gradient by `init` `[D]` and omega, under the names of the meta-parameters."""
        sizes = {name: value for name, value in self.meta.items() if name.startswith("init.")}
        parts = torch.split(init, [value.numel() for value in sizes.values()])
        named = {name: part.view_as(sizes[name]) for name, part in zip(sizes, parts, strict=True)}
        return named | {self.omega: omega.view_as(self.meta[self.omega])}


class _WithConstants(Adapter):
    """A problem's adapter, whose own values are the problem's meta-parameters."""

    def __init__(self, problem: EndProblem) -> None:
        self._constants = problem.meta
        self._adapter = problem.unroll.learner.adapter

    def meta_parameters(self, *, init: bool, backbone: Learned) -> dict[str, Tensor]:
        return self._adapter.meta_parameters(init=init, backbone=backbone)

    def init(self, meta: Mapping[str, Tensor], num_tasks: int) -> dict[str, Tensor]:
        return self._adapter.init(self._constants | dict(meta), num_tasks)

    def forward(
        self,
        meta: Mapping[str, Tensor],
        fast: Mapping[str, Tensor],
        inputs: Tensor,
        forward_pass: ForwardPass,
    ) -> Readout:
        return self._adapter.forward(self._constants | dict(meta), fast, inputs, forward_pass)


@dataclasses.dataclass(frozen=True)
class Dense:
    """Dense derivatives of one task at phi: H `[D, D]`, M `[E, D]`, and the slopes."""

    hessian: Tensor
    mixed: Tensor
    inner_slope: Tensor
    query_slope: Tensor
    query_omega: Tensor


def dense(problem: EndProblem, phi: Tensor, task: int) -> Dense:
    omega = problem.meta[problem.omega]
    mixed = jacfwd(grad(problem.inner, argnums=1), argnums=0)(phi, omega, task)
    return Dense(
        hessian(problem.inner)(phi, omega, task),
        mixed.reshape(omega.numel(), phi.numel()),
        grad(problem.inner)(phi, omega, task),
        grad(problem.outer)(phi, omega, task),
        grad(problem.outer, argnums=1)(phi, omega, task).flatten(),
    )


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten(1) for value in tensors.values()], dim=1)


def quadratic_end_problem(
    *,
    rule: InnerRule,
    num_steps: int = 3,
    grain: Grain = "none",
    rate: float = 0.3,
    rehearsal: Rehearsal | None = None,
) -> EndProblem:
    """Mean squares in fast and backbone weights (see test_hypergradients_quadratic)."""
    generator = torch.Generator().manual_seed(4)

    def part(num_examples: int) -> dict[str, Tensor]:
        shape = (T, num_examples, D_QUADRATIC + E_QUADRATIC + 1)
        rows = torch.randn(shape, generator=generator, dtype=torch.float64) * STEEPNESS[:, None, None]
        return {"inputs": rows, "targets": torch.ones(shape[:2], dtype=torch.int64)}

    batch = TaskBatch(tuple(range(T)), part(6), part(4), rehearsal=None if rehearsal is None else part(3))
    old_rows = None
    if rehearsal is not None:
        assert batch.rehearsal is not None
        old_rows = batch.rehearsal["inputs"][:, [(num_steps - 1) % 3]]

    def mean_square(phi: Tensor, omega: Tensor, rows: Tensor) -> Tensor:
        a, c, b = torch.split(rows, [D_QUADRATIC, E_QUADRATIC, 1], dim=1)
        residuals = a @ phi + c @ omega - b[:, 0]
        return 0.5 * residuals.square().mean() + OFFSET

    def inner(phi: Tensor, omega: Tensor, task: int) -> Tensor:
        own = mean_square(phi, omega, batch.support["inputs"][task])
        if rehearsal is None or old_rows is None:
            return own
        assert rehearsal.num_samples == 1
        return (1 - rehearsal.ratio) * own + rehearsal.ratio * mean_square(phi, omega, old_rows[task])

    def outer(phi: Tensor, omega: Tensor, task: int) -> Tensor:
        return mean_square(phi, omega, batch.query["inputs"][task])

    adapter = QuadraticAdapter()
    return _problem(adapter, batch, rule, num_steps, grain, rate, rehearsal, inner, outer, "backbone.omega")


class FeatureAdapter(Adapter):
    """Logistic regression per task on features that tasks share: logits `tanh(x U) w + bias`."""

    def meta_parameters(self, *, init: bool, backbone: Learned) -> dict[str, Tensor]:
        return {f"init.{name}": value for name, value in self._initial().items()} | {
            "backbone.u": torch.zeros(F, W, dtype=torch.float64)
        }

    def init(self, meta: Mapping[str, Tensor], num_tasks: int) -> dict[str, Tensor]:
        return broadcast_init(self._initial(), meta, num_tasks)

    def forward(
        self,
        meta: Mapping[str, Tensor],
        fast: Mapping[str, Tensor],
        inputs: Tensor,
        forward_pass: ForwardPass,
    ) -> Readout:
        features = torch.tanh(inputs @ meta["backbone.u"])
        return Readout(torch.bmm(features, fast["w"]) + fast["bias"][:, None])

    def _initial(self) -> dict[str, Tensor]:
        return {
            "w": torch.zeros(W, C, dtype=torch.float64),
            "bias": torch.zeros(C, dtype=torch.float64),
        }


def logistic_end_problem(
    *, rule: InnerRule, num_steps: int = 3, grain: Grain = "none", rate: float = 0.3
) -> EndProblem:
    """Classification: third derivatives are not zero, and the Hessian by phi is singular."""
    generator = torch.Generator().manual_seed(6)

    def part(num_examples: int) -> dict[str, Tensor]:
        inputs = torch.randn((T, num_examples, F), generator=generator, dtype=torch.float64)
        targets = torch.randint(C, (T, num_examples), generator=generator)
        return {"inputs": inputs * STEEPNESS[:, None, None], "targets": targets}

    batch = TaskBatch(tuple(range(T)), part(7), part(5))

    def loss(phi: Tensor, omega: Tensor, part: Mapping[str, Tensor], task: int) -> Tensor:
        w, bias = phi[: W * C].view(W, C), phi[W * C :]
        logits = torch.tanh(part["inputs"][task] @ omega) @ w + bias
        chosen = torch.nn.functional.one_hot(part["targets"][task], C)
        return (logits.exp().sum(1).log() - (chosen * logits).sum(1)).mean()

    def inner(phi: Tensor, omega: Tensor, task: int) -> Tensor:
        return loss(phi, omega, batch.support, task)

    def outer(phi: Tensor, omega: Tensor, task: int) -> Tensor:
        return loss(phi, omega, batch.query, task)

    adapter = FeatureAdapter()
    return _problem(adapter, batch, rule, num_steps, grain, rate, None, inner, outer, "backbone.u")


def _problem(
    adapter: Adapter,
    batch: TaskBatch,
    rule: InnerRule,
    num_steps: int,
    grain: Grain,
    rate: float,
    rehearsal: Rehearsal | None,
    inner: Loss,
    outer: Loss,
    omega: str,
) -> EndProblem:
    generator = torch.Generator().manual_seed(8)
    rates = Rates(rate, grain, num_steps)
    meta = adapter.meta_parameters(init=True, backbone=True)
    meta |= rates.meta_parameters(adapter.init(meta, 1))
    meta = {
        name: value + 0.6 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in meta.items()
    }
    unroll = Unroll(Learner(adapter, Precision("float64"), rehearsal), rule, rates, last(num_steps))
    return EndProblem(unroll, meta, batch, inner, outer, omega)
