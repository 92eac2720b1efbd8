"""`metaloom data pack images | records | parquet | huggingface`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from metaloom.arguments import add_command

if TYPE_CHECKING:
    from metaloom.arguments import Commands
    from metaloom.datasets.pack import Columns, Limits, PackedDataset, Source
    from metaloom.tracking.console import Console

PACK_EXAMPLES = """\
examples:
  metaloom data pack images ~/birds data/birds --split train=0.7,validation=0.15,test=0.15
  metaloom data pack records reviews.csv data/reviews --input text --target label --group user
  metaloom data pack records episodes.jsonl data/tasks --task episodes
  metaloom data pack parquet ~/corpus data/corpus --task language-modelling --input text
  metaloom data pack huggingface ~/saved data/saved --input image --target label

The same files and options give the same bytes, whatever --processes is. What is broken is named, and ends the
command, unless --max-broken leaves so many samples out. All about it: docs/packing.md
"""

IMAGES_EXAMPLES = """\
examples:
  metaloom data pack images ~/birds data/birds                      ~/birds/wren/1.jpg: class wren
  metaloom data pack images ~/birds data/birds --split train=0.7,validation=0.15,test=0.15 --image-size 84
  metaloom data pack images ~/domainnet data/dn --folders group/class       the group is the domain
  metaloom data pack images ~/omniglot data/omniglot --folders class/class  alphabet and letter
"""

RECORDS_EXAMPLES = """\
examples:
  metaloom data pack records reviews.csv data/reviews --input text --target label --group user
  metaloom data pack records train.jsonl test.jsonl data/qa --input question --target topic
  metaloom data pack records scans.csv data/scans --input file --input-kind image --target finding
  metaloom data pack records plant.csv data/plant --task regression --input t --input p --target yield
  metaloom data pack records books.jsonl data/books --task language-modelling --input text --key title
  metaloom data pack records episodes.jsonl data/tasks --task episodes
"""

PARQUET_EXAMPLES = """\
examples:
  metaloom data pack parquet ~/reviews data/reviews --input text --target label
  metaloom data pack parquet train.parquet test.parquet data/corpus --task language-modelling --input text
"""

HUGGINGFACE_EXAMPLES = """\
examples:
  metaloom data pack huggingface ~/saved data/saved --input image --target label
  metaloom data pack huggingface ~/saved data/saved --input text --target label --tokenizer tokenizer.json

