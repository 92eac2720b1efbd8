"""The rules of Kubernetes for names, labels and annotations, in words."""

from __future__ import annotations

import re

MAX_LABEL = 63
MAX_SUBDOMAIN = 253
_LABEL_1123 = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_LABEL_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_QUALIFIED = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")


def service_name_fault(name: str, *, longest_suffix: str = "") -> str | None:
    """What is wrong with a name that host names and Services are made of (RFC 1035); None: nothing.

    Args:
        longest_suffix: the longest of those that the cluster puts behind it.
    """
    limit = MAX_LABEL - len(longest_suffix)
    if len(name) > limit:
        room = f" once {longest_suffix!r} is put behind it" if longest_suffix else ""
        return f"{name!r} has {len(name)} letters; at most {limit} fit into a host name of {MAX_LABEL}{room}"
    if _LABEL_1035.fullmatch(name) is None:
        return _malformed(
            name, "lower-case letters, digits and '-', beginning with a letter and not ending with '-'", "run"
        )
    return None


def label_name_fault(name: str) -> str | None:
    """What is wrong with a name of RFC 1123, such as a namespace's; None: nothing."""
    if len(name) > MAX_LABEL:
        return f"{name!r} has {len(name)} letters; at most {MAX_LABEL} are allowed"
    if _LABEL_1123.fullmatch(name) is None:
        return _malformed(
            name, "lower-case letters, digits and '-', beginning and ending with a letter or digit"
        )
    return None


def object_name_fault(name: str) -> str | None:
    """What is wrong with the name of a secret, a claim, a class or an account; None: nothing."""
    if len(name) > MAX_SUBDOMAIN:
        return f"{name[:40]!r}... has {len(name)} letters; at most {MAX_SUBDOMAIN} are allowed"
    if _SUBDOMAIN.fullmatch(name) is None:
        return _malformed(
            name,
            "lower-case letters, digits, '-' and '.', each part beginning and ending with a letter or digit",
        )
    return None


def key_fault(key: str) -> str | None:
    """What is wrong with the key of a label, an annotation or a resource; None: nothing."""
    prefix, slash, name = key.rpartition("/")
    if slash and (len(prefix) > MAX_SUBDOMAIN or _SUBDOMAIN.fullmatch(prefix) is None):
        return f"{key!r}: what is before the '/' must be a domain, as in example.com/{name or 'team'}"
    if len(name) > MAX_LABEL or _QUALIFIED.fullmatch(name) is None:
        return (
            f"{key!r}: a key has at most {MAX_LABEL} letters, digits, '-', '_' and '.', beginning and ending "
            "with a letter or digit, after a domain and '/' where there is one"
        )
    return None


def label_value_fault(value: str) -> str | None:
    """What is wrong with a label's value; None: nothing."""
    if value and (len(value) > MAX_LABEL or _QUALIFIED.fullmatch(value) is None):
        return (
            f"{value!r} is no value of a label: at most {MAX_LABEL} letters, digits, '-', '_' and '.', "
            "beginning and ending with a letter or digit"
        )
    return None


def suggested_name(words: str, *, limit: int) -> str:
    """A name of RFC 1035 with at most `limit` letters that reads like the given words; "" where none does."""
    name = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    return re.sub(r"^[0-9-]+", "", name)[:limit].rstrip("-")


def _malformed(name: str, rule: str, fallback: str = "") -> str:
    meant = suggested_name(name, limit=MAX_LABEL) or fallback
    hint = f"; did you mean {meant}?" if meant and meant != name else ""
    return f"{name!r} is no name in Kubernetes: {rule}{hint}"
