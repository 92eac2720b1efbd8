"""Ranks that are asked to stop do so at one place, whichever is asked and wherever they are."""

from __future__ import annotations

import datetime
import random
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from metaloom.stopping import Stopped, StopWatch
from tests.multirank.processes import run_ranks

NUM_CASES = 12
TIMEOUT = datetime.timedelta(seconds=8)  # what is broken off keeps a group from being destroyed for as long


def _watch(store: TCPStore, case: int, *, is_lockstep: bool) -> StopWatch:
    def connect() -> PrefixStore:
        # Connections are not to be shared by threads that wait.
        own = TCPStore(store.host, store.port, is_master=False, wait_for_workers=False)
        return PrefixStore(f"{is_lockstep}/{case}", own)

    return StopWatch(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        is_lockstep=is_lockstep,
        connect=connect,
        timeout=TIMEOUT,
    )


def _shared_store() -> TCPStore:
    port = [0]
    served = None
    if dist.get_rank() == 0:
        served = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = [served.port]
    dist.broadcast_object_list(port, src=0)
    return served or TCPStore("127.0.0.1", port[0], is_master=False, wait_for_workers=False)


def stopped_at_steps(is_lockstep: bool) -> list[tuple[int, int]]:
    """In each case the outer steps that this rank has done when it stopped, and the inner steps of the one
    that it broke off; passes have collectives in lockstep, steps end with one in any case."""
    rank, store = dist.get_rank(), _shared_store()
    found = []
    for case in range(NUM_CASES):
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        watch = _watch(store, case, is_lockstep=is_lockstep)
        common, own = random.Random(case), random.Random(f"{case} {rank}")
        asked, ask_at = common.randrange(dist.get_world_size()), common.uniform(0.0, 0.15)
        begin, done, inner, has_asked = time.monotonic(), 0, 0, False
        try:
            while True:
                num_inner = 5 if is_lockstep else own.randrange(0, 9)
                for inner in range(num_inner):  # noqa: B007 (where it was broken off)
                    if rank == asked and not has_asked and time.monotonic() - begin > ask_at:
                        watch.ask(f"rank {rank}")
                        has_asked = True
                    watch.between_passes()
                    time.sleep(own.uniform(0.0, 0.01))
                    if is_lockstep:
                        dist.all_reduce(torch.zeros(1), group=group)
                inner = -1
                watch.meet()
                dist.all_reduce(torch.zeros(1), group=group)
                done += 1
                if rank == asked and not has_asked and time.monotonic() - begin > ask_at:
                    watch.ask(f"rank {rank}")
                    has_asked = True
        except Stopped:
            found.append((done, inner))
            assert watch.reason == f"rank {asked}"
        watch.close()
    dist.barrier()  # rank 0 has the store
    return found


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("is_lockstep", [False, True])
def test_all_ranks_stop_after_the_same_outer_step(world_size: int, is_lockstep: bool) -> None:
    ranks = run_ranks(world_size, stopped_at_steps, is_lockstep, timeout_s=120)
    for case in range(NUM_CASES):
        assert len({rank[case][0] for rank in ranks}) == 1, [rank[case] for rank in ranks]
        if is_lockstep:  # and at the same inner step
            assert len({rank[case] for rank in ranks}) == 1


def stopped_while_a_partner_is_busy() -> tuple[int, bool]:
    """Outer steps done; and whether this rank was stopped before the busy one's share was done."""
    watch = _watch(_shared_store(), 0, is_lockstep=False)
    done, is_early = 0, False
    try:
        while True:
            if done == 2 and dist.get_rank() == 1:
                watch.ask("rank 1")
                for _ in range(2000):  # a minute's share, which the others wait for in `meet`
                    time.sleep(0.03)
                    watch.between_passes()
                is_early = True
            watch.meet()
            dist.barrier()
            done += 1
    except Stopped:
        pass
    watch.close()
    dist.barrier()
    return done, is_early


def test_a_rank_that_waits_for_a_busy_one_stops_without_it() -> None:
    assert run_ranks(3, stopped_while_a_partner_is_busy, timeout_s=40) == [(2, False)] * 3


def _pass_for_ever(watch: StopWatch) -> None:
    while True:
        watch.between_passes()


def test_a_rank_alone_stops_at_the_next_point() -> None:
    watch = StopWatch(rank=0, world_size=1, is_lockstep=False, connect=None)
    for _ in range(3):
        watch.between_passes()
        watch.meet()
    assert watch.reason == ""
    watch.ask("SIGTERM")
    watch.ask("SIGINT")  # the first counts
    with pytest.raises(Stopped):
        _pass_for_ever(watch)
    assert watch.reason == "SIGTERM"
    with pytest.raises(Stopped):
        watch.meet()
    watch.close()
