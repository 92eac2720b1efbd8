"""Kubernetes objects as YAML that reads well and means the same to every reader."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

# What kubectl may read as a number, a date or as true where PyYAML sees a text: 1e3, 0o17, y.
# What ends a line for some readers and not for others, or is nothing that can be seen.
_UNSEEN = re.compile(r"[^\n\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd]")
_MISREAD = re.compile(r"[-+.]*[0-9][-+.:_0-9a-fA-FxXoObBTZ]*|[yYnN]")


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks; no references between objects."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None
    if _UNSEEN.search(text):
        style = '"'
    elif "\n" in text:
        style = "|"
    elif _MISREAD.fullmatch(text):
        style = "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def to_yaml(objects: Sequence[Mapping[str, Any]]) -> str:
    """The objects as documents of one file, for `kubectl apply -f`; the same for the same objects."""
    return yaml.dump_all(
        [dict(each) for each in objects],
        Dumper=_Dumper,
        sort_keys=False,
        explicit_start=True,
        allow_unicode=True,
        width=2**20,
    )
