"""Google Cloud Storage and the Hugging Face Hub on 127.0.0.1, as far as reading needs them.

They answer what the official drivers ask, and refuse in the words of the services: Google's JSON API
(https://cloud.google.com/storage/docs/json_api/v1/status-codes) and the Hub's headers X-Error-Code and
X-Error-Message (huggingface_hub's `hf_raise_for_status` lists them).
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections import deque
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, quote, unquote, urlsplit

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.flaky_server import FlakyServer, Handler, running

GOOGLE_TOKEN = "ya29.planted-access-token"
HUB_TOKEN = "hf_plantedplantedplantedplantedplant"
SIGNATURE = "planted-signature-of-a-redirect"


class CloudServer(FlakyServer):
    """Files by `/bucket/object` or `/datasets/user/name/file`; `faults` meet the next requests for their
    content, `head_faults` those for their metadata, `token_faults` those for an access token of Google's,
    `stored_faults` those that the Hub has sent on.
    """

    def __init__(self, handler: type[Handler]) -> None:
        super().__init__(handler)
        self.stored_faults: deque[str] = deque()
        self.token_faults: deque[str] = deque()

    def upload(self, folder: Path, path: str) -> None:
        """Puts all files of a local folder below a path."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self.files[f"{path}/{file.relative_to(folder).as_posix()}"] = file.read_bytes()

    def content_requests(self) -> list[tuple[str, range]]:
        """The name of the file, and the bytes asked for, of every request for content."""
        found = []
        for _, path, asked in self.requests:
            if "/download/" in path or "/resolve/" in path:
                first, last = asked.removeprefix("bytes=").split("-")
                name = unquote(urlsplit(path).path).rsplit("/", 1)[1]
                found.append((name, range(int(first), int(last) + 1)))
        return found


class _CloudHandler(Handler):
    server: CloudServer

    def _json(self, value: Any, status: str = "200") -> None:
        self._answer(status, json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def _look_up(self, answer: Any, *, missing: bool = False) -> None:
        """Metadata, unless there is a reason not to."""
        fault = self._next(self.server.head_faults)
        if not self._is_allowed():
            return self._refuse("401")
        if fault is not None:
            return self._fail(fault, b"", 0, 0)
        return self._refuse("404") if missing else self._json(answer)

    def _below(self, folder: str) -> tuple[dict[str, int], list[str]]:
        """Sizes of the files right below `folder/` and the folders there, as paths below the first two."""
        files, folders = {}, set()
        for path, content in self.server.files.items():
            if path.startswith(folder):
                rest = path.removeprefix(folder)
                if "/" in rest:
                    folders.add(folder + rest.split("/", 1)[0])
                else:
                    files[path] = len(content)
        return files, sorted(folders)


# What Google says: reason and message by status.
_GOOGLE_ERRORS = {
    "401": ("authError", "Invalid Credentials"),
    "403": ("forbidden", "reader@planted.iam.gserviceaccount.com does not have storage.objects.get access to "
            "the Google Cloud Storage object. Permission 'storage.objects.get' denied on resource (or it may "
            "not exist)."),
    "404": ("notFound", "No such object"),
    "416": ("requestedRangeNotSatisfiable", "Request range not satisfiable"),
    "429": ("rateLimitExceeded", "The rate of requests exceeds the limit. Please reduce your request rate."),
    "500": ("internalError", "We encountered an internal error. Please try again."),
    "503": ("backendError", "We encountered an internal error. Please try again."),
}  # fmt: skip


class _GoogleHandler(_CloudHandler):
    def _post(self, form: bytes) -> None:
        """Google's OAuth: a signed statement of who asks, for an access token."""
        fault = self._next(self.server.token_faults)
        if fault is not None:
            return self._fail(fault, b"", 0, 0)
        return self._json({"access_token": GOOGLE_TOKEN, "expires_in": 3600, "token_type": "Bearer"})

    def _get(self) -> None:
        path = urlsplit(self.path).path
        _, _, bucket_and_object = path.partition("/storage/v1/b/")
        bucket, _, name = bucket_and_object.partition("/o")
        name = unquote(name.removeprefix("/"))
        content = self.server.files.get(f"/{bucket}/{name}")
        if path.startswith("/download/"):
            self._serve(content, self._next(self.server.faults))
        elif name:
            self._look_up(self._resource(bucket, name, len(content or b"")), missing=content is None)
        else:
            prefix = f"/{bucket}/" + parse_qs(urlsplit(self.path).query).get("prefix", [""])[0]
            files, folders = self._below(prefix)
            parts = len(f"/{bucket}/")
            items = [self._resource(bucket, path[parts:], size) for path, size in files.items()]
            prefixes = [f"{folder[parts:]}/" for folder in folders]
            self._look_up({"kind": "storage#objects", "items": items, "prefixes": prefixes})

    def _resource(self, bucket: str, name: str, num_bytes: int) -> dict[str, str]:
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/1",
            "bucket": bucket,
            "name": name,
            "size": str(num_bytes),
            "generation": "1",
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }

    def _refuse(self, status: str) -> None:
        reason, message = _GOOGLE_ERRORS[status]
        more = self.server.error_headers
        if urlsplit(self.path).path.startswith("/download/"):  # the message alone
            return self._answer(status, message.encode(), headers={"Content-Type": "text/html"} | more)
        entry = {"message": message, "domain": "global", "reason": reason}
        return self._json({"error": {"code": int(status), "message": message, "errors": [entry]}}, status)


