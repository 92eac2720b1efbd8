"""One network for a few tasks that ask different things of the same inputs: multi-task architectures.

Each is made of the blocks and heads of an ordinary network, is called with the name of a task, and says what
that task asks for. What tasks share, and what each has of its own, is what they differ in.

Shape letters: N examples, G tasks, D channels or units behind a block, C outputs.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from metaloom.models.conv4 import Conv4
from metaloom.models.mlp import Mlp

Network = Mlp | Conv4


class MultiTask(nn.Module, abc.ABC):
    """What all have.

    Args:
        make: makes a network with weights that are drawn anew each time.
        tasks: their names, G of them, all different.
    """

    def __init__(self, make: Callable[[], Network], tasks: Sequence[str]) -> None:
        super().__init__()
        self._place = {task: place for place, task in enumerate(tasks)}

    @property
    @abc.abstractmethod
    def block_names(self) -> tuple[str, ...]:
        """The modules that are one block each."""

    @abc.abstractmethod
    def forward(self, inputs: Tensor, task: str) -> Tensor:
        """Outputs `[N, C]` of inputs `[N, ...]`.

        Args:
            task: one of the names.
        """


class MultiHead(MultiTask):
    """All blocks are shared; each task has a head of its own (hard parameter sharing; Caruana 1997,
    "Multitask Learning")."""

    def __init__(self, make: Callable[[], Network], tasks: Sequence[str]) -> None:
        super().__init__(make, tasks)
        networks = [make() for _ in tasks]
        self.network = networks[0]
        self.heads = nn.ModuleList(network.head for network in networks)
        del self.network.head

    @property
    def block_names(self) -> tuple[str, ...]:
        return tuple(f"network.blocks.{row}" for row in range(len(self.network.blocks)))

    def forward(self, inputs: Tensor, task: str) -> Tensor:
        features = self.network.entering(inputs)
        for block in self.network.blocks:
            features = block(features)
        outputs: Tensor = self.heads[self._place[task]](self.network.leaving(features))
        return outputs


class Film(MultiTask):
    """All layers are shared; each task scales and shifts what they make (Perez et al. 2018, "FiLM: Visual
    Reasoning with a General Conditioning Layer", equation 2), here by numbers of its own:

        h_d <- scale_gd h_d + shift_gd,    behind each block, for each of its D channels or units

    The paper has it before a block's activation, and reports that other places do as well. Scales start at 1
    and shifts at 0: all tasks alike.
    """

    def __init__(self, make: Callable[[], Network], tasks: Sequence[str]) -> None:
        super().__init__(make, tasks)
        self.network = make()
        self.films = nn.ModuleList(_Modulation(len(tasks), _width(block)) for block in self.network.blocks)

    @property
    def block_names(self) -> tuple[str, ...]:
        return tuple(f"network.blocks.{row}" for row in range(len(self.network.blocks)))

    def forward(self, inputs: Tensor, task: str) -> Tensor:
        features = self.network.entering(inputs)
        for block, film in zip(self.network.blocks, self.films, strict=True):
            features = film(block(features), self._place[task])
        outputs: Tensor = self.network.head(self.network.leaving(features))
        return outputs


class CrossStitch(MultiTask):
    """Each task has a network of its own, whose next block is given a mixture of what the blocks of all have
    made (Misra et al. 2016, "Cross-stitch Networks for Multi-task Learning", equation 1):

        h_gd <- sum over tasks k of alpha_gkd h_kd,    behind each block, for each of its D channels or units

    Each task's pass runs the networks of all: G times the work of one. At the start alpha is 0.9 for a
    network's own and 0.1 for the others in all: values of the paper's, which starts from networks that were
    trained for the tasks one by one. Ours start at random.
    """

    OWN = 0.9

    def __init__(self, make: Callable[[], Network], tasks: Sequence[str]) -> None:
        super().__init__(make, tasks)
        self.networks = nn.ModuleList(make() for _ in tasks)
        first = self._network(0)
        self.stitches = nn.ModuleList(_Stitch(len(tasks), _width(block), self.OWN) for block in first.blocks)

    def _network(self, place: int) -> Network:
        network = self.networks[place]
        assert isinstance(network, Mlp | Conv4)
        return network

    @property
    def block_names(self) -> tuple[str, ...]:
        return tuple(
            f"networks.{place}.blocks.{row}"
            for place in range(len(self.networks))
            for row in range(len(self.stitches))
        )

    def forward(self, inputs: Tensor, task: str) -> Tensor:
        networks = [self._network(place) for place in range(len(self.networks))]
        features = [network.entering(inputs) for network in networks]
        for row, stitch in enumerate(self.stitches):
            made = [network.blocks[row](own) for network, own in zip(networks, features, strict=True)]
            features = list(stitch(torch.stack(made)))
        place = self._place[task]
        outputs: Tensor = networks[place].head(networks[place].leaving(features[place]))
        return outputs


class _Modulation(nn.Module):
    """A scale and a shift of each channel, of each of G tasks."""

    def __init__(self, num_tasks: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_tasks, width))
        self.shift = nn.Parameter(torch.zeros(num_tasks, width))

    def forward(self, features: Tensor, place: int) -> Tensor:
        return features * _beside(self.scale[place], features) + _beside(self.shift[place], features)


class _Stitch(nn.Module):
    """Mixes the features of G networks, channel by channel."""

    def __init__(self, num_tasks: int, width: int, own: float) -> None:
        super().__init__()
        start = torch.full((num_tasks, num_tasks), (1.0 - own) / max(1, num_tasks - 1))
        start.fill_diagonal_(own)
        self.alpha = nn.Parameter(start[:, :, None].repeat(1, 1, width))

    def forward(self, features: Tensor) -> Tensor:
        """`[G, N, D, ...]` of features of the same shape."""
        mixed: Tensor = sum(
            features[k, None] * _beside(self.alpha[:, k], features, dim=2) for k in range(len(features))
        )  # type: ignore[assignment]  # of at least one
        return mixed


def _beside(numbers: Tensor, features: Tensor, dim: int = 1) -> Tensor:
    """Numbers `[..., D]` so that they meet the channels of features, which are at `dim`; leading dims stay
    in front, with one for examples behind them."""
    leading = numbers.shape[:-1]
    return numbers.view(*leading, 1, numbers.shape[-1], *(1,) * (features.ndim - dim - 1))


def _width(block: nn.Module) -> int:
    width = block.width
    assert isinstance(width, int)
    return width
