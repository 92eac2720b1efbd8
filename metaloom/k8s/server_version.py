"""Which release of Kubernetes an API server is, as it says it itself at /version."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from metaloom.k8s.resources import Resource

# No object, and no role has to grant it.
SERVER_VERSION = Resource("", "v1", "Version", "version", is_namespaced=False)


@dataclasses.dataclass(frozen=True)
class ServerVersion:
    """A release.

    Attributes:
        text: as the server has it, such as v1.28.5-gke.100.
        number: its major and minor number, by which releases are ordered.
    """

    text: str
    number: tuple[int, int]


def read_version(told: Mapping[str, Any]) -> ServerVersion | None:
    """The release that an answer of /version names; None where it names none.

    Who sells clusters puts something behind the numbers: v1.28.5-gke.100, and a minor number of 28+.
    """
    text = str(told.get("gitVersion") or "")
    found = re.match(r"v?(\d+)\.(\d+)", text)
    if found is None:
        text = f"{told.get('major')}.{told.get('minor')}"
        found = re.match(r"(\d+)\D*\.(\d+)", text)
    return None if found is None else ServerVersion(text, (int(found[1]), int(found[2])))
