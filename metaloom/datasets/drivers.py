"""fsspec's drivers: how one is opened and asked for bytes, and what its errors mean.

What drivers raise, as read in s3fs 2026.9, gcsfs 2026.10, huggingface_hub 2.4 and fsspec's http:

* s3fs translates botocore's `ClientError` by its code into FileNotFoundError, PermissionError, TimeoutError
  or OSError with the ClientError as its cause; everything else of botocore and aiohttp (no connection, no
  credentials, a body that ends early, timeouts) passes as it is, and is no OSError.
* http gives aiohttp's errors, with a status where the server answered; a look-up of the size gives
  FileNotFoundError whatever went wrong, with the true error as its cause.
* gcsfs gives HttpError with a code, OSError("Forbidden: ...") for 403, and errors of google.auth, requests
  and aiohttp. That no access token could be fetched is a 401 whatever the reason, with google.auth's error as
  its cause.
* huggingface_hub gives errors with a response; a private repository, without a token, is a 401 under a
  FileNotFoundError.

tests/faults/test_clouds.py sees the last two do so.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import inspect
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem, get_loop

from metaloom.credentials import has_credentials, without_credentials
from metaloom.datasets.hub import read_hub_range, read_hub_size
from metaloom.errors import StreamError

T = TypeVar("T")

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "hf": "hf", "http": "http", "https": "http"}

_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (with AWS_SESSION_TOKEN for temporary ones), or "
    "AWS_PROFILE with a profile of ~/.aws/credentials; AWS_ENDPOINT_URL names a storage that is not Amazon's",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, the path of a key file, or `gcloud auth application-default "
    "login`",
    "hf": "HF_TOKEN, or `hf auth login`",
    "http": "user and password of the host in ~/.netrc, or in the file that NETRC names",
}

# Names of exceptions of drivers that need not be installed.
_NO_CREDENTIALS = {
    "NoCredentialsError",
    "NoAuthTokenError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "ProfileNotFound",
    "DefaultCredentialsError",
    "NonRetryableError",
}
_NETWORK = {"ClientError", "TransportError", "RequestException", "HTTPClientError"}


class Meaning(enum.Enum):
    """What a driver's error says about a request."""

    MISSING = "there is no such file"
    FORBIDDEN = "the credentials are missing, or do not allow it"
    BEYOND_THE_END = "the file has no such bytes"
    TRANSIENT = "anything else: it may be right the next time"


def open_filesystem(url: str, *, options: Mapping[str, Any] | None = None) -> tuple[Any, str]:
    """The fsspec filesystem of a URL and the path in it, without a trailing slash.

    Args:
        options: the driver's own, in place of its defaults.

    Raises:
        StreamError: the scheme is unknown, or its driver is not installed.
    """
    with _explained(url):
        filesystem, root = fsspec.core.url_to_fs(url, **(options or {}))
    return filesystem, str(root).rstrip("/")


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    """What goes wrong as a driver is opened, as a StreamError."""
    try:
        yield
    except ImportError as error:
        extra = _EXTRAS.get(scheme_of(url))
        fix = f"Install it: pip install 'metaloom[{extra}]'." if extra else "Install the package it names."
        raise StreamError(
            f"{shown(url)}: the driver of {scheme_of(url)}:// is not installed "
            f"({without_credentials(str(error))}). {fix}"
        ) from None
    except ValueError as error:
        raise StreamError(
            f"{shown(url)}: this URL cannot be opened ({without_credentials(str(error))}). Give a path, or a "
            f"URL of a scheme that fsspec knows: file, s3, gs, hf, http, https, memory ..."
        ) from None


