"""The outer optimizer under DeepSpeed's ZeRO: every rank moves its own share of the meta-parameters.

| | `replicated` | stage 1 | stage 2 |
|---|---|---|---|
| meta-parameters, and the sum of a rank's own gradients | whole | whole | whole |
| gradient of all ranks, after the reduction | whole | whole while it is reduced, then a share | a share |
| optimizer states, float32 master weights | whole, none | a share | a share |

A share is 1 / ranks of the elements, on the GPU or, offloaded, in the host's memory (Rajbhandari et al.
2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", section 5: P_os and P_os+g).

The hypergradient is the engine's own, computed on whole meta-parameters; DeepSpeed sees nothing of the
model. A rank's gradient g enters as that of `sum(theta * g)`, which is g exactly; DeepSpeed adds it over the
ranks and leaves a share of the sum on each. Norm, clipping, schedule and the decision to skip stay the outer
optimizer's, and torch's own fused optimizers do the arithmetic. So the results are those of `replicated` up
to rounding, and no compiler is needed: DeepSpeed's own kernels are compiled on first use, for minutes.

Stage 3 is refused. It shards the meta-parameters too, and gathers them in hooks around a module's forward
pass, which autograd does not see: the passes that hypergradients are made of cannot go through them. Gathered
around the whole hypergradient instead, they would be whole on every rank nearly all the time, so that nothing
would be won over stage 2. The `sharded` backend gathers them by an operator that can be differentiated.

Checkpoints are metaloom's own, not DeepSpeed's universal checkpoint: states are put together to whole tensors
by name, so that any number of ranks and `replicated` go on from them, with no conversion in between. While
one is written or read, every rank has the whole of them in the host's memory.

DeepSpeed is imported inside functions of this module alone.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import json
import math
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from metaloom.engine.meta_optimizer import MetaOptimizer, States, UpdateRule, set_rates
from metaloom.engine.sharding.base import Sharding
from metaloom.engine.sharding.deepspeed_config import ZERO, deepspeed_config, refused_keys
from metaloom.errors import CapabilityError, LaunchError, MetaloomError

# Elements of a rank's share that are put together at a time, so that little of it is on the GPU.
GATHERED_AT_A_TIME = 2**24


@dataclasses.dataclass(frozen=True)
class ZeroSettings:
    """How DeepSpeed is to keep gradients and optimizer states.

    Attributes:
        stage: what is sharded: 1, optimizer states; 2, gradients too.
        offload_optimizer: whether master weights and optimizer states are in the host's memory, where the
            update is then computed.
        extra: further keys of DeepSpeed's configuration.
    """

    stage: int
    offload_optimizer: bool = False
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class DeepSpeedZero(Sharding):
    """Meta-parameters on every rank; gradients and optimizer states sharded by DeepSpeed.

    The gradients that it sums are those of the meta-parameters last given to `optimizer`.

    Args:
        device: where this rank's meta-parameters are.

    Raises:
        CapabilityError: the stage is 3; DeepSpeed is not installed; or an extra key is one that the recipe
            decides, that has no effect, or that DeepSpeed refuses.
        LaunchError: there is no process group, or DeepSpeed would compute on another device.
    """

    def __init__(self, settings: ZeroSettings, device: torch.device) -> None:
        super().__init__()
        if settings.stage not in (1, 2):
            raise CapabilityError(
                f"sharding.stage: {settings.stage}; deepspeed_zero has stages 1 and 2. No hypergradient "
                "passes through weights that DeepSpeed shards in stage 3; sharding.kind: sharded does that."
            )
        self._settings = settings
        self._device = device
        self._optimizer: _ZeroOptimizer | None = None
        self._num_elements = 1
        self.deepspeed_version = _import_deepspeed(device).__version__
        self._require_effect_of_extra_keys()

    @property
    def config(self) -> dict[str, Any]:
        """What DeepSpeed is given for the meta-parameters last given to `optimizer`."""
        return self._config_for(self._num_elements, self._settings.extra)

    def describe(self) -> str:
        """In a line, what is sharded and where."""
        settings = self._settings
        device = "GPU" if self._device.type == "cuda" else "CPU"
        place = "shares" + (", in the host's memory" if settings.offload_optimizer else "")
        return (
            f"DeepSpeed {self.deepspeed_version}: ZeRO stage {settings.stage} over {self.world_size} "
            f"{'rank' if self.world_size == 1 else 'ranks'} ({device}), optimizer states in {place}"
        )

    def optimizer(self, meta: Mapping[str, Tensor], rule: UpdateRule) -> MetaOptimizer:
        """The meta-parameters under DeepSpeed. Every rank must call. What it returned before can be read from
        then on, and no longer moved.

        Raises:
            CapabilityError: a meta-parameter is not float32, the one format of DeepSpeed's master weights.
        """
        for name, value in meta.items():
            if value.dtype != torch.float32:
                dtype = str(value.dtype).removeprefix("torch.")
                raise CapabilityError(
                    f"{name} is {dtype}; DeepSpeed keeps float32 alone. Set "
                    "precision.compute to float32, bfloat16 or float16, or sharding.kind to replicated."
                )
        self._num_elements = sum(value.numel() for value in meta.values())
        if self._optimizer is not None:
            self._optimizer.release()
        self._optimizer = _ZeroOptimizer(meta, rule, self)
        return self._optimizer

    def sum_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The flat elements of this rank's share of each gradient, summed over all ranks; none of some.
        Every rank must call, and follow with an update of the optimizer."""
        assert self._optimizer is not None, "the meta-parameters are given to DeepSpeed first"
        return self._optimizer.reduce(gradients)

    def norm(self, gradients: Mapping[str, Tensor]) -> float:
        squares = torch.stack([value.double().square().sum() for value in gradients.values()]).sum()
        total = self.sum_over_ranks({"squares": squares})["squares"]
        # Infinite where it is so in float32: DeepSpeed takes such a gradient for an overflow.
        return math.sqrt(total.float().item())

    def _config_for(self, num_elements: int, extra: Mapping[str, Any]) -> dict[str, Any]:
        return deepspeed_config(
            stage=self._settings.stage,
            offload_optimizer=self._settings.offload_optimizer,
            pin_memory=self._device.type == "cuda",
            num_elements=num_elements,
            extra=extra,
        )

    def _require_effect_of_extra_keys(self) -> None:
        """Checks that the recipe leaves every extra key open, and that DeepSpeed reads it: it passes over
        keys that it does not know, and what it makes of the configuration without one is then the same."""
        extra = self._settings.extra
        for key, reason in refused_keys(extra):
            raise CapabilityError(f"sharding.extra.{key}: is refused, since {reason}; leave it out.")
        try:
            read = _as_read(self._config_for(1, extra))
        except Exception as error:  # its own errors, pydantic's, AssertionError: whatever it raises
            raise CapabilityError(f"sharding.extra: DeepSpeed refuses it: {error}") from error
        for path in _paths(extra):
            if _as_read(self._config_for(1, _without(extra, path))) == read:
                raise CapabilityError(
                    f"sharding.extra.{'.'.join(path)}: has no effect, since DeepSpeed does not know it, or "
                    "does the same without it; leave it out."
                )


