"""The helper that runs functions on real ranks: what it promises to the tests that use it."""

import os
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.multirank.processes import RanksFailedError, run_ranks


def sum_of_ranks(factor: float) -> tuple[int, float, int]:
    total = torch.tensor(factor * dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), float(total), torch.get_num_threads()


def fails_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("a cause of its own")
    dist.barrier()


def warns() -> None:
    warnings.warn("not to be overlooked", UserWarning, stacklevel=1)


def hangs_on_rank_0(folder: Path) -> None:
    (folder / str(dist.get_rank())).write_text(str(os.getpid()))
    print("rank 0 is about to hang")
    if dist.get_rank() == 0:
        time.sleep(600)


def test_results_come_in_the_order_of_ranks() -> None:
    assert run_ranks(3, sum_of_ranks, 2.0) == [(0, 6.0, 1), (1, 6.0, 1), (2, 6.0, 1)]


def test_every_failing_rank_is_told_with_its_traceback() -> None:
    with pytest.raises(RanksFailedError, match="ValueError: a cause of its own") as caught:
        run_ranks(2, fails_on_rank_1)
    assert "fails_on_rank_1" in caught.value.failures[1]
    # Rank 0 was left alone in the barrier, and is told so at once, not after the timeout.
    assert caught.value.failures.keys() == {0, 1}


def test_a_warning_on_a_rank_is_an_error() -> None:
    with pytest.raises(RanksFailedError, match="UserWarning: not to be overlooked"):
        run_ranks(1, warns)


def test_ranks_that_hang_are_ended(tmp_path: Path) -> None:
    with pytest.raises(RanksFailedError, match=r"did not end within 1.0 s") as caught:
        run_ranks(2, hangs_on_rank_0, tmp_path, timeout_s=1.0)
    assert "ended without a word" in caught.value.failures[0]
    for rank in (0, 1):
        assert not Path("/proc", (tmp_path / str(rank)).read_text()).exists()