def open_for_requests(url: str, num_connections: int, timeout_s: float) -> tuple[Any, str]:
    """As `open_filesystem`, for one user: not shared with others in the process, so that its connections and
    credentials are those of now; and without retries of the driver's own, where they can be turned off.

    Raises:
        StreamError: as `open_filesystem`.
    """
    options: dict[str, Any] = {"skip_instance_cache": True}
    scheme = "" if "::" in url else scheme_of(url)
    if scheme in ("s3", "s3a"):
        options["config_kwargs"] = {
            # Every sample has a checksum of its own. Not all storages that speak as S3 know that of a range.
            "response_checksum_validation": "when_required",
            # What a file of fsspec's configuration says of the client stays.
            **fsspec.config.conf.get(scheme, {}).get("config_kwargs", {}),
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": num_connections,
            "read_timeout": timeout_s,
        }
    elif scheme in ("http", "https"):
        configured = fsspec.config.conf.get(scheme, {})
        # trust_env: proxies and ~/.netrc. identity: a range of a compressed answer is not a range of the
        # file.
        options["client_kwargs"] = {**configured.get("client_kwargs", {}), "trust_env": True}
        options["headers"] = {**configured.get("headers", {}), "Accept-Encoding": "identity"}
    elif scheme in ("gs", "gcs"):
        return _open_google(url, options)
    filesystem, root = open_filesystem(url, options=options)
    if scheme in ("s3", "s3a"):
        filesystem.retries = 1
    return filesystem, root


