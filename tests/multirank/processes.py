"""Functions on real ranks: processes that share a gloo group.

One interpreter is started, imports what the function needs, and forks itself into the ranks before it has any
other thread: torch is imported once, however many ranks there are.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

REPOSITORY = Path(__file__).parent.parent.parent
IMPORT_TIMEOUT_S = 180.0
TIMED_OUT = 3  # an exit code
Result = TypeVar("Result")


class RanksFailedError(AssertionError):
    """Ranks that raised, ended by themselves or took too long.

    Attributes:
        failures: what each of them had to say, by rank: its traceback as far as it had one.
    """

    def __init__(self, what: str, failures: Mapping[int, str], output: str) -> None:
        parts = [f"== rank {rank}\n{text}" for rank, text in failures.items()]
        super().__init__("\n".join([what, *parts, "== output of all ranks", output]))
        self.failures = dict(failures)


def run_ranks(
    world_size: int,
    function: Callable[..., Result],
    *args: object,
    timeout_s: float = 180.0,
    environment: Mapping[str, str] | None = None,
) -> list[Result]:
    """What `function(*args)` returns on each of `world_size` ranks of a gloo group, in the order of ranks.

    Every rank is a process of its own, with one thread; warnings are errors in it. None outlives the call.

    Args:
        function: of a module, found there by its name; arguments and results go through pickle.
        timeout_s: for all of it, once the ranks run.
        environment: added to this process's.

    Raises:
        RanksFailedError: on some rank the function did not return.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = (sys.path, world_size, timeout_s, pickle.dumps((function, args)))
        (folder / "job").write_bytes(pickle.dumps(job))
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        with (folder / "output").open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, __file__, name],
                cwd=REPOSITORY,
                env={**os.environ, **one_thread, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, to be ended as a whole
            )
            try:
                code = process.wait(IMPORT_TIMEOUT_S + timeout_s)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        results = [_result(folder, rank) for rank in range(world_size)]
        failures = {rank: str(value) for rank, (is_good, value) in enumerate(results) if not is_good}
        if failures:
            what = f"ranks did not end within {timeout_s} s:" if code == TIMED_OUT else "ranks failed:"
            raise RanksFailedError(what, failures, (folder / "output").read_text(errors="replace"))
        return [value for _, value in results]


def _result(folder: Path, rank: int) -> tuple[bool, Any]:
    path = folder / f"result-{rank}"
    if not path.exists():
        return False, "(ended without a word, or was ended)"
    result: tuple[bool, Any] = pickle.loads(path.read_bytes())
    return result


def _start_ranks(folder: Path) -> int:
    """Forks this process into the ranks of the job in the folder, and returns when all have ended.

    Returns:
        An exit code: `TIMED_OUT` where they had to be ended.
    """
    path, world_size, timeout_s, content = pickle.loads((folder / "job").read_bytes())
    sys.path[:] = path
    pickle.loads(content)  # imports what the ranks need, before they are forked
    if "metaloom.engine.outer" in sys.modules:
        importlib.import_module("torch._dynamo")  # torch's optimizers would, on every rank
    alive: list[int] = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            _be_rank(folder, rank, world_size, timeout_s, content)
        alive.append(child)
    has_timed_out = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal has_timed_out
        has_timed_out = True
        for child in alive:
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself just now
                os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    while alive:
        os.waitpid(alive[0], 0)
        alive.pop(0)
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    return TIMED_OUT if has_timed_out else 0


def _be_rank(folder: Path, rank: int, world_size: int, timeout_s: float, content: bytes) -> None:
    """Runs the function as one rank, leaves its result in the folder, and ends this process."""
    try:
        function, args = pickle.loads(content)
        torch.set_num_threads(1)
        warnings.simplefilter("error")
        # Torch scripts its forward-mode rules when the first dual number is made, and warns of itself.
        warnings.filterwarnings("ignore", r".torch\.jit\.script. is", DeprecationWarning, r"torch\.jit")
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
        result = (True, function(*args))
        dist.barrier()  # no rank closes its connections while another still reads from them
        dist.destroy_process_group()
    except BaseException:
        result = (False, traceback.format_exc())
    staged = folder / f"result-{rank}.staged"
    staged.write_bytes(pickle.dumps(result))
    staged.rename(folder / f"result-{rank}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # what the parent had open is the parent's to close


if __name__ == "__main__":
    sys.exit(_start_ranks(Path(sys.argv[1])))
