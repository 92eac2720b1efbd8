"""Norms that have weights, biases and statistics of their own for each inner step.

Shape letters: T tasks, K inner steps, N examples, C channels.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from metaloom.engine.capabilities import TRACKED
from metaloom.errors import CapabilityError

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NORMS = (*BATCH_NORMS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_SITE = ".statistics"


def is_own_norm(module: nn.Module) -> bool:
    """Whether it is a norm of the model's own class: of vectors alone, by what it is called, such as
    `LlamaRMSNorm` of transformers."""
    own = [value for _, value in module.named_parameters()]
    return (
        "norm" in type(module).__name__.lower()
        and type(module) not in NORMS
        and not isinstance(module, _NormBase)
        and bool(own)
        and all(value.ndim == 1 for value in own)
        and not any(True for _ in module.children())
    )


@dataclasses.dataclass(frozen=True)
class PerStepNorms:
    """What norms have for each inner step (Antoniou et al. 2019, "How to Train Your MAML", section 4: BNWB
    and BNRS).

    Row k of K + 1 is for all that is computed at phi_k: the support loss of inner step k, and the query loss
    after k steps; what comes later has the last row. (The authors' code has K rows, and computes the query
    loss after a step with the row of the support loss before it.)

    Attributes:
        num_steps: K.
        weights: whether weights and biases are learned per step, shared by the tasks, and not adapted.
        statistics: whether batch norms count, per step, the mean and variance that they meet in training, and
            normalise by these where nothing is learned from the tasks: a prediction does not depend on the
            examples beside it then.
    """

    num_steps: int
    weights: bool
    statistics: bool

    def row(self, step: int) -> int:
        """The row of what is computed at phi_step."""
        return min(step, self.num_steps)

    def parameters_of(self, model: nn.Module) -> list[str]:
        """Names of the weights and biases that are learned per step.

        Raises:
            CapabilityError: they are to be, and there are none.
        """
        if not self.weights:
            return []
        found = [
            f"{module}.{name}"
            for module, layer in model.named_modules()
            if isinstance(layer, NORMS)
            for name, _ in layer.named_parameters(recurse=False)
        ]
        if not found:
            raise CapabilityError(
                "adaptation.norms.weights: per_step; and this model has no norm with weights: set it to fast."
            )
        return found

    def initial_statistics(self, model: nn.Module) -> dict[str, Tensor]:
        """Mean 0 and variance 1 for each batch norm, `tracked.<module>` `[K + 1, 2, C]`; nothing where
        statistics are not counted.

        Raises:
            CapabilityError: they are to be, and the model has no batch norm.
        """
        if not self.statistics:
            return {}
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BATCH_NORMS)}
        if not layers:
            raise CapabilityError(
                "adaptation.norms.statistics: per_step; counts what batch norms meet, and this model has "
                "none: set it to batch."
            )
        like = next(model.parameters()).detach()
        start = {}
        for name, layer in layers.items():
            rows = like.new_zeros(self.num_steps + 1, 2, layer.num_features)
            rows[:, 1] = 1.0
            start[TRACKED + name] = rows
        return start


class MetStatistics:
    """The mean and variance that batch norms meet in the passes of one meta-gradient. A pass that is computed
    again meets the same, and counts once."""

    def __init__(self) -> None:
        self._met: dict[tuple[str, int], dict[tuple[int, str], Tensor]] = {}

    def record(self, name: str, site: Site, moments: Tensor) -> None:
        """Takes in `[2, C]` of one norm in one pass of one task."""
        self._met.setdefault((name, site.row), {})[site.task, site.objective] = moments

    def sums(self, like: Mapping[str, Tensor], counts: Tensor | None) -> dict[str, Tensor]:
        """The sum over tasks of each norm's statistics, those of several passes at one step averaged; shaped
        like `like`.

        Args:
            counts: `[T]`, 0 for a dummy; None where there is none.
        """
        sums = {name: torch.zeros_like(value) for name, value in like.items()}
        for (name, row), passes in self._met.items():
            of_tasks: dict[int, list[Tensor]] = {}
            for (task, _), moments in passes.items():
                of_tasks.setdefault(task, []).append(moments)
            for task, found in of_tasks.items():
                if counts is None or counts[task] != 0:
                    sums[TRACKED + name][row] += torch.stack(found).mean(0)
        return sums


@dataclasses.dataclass(frozen=True)
class Site:
    """Where in an adaptation the pass of one task is.

    Attributes:
        row: of what norms have per step.
        task: among those of the batch.
        objective: of the loss that the pass is for.
    """

    row: int
    task: int
    objective: str


def sites(model: nn.Module) -> dict[str, Tensor]:
    """What `collecting` is attached by: nothing, under a name for each batch norm."""
    names = [name for name, layer in model.named_modules() if isinstance(layer, BATCH_NORMS)]
    return {name + _SITE: torch.empty(0) for name in names}


def rows_of(tracked: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    """What `normalising` is attached by: `[2, C]` for each batch norm, from `tracked.<module>`."""
    return {name.removeprefix(TRACKED) + _SITE: value[row] for name, value in tracked.items()}


@contextlib.contextmanager
def _hooked(model: nn.Module, hooks: Mapping[str, Callable[..., Tensor | None]]) -> Iterator[None]:
    modules = dict(model.named_modules())
    with contextlib.ExitStack() as stack:
        for name, hook in hooks.items():
            stack.callback(modules[name].register_forward_hook(hook).remove)
        yield


def collecting(
    model: nn.Module, met: MetStatistics, site: Site, weights: Tensor | None
) -> Callable[[Mapping[str, Tensor]], contextlib.AbstractContextManager[None]]:
    """Attaches hooks that record what the batch norms named by `sites` meet, which is all that they do.

    Args:
        weights: `[N]`, 0 for padding; None where there is none.
    """

    def hook_of(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            met.record(name, site, moments(args[0], weights))

        return hook

    return lambda tensors: _hooked(
        model, {name.removesuffix(_SITE): hook_of(name.removesuffix(_SITE)) for name in tensors}
    )


def normalising(
    model: nn.Module,
) -> Callable[[Mapping[str, Tensor]], contextlib.AbstractContextManager[None]]:
    """Attaches hooks that normalise by the statistics that `rows_of` gives, in place of the examples' own."""

    def hook_of(statistics: Tensor) -> Callable[..., Tensor]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            assert isinstance(layer, BATCH_NORMS)
            mean, variance = statistics
            return F.batch_norm(
                args[0], mean, variance, layer.weight, layer.bias, training=False, eps=layer.eps
            )

        return hook

    return lambda tensors: _hooked(
        model, {name.removesuffix(_SITE): hook_of(value) for name, value in tensors.items()}
    )


def moments(inputs: Tensor, weights: Tensor | None) -> Tensor:
    """Mean and unbiased variance of each channel of `[N, C, ...]`, as batch norm counts them: `[2, C]`,
    without a graph, in at least float32.

    Args:
        weights: `[N]`, 0 for padding; None where there is none.
    """
    values = forward_ad.unpack_dual(inputs).primal.detach()  # type: ignore[no-untyped-call]
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if weights is not None:
        values = values[weights != 0]
    variance, mean = torch.var_mean(values.transpose(0, 1).flatten(1), dim=1)
    # Of one number there is no spread.
    return torch.stack([mean, variance.nan_to_num() if values[:, 0].numel() == 1 else variance])
