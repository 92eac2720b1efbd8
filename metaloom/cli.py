"""The command line: `metaloom train | evaluate | check | plan | submit | jobs | launchers | export | adapt |
data | checkpoints | recipe`.

Everything that can be checked is checked here, before any process is started and without importing torch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaloom import __version__
from metaloom.adapt_command import add_adapt_command
from metaloom.arguments import add_command
from metaloom.checkpoints_command import add_checkpoint_commands
from metaloom.data_command import add_data_commands
from metaloom.errors import CheckpointError, LaunchError, MetaloomError, RecipeError, StreamError
from metaloom.export_command import add_export_command
from metaloom.faults import START_AGAIN
from metaloom.files import replace_file
from metaloom.jobs_command import add_jobs_commands
from metaloom.launchers_command import add_launchers_command
from metaloom.planning.hardware import DEVICES, HERE, LINKS
from metaloom.planning.request import DEFAULT_RANKS, Request, check_comparison, checked, ranks_in
from metaloom.run_folder import Lock, RunFolder, new_run_path
from metaloom.submit_command import add_submit_command

if TYPE_CHECKING:
    from metaloom.launchers.local import Standing
    from metaloom.recipe import Recipe

EXAMPLES = """\
examples:
  metaloom data make glyphs data/glyphs        write a built-in data set as shards
  metaloom train recipes/glyphs-maml.yaml      meta-train
  metaloom evaluate runs/glyphs-maml           adapt to tasks never seen, beside baselines

exit codes: 0 done, 1 a fault of a process, 2 recipe, 3 data, 4 checkpoint, 5 launch or run folder,
6 tracking store, 75 stopped from outside and saved (start it again to go on), 130 interrupted
"""

TRAIN_EXAMPLES = """\
examples:
  metaloom train recipes/glyphs-maml.yaml
  metaloom train recipes/glyphs-maml.yaml data.n_way=20 outer.optimizer.lr=5e-4 --run runs/20-way
  metaloom train recipes/smoke.yaml launcher.num_processes=1
  metaloom train --resume runs/glyphs-maml
"""

EVALUATE_EXAMPLES = """\
examples:
  metaloom evaluate runs/glyphs-maml
  metaloom evaluate runs/glyphs-maml evaluation.num_episodes=2000
  metaloom evaluate runs/glyphs-maml 'evaluation.baselines=[random]' data.n_shot=5
"""

CHECK_EXAMPLES = """\
examples:
  metaloom check recipes/glyphs-maml.yaml
  metaloom check recipes/stdlib-lora.yaml data.num_query=1 model.num_layers=1    a smaller batch and model
  metaloom check recipes/stdlib-lora.yaml algorithm.hypergradient=mixed_mode
  metaloom check recipes/glyphs-maml.yaml --full

The hypergradient on the recipe's model and two tasks, in float64, is compared with that of the whole graph
and with differences of the meta-loss, and tasks are checked not to reach into each other: a table, and exit
code 2 if terms are lost. For values and data alone, in a moment: metaloom recipe check
"""

PLAN_EXAMPLES = """\
examples:
  metaloom plan recipes/stdlib-lora.yaml                          on H100s, 1 to 1024 of them
  metaloom plan recipes/stdlib-lora.yaml --ranks 16 --hardware a100-80 --link hdr
  metaloom plan recipes/glyphs-maml.yaml --hardware here --ranks 1-8
  metaloom plan recipes/stdlib-lora.yaml outer.micro_batch=1 --json > plan.json

An outer step of the recipe is run on tensors without data, and what it would hold, compute and send is
counted; nothing is trained, and no data set is needed. What an estimate rests on: docs/scaling.md.
"""

RECIPE_EXAMPLES = """\
examples:
  metaloom recipe check recipes/glyphs-maml.yaml data.n_way=10
  metaloom recipe show recipes/glyphs-maml.yaml          every key, defaults spelled out
  metaloom recipe schema > recipe.schema.json            for editors
