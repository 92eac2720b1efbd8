"""`metaloom train`: a run begins, or goes on, wherever it is found."""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaloom.arguments import add_command, add_overrides
from metaloom.errors import CheckpointError, LaunchError, RecipeError
from metaloom.faults import START_AGAIN
from metaloom.files import replace_file
from metaloom.run_folder import RunFolder, new_run_path
from metaloom.starting import (
    alone,
    alone_at_checkpoints,
    check_data,
    launch_job,
    standing_of,
    write_recipe,
)

if TYPE_CHECKING:
    from metaloom.arguments import Commands
    from metaloom.recipe import Recipe

EXAMPLES = """\
examples:
  metaloom train recipes/glyphs-maml.yaml
  metaloom train recipes/glyphs-maml.yaml data.n_way=20 outer.optimizer.lr=5e-4 --run runs/20-way
  metaloom train recipes/smoke.yaml launcher.num_processes=1
  metaloom train --resume runs/glyphs-maml
  metaloom train --resume runs/glyphs-maml outer.optimizer.lr=1e-4 --insist
"""


DATA = "the data's digest"  # what is said to change with the data


def add_train_command(commands: Commands) -> None:
    """Adds the command to those of a parser."""
    train = add_command(commands, "train", "meta-train by a recipe, or resume a run", EXAMPLES)
    train.add_argument("recipe", nargs="?", metavar="RECIPE", help="a YAML file (not needed with --resume)")
    add_overrides(train)
    train.add_argument("--run", type=Path, metavar="DIR", help="folder of the new run (default: runs/NAME)")
    train.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with a run where it stopped; or, in a new folder (--run), with the one whose "
        "checkpoints are at a path or URL (checkpoint.url)",
    )
    train.add_argument(
        "--run-id",
        metavar="ID",
        help="a name that no other run has: the command goes on with the run of that name where its folder, "
        "or checkpoint.url, has it, and else begins it; so a cluster can give it again and again",
    )
    train.add_argument(
        "--insist",
        action="store_true",
        help="go on with a run by a recipe, or on data, that make it another one than it was so far: each "
        "such change is printed, and kept in run.json",
    )
    train.set_defaults(run_command=_train)


def _train(arguments: argparse.Namespace) -> int:
    from metaloom.recipe import load_recipe

    if arguments.resume is not None:
        return _resume(arguments)
    if arguments.recipe is None:
        raise RecipeError("no recipe was named: give a YAML file, or --resume RUN to go on with a run.")
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if recipe.launcher.hosts is not None and arguments.run is None:
        raise RecipeError(
            "launcher.hosts: several hosts work on one run folder; name it with --run DIR, on a file system "
            "that all of them share."
        )
    if arguments.insist and recipe.launcher.hosts is None and arguments.run_id is None:
        raise RecipeError("--insist is for a run that goes on: name it with --resume RUN.")
    run_id = _checked_run_id(arguments.run_id, arguments.run)
    if run_id is not None:
        # Until its ranks run there is nothing to save. The first process of a container would not even hear
        # the signal.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(START_AGAIN))
    folder = RunFolder(arguments.run or new_run_path(recipe.name))
    url = recipe.checkpoint.url
    stored = None if run_id is None else _newest_origin(url or str(folder.checkpoints("meta").parent))
    if stored is not None and stored["run"] != run_id:
        stored = None
    if stored is not None and recipe.launcher.hosts is not None and _is_finished(recipe, stored):
        # A host that was replaced when the others had ended would wait for them.
        print(f"the run {run_id} is finished")
        return 0
    if (recipe.launcher.hosts is not None or run_id is not None) and folder.has_started():
        # The same command is given on every host, and again on one that comes back.
        if run_id is not None:
            _require_run(folder, run_id)
        return _go_on(recipe, folder, insists=arguments.insist)
    hosts = standing_of(recipe)
    if stored is not None and url is not None and hosts.is_first:
        return _go_on(recipe, _taken_over(url, folder.path, stored), insists=arguments.insist)
    digest = check_data(recipe)
    if hosts.is_first:
        folder.create()
    with alone(folder, "train", hosts) as lock:
        if lock.is_own:
            folder.forget_start()
            folder.record(data_digest=digest, run=run_id or uuid.uuid4().hex)
            write_recipe(recipe, folder.recipe)
        return launch_job("train", recipe, folder, folder.recipe, hosts, locks=[lock])


def _checked_run_id(run_id: str | None, path: Path | None) -> str | None:
    if run_id is None:
        return None
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", run_id) is None:
        raise LaunchError(
            f"--run-id {run_id!r}: at most 63 letters, digits, points, hyphens and underscores, of which the "
            "first is a letter or digit."
        )
    if path is None:
        raise LaunchError("--run-id: name the run's folder too, with --run DIR, to find it there again.")
    return run_id


def _require_run(folder: RunFolder, run_id: str) -> None:
    found = folder.facts().get("run")
    if found != run_id:
        raise LaunchError(
            f"{folder.path} holds another run (id {found}) than --run-id {run_id}: name another folder with "
            "--run, or the run that is meant."
        )


def _is_finished(recipe: Recipe, stored: Mapping[str, Any]) -> bool:
    """Whether a run's newest checkpoint is of its end, as the recipe has it now."""
    num_steps = stored["recipe"]["outer"]["num_steps"]
    return bool(stored.get("is_finished")) and num_steps >= recipe.outer.num_steps


