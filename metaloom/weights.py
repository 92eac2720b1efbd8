"""A model and what a rank holds of its weights: whole or in shards, made from a seed or read from files."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from metaloom.engine.adapters.base import BACKBONE
from metaloom.engine.sharding.base import Sharding
from metaloom.engine.sharding.sharded import ReadRows, Sharded, ShardedWeights, rows_in
from metaloom.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class HeldModel:
    """A model on one rank.

    Attributes:
        module: what computes. Its own parameters require no gradients: what is learned is substituted for
            them; in shards they are on the meta device, and hold nothing.
        shards: the weights, where this rank holds shards of them.
    """

    module: nn.Module
    shards: ShardedWeights | None = None

    def values(self) -> dict[str, Tensor]:
        """What this rank holds of each weight, by name."""
        if self.shards is not None:
            return self.shards.values
        return {name: value.detach() for name, value in self.module.named_parameters()}

    def hold_once(self, meta: Mapping[str, Tensor]) -> None:
        """Lets go of the model's own copy of the weights that are learned: from now on they are those of
        `meta`.

        Args:
            meta: meta-parameters by name, as the outer optimizer holds them.
        """
        learned = {
            name.removeprefix(BACKBONE): value for name, value in meta.items() if name.startswith(BACKBONE)
        }
        if self.shards is not None:
            self.shards.values.update(learned)
            return
        for name, parameter in self.module.named_parameters():
            if name in learned:
                parameter.data = learned[name]

    def load(self, values: Mapping[str, Tensor]) -> HeldModel:
        """The same model with some of its weights replaced, in place.

        Args:
            values: what this rank holds of them, by name.
        """
        for name, value in self.values().items():
            if name in values:
                value.copy_(values[name])
        return self


Source = Callable[[nn.Module], ReadRows]


def hold(
    make: Callable[[], nn.Module],
    source: Source | None,
    sharding: Sharding,
    device: torch.device,
    dtype: torch.dtype,
) -> HeldModel:
    """The model that `make` makes, with the weights that this rank is to hold.

    From files a rank reads what it holds, and nothing else of the weights is ever in its memory. Weights that
    `make` draws are drawn whole, and then divided: every rank has all of them for a moment.

    Args:
        source: what reads the weights of such a model: `of_file` or `of_pretrained`; None for what `make`
            draws.
        device: where the weights go.
        dtype: which they get.

    Raises:
        CheckpointError: the files lack a weight, have one that the model has not, or one of another shape.
    """
    if source is None:
        module = make().to(dtype=dtype).requires_grad_(False)
        if not isinstance(sharding, Sharded):
            return HeldModel(module.to(device))
        read = rows_in(module)
    else:
        with parameters_on_meta():
            module = make().to(dtype=dtype).requires_grad_(False)
        read = source(module)
    if isinstance(sharding, Sharded):
        shards = sharding.divide(module, _read_onto(read, device, dtype))
        drop_parameters(module)
        move_buffers(module, device)
        return HeldModel(module, shards)
    materialize(module, _read_onto(read, device, dtype))
    return HeldModel(module.to(device))


def _read_onto(read: ReadRows, device: torch.device, dtype: torch.dtype) -> ReadRows:
    def read_onto(name: str, rows: range) -> Tensor:
        return read(name, rows).to(device, dtype)

    return read_onto


# ---------------------------------------------------------------- parameters without memory


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """While it lasts, the parameters of modules that are made take no memory. Buffers are real: what a module
    computes when it is made (the frequencies of rotary embeddings) is in no file."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def drop_parameters(module: nn.Module) -> None:
    """Puts the parameters on the meta device; tied ones stay tied."""
    _replace_parameters(module, lambda name, parameter: parameter.to("meta"))


def materialize(module: nn.Module, read: ReadRows) -> None:
    """Reads the parameters; tied ones stay tied."""
    _replace_parameters(module, lambda name, parameter: read(name, range(len(parameter))))


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Moves the buffers alone: what is on the meta device cannot be moved."""
    for owner in module.modules():
        for name, buffer in list(owner.named_buffers(recurse=False)):
            setattr(owner, name, buffer.to(device))


def _replace_parameters(module: nn.Module, make: Callable[[str, nn.Parameter], Tensor]) -> None:
    made: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, owner in module.named_modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            full_name = f"{prefix}.{name}" if prefix else name
            if parameter not in made:
                made[parameter] = nn.Parameter(make(full_name, parameter), requires_grad=False)
            setattr(owner, name, made[parameter])


# ---------------------------------------------------------------- files


def of_file(path: Path) -> Source:
    """Reads the weights of a model from a safetensors file, or from a folder of them with an index, under the
    model's own names."""

    def source(module: nn.Module) -> ReadRows:
        files = SafetensorsFiles(path)
        files.require_those_of(module)
        return files.rows

    return source


