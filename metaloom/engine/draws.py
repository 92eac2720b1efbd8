"""Randomness inside a forward pass, as a function of what it is for.

A draw depends on (seed, task number, inner step, site, example) and on nothing else. An episode's number is
unique in a run and stands for the outer step and the task in it; the site says which draw of the pass it is.
So a step that is computed again, alone or among other tasks, on any rank, sees the very same draws.
"""

from __future__ import annotations

import dataclasses
import hashlib

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Draws:
    """The draws of one inner step of T tasks.

    Attributes:
        seed: of the run.
        numbers: the episode number of each task, length T.
        step: the inner step.
        part: of the step, where it has several forward passes.
    """

    seed: int
    numbers: tuple[int, ...]
    step: int
    part: str = ""

    def of_task(self, task: int) -> Draws:
        """The draws of one of the tasks alone: the same as among the others."""
        return dataclasses.replace(self, numbers=(self.numbers[task],))

    def dropout(self, inputs: Tensor, probability: float, site: str) -> Tensor:
        """Inputs `[T * N, ...]` with entries zeroed by `probability` and the rest scaled by `1 / (1 - p)`.

        An example's draws depend on its row among its task's, not on how many follow: padding changes none.
        """
        if probability == 0.0:
            return inputs
        shape = (inputs.shape[0] // len(self.numbers), *inputs.shape[1:])
        kept = torch.cat([self._uniform(shape, number, site, inputs.device) for number in self.numbers])
        scale = 0.0 if probability == 1.0 else 1.0 / (1.0 - probability)
        return inputs * ((kept >= probability).to(inputs.dtype) * scale)

    def normal(self, mean: Tensor, std: Tensor, site: str) -> Tensor:
        """`mean + std * eps`, all `[T * N, ...]`, eps standard normal; examples as in `dropout`."""
        num_examples = mean.shape[0] // len(self.numbers)
        noise = torch.empty(mean.shape, device=mean.device)
        for task, number in enumerate(self.numbers):
            generator = self._generator(number, site, mean.device)
            for row in noise[task * num_examples : (task + 1) * num_examples]:
                row.normal_(generator=generator)
        return mean + std * noise.to(std.dtype)

    def _uniform(self, shape: tuple[int, ...], number: int, site: str, device: torch.device) -> Tensor:
        generator = self._generator(number, site, device)
        uniform = torch.empty(shape, device=device)
        for row in uniform:
            # Row by row: on a GPU a number depends on how many are drawn at once.
            row.uniform_(generator=generator)
        return uniform

    def _generator(self, number: int, site: str, device: torch.device) -> torch.Generator:
        return _generator(f"{self.seed}/{number}/{self.step}/{self.part}{site}", device)


def standard_normal(like: Tensor, *key: object) -> Tensor:
    """Standard normal numbers shaped like a tensor, in its dtype and on its device: a function of the key."""
    generator = _generator("/".join(map(str, key)), like.device)
    return torch.empty_like(like).normal_(generator=generator)


def _generator(key: str, device: torch.device) -> torch.Generator:
    """A generator whose seed is the key's digest."""
    generator = torch.Generator(device)
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    # 63 bits: a generator's seed is a signed number.
    generator.manual_seed(int.from_bytes(digest, "big") >> 1)
    return generator
