"""Small inner problems on the built-in models, and how gradients are compared.

Shape letters: T tasks, S support and Q query examples, L tokens, K inner steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from metaloom.engine.adapters.base import Adapter
from metaloom.engine.adapters.full import FullAdapter
from metaloom.engine.adapters.lora import LoraAdapter
from metaloom.engine.adapters.model import Structure
from metaloom.engine.adapters.norms import PerStepNorms
from metaloom.engine.forward_pass import ForwardPass
from metaloom.engine.inner_loops.base import InnerRule
from metaloom.engine.inner_loops.gradient_terms import GradientTerms
from metaloom.engine.inner_loops.rates import Grain, Rates
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import Learner, Rehearsal, TaskBatch
from metaloom.engine.precision import ComputeFormat, Precision
from metaloom.engine.unroll import Unroll
from metaloom.models.conv4 import Conv4
from metaloom.models.gpt import VOCABULARY, Gpt

PLAIN = Sgd()
HEAVY = Sgd(GradientTerms(weight_decay=0.05), momentum=0.7)
CLIPPED = Sgd(GradientTerms(clip_norm=0.05), momentum=0.5)  # active: these problems' gradients are longer
RATE = 0.2
# The estimators that give every kind of meta-parameter here, and take terms at every inner step.
FOR_EVERYTHING = ("unrolled", "rematerialized", "mixed_mode", "first_order")
# Images are smaller than 28 x 28, which the network does not mind: the tests stay quick.
IMAGE = 12
TOKENS = 5


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a hypergradient estimator takes, and the model that the adapter stands on."""

    unroll: Unroll
    meta: dict[str, Tensor]
    batch: TaskBatch
    model: nn.Module


def logits_of(
    adapter: Adapter, meta: Mapping[str, Tensor], fast: Mapping[str, Tensor], inputs: Tensor
) -> Tensor:
    """What the adapter's model says, by its own kernels."""
    forward_pass = ForwardPass(precision=Precision("float64"), device=inputs.device)
    return adapter.forward(meta, fast, inputs, forward_pass).features


def last(num_steps: int) -> tuple[float, ...]:
    """Plain MAML's c_0 .. c_K."""
    return (*(0.0,) * num_steps, 1.0)


def conv4_problem(
    *,
    step_weights: tuple[float, ...],
    grain: Grain = "none",
    rule: InnerRule = PLAIN,
    init: bool = True,
    norm: str = "batch",
    num_tasks: int = 2,
    compute: ComputeFormat = "float64",
    tasks: Literal["loop", "vmap"] = "loop",
    norms: PerStepNorms | None = None,
) -> Problem:
    """Few-shot images, every weight fast."""
    generator = torch.Generator().manual_seed(7)
    precision = Precision(compute)
    model = _seeded(lambda: Conv4(num_classes=3, width=4, num_blocks=3, norm=norm), precision)
    structure = Structure(tuple(f"blocks.{block}" for block in range(3)), "head")

    def part(num_examples: int) -> dict[str, Tensor]:
        shape = (num_tasks, num_examples, 1, IMAGE, IMAGE)
        images = torch.randn(shape, generator=generator, dtype=torch.float64)
        labels = torch.randint(3, (num_tasks, num_examples), generator=generator)
        return {"inputs": images.to(precision.storage_dtype), "targets": labels}

    batch = TaskBatch(tuple(range(num_tasks)), support=part(6), query=part(5))
    adapter = FullAdapter(model, structure=structure, tasks=tasks, norms=norms)
    return _problem(adapter, model, batch, precision, step_weights, grain, rule, init, False)


