"""Eight processes on one small block cache, stopped to be looked at, and killed: what `test_storage.py` runs.

    python -m tests.faults.hammer_cache FOLDER SECONDS SEED

Prints one line of JSON: how often all were stopped and looked at; the most that lay on disk then; kills; of
these, how many were in the middle of a change; blocks that were found and right.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import struct
import sys
import time
from pathlib import Path

from metaloom.datasets.cache import _LEDGER, BlockCache, block_key

LIMIT_BYTES = 2_000_000
NUM_BLOCKS = 60
NUM_PROCESSES = 8


def size_of(name: int) -> int:
    return 1 + (name * 37_997) % 150_000


def content_of(name: int) -> bytes:
    return random.Random(name).randbytes(size_of(name))


def work(folder: Path, seed: int, hits: mmap.mmap, slot: int) -> None:
    """Reads and puts blocks for ever; ends at a block that is wrong, or a cache that fails."""
    contents = [content_of(name) for name in range(NUM_BLOCKS)]
    draws = random.Random(seed)
    cache = BlockCache(folder, LIMIT_BYTES)
    while True:
        name = int(NUM_BLOCKS * draws.random() ** 2)
        key = block_key(str(name))
        if (found := cache.read(key, size_of(name), 0, size_of(name))) is None:
            cache.put(key, contents[name])
        elif found != contents[name] or cache.take_notes():
            os._exit(1)
        else:
            hits[8 * slot : 8 * slot + 8] = struct.pack("<Q", 1 + struct.unpack_from("<Q", hits, 8 * slot)[0])
        if draws.random() < 0.02:
            cache.remove(key)


def start(folder: Path, seed: int, hits: mmap.mmap, slot: int) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work(folder, seed, hits, slot)
        finally:
            os._exit(2)
    return pid


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


def main(folder: Path, seconds: float, seed: int) -> dict[str, int]:
    draws = random.Random(seed)
    hits = mmap.mmap(-1, 8 * NUM_PROCESSES)
    pids = [start(folder, seed + slot, hits, slot) for slot in range(NUM_PROCESSES)]
    looks = kills = kills_in_change = most = 0
    begin = time.monotonic()
    try:
        # As long as it takes on a slow machine to fill the cache and to hit changes.
        while (took_s := time.monotonic() - begin) < seconds or (
            took_s < 60 and (kills_in_change < 3 or most < 0.95 * LIMIT_BYTES)
        ):
            time.sleep(0.005 * draws.random())
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            for pid in pids:
                _, status = os.waitpid(pid, os.WUNTRACED)
                if not os.WIFSTOPPED(status):
                    pids.remove(pid)
                    raise SystemExit(f"a process ended by itself with status {status}")
            looks += 1
            most = max(most, on_disk(folder))
            slot = draws.randrange(NUM_PROCESSES)
            ledger = (folder / "metaloom-cache.lock").read_bytes() if looks > 20 else b""
            is_changing = len(ledger) == _LEDGER.size and bool(_LEDGER.unpack(ledger)[1])
            # One is stopped in the middle of a change; which one cannot be seen, so kill all of them.
            victims = [slot] if looks % 9 == 0 else []
            if is_changing and draws.random() < 0.2:
                victims = list(range(NUM_PROCESSES))
            for victim in victims:
                os.kill(pids[victim], signal.SIGKILL)
                os.waitpid(pids[victim], 0)
                pids[victim] = start(folder, draws.randrange(1 << 30), hits, victim)
            kills += len(victims)
            kills_in_change += len(victims) > 1
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    found = struct.unpack(f"<{NUM_PROCESSES}Q", hits[:])
    return {
        "looks": looks,
        "most": most,
        "kills": kills,
        "kills_in_change": kills_in_change,
        "hits": sum(found),
        "least_hits": min(found),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))))
