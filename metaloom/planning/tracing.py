"""Counting what runs: tensors that live, arithmetic, traffic. On tensors without data nothing is computed."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from metaloom.engine.kernels.linear import product_flops

META = torch.device("meta")
ALIGNMENT = 64  # bytes that torch rounds an allocation up to
_aten = torch.ops.aten


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every operation that runs inside, and the storages that live.

    What the code under it asks of values that are not there is answered alike: numbers are 1, flags are True:
    an iteration that goes on while something moves goes on to its last.

    Attributes:
        live_bytes: of storages that were made inside and live.
        peak_bytes: the most so far.
        flops: of matrix products, convolutions and attention.
        moved_bytes: read and written by all other operations that are no views.
        num_operations: that are no views.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._flops = {**flop_registry, **_FLOPS, **_on_tensors(product_flops())}
        self.restart()

    def restart(self) -> None:
        """Counts from zero; what lives goes on living."""
        self.peak_bytes = self.live_bytes
        self.flops = self.moved_bytes = self.num_operations = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and being kept from it costs as much as the rest

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") == META:
            # Zeros in place of a tangent that is not there are made where the tensor has its (missing) data.
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        packet = func.overloadpacket
        if packet is _aten._local_scalar_dense:
            return 1.0 if args[0].dtype.is_floating_point else args[0].dtype == torch.bool or 1
        if packet is _aten.equal:
            return True
        output = func(*args, **kwargs)
        outputs = [value for value in pytree.tree_leaves(output) if isinstance(value, Tensor)]
        for value in outputs:
            self._hold(value)
        if func.is_view or packet is _aten.detach:
            return output
        self.num_operations += 1
        count = self._flops.get(packet)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=output)
        else:
            inputs = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            self.moved_bytes += sum(map(_touched_bytes, (*inputs, *outputs)))
        return output

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = -(-storage.nbytes() // ALIGNMENT) * ALIGNMENT

        def drop(_: weakref.ref[Any]) -> None:
            self.live_bytes -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, drop)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


@contextlib.contextmanager
def traced() -> Iterator[Trace]:
    """A trace under which tensors that are made have no data."""
    with (
        warnings.catch_warnings(),
        FakeTensorMode(allow_non_fake_inputs=True),
        Trace() as trace,
    ):
        # Weights in shards tell by their address whether they are the same: here all have one.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield trace


def _touched_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's numbers; each once, however often it is expanded."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _on_tensors(counts: dict[Any, Any]) -> dict[Any, Any]:
    """Counts that take shapes, as functions of the tensors themselves."""

    def taking_tensors(count: Any) -> Any:
        return lambda *args, out_val, **options: count(
            *(value.shape if isinstance(value, Tensor) else value for value in args)
        )

    return {operation: taking_tensors(count) for operation, count in counts.items()}


def _attention_flops(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any, out_val: Any, **options: Any
) -> int:
    """Of the CPU's fused attention, of which torch's counters do not know: two products, not halved where it
    is causal, as theirs."""
    batch, heads, num_queries, width = query.shape
    return 2 * batch * heads * num_queries * key.shape[-2] * (width + value.shape[-1])


def _attention_backward_flops(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, out_val: Any, **options: Any
) -> int:
    """Five products: the weights again, and the gradients of query, key, value and weights."""
    batch, heads, num_queries, width = query.shape
    return 2 * batch * heads * num_queries * key.shape[-2] * (3 * width + 2 * value.shape[-1])


def _convolution_backward_flops(
    gradient: Tensor, inputs: Tensor, weight: Tensor, *rest: Any, out_val: Any, **options: Any
) -> int:
    """As many as the convolution itself for each of the gradients of inputs and weight. torch's own count
    takes grouped convolutions, such as those of several tasks under vmap, for one of all groups with all."""
    transposed, output_mask = bool(rest[4]), rest[-1]
    positions = inputs if transposed else gradient
    forward = 2 * positions.numel() * weight.shape[1:].numel()
    return forward * (int(output_mask[0]) + int(output_mask[1]))


_FLOPS: dict[Any, Any] = {
    _aten.convolution_backward: _convolution_backward_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