"""

# What an evaluation's tasks of classes may differ in from those of training, and beside which baselines.
SHOTS = ("data.n_shot", "data.n_query")
UNTRAINED = ("random", "pretrained")
CHECKED_STEPS = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    arguments = _parse(argv)
    try:
        return int(arguments.run_command(arguments))
    except MetaloomError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe has seen enough; nothing more can be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; key=value may stand anywhere, also behind options, where argparse alone refuses it."""
    parser = _parser(sys.argv[1:] if argv is None else argv)
    arguments, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-") or "=" not in word]
    if unknown or (rest and "overrides" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of a command's words; others have no part of it that takes long to make."""
    parser = argparse.ArgumentParser(
        prog="metaloom",
        description="Meta-training with exact hypergradients.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"metaloom {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = add_command(commands, "train", "meta-train by a recipe, or resume a run", TRAIN_EXAMPLES)
    train.add_argument("recipe", nargs="?", metavar="RECIPE", help="a YAML file (not needed with --resume)")
    _add_overrides(train)
    train.add_argument("--run", type=Path, metavar="DIR", help="folder of the new run (default: runs/NAME)")
    train.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with a run where it stopped; or, in a new folder (--run), with the one whose "
        "checkpoints are at a URL (checkpoint.url)",
    )
    train.add_argument(
        "--run-id",
        metavar="ID",
        help="a name that no other run has: the command goes on with the run of that name where its folder, "
        "or checkpoint.url, has it, and else begins it; so a cluster can give it again and again",
    )
    train.set_defaults(run_command=_train)

    evaluate = add_command(commands, "evaluate", "evaluate a run on tasks never seen", EVALUATE_EXAMPLES)
    evaluate.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    _add_overrides(evaluate)
    evaluate.set_defaults(run_command=_evaluate)

    check = add_command(
        commands, "check", "check a recipe's hypergradient on its own model and data", CHECK_EXAMPLES
    )
    check.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    _add_overrides(check)
    check.add_argument(
        "--full",
        action="store_true",
        help=f"all of the recipe's inner steps (default: at most {CHECKED_STEPS})",
    )
    check.set_defaults(run_command=_check)

    plan = add_command(
        commands,
        "plan",
        "say what a recipe takes on 1 to 1024 ranks: memory, communication, time",
        PLAN_EXAMPLES,
    )
    plan.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    _add_overrides(plan)
    plan.add_argument(
        "--ranks",
        default=DEFAULT_RANKS,
        metavar="N",
        help=f"numbers of ranks: 8, or 1,8,64, or 1-64 for powers of two (default: {DEFAULT_RANKS})",
    )
    plan.add_argument(
        "--hardware",
        default="h100",
        metavar="NAME",
        help=f"{', '.join(DEVICES)}, or {HERE} for this machine, measured (default: h100)",
    )
    plan.add_argument(
        "--link", default="ndr", metavar="NAME", help=f"between nodes: {', '.join(LINKS)} (default: ndr)"
    )
    plan.add_argument(
        "--gpus-per-node",
        type=int,
        metavar="N",
        help=f"ranks of one node (default: 8; with --hardware {HERE} launcher.num_processes)",
    )
    plan.add_argument(
        "--compare", action="store_true", help="the same with weights in shards, also where they fit whole"
    )
    plan.add_argument("--json", action="store_true", help="print JSON in place of tables")
    plan.set_defaults(run_command=_plan)

    add_submit_command(commands, is_given=list(words[:1]) == ["submit"])
    add_jobs_commands(commands)
    add_launchers_command(commands)
    add_export_command(commands)
    add_adapt_command(commands)
    add_data_commands(commands)
    add_checkpoint_commands(commands)

    recipe = add_command(commands, "recipe", "check, show or describe recipes", RECIPE_EXAMPLES)
    recipe_commands = recipe.add_subparsers(title="commands", required=True, metavar="COMMAND")
    values = add_command(
        recipe_commands,
        "check",
        "check a recipe's values and data, and start nothing (the hypergradient: metaloom check)",
        RECIPE_EXAMPLES,
    )
    show = add_command(
        recipe_commands, "show", "print a recipe with every default spelled out", RECIPE_EXAMPLES
    )
    for command, function in ((values, _recipe_check), (show, _recipe_show)):
        command.add_argument("recipe", metavar="RECIPE", help="a YAML file")
        _add_overrides(command)
        command.set_defaults(run_command=function)
    schema = add_command(recipe_commands, "schema", "print the JSON schema of recipes", RECIPE_EXAMPLES)
    schema.set_defaults(run_command=_recipe_schema)
    return parser


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the recipe, such as outer.num_steps=50"
    )


# Imports stand inside the commands, so that `metaloom --help` is quick.


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
    run_id = _checked_run_id(arguments.run_id, arguments.run)
    if run_id is not None:
        # Until its ranks run there is nothing to save. The first process of a container would not even hear
        # the signal.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(START_AGAIN))
    folder = RunFolder(arguments.run or new_run_path(recipe.name))
    url = recipe.checkpoint.url
    if run_id is not None and recipe.launcher.hosts is not None and _is_finished(recipe, folder, run_id):
        # A host that was replaced when the others had ended would wait for them.
        print(f"the run {run_id} is finished")
        return 0
    if (recipe.launcher.hosts is not None or run_id is not None) and folder.has_started():
        # The same command is given on every host, and again on one that comes back.
        if run_id is not None:
            _require_run(folder, run_id)
        return _go_on(recipe, folder)
    hosts = _standing(recipe)
    if run_id is not None and url is not None and hosts.is_first and _has_checkpoints(url, run_id):
        return _go_on(recipe, _taken_over(url, folder.path))
    digest = _check_data(recipe)
    if hosts.is_first:
        folder.create()
    with _alone(folder, "train", hosts) as lock:
        if lock.is_own:
            folder.forget_start()
            folder.record(data_digest=digest, run=run_id or uuid.uuid4().hex)
            _write_recipe(recipe, folder.recipe)
        return _launch("train", recipe, folder, folder.recipe, hosts, lock=lock)


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


def _is_finished(recipe: Recipe, folder: RunFolder, run_id: str) -> bool:
    """Whether the newest checkpoint of a run is of its end, as the recipe has it now."""
    origin = _newest_origin(recipe.checkpoint.url or str(folder.checkpoints("meta").parent))
    if origin is None or origin["run"] != run_id or not origin.get("is_finished"):
        return False
    return bool(origin["recipe"]["outer"]["num_steps"] >= recipe.outer.num_steps)


def _has_checkpoints(url: str, run_id: str) -> bool:
    """Whether the checkpoints at a URL are of the run of that id."""
    origin = _newest_origin(url)
    return origin is not None and origin["run"] == run_id


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
    if "://" in arguments.resume:
        folder = _taken_over(arguments.resume, arguments.run)
    else:
        folder = RunFolder(Path(arguments.resume))
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
    return _go_on(load_recipe(source or folder.recipe, overrides), folder)


def _taken_over(url: str, path: Path | None) -> RunFolder:
    """The folder of a run whose own is lost, made of what its newest checkpoint says; as it is, where the run
    goes on in it already.

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
    origin = _newest_origin(url)
    if origin is None:
        raise CheckpointError(
            f"{shown} holds no complete checkpoint: name what the run's recipe has as checkpoint.url."
        )
    if folder.facts().get("run") == origin["run"]:
        return folder
    folder.create()
    with _alone(folder, "train"):
        folder.forget_start()
        folder.record(
            run=origin["run"],
            data_digest=origin["data_digest"],
            tracking_run_id=origin["tracking_run_id"],
        )
        recipe = recipe_from_dict(origin["recipe"], source=shown)
        moved = recipe.checkpoint.model_copy(update={"url": url})
        replace_file(folder.recipe, dump_recipe(recipe.model_copy(update={"checkpoint": moved})))
    return folder


def _go_on(new: Recipe, folder: RunFolder) -> int:
    """Trains on in the folder of a run, by a recipe that differs from the run's in harmless keys alone."""
    from metaloom.recipe import differences, load_recipe

    changes = differences(load_recipe(folder.recipe), new)
    harmful = [change for change in changes if change.harmful]
    if harmful:
        lines = "\n".join(f"  {change.path}: {change.old} in the run, {change.new} now" for change in harmful)
        raise RecipeError(
            f"{folder.path} cannot be resumed with these changes, since it would not be the same run:\n"
            f"{lines}\nLeave them out, or start a new run (without --resume)."
        )
    for change in changes:
        print(f"changed: {change.path}: {change.old} -> {change.new}")
    _check_data(new, of_run=folder)
    hosts = _standing(new)
    with _alone(folder, "train", hosts) as lock:
        if lock.is_own:
            _write_recipe(new, folder.recipe)
        return _launch("train", new, folder, folder.recipe, hosts, lock=lock)


def _evaluate(arguments: argparse.Namespace) -> int:
    from metaloom.recipe import differences, load_recipe

    folder = RunFolder(arguments.run)
    folder.require()
    old = load_recipe(folder.recipe)
    recipe = load_recipe(folder.recipe, arguments.overrides)
    free = ("evaluation.", "launcher.", "tracking.", "data.url", "outer.micro_batch")
    changed = [change.path for change in differences(old, recipe)]
    others = [path for path in changed if not path.startswith(free) and path not in SHOTS]
    if others:
        raise RecipeError(
            f"an evaluation has no use for another {', '.join(others)}. It takes keys of evaluation, "
            "launcher and tracking, data.url, data.n_shot and data.n_query, and outer.micro_batch."
        )
    trained = [name for name in recipe.baselines if name not in UNTRAINED]
    if trained and any(path in SHOTS for path in changed):
        raise RecipeError(
            f"evaluation.baselines: {', '.join(trained)}; had as much data or compute as meta-training, "
            "which is counted by data.n_shot and data.n_query; leave them out where these are others, for "
            "example evaluation.baselines=[random]."
        )
    _check_data(recipe, of_run=folder)
    if recipe.checkpoint.url is None and not folder.checkpoints("meta").is_dir():
        raise LaunchError(
            f"{folder.path} has no checkpoint yet: train it with `metaloom train --resume {folder.path}`."
        )
    hosts = _standing(recipe)
    with _alone(folder, "evaluate", hosts) as lock:
        if lock.is_own:
            _write_recipe(recipe, folder.evaluation_recipe)
        return _launch("evaluate", recipe, folder, folder.evaluation_recipe, hosts, lock=lock)


def _check(arguments: argparse.Namespace) -> int:
    from metaloom.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    _check_data(recipe)
    num_steps = recipe.adaptation.num_steps
    if num_steps > CHECKED_STEPS and not arguments.full:
        shorter = [*arguments.overrides, f"adaptation.num_steps={CHECKED_STEPS}"]
        try:
            recipe = load_recipe(arguments.recipe, shorter)
        except RecipeError:
            print(f"with all {num_steps} inner steps: the recipe does not hold together with fewer")
        else:
            print(f"with {CHECKED_STEPS} of {num_steps} inner steps (--full takes all)")
    # One process, which is not started again: whatever it meets is a finding.
    alone = recipe.launcher.model_copy(update={"num_processes": 1, "max_restarts": 0, "hosts": None})
    recipe = recipe.model_copy(update={"launcher": alone})
    # Nothing is kept but, of a crash, the traceback that its message points to.
    folder = RunFolder(Path(tempfile.mkdtemp(prefix="metaloom-check-")))
    _write_recipe(recipe, folder.recipe)
    code = 1
    try:
        code = _launch("check", recipe, folder, folder.recipe, _standing(recipe))
    finally:
        if code != 1:
            shutil.rmtree(folder.path, ignore_errors=True)
    return code


def _plan(arguments: argparse.Namespace) -> int:
    from metaloom.recipe import load_recipe

    request = checked(
        Request(
            hardware=arguments.hardware,
            link=arguments.link,
            ranks=ranks_in(arguments.ranks),
            devices_per_node=arguments.gpus_per_node,
            compare=arguments.compare,
            as_json=arguments.json,
        )
    )
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    check_comparison(request, recipe)
    with tempfile.TemporaryDirectory(prefix="metaloom-plan-") as folder:
        path = Path(folder) / "recipe.yaml"
        _write_recipe(recipe, path)
        words = [str(path), json.dumps(dataclasses.asdict(request))]
        code = subprocess.run([sys.executable, "-m", "metaloom.planning", *words]).returncode
    if code < 0:
        raise LaunchError(f"the process that makes the plan was ended by signal {-code}; start it again.")
    return code


def _standing(recipe: Recipe) -> Standing:
    from metaloom.launchers.local import standing

    return standing(recipe.launcher)


@contextlib.contextmanager
def _alone(folder: RunFolder, purpose: str, hosts: Standing | None = None) -> Iterator[Lock]:
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


def _launch(
    job: str,
    recipe: Recipe,
    folder: RunFolder,
    recipe_path: Path,
    hosts: Standing,
    *,
    lock: Lock | None = None,
) -> int:
    """Runs this machine's part of a job.

    Args:
        recipe_path: where the first host has left the recipe. Another one may not see it yet, and hands
            its ranks one of its own: the hosts' agents see that they are equal.
    """
    from metaloom.launchers.local import launch
    from metaloom.recipe import recipe_digest

    with tempfile.TemporaryDirectory(prefix="metaloom-recipe-") as own:
        if not hosts.is_first:
            recipe_path = Path(own) / recipe_path.name
            _write_recipe(recipe, recipe_path)
        return launch(
            [job, str(folder.path), "--recipe", str(recipe_path)],
            recipe.launcher,
            hosts,
            log_dir=folder.logs,
            digest=recipe_digest(recipe),
            inherited=[] if lock is None or lock.descriptor is None else [lock.descriptor],
        )


def _check_data(recipe: object, *, of_run: RunFolder | None = None) -> str:
    """Opens the recipe's data: every shard is there and whole in size, and has what is asked for.

    Args:
        of_run: the run that goes on, or is evaluated, with the data.

    Returns:
        The data's digest.

    Raises:
        StreamError: something is missing, truncated or too small, or is not what the run was trained on.
    """
    from metaloom.recipe import Recipe
    from metaloom.recipe.tasks import data_urls
    from metaloom.sources import open_data, require_episodes

    assert isinstance(recipe, Recipe)
    data = open_data(recipe)
    try:
        require_episodes(recipe, data)
    finally:
        data.close()
    trained_on = data.digest if of_run is None else of_run.facts().get("data_digest", data.digest)
    if trained_on != data.digest:
        assert of_run is not None
        urls = data_urls(recipe)
        if not urls:
            raise StreamError(
                f"this version of metaloom computes other synthetic data (digest {data.digest[:12]}) than "
                f"{of_run.path} was trained on (digest {trained_on[:12]}). Go on with the version that "
                "trained it, or start a new run."
            )
        raise StreamError(
            f"{', '.join(dict.fromkeys(urls.values()))} holds other data (digest {data.digest[:12]}) than "
            f"{of_run.path} was trained on (digest {trained_on[:12]}). Point {', '.join(urls)} at the same "
            "data, or start a new run."
        )
    return data.digest


def _write_recipe(recipe: object, path: Path) -> None:
    from metaloom.recipe import Recipe, dump_recipe

    assert isinstance(recipe, Recipe)
    try:
        replace_file(path, dump_recipe(recipe))
    except OSError as error:
        raise LaunchError(f"{path} cannot be written: {error.strerror or error}.") from error


def _recipe_check(arguments: argparse.Namespace) -> int:
    from metaloom.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    _check_data(recipe)
    print(f"{arguments.recipe}: no mistakes found")
    return 0


def _recipe_show(arguments: argparse.Namespace) -> int:
    from metaloom.recipe import dump_recipe, load_recipe

    print(dump_recipe(load_recipe(arguments.recipe, arguments.overrides)), end="")
    return 0


def _recipe_schema(arguments: argparse.Namespace) -> int:
    from metaloom.recipe import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