# What the Hub says: code and message by status.
_HUB_ERRORS = {
    "401": ("", "Invalid credentials in Authorization header"),
    "403": ("GatedRepo", "Access to dataset user/set is restricted and you are not in the authorized list."),
    "404": ("EntryNotFound", "Entry not found"),
    "429": ("", "You have exceeded your rate limit"),
}


class _HubHandler(_CloudHandler):
    """Tars are large files: a request for one is sent on, with a signature, to the host that keeps them."""

    repository: ClassVar[str] = "user/set"

    def _get(self) -> None:
        path = urlsplit(self.path).path
        api, resolve = f"/api/datasets/{self.repository}", f"/datasets/{self.repository}/resolve/main/"
        folder = f"/datasets/{self.repository}/"
        if self._is_stored():
            self._serve_stored(self.server.files.get(unquote(path).removeprefix("/large")))
        elif path.startswith(resolve):
            self._resolve(folder + unquote(path).removeprefix(resolve))
        elif path == api:
            self._look_up({"id": self.repository, "sha": "0" * 40, "private": True, "siblings": []})
        elif path.startswith(f"{api}/tree/main"):
            inside = unquote(path).removeprefix(f"{api}/tree/main").strip("/")
            self._tree(folder, f"{folder}{inside}/" if inside else folder)
        else:
            self._next(self.server.head_faults)
            self._refuse_repository()

    def _post(self, form: bytes) -> None:
        """paths-info: those of the files asked for that are there."""
        folder, paths = f"/datasets/{self.repository}/", parse_qs(form.decode())["paths"]
        self._look_up([self._row(folder, path) for path in paths if folder + path in self.server.files])

    def _row(self, folder: str, path: str) -> dict[str, Any]:
        num_bytes = len(self.server.files[folder + path])
        return {"type": "file", "oid": "0" * 40, "size": num_bytes, "path": path}

    def _resolve(self, path: str) -> None:
        fault = self._next(self.server.faults)
        is_large = path.endswith(".tar") and path in self.server.files
        if fault is None and is_large and self._is_allowed():
            place = f"http://localhost:{self.server.server_address[1]}/large{quote(path)}?Policy=abc&Signature={SIGNATURE}&Key-Pair-Id=K"
            return self._answer("302", b"", headers={"Location": place})
        return self._serve(self.server.files.get(path), fault)

    def _serve_stored(self, content: bytes | None) -> None:
        fault = self._next(self.server.stored_faults)
        if self.headers.get("Authorization") is not None:
            return self._refuse("400")  # the signature is one way to be allowed already
        return self._serve(content, fault)

    def _is_allowed(self) -> bool:
        if self._is_stored():
            return SIGNATURE in self.path
        return super()._is_allowed()

    def _is_stored(self) -> bool:
        return self.path.startswith("/large/")

    def _tree(self, root: str, folder: str) -> None:
        files, folders = self._below(folder)
        rows = [self._row(root, path.removeprefix(root)) for path in files]
        rows += [
            {"type": "directory", "oid": "0" * 40, "size": 0, "path": path.removeprefix(root)}
            for path in folders
        ]
        self._look_up(rows, missing=not rows)

    def _refuse(self, status: str) -> None:
        if self._is_stored():
            return self._answer(status, b"<Error><Code>planted</Code></Error>")
        code, message = _HUB_ERRORS.get(status, ("", HTTPStatus(int(status)).phrase))
        if status == "401" and self.headers.get("Authorization") is None:
            message = "Invalid username or password."
        headers = {"X-Request-Id": "Root=1-planted", "Content-Type": "application/json"}
        headers |= {"X-Error-Code": code} if code else {}
        headers |= {"X-Error-Message": message} | self.server.error_headers
        return self._answer(status, json.dumps({"error": message}).encode(), headers=headers)

    def _refuse_repository(self) -> None:
        """A repository that is not there, or may not be seen, which looks the same.

        The Hub says no code with 401, where huggingface_hub takes any of them to be this one, but under
        https:// alone.
        """
        is_known = self.headers.get("Authorization") is not None
        message = "Repository not found" if is_known else "Invalid username or password."
        headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": message}
        self._answer("404" if is_known else "401", json.dumps({"error": message}).encode(), headers=headers)


@contextlib.contextmanager
def running_google_storage() -> Iterator[CloudServer]:
    """Google Cloud Storage; at the end it is gone."""
    with running(CloudServer(_GoogleHandler)) as server:
        yield server


@contextlib.contextmanager
def running_hub() -> Iterator[CloudServer]:
    """The Hub with one repository, `datasets/user/set`; at the end it is gone."""
    with running(CloudServer(_HubHandler)) as server:
        yield server


@functools.cache
def _private_key() -> str:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    coding = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return key.private_bytes(*coding).decode()


def google_key(folder: Path, server: CloudServer) -> Path:
    """The file of a service account's key, as GOOGLE_APPLICATION_CREDENTIALS has it."""
    path = folder / "key.json"
    facts = {
        "type": "service_account",
        "project_id": "planted",
        "private_key_id": "planted-key-id",
        "private_key": _private_key(),
        "client_email": "reader@planted.iam.gserviceaccount.com",
        "token_uri": f"{server.url}/token",
    }
    path.write_text(json.dumps(facts))
    return path
