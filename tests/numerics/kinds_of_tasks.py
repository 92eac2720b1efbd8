"""Inner problems of every kind of task, each task's data a function of its number, padded to any size.

Shape letters: T tasks, N examples, L tokens, C classes, P numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from metaloom.engine.adapters.base import Adapter
from metaloom.engine.adapters.full import FullAdapter
from metaloom.engine.adapters.lora import LoraAdapter
from metaloom.engine.adapters.model import Shards, Structure
from metaloom.engine.adapters.part import PartAdapter
from metaloom.engine.adapters.selection import head_parameters, norm_and_bias_parameters
from metaloom.engine.adapters.soft_prompt import SoftPromptAdapter
from metaloom.engine.inner_loops.base import InnerRule
from metaloom.engine.inner_loops.gradient_terms import GradientTerms
from metaloom.engine.inner_loops.rates import Grain, Rates
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import Learner, Rehearsal, TaskBatch
from metaloom.engine.losses import IGNORE, CrossEntropy, MeanSquaredError, SupportLoss
from metaloom.engine.precision import Precision
from metaloom.engine.unroll import Unroll
from metaloom.models.conv4 import Conv4
from metaloom.models.gpt import PAD, Gpt
from metaloom.models.mlp import Mlp
from tests.numerics.problems import Problem, perturbed

Kind = Literal["images", "numbers", "regression", "tokens", "sequences"]
Fast = Literal["lora", "loop", "vmap", "head", "norm_bias", "norm_bias, loop", "soft_prompt"]
# Examples of a task's parts, by its number: no two tasks, and no two parts, have as many.
SIZES: Mapping[int, Mapping[str, int]] = {
    3: {"support": 5, "query": 4, "rehearsal": 2, "outer_rehearsal": 3},
    8: {"support": 3, "query": 6, "rehearsal": 3, "outer_rehearsal": 1},
    9: {"support": 4, "query": 3, "rehearsal": 5, "outer_rehearsal": 2},
}
NUMBERS = tuple(SIZES)
WAYS = {3: 4, 8: 2, 9: 3}
NUM_CLASSES, NUM_OLD_CLASSES, NUM_INPUTS, TOKENS, VOCABULARY, IMAGE = 5, 3, 4, 6, 11, 7
NUM_PROMPT = 2
RULE = Sgd(GradientTerms(weight_decay=0.03, clip_norm=0.2), momentum=0.6)
STEP_WEIGHTS = (0.0, 0.4, 0.9)
LEARNED_LOSS = SupportLoss(1.3, 0.1, ("temperature", "label_smoothing"))
ALIKE = Rehearsal(0.3, 2, outer_ratio=0.2)
# In the other head of a model, by its own loss.
CLASSIFYING = Rehearsal(0.3, 2, outer_ratio=0.2, criterion=CrossEntropy(), head="rehearsal")
MODELLING = dataclasses.replace(CLASSIFYING, head="language_modelling")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One kind of task, and how it is computed."""

    kind: Kind
    fast: Fast
    rehearsal: Rehearsal | None = None
    dropout: float = 0.0
    recompute_blocks: bool = False
    head_chunk: int | None = None
    has_ways: bool = False
    support_loss: SupportLoss = dataclasses.field(default_factory=SupportLoss)
    rule: InnerRule = RULE
    step_weights: tuple[float, ...] = STEP_WEIGHTS
    grain: Grain = "per_tensor"

    @property
    def has_own_rehearsal(self) -> bool:
        """Whether rehearsal is of another kind than the tasks."""
        return self.rehearsal is not None and self.rehearsal.head is not None


