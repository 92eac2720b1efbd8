"""Cosines between the gradients of tasks or groups, as lines of JSON in the run folder.

Each line is one outer step:

    {"step": 3, "of": "groups", "labels": ["a", "b"], "values": [[1.0, -0.2], [-0.2, 1.0]]}
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from metaloom.disk import Disk
from metaloom.tracking.jsonl import complete_lines


@dataclass(frozen=True)
class CosineRecord:
    """The cosines of one outer step.

    Attributes:
        of: what rows are: `groups` or `tasks`.
        labels: of the rows.
        values: a symmetric matrix, by rows.
    """

    step: int
    of: str
    labels: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]


def read_cosines(path: Path) -> list[CosineRecord]:
    """The records of a file in the order of steps; none where there is no file. A torn last line is left
    out."""
    return [_record(line) for line in complete_lines(path)] if path.exists() else []


def add_cosines(path: Path, record: CosineRecord, disk: Disk) -> None:
    """Adds a record; those of its step and later ones, of an attempt that went on after its last checkpoint,
    are dropped. One rank must call."""
    lines = disk.read(path).splitlines(keepends=True)
    before = [_record(line) for line in lines if line.endswith(b"\n")]
    kept = [each for each in before if each.step < record.step]
    disk.replace(
        path, "".join(f"{json.dumps(asdict(each), ensure_ascii=False)}\n" for each in [*kept, record])
    )


def mean_cosines(records: Sequence[CosineRecord], *, most: int) -> CosineRecord | None:
    """The mean over the later half of the records: between the groups that came most often, NaN for pairs
    that never met. Tasks are others in every step: of them, the last record's first ones.

    Args:
        most: rows.
    """
    if not records:
        return None
    last = records[-1]
    if last.of == "tasks":
        rows = tuple(row[:most] for row in last.values[:most])
        return CosineRecord(last.step, last.of, last.labels[:most], rows)
    later = [record for record in records[len(records) // 2 :] if record.of == "groups"]
    counts = Counter(label for record in later for label in record.labels)
    labels = sorted(label for label, _ in counts.most_common(most))
    found: dict[tuple[str, str], list[float]] = {}
    for record in later:
        for one, row in zip(record.labels, record.values, strict=True):
            for other, value in zip(record.labels, row, strict=True):
                found.setdefault((one, other), []).append(value)

    def mean(pair: tuple[str, str]) -> float:
        values = found.get(pair, [])
        return math.fsum(values) / len(values) if values else math.nan

    values = tuple(tuple(mean((one, other)) for other in labels) for one in labels)
    return CosineRecord(last.step, "groups", tuple(labels), values)


def _record(line: bytes) -> CosineRecord:
    fields = json.loads(line)
    values = tuple(tuple(map(float, row)) for row in fields["values"])
    return CosineRecord(int(fields["step"]), str(fields["of"]), tuple(fields["labels"]), values)
