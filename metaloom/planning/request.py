"""What the command line asks of a plan: checked before anything is counted, without torch."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

from metaloom.errors import RecipeError
from metaloom.planning.hardware import HERE, device_named, link_named

if TYPE_CHECKING:
    from metaloom.recipe import Recipe

DEVICES_PER_NODE = 8
MOST_RANKS = 1024
DEFAULT_RANKS = f"1-{MOST_RANKS}"


@dataclasses.dataclass(frozen=True)
class Request:
    """A plan that is asked for.

    Attributes:
        hardware: a device of the table, or `here`.
        link: of the table, between nodes.
        ranks: numbers of ranks, rising.
        devices_per_node: ranks of one node; None for what the hardware has.
        compare: whether to count other layouts of the meta-parameters too where the recipe's own fits.
        as_json: whether to print JSON in place of tables.
    """

    hardware: str
    link: str
    ranks: tuple[int, ...]
    devices_per_node: int | None
    compare: bool
    as_json: bool


def checked(request: Request) -> Request:
    """The request, where its names are in the table.

    Raises:
        RecipeError: one is not, or a number is out of range.
    """
    if request.hardware != HERE:
        device_named(request.hardware)
    link_named(request.link)
    if request.devices_per_node is not None and request.devices_per_node < 1:
        usual = "the recipe's processes of one machine" if request.hardware == HERE else str(DEVICES_PER_NODE)
        raise RecipeError(
            f"--gpus-per-node: {request.devices_per_node}; a node has at least 1 (leave it out for {usual})."
        )
    return request


def check_comparison(request: Request, recipe: Recipe) -> None:
    """Sees that there is something to compare where that is asked for.

    Raises:
        RecipeError: there is not.
    """
    if not request.compare:
        return
    why = None
    if recipe.sharding.kind == "sharded":
        why = "the recipe's own sharding.kind is sharded"
    elif recipe.adaptation.fast.kind in ("full", "msr"):
        why = (
            f"with adaptation.fast: {recipe.adaptation.fast.kind} every task has a whole copy of all "
            "weights, and none are in shards"
        )
    if why is not None:
        raise RecipeError(
            f"--compare: plans weights in shards too, and has no effect, since {why}; leave it out."
        )


def ranks_in(text: str) -> tuple[int, ...]:
    """The numbers of ranks that a text names: `8`, `1,2,64`, or `1-1024` for its ends and the powers of two
    between them.

    Raises:
        RecipeError: it names none, or one below 1 or above 1024.
    """
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise RecipeError(
                f"--ranks: {text!r} is no number of ranks; give one (8), some (1,8,64) or a range (1-64)."
            )
        first, last = int(match[1]), int(match[2] or match[1])
        for number in (first, last):
            if not 1 <= number <= MOST_RANKS:
                raise RecipeError(f"--ranks: {number}; a plan is for 1 to {MOST_RANKS} ranks.")
        if last < first:
            raise RecipeError(f"--ranks: {part.strip()!r} falls; give the smaller number first.")
        between = {2**power for power in range(MOST_RANKS.bit_length()) if first <= 2**power <= last}
        numbers |= {first, last} | between
    return tuple(sorted(numbers))