def _open_google(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """gcsfs over HTTP alone, with one attempt at each request, and a new access token fetched in a thread.

    What gcsfs opens by default asks by gRPC, before it reads from a bucket, of which kind that is. Where gRPC
    does not get through (many proxies, emulators), or there are no credentials (public data), it does so for
    up to a minute before each read; its threads do not survive a fork, and are not closed. The price: buckets
    that answer gRPC alone (zonal ones, "Rapid") cannot be read.
    """
    with _explained(url):
        from gcsfs.core import GCSFileSystem

        filesystem = GCSFileSystem(**GCSFileSystem._get_kwargs_from_urls(url), **options)
    # Around it are up to six attempts, with half a minute of pauses.
    request = inspect.unwrap(GCSFileSystem._request)

    async def request_once(*args: Any, **options: Any) -> Any:
        # It would be asked for by the request, which would hold up all others on the event loop for as long.
        await _in_thread(filesystem.credentials.maybe_refresh)
        return await request(filesystem, *args, **options)

    filesystem._request = request_once
    return filesystem, str(GCSFileSystem._strip_protocol(url)).rstrip("/")


def close_filesystem(filesystem: Any) -> None:
    """Closes the connections of a filesystem that is not shared; others have none that outlive a request."""
    if not isinstance(filesystem, AsyncFileSystem):
        return
    # Drivers close their client when they are collected. They sit in reference cycles, so that would be at
    # any time, or at exit, where it is a ResourceWarning. Their finalizers do nothing the second time.
    for attribute in ("_s3creator", "_session"):
        client = vars(filesystem).get(attribute)
        if client is not None:
            type(filesystem).close_session(filesystem.loop, client)


def scheme_of(url: str) -> str:
    """The scheme of a URL, of the storage itself where several are chained; `file` for a path."""
    return str(fsspec.utils.get_protocol(url.split("::")[-1]))


def shown(url: str) -> str:
    """The URL as messages may have it."""
    return without_credentials(url) if has_credentials(url) else url


async def read_range(filesystem: Any, path: str, start: int, stop: int, timeout_s: float) -> bytes:
    """What the driver answers when it is asked for bytes `start` to `stop`.

    Args:
        timeout_s: when the caller stops to wait. A request in a thread cannot be told, and is given so long
            for each of its steps.
    """
    if _is_async(filesystem):
        return bytes(await filesystem._cat_file(path, start=start, end=stop))
    if _is_hub(filesystem):
        return await _in_thread(lambda: read_hub_range(filesystem, path, start, stop, timeout_s))
    return bytes(await _in_thread(lambda: filesystem.cat_file(path, start=start, end=stop)))


async def read_whole(filesystem: Any, path: str) -> bytes:
    """All that the file has, whatever its size."""
    if _is_async(filesystem):
        return bytes(await filesystem._cat_file(path))
    return bytes(await _in_thread(lambda: filesystem.cat_file(path)))


async def read_size(filesystem: Any, path: str) -> int | None:
    """The size of a file in bytes as it is now; None where the storage does not tell.

    Raises:
        FileNotFoundError: it is a folder.
    """
    if _is_hub(filesystem):
        return await _in_thread(lambda: read_hub_size(filesystem, path))
    filesystem.invalidate_cache()
    if _is_async(filesystem):
        info = await filesystem._info(path)
    else:
        info = await _in_thread(lambda: filesystem.info(path))
    if info.get("type") == "directory":
        raise FileNotFoundError(f"{path} is a folder")
    return None if info.get("size") is None else int(info["size"])


def _is_async(filesystem: Any) -> bool:
    return isinstance(filesystem, AsyncFileSystem) and filesystem.async_impl


def _is_hub(filesystem: Any) -> bool:
    protocol = filesystem.protocol
    return "hf" in ((protocol,) if isinstance(protocol, str) else protocol)


async def _in_thread(call: Callable[[], T]) -> T:
    """`call()`, in a thread of its own.

    A driver that hangs has no way to be told to stop. So the thread is a daemon, which nothing waits for: its
    result is dropped where the wait has ended.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: Exception | None) -> None:
        if answer.done():
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        try:
            result = call()
        except Exception as error:
            loop.call_soon_threadsafe(settle, None, error)
        else:
            loop.call_soon_threadsafe(settle, result, None)

    threading.Thread(target=run, name="metaloom-storage", daemon=True).start()
    return await answer


def request_loop() -> asyncio.AbstractEventLoop:
    """The event loop of this process on which drivers do their requests: fsspec's, in a daemon thread."""
    loop: asyncio.AbstractEventLoop = get_loop()
    return loop


def meaning(error: BaseException) -> Meaning:
    """What an error of a driver says; see the head of this module."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause is not None:
        if _status(cause) is not None or isinstance(cause, OSError | asyncio.TimeoutError):
            return meaning(cause)
        return Meaning.TRANSIENT if _names(cause) & _NETWORK else Meaning.MISSING
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return Meaning.MISSING
    if getattr(cause, "retryable", False):  # google.auth's, of an access token that could not be fetched now
        return Meaning.TRANSIENT
    status = _status(error) or (_status(cause) if cause is not None else None)
    if isinstance(error, PermissionError) or status in (401, 403) or _names(error) & _NO_CREDENTIALS:
        return Meaning.FORBIDDEN
    if status in (404, 410):
        return Meaning.MISSING
    if status == 416:
        return Meaning.BEYOND_THE_END
    if type(error) is OSError and str(error).startswith("Forbidden:"):
        return Meaning.FORBIDDEN
    return Meaning.TRANSIENT


def asked_pause_s(error: BaseException) -> float:
    """How long a server asks to be left alone, by Retry-After or a rate limit that is used up; else 0."""
    headers = {str(name).lower(): str(value) for name, value in _headers(error).items()}
    is_used_up = re.search(r"\br=0\b.*?\bt=(\d+)", headers.get("ratelimit", ""))  # the Hub's
    if is_used_up:
        return float(is_used_up[1])
    asked = headers.get("retry-after", "")
    return float(asked) if asked.isdecimal() else 0.0


def described(error: BaseException) -> str:
    """The kind of an error and its text in one line, without credentials."""
    text = " ".join(without_credentials(str(error)).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def credentials_advice(url: str) -> str:
    """The sentence that says where credentials for a URL are looked for."""
    scheme = scheme_of(url)
    places = _CREDENTIALS.get(_EXTRAS.get(scheme, scheme))
    if scheme in ("file", "local"):
        return "Change the permissions of the file and of its folders, or run as a user who may read them."
    if places is None:
        return f"Give credentials in the way that the driver of {scheme}:// documents."
    return f"Credentials for {scheme}:// come from the environment: {places}."


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _headers(error: BaseException) -> Mapping[str, str]:
    """The headers of the answer in an error, where each driver keeps them; gcsfs keeps none."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):  # botocore
        found = response.get("ResponseMetadata", {}).get("HTTPHeaders")
    else:  # huggingface_hub, requests; aiohttp
        found = getattr(error if response is None else response, "headers", None)
    if isinstance(found, Mapping):
        return found
    return {} if error.__cause__ is None else _headers(error.__cause__)


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error, where each driver keeps it."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):  # botocore
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    elif response is not None:  # huggingface_hub, requests
        found = getattr(response, "status_code", None)
    else:  # aiohttp; gcsfs
        found = getattr(error, "status", None) or getattr(error, "code", None)
    return int(found) if isinstance(found, int) or (isinstance(found, str) and found.isdigit()) else None
