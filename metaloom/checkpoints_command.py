"""`metaloom checkpoints list | verify | prune`, without torch."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from metaloom.arguments import add_command
from metaloom.errors import CheckpointError
from metaloom.run_folder import RunFolder

if TYPE_CHECKING:
    from metaloom.arguments import Commands
    from metaloom.checkpoints.catalogue import Catalogue
    from metaloom.checkpoints.retention import Retention
    from metaloom.recipe import Recipe

EXAMPLES = """\
examples:
  metaloom checkpoints list runs/glyphs-maml
  metaloom checkpoints list s3://bucket/glyphs-maml --json
  metaloom checkpoints verify runs/glyphs-maml             reads every byte; exit code 4 where one is damaged
  metaloom checkpoints prune runs/glyphs-maml --keep-last 1 --dry-run

Where a run's checkpoints are is up to its recipe (checkpoint.url); a path or URL of checkpoints may be
given too.
"""


def add_checkpoint_commands(commands: Commands) -> None:
    """Adds the commands to those of a parser."""
    group = add_command(commands, "checkpoints", "list, verify or prune checkpoints", EXAMPLES)
    own = group.add_subparsers(title="commands", required=True, metavar="COMMAND")
    listing = add_command(own, "list", "say which checkpoints there are", EXAMPLES)
    listing.add_argument("--json", action="store_true", help="print JSON in place of a table")
    listing.set_defaults(run_command=_list)
    verify = add_command(own, "verify", "read every byte, and compare it with what was written", EXAMPLES)
    verify.add_argument("--step", type=int, metavar="N", help="of this step alone")
    verify.set_defaults(run_command=_verify)
    prune = add_command(own, "prune", "delete checkpoints of meta-training that no rule keeps", EXAMPLES)
    prune.add_argument("--keep-last", type=int, metavar="N", help="the newest (default: as the recipe says)")
    prune.add_argument("--keep-every", type=int, metavar="M", help="those of steps that are multiples of it")
    prune.add_argument("--keep-best", type=int, metavar="K", help="the best by validation.best_by")
    prune.add_argument("--dry-run", action="store_true", help="delete nothing, and say what would be")
    prune.set_defaults(run_command=_prune)
    for command in (listing, verify, prune):
        command.add_argument("run", metavar="RUN", help="a run's folder, or a path or URL of checkpoints")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where checkpoints are.

    Attributes:
        root: the path or URL that holds a folder for each phase.
        folder: of the run, where they are in it; else None.
        recipe: of the run; None where checkpoints were named, and no run.
    """

    root: str
    folder: RunFolder | None
    recipe: Recipe | None

    def catalogue(self, phase: str) -> Catalogue:
        from metaloom.checkpoints.catalogue import Catalogue

        return Catalogue(f"{self.root}/{phase}")

    def phases(self) -> list[str]:
        """The phases that have checkpoints.

        Raises:
            CheckpointError: there are none.
        """
        from metaloom.checkpoints.folder import Folder

        names = {name.partition("/")[0] for name in Folder(self.root).sizes() if name.count("/") > 1}
        if not names:
            raise CheckpointError(
                f"{self.root} holds no checkpoints: name a run's folder, or what its recipe has as "
                "checkpoint.url."
            )
        return sorted(names)


def _place(words: str) -> Place:
    from metaloom.recipe import load_recipe

    folder = RunFolder(Path(words))
    if Path(words).name == "checkpoints" and RunFolder(Path(words).parent).recipe.is_file():
        folder = RunFolder(Path(words).parent)
    if "://" in words or not folder.recipe.is_file():
        return Place(words.rstrip("/"), None, None)
    recipe = load_recipe(folder.recipe)
    url = recipe.checkpoint.url
    if url is not None:
        return Place(url.rstrip("/"), None, recipe)
    return Place(str(folder.checkpoints("meta").parent), folder, recipe)


def _list(arguments: argparse.Namespace) -> int:
    place = _place(arguments.run)
    found = [row for phase in place.phases() for row in _rows(place.catalogue(phase), phase)]
    if arguments.json:
        print(json.dumps([dataclasses.asdict(row) for row in found], indent=2))
        return 0
    from metaloom.tracking.console import make_console

    cells = [
        (
            row.phase,
            str(row.step),
            row.written,
            _size(row.num_bytes),
            str(row.num_files),
            row.state if row.state != "complete" else _shown(row.metrics),
        )
        for row in found
    ]
    console = make_console(rank=0, error_stream=sys.stderr)
    console.table(place.root, ("phase", "step", "written (UTC)", "size", "files", "measured"), cells)
    return 0


