"""A problem as PyTorch's libraries take it: a module whose parameters are the fast weights, and a loss.

Shape letters: N examples, L tokens, D width, R LoRA rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.workloads import Array, Problem


@dataclasses.dataclass(frozen=True)
class Task:
    """One task's data."""

    support: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class TorchProblem:
    """A problem for libraries that adapt modules.

    Attributes:
        module: its parameters, all of them, are fast; their values are the learned initialisation.
        names: of the parameters, in the order of `module.parameters()`.
        backbone: weights that tasks share and that are learned too, by name.
        tasks: to be adapted to one after the other.
    """

    module: nn.Module
    names: tuple[str, ...]
    backbone: dict[str, nn.Parameter]
    tasks: tuple[Task, ...]
    num_steps: int
    rate: float

    def meta_parameters(self) -> dict[str, nn.Parameter]:
        """What is learned, by the names of metaloom's meta-parameters."""
        initial = zip(self.names, self.module.parameters(), strict=True)
        learned = {f"init.{name}": value for name, value in initial}
        return learned | {f"backbone.{name}": value for name, value in self.backbone.items()}

    def forward(self) -> None:
        """One forward pass on each task's query data."""
        with torch.no_grad():
            for task in self.tasks:
                loss(self.module, task.query)

    def clear(self) -> None:
        """Drops the gradients that the last hypergradient has left."""
        for parameter in self.meta_parameters().values():
            parameter.grad = None

    def gradients(self) -> dict[str, Array]:
        """What backward passes have accumulated, by name."""
        found = {}
        for name, parameter in self.meta_parameters().items():
            assert parameter.grad is not None, f"no gradient has reached {name}"
            found[name] = parameter.grad.numpy()
        return found


def torch_problem(problem: Problem) -> TorchProblem:
    """The problem's weights as parameters, its data as tensors."""
    if problem.lora:
        module: nn.Module = LoraModel(problem)
        names = tuple(problem.lora)
    else:
        module = problem.model.requires_grad_(True)
        names = tuple(name for name, _ in module.named_parameters())
    backbone: dict[str, nn.Parameter] = {}
    if problem.workload.learn_backbone:
        backbone = dict(problem.model.requires_grad_(True).named_parameters())
    support, query = (
        list(zip(torch.from_numpy(part.inputs), torch.from_numpy(part.targets), strict=True))
        for part in (problem.support, problem.query)
    )
    tasks = tuple(Task(*pair) for pair in zip(support, query, strict=True))
    return TorchProblem(module, names, backbone, tasks, problem.num_steps, problem.workload.rate)


def twice_differentiable() -> AbstractContextManager[None]:
    """Keeps torch from its fused attention, which has no second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


def loss(module: nn.Module, examples: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of one task's examples, in nats."""
    inputs, targets = examples
    with twice_differentiable():
        logits: Tensor = module(inputs)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


class LoraPair(nn.Module):
    """`scale * B A x` for x `[N, ..., D]`."""

    def __init__(self, lora_a: Array, lora_b: Array, scale: float) -> None:
        super().__init__()
        self.lora_a = nn.Parameter(torch.from_numpy(lora_a))
        self.lora_b = nn.Parameter(torch.from_numpy(lora_b))
        self.scale = scale

    def forward(self, inputs: Tensor) -> Tensor:
        return self.scale * F.linear(F.linear(inputs, self.lora_a), self.lora_b)


class Shared:
    """Holds a module that is no submodule of its holder, and that copies of the holder share."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: object) -> Shared:
        return self


class LoraModel(nn.Module):
    """A model with LoRA matrices, which alone are its parameters: what libraries adapt is all parameters."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(
            LoraPair(problem.lora[f"{name}.lora_a"], problem.lora[f"{name}.lora_b"], problem.lora_scale)
            for name in problem.lora_layers
        )
        self.backbone = Shared(problem.model)
        self.layers = problem.lora_layers

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits; the products are added by hooks that live for one forward pass."""
        with contextlib.ExitStack() as stack:
            for name, pair in zip(self.layers, self.pairs, strict=True):
                layer = self.backbone.module.get_submodule(name)
                stack.callback(layer.register_forward_hook(_Adding(pair)).remove)
            logits: Tensor = self.backbone.module(inputs)
        return logits


class _Adding:
    """A forward hook that adds what another module makes of the same inputs."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        addend: Tensor = self._module(args[0])
        return output + addend