def problem_of(setting: Setting, numbers: Sequence[int], *, is_padded: bool) -> Problem:
    """The tasks of these numbers side by side.

    Args:
        is_padded: whether examples are appended that have weight 0, up to the largest task's number and one
            more; tasks of different sizes have to be.
    """
    model, structure = model_of(setting)
    adapter = adapter_of(setting, model, structure)
    learner = Learner(
        adapter,
        Precision("float64"),
        setting.rehearsal,
        setting.support_loss,
        seed=4,
        recompute_blocks=setting.recompute_blocks,
        head_chunk=setting.head_chunk,
        criterion=MeanSquaredError() if setting.kind == "regression" else CrossEntropy(),
        head=_output(setting),
    )
    rates = Rates(0.2, setting.grain, len(setting.step_weights) - 1)
    unroll = Unroll(learner, setting.rule, rates, setting.step_weights)
    meta = adapter.meta_parameters(init=True, backbone=setting.fast not in ("loop", "vmap"))
    meta |= rates.meta_parameters(adapter.init({}, 1))
    meta |= setting.support_loss.meta_parameters(torch.empty(0, dtype=torch.float64))
    parts = {
        name: _padded([_examples(setting, number, name) for number in numbers], is_padded)
        for name in ("support", "query", "rehearsal", "outer_rehearsal")
    }
    has_rehearsal = setting.rehearsal is not None
    batch = TaskBatch(
        tuple(numbers),
        parts["support"],
        parts["query"],
        rehearsal=parts["rehearsal"] if has_rehearsal else None,
        num_ways=torch.tensor([WAYS[number] for number in numbers]) if setting.has_ways else None,
        outer_rehearsal=parts["outer_rehearsal"] if has_rehearsal else None,
    )
    return Problem(unroll, perturbed(meta, scale=0.1), batch, model)