@dataclasses.dataclass(frozen=True)
class Row:
    """What is said of one checkpoint."""

    phase: str
    step: int
    state: str
    written: str
    num_bytes: int
    num_files: int
    metrics: dict[str, float]


def _rows(catalogue: Catalogue, phase: str) -> Iterator[Row]:
    """Every checkpoint of a phase, by what its manifest and the sizes of its files say."""
    from metaloom.checkpoints.folder import MissingFileError
    from metaloom.checkpoints.manifest import DamagedError

    for listing in catalogue.listings():
        size = sum(listing.sizes.values())
        state, written, metrics = "complete", "", {}
        if not listing.is_committed:
            state = "no manifest: being written, or left by a run that was killed"
        else:
            try:
                manifest = catalogue.manifest(listing.step)
                written, metrics = manifest.written, dict(manifest.metrics)
                catalogue.require_sizes(manifest, listing.sizes)
            except (DamagedError, MissingFileError) as error:
                state = f"damaged: {error}"
        yield Row(phase, listing.step, state, written, size, len(listing.sizes), metrics)


def _shown(metrics: dict[str, float]) -> str:
    names = [name for name in metrics if not name.endswith("_before")]
    return ", ".join(f"{name.removeprefix('validation_')} {metrics[name]:.4g}" for name in names)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.1f} KiB"


def _verify(arguments: argparse.Namespace) -> int:
    from metaloom.checkpoints.folder import MissingFileError
    from metaloom.checkpoints.manifest import DamagedError

    place = _place(arguments.run)
    num_damaged = num_sound = 0
    for phase in place.phases():
        catalogue = place.catalogue(phase)
        steps = catalogue.steps()
        for step in steps if arguments.step is None else [step for step in steps if step == arguments.step]:
            try:
                manifest = catalogue.verify(step)
            except (DamagedError, MissingFileError) as error:
                num_damaged += 1
                print(f"{phase} step {step}: damaged: {error}")
            else:
                num_sound += 1
                print(f"{phase} step {step}: {_size(manifest.num_bytes)}, as written")
    if num_damaged + num_sound == 0:
        of_step = "" if arguments.step is None else f" of step {arguments.step}"
        raise CheckpointError(f"{place.root} holds no complete checkpoint{of_step}.")
    return CheckpointError.exit_code if num_damaged else 0


def _prune(arguments: argparse.Namespace) -> int:
    place = _place(arguments.run)
    place.phases()
    retention = _retention(place, arguments)
    catalogue = place.catalogue("meta")
    with _nobody_training(place):
        removed = catalogue.prune(retention, is_valid=_validity(catalogue), is_dry=arguments.dry_run)
    verb = "would delete" if arguments.dry_run else "deleted"
    kept = [step for step in catalogue.steps() if step not in removed]
    print(f"{verb} {', '.join(map(str, removed)) or 'none'}; kept {', '.join(map(str, kept))}")
    return 0


def _retention(place: Place, arguments: argparse.Namespace) -> Retention:
    from metaloom.checkpoints.retention import Retention, retention_of

    for name in ("keep_last", "keep_every", "keep_best"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise CheckpointError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
    if place.recipe is None:
        if arguments.keep_last is None:
            raise CheckpointError("--keep-last is needed where no run's folder, and so no recipe, is named.")
        base = Retention(last=arguments.keep_last, metric="validation_loss")
    else:
        base = retention_of(place.recipe)
    asked = {"last": arguments.keep_last, "every": arguments.keep_every, "best": arguments.keep_best}
    return dataclasses.replace(base, **{name: value for name, value in asked.items() if value is not None})


def _validity(catalogue: Catalogue) -> Callable[[int], bool]:
    """Whether the checkpoint of a step is valid, as every byte of it says."""
    from metaloom.checkpoints.folder import MissingFileError
    from metaloom.checkpoints.manifest import DamagedError

    def is_valid(step: int) -> bool:
        try:
            catalogue.verify(step)
        except (DamagedError, MissingFileError):
            return False
        return True

    return is_valid


@contextlib.contextmanager
def _nobody_training(place: Place) -> Iterator[None]:
    """While it lasts, no training writes checkpoints there.

    Raises:
        MetaloomError: one does.
    """
    from metaloom.alone import leased, working_alone

    if place.folder is not None:
        with working_alone(place.folder, "train"):
            yield
    else:
        with leased(place.root, "train"):
            yield
