"""Credentials inside URLs and variables: found, so that they are refused, and blotted out of messages."""

import re

# A password may hold unescaped '/' and '@', so anything up to the last '@' counts. A lone user name
# before '@' is a token in http, but the container in abfss://container@account.
_USER = re.compile(r"://.*:.*@|^https?://[^/?]*@", re.DOTALL | re.IGNORECASE)
_WORDS = "password|passwd|pwd|token|secret|signature|credential|sig|api_?key"
_PARAMETER = re.compile(rf"[?&;][^=&;]*(?:{_WORDS})=.*", re.DOTALL | re.IGNORECASE)

# TOKENIZERS_PARALLELISM is none: what counts is how a word ends.
_NAME = re.compile(r"(key|token|secret|passwo?rd|passwd|passphrase|credential)s?(?![a-z0-9])", re.IGNORECASE)
HIDDEN = "***"


def is_secret_name(name: str) -> bool:
    """Whether the name of a variable is one of a secret."""
    return _NAME.search(name) is not None


def has_credentials(url: str) -> bool:
    """Whether a URL, or one of a chain joined by '::', holds a user with password or a secret parameter."""
    return any(("@" in part and _USER.search(part)) or _PARAMETER.search(part) for part in url.split("::"))


def without_credentials(text: str) -> str:
    """The text with everything blotted out that may be a credential of a URL in it; rather too much."""
    if "@" in text:
        text = re.sub(r"[^\s'\"]*:.*@", f"{HIDDEN}@", text, flags=re.DOTALL)
    return _PARAMETER.sub(f"?{HIDDEN}", text)
