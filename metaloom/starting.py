"""What the commands share that start processes on a run: data opened, recipe written, lock, launch."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from metaloom.errors import LaunchError, StreamError
from metaloom.files import replace_file
from metaloom.run_folder import Lock, RunFolder

if TYPE_CHECKING:
    from metaloom.launchers.local import Standing
    from metaloom.recipe import Recipe

# Imports stand inside the functions, so that `metaloom --help` is quick.


def check_data(recipe: Recipe, *, of_run: RunFolder | None = None, may_insist: bool = False) -> str:
    """Opens the recipe's data: every shard is there and whole in size, and has what is asked for.

    Args:
        of_run: the run that goes on, or is evaluated, with the data.
        may_insist: whether the user may insist on other data.

    Returns:
        The data's digest.

    Raises:
        StreamError: something is missing, truncated or too small, or is not what the run was trained on.
    """
    from metaloom.recipe.tasks import data_urls
    from metaloom.sources import open_data, require_episodes

    data = open_data(recipe)
    try:
        require_episodes(recipe, data)
    finally:
        data.close()
    trained_on = data.digest if of_run is None else of_run.facts().get("data_digest", data.digest)
    if trained_on != data.digest:
        assert of_run is not None
        urls = data_urls(recipe)
        otherwise = "or start a new run"
        if may_insist:
            otherwise = "start a new run, or insist on it (--insist)"
        if not urls:
            raise StreamError(
                f"this version of metaloom computes other synthetic data (digest {data.digest[:12]}) than "
                f"{of_run.path} was trained on (digest {trained_on[:12]}). Go on with the version that "
                f"trained it, {otherwise}."
            )
        raise StreamError(
            f"{', '.join(dict.fromkeys(urls.values()))} holds other data (digest {data.digest[:12]}) than "
            f"{of_run.path} was trained on (digest {trained_on[:12]}). Point {', '.join(urls)} at the same "
            f"data, {otherwise}."
        )
    return data.digest


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Writes a recipe to a file, at once.

    Raises:
        LaunchError: the file cannot be written.
    """
    from metaloom.recipe import dump_recipe

    try:
        replace_file(path, dump_recipe(recipe))
    except OSError as error:
        raise LaunchError(f"{path} cannot be written: {error.strerror or error}.") from error


def standing_of(recipe: Recipe) -> Standing:
    """How this machine stands among the hosts of a run: `launchers.local.standing`."""
    from metaloom.launchers.local import standing

    return standing(recipe.launcher)


@contextlib.contextmanager
def alone(folder: RunFolder, purpose: str, hosts: Standing | None = None) -> Iterator[Lock]:
    """While it lasts, no other command works on the run; of several hosts, the first sees to that.

    Raises:
        MetaloomError: another command does now.
    """
    if hosts is not None and not hosts.is_first:
        yield Lock(None, is_own=False)
        return
    from metaloom.alone import working_alone

    party = "" if hosts is None or hosts.endpoint is None else hosts.endpoint
    with working_alone(folder, purpose, party=party) as lock:
        yield lock


@contextlib.contextmanager
def alone_at_checkpoints(recipe: Recipe, folder: RunFolder, hosts: Standing) -> Iterator[Lock]:
    """While it lasts, no run trains whose own folder holds the checkpoints that this one goes on with. Such a
    run has a lock on that folder, and no lease at the checkpoints.

    Raises:
        MetaloomError: one does now.
    """
    url = recipe.checkpoint.url
    owner = None if url is None else RunFolder(Path(url.removeprefix("file://")).parent)
    if owner is None or not owner.recipe.is_file() or owner.path.resolve() == folder.path.resolve():
        yield Lock(None, is_own=False)
        return
    with alone(owner, "train", hosts) as lock:
        yield lock


def launch_job(
    job: str,
    recipe: Recipe,
    folder: RunFolder,
    recipe_path: Path,
    hosts: Standing,
    *,
    locks: Sequence[Lock] = (),
) -> int:
    """Runs this machine's part of a job.

    Args:
        locks: which its processes hold too.
        recipe_path: where the first host has left the recipe. Another one may not see it yet, and hands
            its ranks one of its own: the hosts' agents see that they are equal.
    """
    from metaloom.launchers.local import launch
    from metaloom.recipe import recipe_digest

    with tempfile.TemporaryDirectory(prefix="metaloom-recipe-") as own:
        if not hosts.is_first:
            recipe_path = Path(own) / recipe_path.name
            write_recipe(recipe, recipe_path)
        return launch(
            [job, str(folder.path), "--recipe", str(recipe_path)],
            recipe.launcher,
            hosts,
            log_dir=folder.logs,
            digest=recipe_digest(recipe),
            inherited=[lock.descriptor for lock in locks if lock.descriptor is not None],
        )