class _ZeroOptimizer(MetaOptimizer):
    """Meta-parameters as parameters of a DeepSpeed engine.

    DeepSpeed lays the parameters of a group behind each other in one flat buffer, zeros at its end, and cuts
    that into as many equal parts as there are ranks: rank r has part r of each group. Parameters whose rates
    are the same share a group.
    """

    def __init__(self, meta: Mapping[str, Tensor], rule: UpdateRule, sharding: DeepSpeedZero) -> None:
        self._sharding = sharding
        # Flat, since DeepSpeed cannot send a tensor without dims.
        self._parameters = {
            name: nn.Parameter(value.detach().flatten().clone()) for name, value in meta.items()
        }
        self._shapes = {name: value.shape for name, value in meta.items()}
        by_rates: dict[tuple[float, float], list[str]] = {}
        for name in meta:
            by_rates.setdefault((rule.lr[name], rule.weight_decay[name]), []).append(name)
        self._groups = list(by_rates.values())
        groups = [rule.group(names[0], [self._parameters[name] for name in names]) for names in self._groups]
        self._optimizer = rule.build(groups, fused=True)
        self._engine = _initialize(list(self._parameters.values()), self._optimizer, sharding)
        # DeepSpeed has moved the parameters into its flat buffers, where they stay.
        self.meta = {
            name: parameter.detach().view(self._shapes[name]) for name, parameter in self._parameters.items()
        }

    def reduce(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's share of each gradient, summed over ranks: views of DeepSpeed's own memory."""
        with torch.enable_grad():
            products = [
                torch.dot(value, gradients[name].flatten()) for name, value in self._parameters.items()
            ]
            self._engine.backward(torch.stack(products).sum())
        return self._gradients()

    def apply(self, gradient: Mapping[str, Tensor], *, scale: float, lr_factor: float) -> None:
        for name, share in self._gradients().items():
            torch.mul(gradient[name], scale, out=share)
        set_rates(self._optimizer, lr_factor)
        self._step(is_finite=True)

    def discard(self) -> None:
        # DeepSpeed finds by itself that the gradient is not finite, and throws it away.
        self._step(is_finite=False)

    def _step(self, *, is_finite: bool) -> None:
        self._engine.step()
        if self._engine.was_step_applied() != is_finite:
            found, done = ("finite", "passed over") if is_finite else ("not finite", "followed")
            raise MetaloomError(
                f"DeepSpeed {done} a meta-gradient whose norm is {found}. Go on with sharding.kind: "
                "replicated."
            )

    def states(self) -> States:
        states: States = {name: {} for name in self._parameters}
        for group, names in enumerate(self._groups):
            share = self._share(group)
            for key, entry in self._optimizer.state.get(share, {}).items():
                if entry is None:
                    continue
                whole = self._gather(entry) if entry.shape == share.shape else None
                for name, start, stop in self._places(names):
                    states[name][key] = (
                        entry.cpu().clone() if whole is None else whole[start:stop].view(self._shapes[name])
                    )
        return states

    def load(self, meta: Mapping[str, Tensor], states: States) -> None:
        with torch.no_grad():
            for name, value in self.meta.items():
                value.copy_(meta[name])
            for group, names in enumerate(self._groups):
                share = self._share(group)
                share.copy_(self._cut(names, meta, share))
                self._optimizer.state[share] = {
                    # A fused optimizer keeps its step count where it computes.
                    key: entry.to(share.device, copy=True)
                    if entry.ndim == 0 and key == "step"
                    else self._cut(names, {name: states[name][key] for name in names}, share)
                    for key, entry in states[names[0]].items()
                }

    def release(self) -> None:
        """Gives back DeepSpeed's hooks and the optimizer's memory; the meta-parameters stay as they are."""
        self._engine.destroy()
        self._optimizer.state.clear()

    def _share(self, group: int) -> Tensor:
        """This rank's part of a group's flat buffer: float32 master weights."""
        share: Tensor = self._optimizer.param_groups[group]["params"][0]
        return share

    def _places(self, names: Sequence[str]) -> Iterator[tuple[str, int, int]]:
        """`(name, start, stop)` of each parameter in its group's flat buffer."""
        start = 0
        for name in names:
            stop = start + self._parameters[name].numel()
            yield name, start, stop
            start = stop

    def _overlaps(self, group: int) -> Iterator[tuple[str, int, int]]:
        """`(name, start, stop)` in this rank's part, of each parameter that reaches into it."""
        size = self._share(group).numel()
        begin = self._sharding.rank * size
        for name, start, stop in self._places(self._groups[group]):
            first, last = max(start - begin, 0), min(stop - begin, size)
            if first < last:
                yield name, first, last

    def _gradients(self) -> dict[str, Tensor]:
        """This rank's share of each gradient, in DeepSpeed's memory: between a backward pass and its step."""
        nothing = self._share(0).detach()[:0]
        shares = dict.fromkeys(self._parameters, nothing)
        for group in range(len(self._groups)):
            overlaps = list(self._overlaps(group))
            master = self._share(group)
            if master.grad is not None:  # offloaded
                pieces = [master.grad[start:stop] for _, start, stop in overlaps]
            else:
                # Followed by the zeros at the end of the buffer, where this rank has them.
                pieces = [piece.view(-1) for piece in self._engine.optimizer.averaged_gradients[group]]
            for (name, start, stop), piece in zip(overlaps, pieces, strict=False):
                assert piece.numel() == stop - start, f"DeepSpeed cuts {name} otherwise than is known here"
                shares[name] = piece
        return shares

    def _gather(self, share: Tensor) -> Tensor:
        """A group's whole flat buffer in the host's memory, of all ranks' parts. Every rank must call."""
        whole = torch.empty(self._sharding.world_size, share.numel(), dtype=share.dtype)
        for start in range(0, share.numel(), GATHERED_AT_A_TIME):
            part = share[start : start + GATHERED_AT_A_TIME].contiguous()
            parts = [torch.empty_like(part) for _ in range(self._sharding.world_size)]
            dist.all_gather(parts, part)
            for rank, received in enumerate(parts):
                whole[rank, start : start + part.numel()] = received
        return whole.view(-1)

    def _cut(self, names: Sequence[str], tensors: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """This rank's part of the flat buffer of a group's whole tensors, as `like` is."""
        flat = torch.cat([tensors[name].detach().flatten().cpu() for name in names])
        padded = torch.zeros(self._sharding.world_size * like.numel(), dtype=flat.dtype)
        padded[: flat.numel()] = flat
        begin = self._sharding.rank * like.numel()
        return padded[begin : begin + like.numel()].to(like.device, like.dtype, copy=True)


class _World:
    """The process group as DeepSpeed asks for it: the one that is there.

    Without it DeepSpeed makes a second group of the same ranks, whose time limit is not that of the first.
    """

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(range(dist.get_world_size()))

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size()

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_model_parallel_group(self) -> None:
        return None

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0


def _initialize(
    parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, sharding: DeepSpeedZero
) -> Any:
    """DeepSpeed's engine around an optimizer of `parameters`. Every rank must call."""
    import deepspeed

    index = parameters[0].device.index
    with _output_on_standard_error():
        engine, *_ = deepspeed.initialize(
            # Else it would take the GPU of the number LOCAL_RANK, also where ranks share GPUs.
            args=types.SimpleNamespace(device_rank=0 if index is None else index),
            model=nn.ParameterList(parameters),
            optimizer=optimizer,
            mpu=_World(),
            dist_init_required=False,
            config=copy.deepcopy(sharding.config),
        )
    return engine


def _import_deepspeed(device: torch.device) -> Any:
    """The package, made ready for this process.

    Raises:
        CapabilityError: it is not installed.
        LaunchError: it cannot be used here.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise CapabilityError(
            "sharding.kind: deepspeed_zero needs the package deepspeed, which is not installed. Install it "
            "with `pip install 'metaloom[deepspeed]'`, or set sharding.kind to replicated."
        )
    if not dist.is_initialized():
        raise LaunchError(
            "DeepSpeed needs a process group, also for one rank. Call torch.distributed.init_process_group "
            "first."
        )
    with _output_on_standard_error():
        import deepspeed

        name = deepspeed.accelerator.get_accelerator().device_name()
        # Its all-reduce through shared memory would be compiled on first use, and serves inference.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if name != device.type:
        raise LaunchError(
            f"DeepSpeed computes on {name}, this rank on {device.type}. Set the environment variable "
            f"DS_ACCELERATOR to {device.type} before deepspeed is imported."
        )
    return deepspeed


def _paths(extra: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Every extra key, those of the ZeRO section one by one."""
    for key, value in extra.items():
        if key == ZERO:
            yield from ((key, inner) for inner in value)
        else:
            yield (key,)


def _without(extra: Mapping[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """The extra keys but for one."""
    rest = {key: value for key, value in extra.items() if key != path[0]}
    if len(path) == 1:
        return rest
    return rest | {ZERO: {key: value for key, value in extra[ZERO].items() if key != path[1]}}


def _as_read(config: Mapping[str, Any]) -> str:
    """What DeepSpeed makes of a configuration, as text."""
    from deepspeed.runtime.config import DeepSpeedConfig

    with _output_on_standard_error():
        parsed = vars(DeepSpeedConfig(copy.deepcopy(dict(config)), mpu=_World()))
    read = {name: value for name, value in parsed.items() if name != "_param_dict"}
    return json.dumps(read, default=_contents, sort_keys=True)


def _contents(value: object) -> Any:
    try:
        return vars(value)
    except TypeError:
        return str(value)


@contextlib.contextmanager
def _output_on_standard_error() -> Iterator[None]:
    """DeepSpeed logs and prints to standard output, which is the user's; standard error is kept in the logs.

    Its logger keeps the stream that it finds when it is imported.
    """
    with contextlib.redirect_stdout(sys.stderr):
        yield