def of_pretrained(
    folder: Path,
    *,
    own_names: Callable[[Iterable[str]], Mapping[str, str]],
    head: str,
    std: float,
    seed: int,
) -> Source:
    """Reads the weights of a model from a folder that `save_pretrained` of transformers has written, as
    `from_pretrained` does: also from one of the same network with another head, or without. What has no place
    in this model is left there.

    Args:
        own_names: what weights are called in the model, by what they are called in the folder.
        head: the name of the last module. Weights of it that the folder lacks or has in another shape, and of
            a pooler, are drawn: N(0, std^2), biases 0.
        seed: what is drawn follows from it and the weight's name.
    """

    def source(module: nn.Module) -> ReadRows:
        files = SafetensorsFiles(folder, key="model.hf")
        try:
            stored = {own: name for name, own in own_names(files.shapes).items()}
        except ValueError as error:
            raise CheckpointError(f"model.hf: {folder}: {error}.") from error
        drawn: dict[str, Tensor] = {}
        problems: list[str] = []
        for name, value in module.named_parameters():
            shape = files.shapes[stored[name]] if name in stored else None
            if shape == value.shape:
                continue
            if name.startswith(f"{head}.") or ".pooler." in name:
                drawn[name] = _drawn(name, value.shape, std, seed)
            elif shape is None:
                problems.append(f"  {name}: in the model, not in the files")
            else:
                problems.append(
                    f"  {name}: shape {list(shape)} in the files, {list(value.shape)} in the model"
                )
        if problems:
            raise CheckpointError(
                f"model.hf: the weights in {folder} are of another model than its config.json "
                f"({len(problems)} differences):\n" + "\n".join(problems)
            )

        def read(name: str, rows: range) -> Tensor:
            if name in drawn:
                return drawn[name][rows.start : rows.stop].clone()
            return files.rows(stored[name], rows)

        return read

    return source


def _drawn(name: str, shape: torch.Size, std: float, seed: int) -> Tensor:
    if name.endswith("bias"):
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return std * torch.randn(shape, generator=generator)


class SafetensorsFiles:
    """The tensors of a safetensors file, or of a folder with several and their index.

    Args:
        key: of the recipe, that names them.

    Attributes:
        shapes: of each tensor, by name.

    Raises:
        CheckpointError: there is nothing to read, or it cannot be read.
    """

    def __init__(self, source: Path, *, key: str = "model.weights") -> None:
        self.source, self._key = source, key
        self.shapes: dict[str, torch.Size] = {}
        self._files: dict[str, Path] = {}
        for path in _files_of(source, key):
            with _opened(path, key) as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    self.shapes[name] = torch.Size(file.get_slice(name).get_shape())
                    self._files[name] = path

    def require_those_of(self, model: nn.Module) -> None:
        """Checks that the files hold the weights of a model. Of tied weights one is enough.

        Raises:
            CheckpointError: they do not; all differences are listed at once.
        """
        expected = {name: value.shape for name, value in model.named_parameters(remove_duplicate=False)}
        buffers = {name for name, _ in model.named_buffers()}
        problems = [
            f"  {name}: in the model, not in the files"
            for name, _ in model.named_parameters()
            if name not in self.shapes
        ]
        for name, shape in self.shapes.items():
            if name not in expected:
                if name not in buffers:
                    problems.append(f"  {name}: in the files, not in the model")
            elif shape != expected[name]:
                problems.append(
                    f"  {name}: shape {list(shape)} in the files, {list(expected[name])} in the model"
                )
        if problems:
            raise CheckpointError(
                f"{self._key}: {self.source} belongs to another model ({len(problems)} differences):\n"
                + "\n".join(problems)
            )

    def rows(self, name: str, rows: range) -> Tensor:
        """Some rows of a weight; nothing else is read."""
        with _opened(self._files[name], self._key) as file:
            read: Tensor = file.get_slice(name)[rows.start : rows.stop]
            return read.clone()  # what is read is a view of the file


def _files_of(source: Path, key: str) -> list[Path]:
    if source.is_file():
        return [source]
    if (source / INDEX).is_file():
        try:
            index = json.loads((source / INDEX).read_text(encoding="utf-8"))
            return [source / name for name in sorted(set(index["weight_map"].values()))]
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{key}: {source / INDEX} cannot be read: {error}.") from error
    if (source / SINGLE).is_file():
        return [source / SINGLE]
    raise CheckpointError(
        f"{key}: {source} is neither a safetensors file nor a folder with {SINGLE} or {INDEX}."
    )


@contextlib.contextmanager
def _opened(path: Path, key: str) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{key}: {path} cannot be read: {error}.") from error
