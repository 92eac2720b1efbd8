"""`metaloom data make | pack | index | inspect | verify`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from metaloom.arguments import add_command
from metaloom.errors import StreamError
from metaloom.pack_command import add_pack_command

if TYPE_CHECKING:
    from metaloom.arguments import Commands

EXAMPLES = """\
examples:
  metaloom data make glyphs data/glyphs                     a built-in data set
  metaloom data pack images ~/birds data/birds              one of your own
  metaloom data index shards --class-from cls               webdataset shards that are there
  metaloom data inspect data/glyphs --out episode.png       what is in it
  metaloom data verify s3://bucket/glyphs                   whether it is whole
"""

MAKE_EXAMPLES = """\
examples:
  metaloom data make glyphs data/glyphs
  metaloom data make glyph-faces data/glyph-faces
  metaloom data make stdlib data/stdlib
  metaloom data make glyphs /tmp/small --max-per-split 30
"""

INDEX_EXAMPLES = """\
examples:
  metaloom data index shards --class-from cls        train-*.tar, test-*.tar of webdataset, with images
  metaloom data index shards --class-from json:label --group-from json:user
  metaloom data index books --layout documents --split train --split test

Each tar is read once, and index.json and the columns are written beside them; no tar is copied or changed.
"""

INSPECT_EXAMPLES = """\
examples:
  metaloom data inspect data/glyphs
  metaloom data inspect data/glyphs --split test --episode 3 --n-way 5 --n-shot 1 --out episode.png
  metaloom data inspect data/stdlib --split test --episode 0
"""

VERIFY_EXAMPLES = """\
examples:
  metaloom data verify data/glyphs
  metaloom data verify s3://bucket/glyphs
  metaloom data verify data/birds --decode