def _newest_origin(url: str) -> dict[str, Any] | None:
    """What the newest checkpoint at a URL that can be read says of where it comes from; None where there is
    none.

    Raises:
        CheckpointError: the storage cannot be read.
    """
    from metaloom.checkpoints.catalogue import Catalogue
    from metaloom.checkpoints.folder import MissingFileError
    from metaloom.checkpoints.manifest import DamagedError

    catalogue = Catalogue(f"{url.rstrip('/')}/meta")
    for step in reversed(catalogue.steps()):
        with contextlib.suppress(DamagedError, MissingFileError):  # training says so when it loads one
            origin: dict[str, Any] = catalogue.manifest(step).scalars["origin"]
            return origin
    return None


def _resume(arguments: argparse.Namespace) -> int:
    from metaloom.recipe import load_recipe

    if arguments.run_id is not None:
        raise LaunchError("--run-id begins or continues a run by itself: leave out --resume.")
    folder = RunFolder(Path(arguments.resume))
    if "://" in arguments.resume:
        folder = _taken_over(arguments.resume, arguments.run, _newest_origin(arguments.resume))
    elif arguments.run is not None and not folder.recipe.is_file():
        url = str(folder.path.resolve())
        folder = _taken_over(url, arguments.run, _newest_origin(url))
    else:
        folder.require()
        if arguments.run is not None:
            raise LaunchError(
                "--run names a new run's folder and --resume an existing one: give one of them."
            )
    # With --resume the first argument may already be an override.
    overrides = list(arguments.overrides)
    source = arguments.recipe
    if source is not None and "=" in source:
        overrides.insert(0, source)
        source = None
    return _go_on(load_recipe(source or folder.recipe, overrides), folder, insists=arguments.insist)


def _taken_over(url: str, path: Path | None, origin: Mapping[str, Any] | None) -> RunFolder:
    """The folder of a run whose own is lost, made of what its newest checkpoint says; as it is, where the run
    goes on in it already.

    Args:
        origin: what that checkpoint says; None where there is none.

    Raises:
        MetaloomError: there is no checkpoint, or the folder holds another run.
    """
    from metaloom.credentials import without_credentials
    from metaloom.recipe import dump_recipe
    from metaloom.recipe.loading import recipe_from_dict

    if path is None:
        raise LaunchError(f"name the folder in which the run of {url} goes on, with --run DIR.")
    folder = RunFolder(path)
    shown = f"{without_credentials(url).rstrip('/')}/meta"
    if origin is None:
        raise CheckpointError(
            f"{shown} holds no complete checkpoint: name what the run's recipe has as checkpoint.url."
        )
    if folder.facts().get("run") == origin["run"]:
        return folder
    folder.create()
    with alone(folder, "train"):
        folder.forget_start()
        folder.record(
            run=origin["run"],
            data_digest=origin["data_digest"],
            tracking_run_id=origin["tracking_run_id"],
            insisted=origin.get("insisted", []),
        )
        recipe = recipe_from_dict(origin["recipe"], source=shown)
        moved = recipe.checkpoint.model_copy(update={"url": url})
        replace_file(folder.recipe, dump_recipe(recipe.model_copy(update={"checkpoint": moved})))
    return folder


def _go_on(new: Recipe, folder: RunFolder, *, insists: bool) -> int:
    """Trains on in the folder of a run, by a recipe that differs from the run's in harmless keys alone,
    unless the user insists on others."""
    from metaloom.recipe import differences, load_recipe

    changes = differences(load_recipe(folder.recipe), new)
    harmful = [change for change in changes if change.harmful]
    if harmful and not insists:
        lines = "\n".join(f"  {change.path}: {change.old} in the run, {change.new} now" for change in harmful)
        raise RecipeError(
            f"{folder.path} cannot be resumed with these changes, since it would not be the same run:\n"
            f"{lines}\nLeave them out, start a new run (without --resume), or insist on them (--insist): "
            "then it goes on from its last checkpoint, as a run that no single recipe describes."
        )
    for change in changes:
        insisted = ", as insisted" if change.harmful else ""
        print(f"changed{insisted}: {change.path}: {change.old} -> {change.new}", flush=True)
    digest = check_data(new, of_run=None if insists else folder, may_insist=True)
    trained_on = folder.facts().get("data_digest", digest)
    hosts = standing_of(new)
    with alone(folder, "train", hosts) as lock, alone_at_checkpoints(new, folder, hosts) as other:
        taking: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if lock.is_own:
            insisted_on = [(change.path, change.old, change.new) for change in harmful]
            if trained_on != digest:
                old_data, new_data = trained_on[:12], digest[:12]
                insisted_on.append((DATA, old_data, new_data))
                print(f"changed, as insisted: {DATA}: {old_data} -> {new_data}", flush=True)
            if insisted_on:
                taking = _insisting(folder, insisted_on, digest)
        with taking:
            if lock.is_own:
                write_recipe(new, folder.recipe)
            return launch_job("train", new, folder, folder.recipe, hosts, locks=[lock, other])


@contextlib.contextmanager
def _insisting(folder: RunFolder, changes: Sequence[tuple[str, str, str]], digest: str) -> Iterator[None]:
    """Keeps in a run's folder what a user has insisted on. Where the job in this context ends before it has
    gone on with that, because its checkpoint does not fit for instance, the run is as it was.

    Args:
        changes: path, old and new value of each.
        digest: of the data from now on.
    """
    recipe, facts = folder.recipe.read_bytes(), folder.facts()
    before = facts.get("insisted", [])
    added = [{"path": path, "old": old, "new": new, "after_step": None} for path, old, new in changes]
    folder.record(insisted=[*before, *added], data_digest=digest)
    try:
        yield
    finally:
        # The first rank says after which step they came, when it has taken them.
        if any(change["after_step"] is None for change in folder.facts()["insisted"]):
            replace_file(folder.recipe, recipe)
            folder.record(insisted=before, data_digest=facts.get("data_digest", digest))
            print(f"{folder.path}: the recipe is as it was, since the run did not go on with the changes")
