"""A model's forward pass in parts: blocks that may be computed again, and a head that may be held back.

Shape letters: T tasks, N examples, L tokens, C tokens of a chunk, D width, V outputs (classes, vocabulary).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from metaloom.engine.adapters.norms import is_own_norm
from metaloom.engine.forward_pass import ForwardPass, Interception
from metaloom.engine.recomputation import recomputed
from metaloom.errors import CapabilityError

Tensors = Mapping[str, Tensor]
Attach = Callable[[Tensors], AbstractContextManager[None]]


class Shards(Protocol):
    """Weights of which this rank has shards.

    Attributes:
        values: this rank's shards of the model's parameters, by name.
    """

    values: dict[str, Tensor]

    def whole(self, shards: Tensors) -> dict[str, Tensor]:
        """The whole weights by name, from this rank's shards of them."""


@dataclasses.dataclass(frozen=True)
class Structure:
    """Where a model can be taken apart.

    Attributes:
        blocks: names of the modules whose activations may be recomputed, one at a time; none inside another.
        head: name of the last module, a linear layer over the vocabulary; None where there is no such. Of a
            model with several outputs, that of each by the output's name.
        embedding: name of the module that turns a sequence's tokens into vectors, `[N, L]` into `[N, L, D]`;
            None where there is no such.
    """

    blocks: tuple[str, ...] = ()
    head: str | Mapping[str, str] | None = None
    embedding: str | None = None

    def head_of(self, output: str | None) -> str | None:
        """The name of the last module on the way to one of the model's outputs; None where there is no such.

        Args:
            output: which; None for the one that there is.

        Raises:
            CapabilityError: the model has no output of that name, or several and none is named.
        """
        if self.head is None or (isinstance(self.head, str) and output is None):
            return self.head
        if isinstance(self.head, str):
            raise CapabilityError(
                f"the head {output!r} is asked for, and this model has one output: name none (null), or take "
                "a model with several."
            )
        if output is None or output not in self.head:
            named = "no head is named" if output is None else f"the head {output!r} is none of this model's"
            raise CapabilityError(f"{named}: it has {', '.join(self.head)}; name one of them.")
        return self.head[output]


@dataclasses.dataclass(frozen=True)
class Readout:
    """What a forward pass has come to: features, and how logits are read from them.

    Attributes:
        features: `[T, N, ..., D]`.
        head: `(features [T, C, D], *tensors) -> logits [T, C, V]`, a pure function; None where the features
            are the logits already.
        tensors: the head's own weights.
    """

    features: Tensor
    head: Callable[..., Tensor] | None = None
    tensors: tuple[Tensor, ...] = ()


def nothing_attached(tensors: Tensors) -> AbstractContextManager[None]:
    """For models that are run as they are."""
    return contextlib.nullcontext()