~/saved is what save_to_disk of the library datasets wrote; the library itself is not needed.
"""


def add_pack_command(commands: Commands) -> None:
    """Declares `metaloom data pack` and its sources."""
    pack = add_command(commands, "pack", "write data of your own as webdataset shards", PACK_EXAMPLES)
    sources = pack.add_subparsers(title="sources", required=True, metavar="SOURCE")

    images = add_command(sources, "images", "pack a folder tree of images", IMAGES_EXAMPLES)
    images.add_argument(
        "source", type=Path, metavar="ROOT", help="the tree: ROOT/[split/]class/*.png|jpg|webp"
    )
    _add_packing(images)
    images.add_argument(
        "--folders",
        metavar="WORDS",
        help="what the folders from ROOT down mean: split, class, group, _ with / between (default: class, "
        "or split/class where all folders of ROOT are called like splits: train, val, test ...)",
    )
    images.add_argument(
        "--split", metavar="SHARES", help="deals whole classes to splits: train=0.7,validation=0.15,test=0.15"
    )
    _add_image_size(images)
    images.set_defaults(run_command=_pack_images)

    records = add_command(sources, "records", "pack the records of CSV, TSV or JSONL files", RECORDS_EXAMPLES)
    parquet = add_command(sources, "parquet", "pack the rows of parquet files", PARQUET_EXAMPLES)
    for parser, kind in ((records, "CSV, TSV or JSONL"), (parquet, "parquet")):
        parser.add_argument(
            "source", type=Path, nargs="+", metavar="FILE", help=f"{kind} files, or folders of such files"
        )
        _add_packing(parser)
        _add_columns(parser)
    records.set_defaults(run_command=_pack_records)
    parquet.set_defaults(run_command=_pack_parquet)

    saved = add_command(
        sources, "huggingface", "pack a folder that save_to_disk of datasets wrote", HUGGINGFACE_EXAMPLES
    )
    saved.add_argument("source", type=Path, metavar="FOLDER", help="a Dataset or DatasetDict on disk")
    _add_packing(saved)
    _add_columns(saved)
    saved.set_defaults(run_command=_pack_huggingface)


def _add_packing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="folder for the shards")
    packing = parser.add_argument_group("packing")
    packing.add_argument("--name", metavar="NAME", help="of the data set (default: that of DIR)")
    packing.add_argument(
        "--processes", type=int, metavar="N", help="that read and check samples (default: one a core)"
    )
    packing.add_argument(
        "--max-broken", type=int, default=0, metavar="N", help="leave up to N broken samples out (default: 0)"
    )
    packing.add_argument(
        "--shard-mib", type=int, default=64, metavar="N", help="size of a shard in MiB (default: 64)"
    )
    packing.add_argument("--max-pixels", type=int, metavar="N", help="of an image (default: 50 million)")
    packing.add_argument("--max-sample-bytes", type=int, metavar="N", help="of a sample (default: 64 MiB)")
    packing.add_argument("--replace", action="store_true", help="pack anew over a finished data set")


def _add_columns(parser: argparse.ArgumentParser) -> None:
    columns = parser.add_argument_group("columns")
    columns.add_argument(
        "--task",
        default="classification",
        metavar="TASK",
        help="classification (default), regression, language-modelling, "
        "or episodes: records with lists support and query",
    )
    columns.add_argument(
        "--input",
        action="append",
        metavar="COLUMN",
        help="what a model sees; several are numbers of one array",
    )
    columns.add_argument(
        "--input-kind",
        metavar="KIND",
        help="text, numbers, tokens, image or array (bytes, or the name of a file), record (kept as JSON); "
        "default: what the first record shows",
    )
    columns.add_argument("--target", action="append", metavar="COLUMN", help="the label, or numbers")
    columns.add_argument("--group", metavar="COLUMN", help="user, domain, corruption ...")
    columns.add_argument(
        "--split",
        metavar="COLUMN|SHARES",
        help="column of the split's name, or shares: train=0.8,test=0.2 (default: names of files, folders)",
    )
    columns.add_argument(
        "--split-by",
        metavar="UNIT",
        help="what shares are dealt to: class, group or sample (default: class for classification, else "
        "group where there is one, else sample)",
    )
    columns.add_argument("--key", metavar="COLUMN", help="names of the samples (default: file and number)")
    columns.add_argument("--keep", action="append", metavar="COLUMN", help="kept beside the sample as JSON")
    columns.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json that makes tokens of texts")
    columns.add_argument("--root", type=Path, metavar="DIR", help="of named files (default: the records')")
    _add_image_size(columns)


def _add_image_size(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="N",
        help="cut images to squares of N x N pixels, as PNG (default: files are kept as they are)",
    )


# Imports stand inside the commands, so that `metaloom --help` is quick.


def _pack_images(arguments: argparse.Namespace) -> int:
    from metaloom.datasets.pack import ImageFolder, parse_shares

    source = ImageFolder(
        arguments.source,
        folders=arguments.folders,
        shares=None if arguments.split is None else parse_shares(arguments.split),
        image_size=arguments.image_size,
        limits=_limits(arguments),
    )
    return _pack(source, arguments)


def _pack_records(arguments: argparse.Namespace) -> int:
    from metaloom.datasets.pack import Records

    return _pack(Records(tuple(arguments.source), _columns(arguments), arguments.root), arguments)


def _pack_parquet(arguments: argparse.Namespace) -> int:
    from metaloom.datasets.pack import Parquet

    return _pack(Parquet(tuple(arguments.source), _columns(arguments), arguments.root), arguments)


def _pack_huggingface(arguments: argparse.Namespace) -> int:
    from metaloom.datasets.pack import HuggingFace

    return _pack(HuggingFace(arguments.source, _columns(arguments), arguments.root), arguments)


def _limits(arguments: argparse.Namespace) -> Limits:
    from metaloom.datasets.pack import Limits

    default = Limits()
    return Limits(
        default.max_pixels if arguments.max_pixels is None else arguments.max_pixels,
        default.max_sample_bytes if arguments.max_sample_bytes is None else arguments.max_sample_bytes,
    )


def _columns(arguments: argparse.Namespace) -> Columns:
    from metaloom.datasets.pack import Columns, parse_shares

    says_shares = arguments.split is not None and "=" in arguments.split
    of_episodes = arguments.task == "episodes"
    return Columns(
        inputs=tuple(arguments.input or (("input",) if of_episodes else ())),
        targets=tuple(arguments.target or (("target",) if of_episodes else ())),
        task=arguments.task,
        kind=arguments.input_kind,
        group=arguments.group,
        split=None if says_shares else arguments.split,
        key=arguments.key,
        keep=tuple(arguments.keep or ()),
        tokenizer=arguments.tokenizer,
        image_size=arguments.image_size,
        shares=parse_shares(arguments.split) if says_shares else None,
        divided_by=arguments.split_by,
        limits=_limits(arguments),
    )


def _pack(source: Source, arguments: argparse.Namespace) -> int:
    from metaloom.datasets.pack import pack_dataset
    from metaloom.tracking.console import Phase, make_console

    console = make_console()
    with contextlib.ExitStack() as stack:
        phase: Phase | None = None

        def show(num_done: int, total: int) -> None:
            nonlocal phase
            if phase is None:
                phase = stack.enter_context(console.phase(f"pack {arguments.directory}", total, "sample"))
            phase.advance(num_done - phase.num_done)

        console.note(f"listing samples of {_told(arguments.source)}")
        packed = pack_dataset(
            source,
            arguments.directory,
            name=arguments.name,
            num_processes=os.cpu_count() or 1 if arguments.processes is None else arguments.processes,
            max_broken=arguments.max_broken,
            shard_limit_bytes=arguments.shard_mib << 20,
            replace=arguments.replace,
            progress=show,
        )
    _show_packed(console, packed, arguments.directory)
    return 0


def _told(source: Path | list[Path]) -> str:
    return ", ".join(map(str, source)) if isinstance(source, list) else str(source)


def _show_packed(console: Console, packed: PackedDataset, directory: str) -> None:
    from metaloom.datasets.pack.plan import list_broken

    console.table(
        f"{packed.index.dataset} in {directory}: layout {packed.index.layout}, "
        f"digest {packed.index.digest[:12]}",
        ("split", "samples", "classes", "groups", "shards", "bytes"),
        [
            (split, *(str(n) if n else "" for n in dataclasses.astuple(counts)))
            for split, counts in packed.splits.items()
        ],
    )
    if packed.smallest_class is not None and packed.largest_class is not None:
        sizes = (("smallest", packed.smallest_class), ("largest", packed.largest_class))
        for words, (split, name, count) in sizes:
            console.note(f"{words} class: {name} ({split}), {count} sample{'s' if count > 1 else ''}")
    for warning in packed.warnings:
        console.warn(warning)
    if packed.broken:
        num = len(packed.broken)
        words = "sample was" if num == 1 else "samples were"
        console.warn(f"{num} broken {words} left out:\n{list_broken(packed.broken)}")
    console.note(f"next: metaloom data inspect {shlex.quote(directory)} --episode 0")
