"""A real S3-compatible server on 127.0.0.1, as a process: moto's. The fixtures are `s3_server` and `s3`."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ACCESS_KEY = "AKIAPLANTEDPLANTED00"
SECRET_KEY = "planted-secret-key-which-no-message-may-show"


@dataclass(frozen=True)
class ObjectStore:
    """An S3 server that runs; buckets and objects are made past the code under test, with boto3."""

    endpoint: str
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def environment(self) -> dict[str, str]:
        """What finds the server, and its credentials, for this process or a child."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def new_bucket(self) -> str:
        """The URL of a new, empty bucket."""
        name = f"bucket-{next(self._numbers)}"
        with self._client() as client:
            client.create_bucket(Bucket=name)
        return f"s3://{name}"

    def put(self, url: str, content: bytes) -> None:
        """Makes or replaces the object at `s3://bucket/key`."""
        bucket, key = url.removeprefix("s3://").split("/", 1)
        with self._client() as client:
            client.put_object(Bucket=bucket, Key=key, Body=content)

    def delete(self, url: str) -> None:
        """Deletes the object at `s3://bucket/key`."""
        bucket, key = url.removeprefix("s3://").split("/", 1)
        with self._client() as client:
            client.delete_object(Bucket=bucket, Key=key)

    def upload(self, folder: Path, url: str) -> None:
        """Copies all files of a local folder to `s3://bucket/prefix`."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{url.rstrip('/')}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    @contextlib.contextmanager
    def _client(self) -> Iterator[Any]:
        import boto3
        from botocore.config import Config

        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
            # rclone would give the checksum of an object with each part of it.
            config=Config(request_checksum_calculation="when_required"),
        )
        try:
            yield client
        finally:
            client.close()


@contextlib.contextmanager
def running_object_store(log: Path, *, rclone: str | None = None) -> Iterator[ObjectStore]:
    """A server that answers; it is gone at the end. What it says is in the file `log`.

    Args:
        rclone: that program, whose server takes the place of moto's: it reads of an object what it is asked
            for, where moto reads all of it. Objects lie in a folder beside `log`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    if rclone is not None:
        objects = log.with_suffix(".objects")
        objects.mkdir()
        pair = f"{ACCESS_KEY},{SECRET_KEY}"
        command = [rclone, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", pair, str(objects)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    try:
        _wait_for(f"http://127.0.0.1:{port}/moto-api/", process, log)
        yield ObjectStore(f"http://127.0.0.1:{port}")
    finally:
        process.kill()
        process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            try:
                urllib.request.urlopen(url).close()
            except urllib.error.HTTPError as answer:
                answer.close()
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the S3 server does not answer: {log.read_text()}")
        time.sleep(0.05)