def run_model(
    model: nn.Module,
    structure: Structure,
    weights: Tensors,
    inputs: Tensor,
    forward_pass: ForwardPass,
    *,
    attachments: Tensors,
    attach: Attach,
    shards: Shards | None = None,
    whole: Collection[str] = (),
) -> tuple[Tensor, Callable[..., Tensor] | None, tuple[Tensor, ...]]:
    """The model's output at substituted weights; where the head is held back its input, the head, and its
    weights.

    Each block runs as a function of its own inputs, weights and attachments, in a region of its own: so what
    it computes, draws included, does not depend on whether, or when, it is computed again.

    Where the weights are shards, a block's are gathered inside its region, which is computed again whatever
    `forward_pass.recompute_blocks` says: they are given back when it is done. So are those of every other
    module that has any; what modules around these have themselves is gathered for the whole pass, and so is a
    head that is held back.

    Args:
        weights: the model's parameters by name; those that it lacks stay as they are. With `shards` all of
            them, and the model's own are on the meta device, where nothing can be computed with them.
        inputs: the model's argument; with `forward_pass.head` its first.
        attachments: tensors that hooks add to layers, by `<module>.<tensor>`.
        attach: puts hooks for such tensors on the model while its context lasts.
        shards: makes them whole, where `weights` are this rank's shards.
        whole: names of weights that are no shards all the same.

    Raises:
        CapabilityError: the head cannot be held back; the model has no output of the name that is asked for;
            or, with `shards`, a weight is used outside of the module that has it.
    """
    interception = Interception(forward_pass)
    modules = dict(model.named_modules())
    held_back = _HeldBack()
    own_head = structure.head_of(forward_pass.head)
    head_name = own_head if forward_pass.holds_back_head else None
    parts = [*structure.blocks, *([] if head_name is None else [head_name])]
    outside = {name: value for name, value in attachments.items() if not any(_is_in(name, p) for p in parts)}
    divided = None if shards is None else _Divided(model, weights, shards, whole)
    owners = {name.rpartition(".")[0] for name in whole}
    own_norms = [name for name in owners if is_own_norm(modules[name])]
    interception.shape = inputs.shape
    used: list[tuple[str, _Block]] = []
    with contextlib.ExitStack() as stack:
        for position, name in enumerate(structure.blocks):
            inside = {key: value for key, value in attachments.items() if _is_in(key, name)}
            norms = [modules[norm] for norm in own_norms if _is_in(norm, name)]
            block = _Block(
                modules[name], name, f"{position}", inside, attach, interception, forward_pass, divided, norms
            )
            stack.enter_context(_replaced_forward(modules[name], block))
            if inside or norms:
                used.append((name, block))
        if divided is None:
            rest = [modules[norm] for norm in own_norms if not any(_is_in(norm, p) for p in parts)]
            stack.enter_context(_norms_per_task(rest))
        else:
            stack.enter_context(_RefuseUseOutside())
            others, around = _outside_blocks(model, parts)
            for name in others:
                norms = [modules[name]] if name in own_norms else []
                block = _Block(
                    modules[name], name, None, {}, attach, interception, forward_pass, divided, norms
                )
                stack.enter_context(_replaced_forward(modules[name], block))
            weights = divided.whole({name: weights[name] for name in around})
        if head_name is not None:
            stack.enter_context(_replaced_forward(modules[head_name], held_back.keep(modules[head_name])))
        stack.enter_context(interception)
        stack.enter_context(forward_pass.precision.autocast(forward_pass.device))
        stack.enter_context(attach(outside))
        arguments = forward_pass.arguments(inputs)
        output: Tensor = functional_call(model, dict(weights), arguments, tie_weights=True)
    for name, block in used:
        if not block.is_called:
            raise CapabilityError(
                f"{name} is named as a block and never called: what is in it is used without it, so that "
                "what is adapted there would have no effect. Name modules that are called in model.blocks."
            )
    if head_name is None:
        return output, None, ()
    if held_back.features is None or output is not held_back.features:
        raise CapabilityError(
            f"the model's output is not that of its head {head_name!r} (something is computed after "
            "it), so the head cannot be applied in chunks: set memory.head_chunk to null."
        )
    layer = modules[head_name]
    attached = {key: value for key, value in attachments.items() if _is_in(key, head_name)}
    head_weights = held_back.weights
    if divided is not None:
        own = divided.of_module(head_name, head_weights)
        head_weights = divided.whole_of_module(head_name, own)
    names = tuple(head_weights)
    norms = [modules[norm] for norm in own_norms if norm == head_name or _is_in(norm, head_name)]

    def head(features: Tensor, *tensors: Tensor) -> Tensor:
        substituted = dict(zip(names, tensors[: len(names)], strict=True))
        hooked = dict(zip(attached, tensors[len(names) :], strict=True))
        with interception.region("head"), attach(hooked), _norms_per_task(norms):
            logits: Tensor = functional_call(layer, substituted, (features,))
            return logits

    return output, head, (*head_weights.values(), *attached.values())


