"""Samples of tar shards in the format of mosaicml-streaming.

    python -m benchmarks.episode_mds EXTENSION OUT TAR...

Run by `episodes.py`, with the interpreter that has mosaicml-streaming.
"""

from __future__ import annotations

import sys
import tarfile


def main(extension: str, folder: str, shards: list[str]) -> None:
    """Writes one sample for every member with the extension, in order."""
    from streaming import MDSWriter  # type: ignore[import-not-found]

    with MDSWriter(out=folder, columns={extension: "bytes"}, size_limit=1 << 26) as writer:
        for shard in shards:
            with tarfile.open(shard) as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    if file is not None and member.name.endswith(f".{extension}"):
                        writer.write({extension: file.read()})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
