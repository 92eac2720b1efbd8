"""Facts that make a run repeatable: revisions and versions, nothing about people or machines' names."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import metaloom

_PACKAGES = ("torch", "numpy", "mlflow")


def _git(folder: Path, *arguments: str) -> str | None:
    """Standard output of a git command, or None where it fails or there is no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def git_revision(folder: Path) -> str | None:
    """The commit of the git checkout around `folder`, with " (dirty)" if tracked files differ from it."""
    revision = _git(folder, "rev-parse", "HEAD")
    if not revision:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{revision} (dirty)" if changes else revision


def environment_facts() -> dict[str, str]:
    """Versions of Python, metaloom and what it stands on, the platform, and git revisions if any.

    `git.revision` is that of the working directory; `git.metaloom` that of the package itself,
    when it runs from a checkout. Versions come from package metadata: nothing is imported.
    """
    facts = {
        "version.metaloom": metaloom.__version__,
        "version.python": platform.python_version(),
        "platform": platform.platform(),
    }
    for package in _PACKAGES:
        try:
            facts[f"version.{package}"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[f"version.{package}"] = "not installed"
    if revision := git_revision(Path.cwd()):
        facts["git.revision"] = revision
    package_folder = Path(__file__).parent.parent
    # An installed package may lie inside somebody's checkout without being part of it.
    is_tracked = _git(package_folder, "ls-files", "--error-unmatch", "__init__.py") is not None
    if is_tracked and (revision := git_revision(package_folder)):
        facts["git.metaloom"] = revision
    return facts