class _HeldBack:
    """What a head was given, in place of being run."""

    def __init__(self) -> None:
        self.features: Tensor | None = None
        self.weights: dict[str, Tensor] = {}

    def keep(self, head: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(features: Tensor) -> Tensor:
            # Inside the model's own forward pass the head has its substituted weights.
            self.features, self.weights = features, dict(head.named_parameters())
            return features

        return forward


class _Block:
    """In place of a block's `forward`: the same as a function of every tensor that it depends on.

    Args:
        site: what its draws are counted under, from 1; None: as a part of what is around it.
        norms: those in it, of the model's own classes, of which tasks may have weights of their own.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        site: str | None,
        attachments: Tensors,
        attach: Attach,
        interception: Interception,
        forward_pass: ForwardPass,
        divided: _Divided | None,
        norms: Sequence[nn.Module],
    ) -> None:
        self._original = _NormPerTask(module) if module in norms else _Original(module)
        self._norms = [norm for norm in norms if norm is not module]
        self._name, self._site, self._num_calls = name, site, 0
        self._attachments, self._attach = attachments, attach
        self._interception, self._pass, self._divided = interception, forward_pass, divided

    @property
    def is_called(self) -> bool:
        """Whether it was, in this pass."""
        return self._num_calls > 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._num_calls += 1
        site, num_draws = self._interception.position
        if self._site is not None:
            site, num_draws = f"{self._site}#{self._num_calls}", 0
        if not self._pass.recompute_blocks and self._divided is None:
            with (
                self._interception.region(site),
                self._attach(self._attachments),
                _norms_per_task(self._norms),
            ):
                return self._original(*args, **kwargs)
        values, layout = pytree.tree_flatten((args, kwargs))
        is_given = [isinstance(value, Tensor) for value in values]
        given = [value for value in values if isinstance(value, Tensor)]
        weights: dict[str, Tensor] = dict(self._original.module.named_parameters())
        if self._divided is not None:
            weights = self._divided.of_module(self._name, weights)
        attachments = dict(self._attachments)
        layouts: list[Any] = []
        positions: list[tuple[str, int]] = []

        def compute(*tensors: Tensor) -> tuple[Tensor, ...]:
            rest = iter(tensors)
            filled = [
                next(rest) if is_tensor else value for is_tensor, value in zip(is_given, values, strict=True)
            ]
            substituted = {name: next(rest) for name in weights}
            attached = {name: next(rest) for name in attachments}
            if self._divided is not None:
                substituted = self._divided.whole_of_module(self._name, substituted)
            args, kwargs = pytree.tree_unflatten(filled, layout)
            with (
                self._interception.region(site, num_draws),
                self._attach(attached),
                _norms_per_task(self._norms),
            ):
                prefixed = {f"module.{name}": value for name, value in substituted.items()}
                result = functional_call(self._original, prefixed, args, kwargs)
                positions.append(self._interception.position)
            outputs, output_layout = pytree.tree_flatten(result)
            layouts.append(output_layout)
            return tuple(outputs)

        outputs = recomputed(
            compute, [*given, *weights.values(), *attachments.values()], derivative=self._pass.derivative
        )
        if self._site is None:
            self._interception.position = positions[0]
        return pytree.tree_unflatten(list(outputs), layouts[0])


class _Original(nn.Module):
    """A module's own `forward`, also while an attribute of that name replaces it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)


class _NormPerTask(_Original):
    """A norm of the model's own class of which each task has weights of its own, `[T, D]`: its `forward` on
    `[T * N, ...]`, for each task. With weights `[D]` that tasks share, as it is."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        weights: dict[str, Tensor] = {
            f"module.{name}": value for name, value in self.module.named_parameters()
        }
        places = {name: 0 if value.ndim == 2 else None for name, value in weights.items()}
        if 0 not in places.values():
            return super().forward(*args, **kwargs)
        num_tasks = next(len(value) for value in weights.values() if value.ndim == 2)
        given, layout = pytree.tree_flatten((args, kwargs))
        num_rows = max(len(value) for value in given if isinstance(value, Tensor) and value.ndim)
        if num_rows % num_tasks:
            raise CapabilityError(
                f"a norm of the model is given {num_rows} rows in its first dim for {num_tasks} tasks: keep "
                "examples in the first dim, or set adaptation.fast to full, which runs one task at a time."
            )
        # All that is of examples goes to their tasks, the gate of a gated norm too.
        is_divided = [
            isinstance(value, Tensor) and value.ndim > 0 and len(value) == num_rows for value in given
        ]
        divided = [
            value.reshape(num_tasks, -1, *value.shape[1:]) if is_one else None
            for value, is_one in zip(given, is_divided, strict=True)
        ]
        original = _Original(self.module)

        def of_one(own: dict[str, Tensor], rows: list[Any]) -> Any:
            values = [
                row if is_one else value for row, value, is_one in zip(rows, given, is_divided, strict=True)
            ]
            own_args, own_kwargs = pytree.tree_unflatten(values, layout)
            return functional_call(original, own, own_args, own_kwargs)

        in_rows = [0 if is_one else None for is_one in is_divided]
        return torch.vmap(of_one, in_dims=(places, in_rows))(weights, divided).flatten(0, 1)


@contextlib.contextmanager
def _norms_per_task(norms: Sequence[nn.Module]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for norm in norms:
            stack.enter_context(_replaced_forward(norm, _NormPerTask(norm)))
        yield


@contextlib.contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]


class _Divided:
    """The weights of a model in one pass, where this rank has shards of them.

    Args:
        weights: the shards, by name; of tied ones by the first.
        whole: names of weights that are no shards.
    """

    def __init__(self, model: nn.Module, weights: Tensors, shards: Shards, whole: Collection[str]) -> None:
        self._shards = shards
        self._no_shards = frozenset(whole)
        values = {parameter: weights[name] for name, parameter in model.named_parameters()}
        self._by_name = {
            name: values[parameter] for name, parameter in model.named_parameters(remove_duplicate=False)
        }

    def of_module(self, module: str, names: Iterable[str]) -> dict[str, Tensor]:
        """The shards of a module's weights, by their names in it."""
        return {name: self._by_name[f"{module}.{name}"] for name in names}

    def whole_of_module(self, module: str, weights: Tensors) -> dict[str, Tensor]:
        """The whole weights of a module from their shards, by their names in it."""
        whole = self.whole({f"{module}.{name}": value for name, value in weights.items()})
        return {name: whole[f"{module}.{name}"] for name in weights}

    def whole(self, weights: Tensors) -> dict[str, Tensor]:
        """The whole weights from their shards, by their names in the model."""
        shards = {name: value for name, value in weights.items() if name not in self._no_shards}
        return {**weights, **(self._shards.whole(shards) if shards else {})}


class _RefuseUseOutside(TorchFunctionMode):
    """Tells of weights that are used where they were not gathered: they are on the meta device there. torch
    itself does not always mind: a product of a CPU's matrix with one on the meta device is some number."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = (value for value in (*args, *kwargs.values()))
        flat = (each for value in given for each in (value if isinstance(value, list | tuple) else (value,)))
        devices = {value.device.type for value in flat if isinstance(value, Tensor)}
        if "meta" in devices and len(devices) > 1:
            raise CapabilityError(
                "sharding.kind: sharded gathers weights for the module that has them, and this model uses "
                "one outside of its module's own forward (an embedding's as the output head's, for "
                "instance): make it a module's own, tied if it is shared, or take sharding.kind: replicated."
            )
        return func(*args, **kwargs)


def _outside_blocks(model: nn.Module, parts: Sequence[str]) -> tuple[list[str], list[str]]:
    """The modules with weights of their own that hold no others, outside of `parts`; and the weights of those
    that do hold others."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    owners = dict.fromkeys(
        name.rpartition(".")[0] for name in names if not any(_is_in(name, part) for part in parts)
    )
    inner = [
        owner
        for owner in owners
        if owner and not any(_is_in(other, owner) for other in (*owners, *parts) if other != owner)
    ]
    around = [
        name for name, _ in model.named_parameters() if name.rpartition(".")[0] in set(owners) - set(inner)
    ]
    return inner, around


def _is_in(name: str, module: str) -> bool:
    return name.startswith(f"{module}.")


def stacked(readouts: Sequence[tuple[Tensor, Callable[..., Tensor] | None, tuple[Tensor, ...]]]) -> Readout:
    """The readouts of tasks that ran one after the other, as one of `[T, ...]`."""
    features = torch.stack([output for output, _, _ in readouts])
    heads = [head for _, head, _ in readouts if head is not None]
    if not heads:
        return Readout(features)
    num_tensors = len(readouts[0][2])

    def head(chunk: Tensor, *tensors: Tensor) -> Tensor:
        return torch.stack(
            [
                one(chunk[task], *tensors[task * num_tensors : (task + 1) * num_tensors])
                for task, one in enumerate(heads)
            ]
        )

    return Readout(features, head, tuple(tensor for _, _, tensors in readouts for tensor in tensors))