def gpt_problem(
    *,
    step_weights: tuple[float, ...],
    grain: Grain = "none",
    rule: InnerRule = PLAIN,
    init: bool = True,
    backbone: bool = False,
    rehearsal: Rehearsal | None = None,
    tied_embeddings: bool = False,
    num_tasks: int = 2,
    compute: ComputeFormat = "float64",
    num_layers: int = 1,
    dropout: float = 0.0,
) -> Problem:
    """Byte sequences, LoRA fast."""
    generator = torch.Generator().manual_seed(11)
    precision = Precision(compute)
    model = small_gpt(
        tied_embeddings=tied_embeddings,
        dtype=precision.storage_dtype,
        num_layers=num_layers,
        dropout=dropout,
    )

    def part(num_sequences: int) -> dict[str, Tensor]:
        shape = (num_tasks, num_sequences, TOKENS + 1)
        tokens = torch.randint(VOCABULARY, shape, generator=generator)
        return {"inputs": tokens[..., :-1], "targets": tokens[..., 1:]}

    batch = TaskBatch(
        tuple(range(num_tasks)),
        support=part(2),
        query=part(3),
        rehearsal=None if rehearsal is None else part(5),
    )
    adapter = small_lora(model)
    return _problem(adapter, model, batch, precision, step_weights, grain, rule, init, backbone, rehearsal)


def small_gpt(
    *,
    tied_embeddings: bool = False,
    dtype: torch.dtype = torch.float64,
    num_layers: int = 1,
    dropout: float = 0.0,
    context_length: int = TOKENS,
) -> Gpt:
    """Width 8."""
    precision = Precision("float64" if dtype == torch.float64 else "float32")
    model = _seeded(
        lambda: Gpt(
            num_layers=num_layers,
            width=8,
            num_heads=2,
            context_length=context_length,
            tied_embeddings=tied_embeddings,
            dropout=dropout,
        ),
        precision,
    )
    assert isinstance(model, Gpt)
    return model


def small_lora(model: nn.Module) -> LoraAdapter:
    """Rank 2 on every linear layer but the head; alpha differs from the rank, so that it shows."""
    generator = torch.Generator().manual_seed(3)
    blocks = sum(name.count(".") == 1 and name.startswith("blocks.") for name, _ in model.named_modules())
    structure = Structure(tuple(f"blocks.{block}" for block in range(blocks)), "head")
    return LoraAdapter(
        model, targets="all-linear", rank=2, alpha=6.0, generator=generator, structure=structure
    )


def perturbed(tensors: Mapping[str, Tensor], *, scale: float, seed: int = 5) -> dict[str, Tensor]:
    """The tensors with noise: no zero, and no two rates, stay as they were."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value
        + scale * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
        for name, value in tensors.items()
    }


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, Euclidean; 0 where both are zero, NaN where something is NaN."""
    distance = float(torch.linalg.vector_norm(actual - expected))
    return 0.0 if distance == 0.0 else distance / float(torch.linalg.vector_norm(expected))


def assert_gradients_agree(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, rtol: float
) -> None:
    """Every parameter's gradient to a relative `rtol`, and none of them zero: zeros agree with anything."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        assert float(torch.linalg.vector_norm(value)) > 1e-12, f"{name}: the case tests nothing"
        error = relative_error(actual[name], value)
        assert error <= rtol, f"{name}: relative error {error:.2e}"


def _seeded(build: object, precision: Precision) -> nn.Module:
    assert callable(build)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = build()
    assert isinstance(model, nn.Module)
    return model.to(precision.storage_dtype)


def _problem(
    adapter: Adapter,
    model: nn.Module,
    batch: TaskBatch,
    precision: Precision,
    step_weights: tuple[float, ...],
    grain: Grain,
    rule: InnerRule,
    init: bool,
    backbone: bool,
    rehearsal: Rehearsal | None = None,
) -> Problem:
    num_steps = len(step_weights) - 1
    rates = Rates(RATE, grain, num_steps)
    unroll = Unroll(Learner(adapter, precision, rehearsal), rule, rates, step_weights)
    fast = adapter.init({}, 1)
    meta = adapter.meta_parameters(init=init, backbone=backbone)
    meta |= rates.meta_parameters(fast)
    return Problem(unroll, perturbed(meta, scale=0.1), batch, model)
