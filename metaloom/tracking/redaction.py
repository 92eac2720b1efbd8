"""Keeps secrets out of everything that is recorded or shown."""

import re
from collections.abc import Mapping

MASK = "***"

# user:password@ or token@ between "//" and the host, up to the last "@" before the path. The second
# form is a password with an unescaped "/" or "?": no valid URI, but people write it.
_USER_INFO = re.compile(r"(?<=://)(?:[^\s'\"<>/?#]*@|[^\s'\"<>/?#:@]*:(?!\d+[/?#])[^\s'\"<>]*@)")

_SECRET_WORD = (
    r"(?:password|passwd|pwd|secret|secret[_-]?key|access[_-]?key(?:[_-]?id)?|api[_-]?key|private[_-]?key"
    r"|auth[_-]?token|access[_-]?token|api[_-]?token|session[_-]?token|token|credentials?|authorization"
    r"|sig|signature|x-amz-[a-z-]+|x-goog-[a-z-]+)"
)
_SECRET_ASSIGNMENT = re.compile(rf"(?i)(?<![a-z0-9])({_SECRET_WORD})=[^\s&;'\"<>,)]+")
_AUTHORIZATION = re.compile(r"(?i)\b(bearer|basic)\s+[a-z0-9._~+/=-]{8,}")

# The last word group of a dotted key. `pad_token` or `num_tokens` are no secrets, so a plain
# `token` counts only when it is the whole segment.
_SECRET_KEY = re.compile(
    r"(?i)(?:^|[._/-])(?:[a-z0-9]+[_-])*?(?:password|passwd|secret|secret[_-]?key|access[_-]?key(?:[_-]?id)?"
    r"|api[_-]?key|private[_-]?key|auth[_-]?token|access[_-]?token|api[_-]?token|session[_-]?token|credentials?)$"
    r"|(?:^|[./])token$"
)


def strip_credentials(text: str) -> str:
    """The text with the credentials of every URI in it taken out.

    `https://user:pw@host/x` becomes `https://host/x`; values of query parameters and of
    `name=value` pairs with secret names become `***`; so do bearer tokens.
    """
    text = _USER_INFO.sub("", text)
    text = _SECRET_ASSIGNMENT.sub(rf"\1={MASK}", text)
    return _AUTHORIZATION.sub(rf"\1 {MASK}", text)


def mask_secrets(values: Mapping[str, str]) -> dict[str, str]:
    """The same mapping with secret values masked, by their key or by what they contain."""
    return {
        key: MASK if _SECRET_KEY.search(key) and value else strip_credentials(value)
        for key, value in values.items()
    }
