"""How a model's forward pass is run: by which kernels, with which draws, keeping or recomputing what.

The model itself is not changed. While a pass runs, the functions that it calls are looked at: those whose
fused kernels cannot be differentiated twice are replaced where they have to be, dropout takes its draws from
the step, and a function that draws random numbers of its own is refused, since it could not be repeated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name

from metaloom.engine import kernels
from metaloom.engine.adapters.norms import MetStatistics
from metaloom.engine.draws import Draws
from metaloom.engine.kernels.attention import refuse_dropout
from metaloom.engine.precision import Precision
from metaloom.errors import CapabilityError

Derivative = Literal["once", "reverse", "forward"]
HALF = (torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """What layers that call `torch.normal(mean, std)` do in a pass.

    Attributes:
        draws: what they draw; None: they give their means.
        divergences: takes in KL(N(mean, std^2) || N(0, I)) of each example, task by task or of all at once;
            None where nobody asks.
    """

    draws: Draws | None = None
    divergences: list[Tensor] | None = None

    def of_task(self, task: int) -> Bottleneck:
        """The same for one of the tasks."""
        return Bottleneck(None if self.draws is None else self.draws.of_task(task), self.divergences)


@dataclasses.dataclass(frozen=True)
class ForwardPass:
    """One forward pass of T tasks.

    Attributes:
        precision: number format.
        derivative: how it will be differentiated: `once` (by reverse mode, or not at all), or twice, the
            second time in `reverse` (through a graph of the gradient) or `forward` mode (inputs are dual
            numbers).
        draws: what dropout draws; None: dropout does nothing.
        recompute_blocks: keep each block's inputs alone and compute the block again when it is
            differentiated.
        holds_back_head: leave the head to the caller, who applies it in chunks of tokens.
        device: where.
        head: which output of a model that has several, its second argument; None for a model with one.
        weights: `[T, N]`, 0 for examples that are there as padding: batch statistics are without them. None
            where there are none.
        step: how many inner steps the fast weights have gone.
        objective: the loss that it is for.
        met: takes in what batch norms meet; None where nobody asks.
        bottleneck: what stochastic layers do; None: a model that has one is refused.
        num_tasks: T, where the model is called once with the examples of all tasks, `[T * N, ...]`.
    """

    precision: Precision
    device: torch.device
    derivative: Derivative = "once"
    draws: Draws | None = None
    recompute_blocks: bool = False
    holds_back_head: bool = False
    head: str | None = None
    weights: Tensor | None = None
    step: int = 0
    objective: str = ""
    met: MetStatistics | None = None
    bottleneck: Bottleneck | None = None
    num_tasks: int = 1

    def of_task(self, task: int) -> ForwardPass:
        """The same pass for one of its tasks."""
        return dataclasses.replace(
            self,
            draws=None if self.draws is None else self.draws.of_task(task),
            weights=None if self.weights is None else self.weights[task : task + 1],
            bottleneck=None if self.bottleneck is None else self.bottleneck.of_task(task),
        )

    def together(self, num_tasks: int) -> ForwardPass:
        """The same pass where one call of the model is that of all tasks."""
        return dataclasses.replace(self, num_tasks=num_tasks)

    def arguments(self, inputs: Tensor) -> tuple[Tensor] | tuple[Tensor, str]:
        """What the model is called with."""
        return (inputs,) if self.head is None else (inputs, self.head)


class Interception(TorchFunctionMode):
    """Runs what it is entered around as `ForwardPass` says.

    Args:
        forward_pass: how.
        is_vectorized: whether the pass runs inside `torch.func.vmap`, where kernels are written out.

    Attributes:
        weights: of the examples of each task that the model is called with, `[T, N]`; None where all count.
        shape: of what the model is called with, `[T * N, ...]`; None where that is not known.
    """

    def __init__(self, forward_pass: ForwardPass, *, is_vectorized: bool = False) -> None:
        super().__init__()
        self._pass = forward_pass
        self._replacements = _ONCE if forward_pass.derivative == "once" else _TWICE
        if is_vectorized:
            self._replacements = _WRITTEN_OUT
        if forward_pass.derivative == "forward":
            self._replacements = self._replacements | _FORWARD
        self._is_vectorized = is_vectorized
        self._is_entered = False
        self._site, self._num_draws = "", 0
        self.weights = forward_pass.weights
        self.shape: torch.Size | None = None

    @property
    def position(self) -> tuple[str, int]:
        """Where the pass is: the name of a region, and how many draws were made in it."""
        return self._site, self._num_draws

    @position.setter
    def position(self, position: tuple[str, int]) -> None:
        self._site, self._num_draws = position

    @contextlib.contextmanager
    def region(self, name: str, num_draws: int = 0) -> Iterator[None]:
        """Runs a part of the pass that may be computed again alone: its draws are counted from its start.

        Args:
            num_draws: those that were made in a region of that name before.
        """
        before = self.position
        self.position = name, num_draws
        try:
            if self._is_entered:
                yield
            else:
                with self, self._pass.precision.autocast(self._pass.device):
                    yield
        finally:
            self.position = before

    def __enter__(self) -> Interception:
        self._is_entered = True
        self._generator_state = _generator_state(self._pass.device)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)  # type: ignore[no-untyped-call]
        self._is_entered = False
        before, after = self._generator_state, _generator_state(self._pass.device)
        if exc_info[0] is None and not torch.equal(before, after):
            # What draws inside a function of torch (nn.LSTM) shows here alone.
            raise CapabilityError(
                "torch's random generator moved while the model ran, and draws from it cannot be repeated "
                "when a step is computed again: set the dropout of its recurrent layers to 0 "
                "(torch.nn.functional.dropout takes its draws from the step)."
            )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func is torch.normal and self._pass.bottleneck is not None:
            return self._normal(self._pass.bottleneck, *args, **kwargs)
        if func is F.multi_head_attention_forward:
            with _Within(self):
                return _ATTENTION_OF_SEVERAL_HEADS(*args, **kwargs)
        if func in (F.batch_norm, F.instance_norm):
            _refuse_running_statistics(func, *args, **kwargs)
            if func is F.batch_norm:
                return _batch_norm(self._pass, self.weights, *args, **kwargs)
            if self._pass.derivative == "forward" and args[0].dtype in HALF:
                return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        if func is F.scaled_dot_product_attention:
            refuse_dropout(args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0))
        if func is F.embedding:
            return kernels.embedding_per_task(func, *args, of_inputs=self.shape, **kwargs)
        kernel = self._replacements.get(func, func)
        of_tasks = _PER_TASK.get(func)
        if of_tasks is not None:
            return of_tasks(kernel, *args, **kwargs)
        if kernel is not func:
            return kernel(*args, **kwargs)
        if func in _RANDOM:
            raise CapabilityError(
                f"the model calls {resolve_name(func)}, whose draws cannot be repeated when a step is "
                "computed again: use torch.nn.functional.dropout, which takes its draws from the step, or "
                "remove it."
            )
        return func(*args, **kwargs)

    def _dropout(
        self, inputs: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0.0 or self._pass.draws is None:
            return inputs
        if self._is_vectorized:
            raise CapabilityError("dropout is not drawn inside vmap: set adaptation.fast.tasks to loop.")
        self._num_draws += 1
        return self._pass.draws.dropout(inputs, p, f"{self._site}/{self._num_draws}")

    def _normal(self, bottleneck: Bottleneck, mean: Tensor, std: Tensor) -> Tensor:
        self._num_draws += 1
        if bottleneck.divergences is not None:
            wide = torch.promote_types(mean.dtype, torch.float32)
            mu, sigma = mean.to(wide), std.to(wide)
            each = (mu.square() + sigma.square() - 1.0) / 2.0 - sigma.log()
            bottleneck.divergences.append(each.flatten(1).sum(1))
        if bottleneck.draws is None:
            return mean
        return bottleneck.draws.normal(mean, std, f"{self._site}/{self._num_draws}")


class _Within(TorchFunctionMode):
    """Lets an interception see what a function calls that it was itself asked about: torch turns a mode off
    while it is asked."""

    def __init__(self, interception: Interception) -> None:
        super().__init__()
        self._interception = interception

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._interception.__torch_function__(func, types, args, kwargs)


def _opened(function: Any) -> Callable[..., Any]:
    """A function of torch.nn.functional that does not look for modes, and so runs where one is on: its parts
    are then seen one by one."""
    names = function.__globals__ | {"has_torch_function": lambda tensors: False}
    opened = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


# nn.MultiheadAttention and nn.Transformer's layers: attention, dropout and linear layers are inside.
_ATTENTION_OF_SEVERAL_HEADS = _opened(F.multi_head_attention_forward)


def _refuse_running_statistics(
    func: Any,
    inputs: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *rest: Any,
    **options: Any,
) -> None:
    """Passes where a norm leaves its running statistics as they are.

    Raises:
        CapabilityError: each forward pass would move them.
    """
    if func is F.batch_norm:  # weight, bias, training
        is_moving = rest[2] if len(rest) > 2 else options.get("training", False)
    else:  # weight, bias, use_input_stats
        is_moving = rest[2] if len(rest) > 2 else options.get("use_input_stats", True)
    if is_moving and running_mean is not None:
        raise CapabilityError(
            f"the model calls {resolve_name(func)} with running statistics, which every inner step of every "
            "task would move: set track_running_stats=False, so that it takes those of a task's examples, or "
            "put the layer into eval(), so that they stay."
        )


def _batch_norm(
    forward_pass: ForwardPass,
    example_weights: Tensor | None,
    inputs: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch norm whose statistics are those of each task's examples that count."""
    num_tasks = forward_pass.num_tasks
    if inputs.dtype in HALF and forward_pass.derivative == "forward":
        # Torch's own rule gives a float32 tangent beside a half primal where either alone is dual.
        if not training:
            wide = inputs.float()
            normed = F.batch_norm(wide, running_mean, running_var, weight, bias, False, momentum, eps)
            return normed.to(inputs.dtype)
        if example_weights is None:
            example_weights = inputs.new_ones(num_tasks, len(inputs) // num_tasks)
    if training and example_weights is not None:
        if len(inputs) != example_weights.numel():
            raise CapabilityError(
                f"the model normalises a batch of {len(inputs)} where it was called with "
                f"{example_weights.numel()} examples, so those that are padding cannot be told from the "
                "others: keep examples in the first dim, or take a norm that looks at one example (group or "
                "layer norm)."
            )
        return kernels.weighted_batch_norm(inputs, example_weights, weight, bias, eps)
    is_per_task = any(value is not None and value.ndim == 2 for value in (weight, bias))
    if is_per_task or (training and num_tasks > 1):
        return kernels.batch_norm_per_task(
            inputs, num_tasks, running_mean, running_var, weight, bias, training, momentum, eps
        )
    return F.batch_norm(inputs, running_mean, running_var, weight, bias, training, momentum, eps)


def _generator_state(device: torch.device) -> Tensor:
    """The state of torch's global generator of a device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


_ONCE: dict[Any, Callable[..., Any]] = {F.linear: kernels.linear}
_TWICE: dict[Any, Callable[..., Any]] = {
    F.linear: kernels.linear,
    F.scaled_dot_product_attention: kernels.attention,
    F.gelu: kernels.gelu,
    F.silu: kernels.silu,
}
_WRITTEN_OUT: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: kernels.written_out_attention,
    F.silu: kernels.written_out_silu,
}
# Whose backward pass has no forward-mode rule.
_FORWARD: dict[Any, Callable[..., Any]] = {
    F.group_norm: kernels.written_out_group_norm,
    F.mish: kernels.written_out_mish,
}
# Layers that may have a weight or bias per task.
_PER_TASK: dict[Any, Callable[..., Any]] = {
    F.linear: kernels.linear_per_task,
    F.layer_norm: kernels.layer_norm_per_task,
    F.rms_norm: kernels.rms_norm_per_task,
    F.group_norm: kernels.group_norm_per_task,
    F.conv1d: functools.partial(kernels.conv_per_task, 1),
    F.conv2d: functools.partial(kernels.conv_per_task, 2),
    F.conv3d: functools.partial(kernels.conv_per_task, 3),
    torch.addmm: kernels.transposed_linear_per_task,
}
_RANDOM = frozenset(
    {
        F.alpha_dropout,
        F.dropout1d,
        F.dropout2d,
        F.dropout3d,
        F.feature_alpha_dropout,
        F.gumbel_softmax,
        F.rrelu,
        torch.bernoulli,
        torch.dropout,
        torch.multinomial,
        torch.normal,
        torch.poisson,
        torch.rand,
        torch.rand_like,
        torch.randint,
        torch.randint_like,
        torch.randn,
        torch.randn_like,
        torch.randperm,
        Tensor.bernoulli,
        Tensor.bernoulli_,
        Tensor.exponential_,
        Tensor.normal_,
        Tensor.random_,
        Tensor.uniform_,
    }
)