Every byte of every shard is read. A sample that could not be decoded when it was indexed is as it was then:
with --decode, images, arrays, tokens and JSON are decoded, too. Exit code 3 if anything is broken.
"""


def add_data_commands(commands: Commands) -> None:
    """Declares `metaloom data` and its commands."""
    data = add_command(commands, "data", "make, pack, index, inspect and verify data sets", EXAMPLES)
    data_commands = data.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_make(data_commands)
    add_pack_command(data_commands)
    _add_index(data_commands)
    _add_inspect(data_commands)
    verify = add_command(data_commands, "verify", "check every shard against the index", VERIFY_EXAMPLES)
    verify.add_argument("url", metavar="URL", help="folder or fsspec URL of the data set")
    verify.add_argument("--decode", action="store_true", help="also decode every member of every sample")
    verify.set_defaults(run_command=_verify)


def _add_make(commands: Commands) -> None:
    make = add_command(commands, "make", "write a built-in data set as webdataset shards", MAKE_EXAMPLES)
    make.add_argument("name", choices=("glyphs", "glyph-faces", "stdlib"), help="which data set")
    make.add_argument("directory", metavar="DIR", help="folder for its shards")
    make.add_argument(
        "--max-per-split", type=int, metavar="N", help="at most N classes or modules per split (a small set)"
    )
    make.set_defaults(run_command=_make)


def _add_index(commands: Commands) -> None:
    index = add_command(commands, "index", "index webdataset shards that are there", INDEX_EXAMPLES)
    index.add_argument("directory", type=Path, metavar="DIR", help="folder of tars called SPLIT-*.tar")
    index.add_argument("--name", metavar="NAME", help="of the data set (default: the folder's)")
    index.add_argument(
        "--layout",
        choices=("classes", "groups", "documents", "episodes"),
        default="classes",
        help="what a sample is (default: classes)",
    )
    index.add_argument(
        "--class-from", metavar="WHERE", help="where a sample's class stands: cls, folder or json:KEY"
    )
    index.add_argument("--group-from", metavar="WHERE", help="where its user or domain stands: json:KEY")
    index.add_argument(
        "--split", action="append", metavar="SPLIT", help="this split alone; may come again (default: all)"
    )
    index.add_argument(
        "--max-broken",
        type=int,
        default=0,
        metavar="N",
        help="leave out up to N samples (default: 0)",
    )
    index.set_defaults(run_command=_index)


def _add_inspect(commands: Commands) -> None:
    inspect = add_command(commands, "inspect", "show counts, classes and an episode", INSPECT_EXAMPLES)
    inspect.add_argument("url", metavar="URL", help="folder or fsspec URL of the data set")
    inspect.add_argument("--split", metavar="SPLIT", help="one split (default: all; the first one's episode)")
    inspect.add_argument("--episode", type=int, metavar="N", help="show this episode, counted from 0")
    inspect.add_argument("--n-way", type=int, metavar="N", help="classes (default: 5, or all of fewer)")
    inspect.add_argument("--n-shot", type=int, default=1, metavar="N", help="support of a class (default: 1)")
    inspect.add_argument("--n-query", type=int, metavar="N", help="query of a class (default: up to 3)")
    inspect.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json that turns tokens into text")
    inspect.add_argument("--out", type=Path, metavar="FILE.png", help="draw the episode's images into a file")
    inspect.set_defaults(run_command=_inspect)


# Imports stand inside the commands, so that `metaloom --help` is quick.


def _make(arguments: argparse.Namespace) -> int:
    from metaloom.datasets import make_dataset
    from metaloom.tracking.console import make_console

    console = make_console()
    with console.phase(f"make {arguments.name}", total=None, unit="sample") as phase:
        made = make_dataset(
            arguments.name,
            arguments.directory,
            max_per_split=arguments.max_per_split,
            progress=lambda done, total: phase.advance(done - phase.num_done),
        )
    console.table(
        f"{arguments.name} in {arguments.directory}" + ("" if made.created else " (was already there)"),
        ("split", "classes", "samples"),
        [
            (split, str(made.num_classes.get(split, "")), str(count))
            for split, count in made.num_samples.items()
        ],
    )
    return 0


def _index(arguments: argparse.Namespace) -> int:
    from metaloom.datasets.counts import counts
    from metaloom.datasets.foreign import index_shards
    from metaloom.tracking.console import make_console

    console = make_console()
    with console.phase(f"index {arguments.directory}", total=None, unit="tar") as phase:
        index, broken = index_shards(
            arguments.directory,
            dataset=arguments.name or arguments.directory.resolve().name,
            layout=arguments.layout,
            class_from=arguments.class_from,
            group_from=arguments.group_from,
            splits=arguments.split,
            max_broken=arguments.max_broken,
            progress=lambda done, total: phase.advance(done - phase.num_done),
        )
    for sample in broken:
        console.warn(f"left out: {sample}")
    console.table(
        f"{index.dataset} in {arguments.directory}: layout {index.layout}, digest {index.digest[:12]}",
        ("split", "samples", "classes", "groups", "members"),
        [counts(table) for table in index.splits.values()],
    )
    console.note(f"next: metaloom data inspect {shlex.quote(str(arguments.directory))} --episode 0")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from metaloom.datasets import Index
    from metaloom.datasets.counts import counts, histogram
    from metaloom.datasets.inspect import Ask, draw_episode, shown_text
    from metaloom.tracking.console import make_console

    if arguments.out is not None and arguments.out.suffix.lower() != ".png":
        raise StreamError(f"--out {arguments.out}: the sheet is a PNG; give a name that ends in .png.")
    console = make_console()
    index = Index.load(arguments.url)
    splits = [arguments.split] if arguments.split is not None else list(index.splits)
    tables = [index.split(split) for split in splits]
    console.table(
        f"{index.dataset} at {index.url}: layout {index.layout}, digest {index.digest[:12]}",
        ("split", "samples", "classes", "groups", "members"),
        [counts(table) for table in tables],
    )
    for table in tables:
        for line in histogram(table):
            console.note(line)
    number = arguments.episode
    if number is None and arguments.out is not None:
        number = 0
    if number is None:
        return 0
    ask = Ask(number, arguments.n_way, arguments.n_shot, arguments.n_query, arguments.tokenizer)
    episode = draw_episode(index, splits[0], ask)
    if arguments.out is None:
        console.note(shown_text(episode))
        return 0
    from metaloom.datasets.contact_sheet import contact_sheet

    sheet = contact_sheet(episode.columns, title=episode.title)
    try:
        sheet.save(arguments.out)
    except OSError as error:
        raise StreamError(f"--out {arguments.out} cannot be written: {error.strerror or error}.") from error
    console.note(f"{episode.title}: {arguments.out}")
    if episode.task:
        console.note(episode.task)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from metaloom.datasets import Index
    from metaloom.datasets.verify import verify
    from metaloom.tracking.console import make_console

    console = make_console()
    index = Index.load(arguments.url)
    num_bytes = sum(shard.num_bytes for shard in index.shards)
    with console.phase(f"verify {arguments.url}", total=len(index.shards), unit="shard") as phase:
        damage = verify(
            index,
            decode=arguments.decode,
            progress=lambda done, total: phase.advance(done - phase.num_done),
        )
    if damage:
        listing = "\n".join(f"  {entry}" for entry in damage)
        raise StreamError(f"{index.dataset} at {index.url} is broken in {len(damage)} places:\n{listing}")
    also = ", all decoded" if arguments.decode else ""
    console.note(
        f"{index.dataset} at {index.url} is whole: {len(index.shards)} shards, {num_bytes} bytes{also}"
    )
    return 0
