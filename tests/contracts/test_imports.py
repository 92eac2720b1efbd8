"""Which module may import which: the edges of docs/architecture.md, held on the syntax of every module."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import metaloom

PACKAGE = Path(metaloom.__file__).parent
ERRORS = "metaloom.errors"
RECIPE = "metaloom.recipe"
FILES = "metaloom.files"
CREDENTIALS = "metaloom.credentials"
PROCESSES = "metaloom.processes"
CHECKPOINTS = "metaloom.checkpoints"
DISK = "metaloom.disk"
RESULT = "metaloom.result"

# What the modules under a name may import of metaloom, besides themselves.
EDGES = {
    ERRORS: set[str](),
    FILES: set[str](),
    DISK: {ERRORS, FILES},
    PROCESSES: set[str](),
    CREDENTIALS: set[str](),
    "metaloom.engine": {ERRORS},
    "metaloom.models": set[str](),
    "metaloom.datasets": {CREDENTIALS, ERRORS, FILES, PROCESSES},
    # What drivers' errors mean, and when a request is made again, stands once.
    CHECKPOINTS: {ERRORS, FILES, RECIPE, "metaloom.datasets.connection", "metaloom.datasets.drivers"},
    # The version is recorded with a run.
    "metaloom.tracking": {"metaloom", DISK, ERRORS, FILES, RECIPE},
    # What cannot be given is refused before anything starts; these tables import no torch.
    RECIPE: {
        CREDENTIALS,
        ERRORS,
        "metaloom.engine.capabilities",
        "metaloom.engine.sharding.deepspeed_config",
    },
    "metaloom.run_folder": {DISK, ERRORS, FILES, RECIPE},
    # Which checkpoint is a run's result, and what of it is taken away.
    RESULT: {ERRORS, RECIPE, CHECKPOINTS, "metaloom.engine", "metaloom.keeping", "metaloom.run_folder"},
    "metaloom.export": {
        "metaloom",
        ERRORS,
        FILES,
        PROCESSES,
        RECIPE,
        RESULT,
        "metaloom.build",
        "metaloom.engine",
        "metaloom.models",
        "metaloom.run_folder",
        "metaloom.tracking",
    },
    "metaloom.new_task": {
        ERRORS,
        PROCESSES,
        RECIPE,
        "metaloom.build",
        "metaloom.datasets",
        "metaloom.engine",
        "metaloom.export",
        "metaloom.run_folder",
        "metaloom.sources",
        "metaloom.tracking",
    },
    "metaloom.launchers": {CREDENTIALS, ERRORS, RECIPE, "metaloom.run_folder", "metaloom.k8s"},
    # The version is written on a job.
    "metaloom.k8s": {"metaloom", CREDENTIALS, ERRORS, RECIPE},
}
# What the modules under a name may import from outside, besides the standard library.
OUTSIDE = {
    ERRORS: set[str](),
    FILES: set[str](),
    DISK: set[str](),
    PROCESSES: set[str](),
    CREDENTIALS: set[str](),
    # DeepSpeed where it is asked for alone: see ONLY_IN.
    "metaloom.engine": {"torch", "deepspeed"},
    # Transformers where it is asked for alone: see ONLY_IN.
    "metaloom.models": {"torch", "transformers"},
    CHECKPOINTS: {"torch", "fsspec"},
    # What peft and transformers read is written without them.
    "metaloom.export": {"numpy", "safetensors", "torch"},
    RECIPE: {"pydantic", "pydantic_core", "yaml"},
    "metaloom.run_folder": set[str](),
    "metaloom.launchers": set[str](),
    # The connections of the client, through which it is spoken to.
    "metaloom.k8s": {"kubernetes", "urllib3", "yaml"},
}
# Where alone a package may be imported.
ONLY_IN = {
    "mlflow": ("metaloom.tracking.mlflow", "metaloom.tracking.mlflow_model"),
    "webdataset": ("metaloom.datasets",),
    "kubernetes": ("metaloom.k8s.access",),
    "deepspeed": ("metaloom.engine.sharding.deepspeed_zero",),
    "gcsfs": ("metaloom.datasets.drivers",),
    "huggingface_hub": ("metaloom.datasets.hub",),
    "transformers": ("metaloom.models.hugging_face",),
}
# Packages whose modules may know several parts, as modules at the top do.
KNOWING = ("metaloom.build", "metaloom.export", "metaloom.new_task")
# What alone imports a module of the jobs.
ONLY_BY = {
    "metaloom.train": "metaloom.worker",
    "metaloom.evaluate": "metaloom.worker",
    "metaloom.check": "metaloom.worker",
    "metaloom.contenders": "metaloom.evaluate",
}
TORCH_FREE = (
    "metaloom.adapt_command",
    "metaloom.arguments",
    "metaloom.check_command",
    "metaloom.checkpoints.catalogue",
    "metaloom.checkpoints.folder",
    "metaloom.checkpoints.lease",
    "metaloom.checkpoints.manifest",
    "metaloom.checkpoints.retention",
    "metaloom.checkpoints_command",
    "metaloom.cli",
    "metaloom.computed",
    "metaloom.data_command",
    "metaloom.datasets",
    "metaloom.errors",
    "metaloom.evaluate_command",
    "metaloom.export.card",
    "metaloom.export.folder",
    "metaloom.export.formats",
    "metaloom.export.request",
    "metaloom.export_command",
    "metaloom.faults",
    "metaloom.files",
    "metaloom.jobs_command",
    "metaloom.k8s",
    "metaloom.launchers",
    "metaloom.launchers_command",
    "metaloom.new_task.rehearsal",
    "metaloom.new_task.request",
    "metaloom.new_task.task",
    "metaloom.pack_command",
    "metaloom.plan_command",
    "metaloom.planning.advice",
    "metaloom.planning.estimate",
    "metaloom.planning.facts",
    "metaloom.planning.hardware",
    "metaloom.planning.report",
    "metaloom.planning.request",
    PROCESSES,
    "metaloom.recipe",
    "metaloom.recipe_command",
    "metaloom.run_folder",
    "metaloom.sources",
    "metaloom.starting",
    "metaloom.submit_command",
    "metaloom.tracking",
    "metaloom.train_command",
)


@dataclass(frozen=True)
class Import:
    """One imported module. `lazy`: inside a function. `typing_only`: for the type checker alone."""

    name: str
    lazy: bool
    typing_only: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def is_under(name: str, root: str) -> bool:
    return name == root or name.startswith(f"{root}.")


def imports_of(source: str, module: str, *, is_package: bool = False) -> Iterator[Import]:
    """Every import of a module, by full name; of metaloom's own, down to the module."""

    def walk(node: ast.AST, lazy: bool, typing_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, lazy, typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")
                package = package[: len(package) - node.level + is_package]
                base = ".".join([*package, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield Import(full if full in MODULES else base, lazy, typing_only)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("__import__", "importlib.import_module")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield Import(str(node.args[0].value), lazy, typing_only)
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for statement in node.body:
                yield from walk(statement, lazy, True)
            for statement in node.orelse:
                yield from walk(statement, lazy, typing_only)
            return
        for child in ast.iter_child_nodes(node):
            yield from walk(child, lazy, typing_only)

    yield from walk(ast.parse(source), False, False)


IMPORTS = {
    module: list(imports_of(path.read_text(encoding="utf-8"), module, is_package=path.stem == "__init__"))
    for module, path in MODULES.items()
}


def is_outside(name: str) -> bool:
    top = name.partition(".")[0]
    return top not in sys.stdlib_module_names and top not in ("metaloom", "__future__")


def loaded_with(module: str) -> set[str]:
    """What importing a module imports, itself and the packages around it among it."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        parent = name.rpartition(".")[0]
        waiting += [parent] if parent else []
        waiting += [entry.name for entry in IMPORTS.get(name, []) if not entry.lazy and not entry.typing_only]
    return seen


def test_the_walk_sees_every_kind_of_import() -> None:
    source = """
import torch.nn
from typing import TYPE_CHECKING
from metaloom import errors
from . import sgd
from ..learner import Learner
if TYPE_CHECKING:
    import mlflow
def f():
    from webdataset import writer
    class A:
        import rich
"""
    found = set(imports_of(source, "metaloom.engine.inner_loops.base"))
    assert found == {
        Import("torch.nn", False, False),
        Import("typing", False, False),
        Import("metaloom.errors", False, False),
        Import("metaloom.engine.inner_loops.sgd", False, False),
        Import("metaloom.engine.learner", False, False),
        Import("mlflow", False, True),
        Import("webdataset", True, False),
        Import("rich", True, False),
    }
    inside = set(imports_of("from . import unroll", "metaloom.engine", is_package=True))
    assert inside == {Import("metaloom.engine.unroll", False, False)}
    assert {"metaloom.engine.step", "metaloom.cli", "metaloom.train"} <= MODULES.keys()


@pytest.mark.parametrize("root", EDGES)
def test_a_part_imports_only_the_parts_it_may(root: str) -> None:
    wrong = [
        f"{module} imports {entry.name}"
        for module in MODULES
        if is_under(module, root)
        for entry in IMPORTS[module]
        if is_under(entry.name, "metaloom")
        and not is_under(entry.name, root)
        and not any(
            entry.name == edge if edge == "metaloom" else is_under(entry.name, edge) for edge in EDGES[root]
        )
    ]
    assert wrong == []


@pytest.mark.parametrize("root", OUTSIDE)
def test_a_part_imports_only_the_packages_it_may(root: str) -> None:
    wrong = [
        f"{module} imports {entry.name}"
        for module in MODULES
        if is_under(module, root)
        for entry in IMPORTS[module]
        if is_outside(entry.name) and entry.name.partition(".")[0] not in OUTSIDE[root]
    ]
    assert wrong == []


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_package_is_imported_in_one_place_only(package: str) -> None:
    wrong = [
        module
        for module, entries in IMPORTS.items()
        if not any(is_under(module, place) for place in ONLY_IN[package])
        and any(is_under(entry.name, package) for entry in entries)
    ]
    assert wrong == []


@pytest.mark.parametrize("job", ONLY_BY)
def test_a_module_of_a_job_is_imported_by_one_module_only(job: str) -> None:
    importers = {module for module, entries in IMPORTS.items() if any(entry.name == job for entry in entries)}
    assert importers == {ONLY_BY[job]}


@pytest.mark.parametrize("root", TORCH_FREE)
def test_a_part_that_needs_no_torch_never_imports_it_directly_or_through_others(root: str) -> None:
    wrong = [
        f"{module}: {name}"
        for module in MODULES
        if is_under(module, root)
        for name in sorted(loaded_with(module))
        if is_under(name, "torch")
    ]
    assert wrong == []
    # Nor later, inside a function: workers are started as commands.
    assert not any(
        is_under(entry.name, "torch")
        for module in MODULES
        if is_under(module, root)
        for entry in IMPORTS[module]
    )


def test_only_the_top_of_the_package_knows_several_parts() -> None:
    parts = ("metaloom.engine", "metaloom.datasets", "metaloom.tracking", "metaloom.checkpoints")
    for module, entries in IMPORTS.items():
        known = {part for part in parts for entry in entries if is_under(entry.name, part)}
        if len(known) > 1:
            is_top = module.count(".") == 1 or any(is_under(module, part) for part in KNOWING)
            assert is_top, f"{module} knows {sorted(known)}"


def test_no_module_imports_one_that_imports_it() -> None:
    direct = {
        module: {
            entry.name
            for entry in entries
            if entry.name in MODULES and not entry.lazy and not entry.typing_only and entry.name != module
        }
        for module, entries in IMPORTS.items()
    }

    def reaches(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(direct[start])
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += direct[name]
        return seen

    assert [module for module in MODULES if module in reaches(module)] == []


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_command_line_starts_without_heavy_packages() -> None:
    heavy = ("torch", "mlflow", "matplotlib", "webdataset", "pandas", "scipy", "pyarrow", "numpy")
    program = f"import sys, metaloom.cli; print([name for name in {heavy!r} if name in sys.modules])"
    assert run(program) == "[]"


def test_help_is_printed_without_launchers() -> None:
    program = """
import contextlib, io, sys
from metaloom.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main(["--help"])
print([name for name in sys.modules if name.startswith(("metaloom.k8s", "metaloom.launchers.", "yaml"))])
"""
    assert run(program) == "['metaloom.launchers.table']"


def test_what_jobs_do_is_told_without_what_makes_them() -> None:
    assert not any(is_under(name, "metaloom.k8s.manifests") for name in loaded_with("metaloom.k8s.gathering"))


def test_the_engine_works_with_torch_alone() -> None:
    # None in sys.modules makes an import fail; numpy is left, as torch takes it where it is there.
    absent = ("pydantic", "yaml", "mlflow", "webdataset", "rich", "fsspec", "matplotlib", "PIL", "psutil")
    program = f"""
import sys
sys.modules.update(dict.fromkeys({absent!r}))
import torch
torch.set_num_threads(1)
import metaloom.engine.step, metaloom.models.gpt, metaloom.models.conv4
from metaloom.engine.adapters.full import FullAdapter
from metaloom.engine.algorithms.maml import Maml, step_weights
from metaloom.engine.hypergradients import HYPERGRADIENTS
from metaloom.engine.inner_loops.gradient_terms import GradientTerms
from metaloom.engine.inner_loops.rates import Rates
from metaloom.engine.inner_loops.sgd import Sgd
from metaloom.engine.learner import Learner, TaskBatch
from metaloom.engine.precision import Precision
from metaloom.engine.unroll import Unroll
adapter = FullAdapter(torch.nn.Linear(3, 2))
rule, rates = Sgd(GradientTerms(proximal=0.1)), Rates(0.1, "none", 2)
unroll = Unroll(Learner(adapter, Precision()), rule, rates, step_weights("last", 2))
part = {{"inputs": torch.randn(2, 4, 3), "targets": torch.zeros(2, 4, dtype=torch.int64)}}
meta = adapter.meta_parameters(init=True, backbone=False)
for estimator in HYPERGRADIENTS.values():
    Maml(unroll, estimator()).meta_gradient(meta, TaskBatch((0, 1), part, part))
print("works")
"""
    assert run(program) == "works"