def model_of(setting: Setting) -> tuple[nn.Module, Structure]:
    """A model with two heads, and where it can be taken apart."""
    make: dict[Kind, Callable[[], Conv4 | Mlp | Gpt]] = {
        "images": lambda: Conv4(
            num_classes=NUM_CLASSES,
            width=4,
            num_blocks=2,
            norm="batch",
            num_channels=2,
            num_rehearsal_classes=NUM_OLD_CLASSES,
        ),
        "numbers": lambda: _mlp(NUM_CLASSES),
        "regression": lambda: _mlp(2),
        "tokens": lambda: _gpt(setting),
        "sequences": lambda: _gpt(setting),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = make[setting.kind]()
    embedding = "token_embedding" if isinstance(model, Gpt) else None
    return model.double(), Structure(tuple(f"blocks.{block}" for block in range(2)), model.heads, embedding)


def _mlp(num_outputs: int) -> Mlp:
    return Mlp(
        num_inputs=NUM_INPUTS,
        width=6,
        num_layers=2,
        num_outputs=num_outputs,
        activation="tanh",
        num_rehearsal_outputs=NUM_OLD_CLASSES,
    )


def _gpt(setting: Setting) -> Gpt:
    return Gpt(
        num_layers=2,
        width=8,
        num_heads=2,
        context_length=TOKENS + (NUM_PROMPT if setting.fast == "soft_prompt" else 0),
        tied_embeddings=False,
        dropout=setting.dropout,
        vocabulary=VOCABULARY,
        num_classes=NUM_CLASSES,
    )


def _output(setting: Setting) -> str:
    return {"sequences": "classification", "tokens": "language_modelling"}.get(setting.kind, "tasks")


def adapter_of(
    setting: Setting, model: nn.Module, structure: Structure, shards: Shards | None = None
) -> Adapter:
    """What is fast in a model, of which this rank may have shards."""
    generator = torch.Generator().manual_seed(3)
    match setting.fast:
        case "loop" | "vmap":
            return FullAdapter(model, structure=structure, tasks=setting.fast)
        case "head":
            names = head_parameters(model, structure, _output(setting))
            return PartAdapter(model, names=names, structure=structure, shards=shards)
        case "norm_bias" | "norm_bias, loop":
            names = norm_and_bias_parameters(model, norms=True, biases=True)
            tasks: Literal["together", "loop"] = "together" if setting.fast == "norm_bias" else "loop"
            return PartAdapter(model, names=names, tasks=tasks, structure=structure, shards=shards)
        case "soft_prompt":
            return SoftPromptAdapter(
                model,
                num_tokens=NUM_PROMPT,
                start="tokens",
                generator=generator,
                structure=structure,
                shards=shards,
            )
        case "lora":
            return LoraAdapter(
                model,
                targets="all-linear",
                rank=2,
                alpha=6.0,
                generator=generator,
                structure=structure,
                shards=shards,
            )


def _examples(setting: Setting, number: int, part: str) -> dict[str, Tensor]:
    """One task's examples of a part, `[N, ...]`, without padding but that of tokens."""
    position = ("support", "query", "rehearsal", "outer_rehearsal").index(part)
    generator = torch.Generator().manual_seed(10 * number + position)
    count = SIZES[number][part]
    is_own = "rehearsal" not in part or not setting.has_own_rehearsal
    if setting.kind in ("tokens", "sequences"):
        is_modelled = (setting.kind == "tokens") == is_own
        return _sequences(setting, number, count, generator, is_modelled=is_modelled)
    if setting.kind == "images":
        inputs = torch.randn(count, 2, IMAGE, IMAGE + 2, generator=generator, dtype=torch.float64)
    else:
        inputs = torch.randn(count, NUM_INPUTS, generator=generator, dtype=torch.float64)
    if setting.kind == "regression" and is_own:
        return {
            "inputs": inputs,
            "targets": torch.randn(count, 2, generator=generator, dtype=torch.float64),
        }
    num_classes = _num_classes(setting, number) if is_own else NUM_OLD_CLASSES
    return {"inputs": inputs, "targets": torch.randint(num_classes, (count,), generator=generator)}


def _sequences(
    setting: Setting, number: int, count: int, generator: torch.Generator, *, is_modelled: bool
) -> dict[str, Tensor]:
    """Sequences of 1 to all tokens, each padded on the right."""
    tokens = torch.randint(VOCABULARY, (count, TOKENS + 1), generator=generator)
    lengths = torch.randint(1, TOKENS + 1, (count, 1), generator=generator)
    is_there = torch.arange(TOKENS) < lengths
    inputs = torch.where(is_there, tokens[:, :-1], PAD)
    if is_modelled:
        return {"inputs": inputs, "targets": torch.where(is_there, tokens[:, 1:], IGNORE)}
    num_classes = _num_classes(setting, number)
    return {"inputs": inputs, "targets": torch.randint(num_classes, (count,), generator=generator)}


def _num_classes(setting: Setting, number: int) -> int:
    return WAYS[number] if setting.has_ways else NUM_CLASSES


def _padded(tasks: Sequence[dict[str, Tensor]], is_padded: bool) -> dict[str, Tensor]:
    """The examples of several tasks, `[T, N, ...]`; padding is no example's, and nothing that is neutral."""
    if not is_padded:
        return {name: torch.stack([task[name] for task in tasks]) for name in tasks[0]}
    most = 1 + max(sizes[part] for sizes in SIZES.values() for part in sizes)

    def pad(tensor: Tensor) -> Tensor:
        missing = (most - len(tensor), *tensor.shape[1:])
        if tensor.is_floating_point():
            return torch.cat([tensor, torch.full(missing, 3.7, dtype=tensor.dtype)])
        # No token at all; or a class, one that the task may not have.
        filling = PAD if bool((tensor == PAD).any()) else NUM_OLD_CLASSES - 1
        return torch.cat([tensor, torch.full(missing, filling)])

    padded = {name: torch.stack([pad(task[name]) for task in tasks]) for name in tasks[0]}
    counts = torch.tensor([len(task["inputs"]) for task in tasks])
    return padded | {"weights": (torch.arange(most) < counts[:, None]).double()}
