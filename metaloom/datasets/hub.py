"""Files of the Hugging Face Hub, asked for once: as its driver's `HfFileSystem` names and finds them, without
its retries.

The driver's own reading makes up to six requests of each, with pauses of its own between them, which nothing
can turn off, and lists the folder of a file to know its size. So a request that metaloom counts, times and
makes again would be up to six. What is called here are huggingface_hub's public functions for one request.
"""

from __future__ import annotations

from typing import Any


def read_hub_range(filesystem: Any, path: str, start: int, stop: int, timeout_s: float) -> bytes:
    """What the Hub answers when it is asked for bytes `start` to `stop`, in one request; blocks.

    The first call of a filesystem asks whether the repository is there, too.

    Args:
        filesystem: an `HfFileSystem`.
        timeout_s: how long each step of the request may take.
    """
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        get_session,
        hf_raise_for_status,
    )

    headers = build_hf_headers(token=filesystem.token)
    # identity: a range of a compressed answer is not a range of the file.
    headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    response = get_session().get(_address(filesystem, path), headers=headers, timeout=timeout_s)
    hf_raise_for_status(response)
    return bytes(response.content)


def read_hub_size(filesystem: Any, path: str) -> int:
    """The size of a file in bytes as it is now, in one request; blocks.

    Raises:
        FileNotFoundError: there is no such file, or it is a folder.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    if _is_in_bucket(path):
        info = filesystem.info(path, refresh=True)
        found = info["size"] if info["type"] == "file" else None
    else:
        place = _resolved(filesystem, path)
        api = HfApi(endpoint=filesystem.endpoint, token=filesystem.token)
        infos = api.get_paths_info(
            place.repo_id, [place.path_in_repo], revision=place.revision, repo_type=place.repo_type
        )
        found = next((info.size for info in infos if isinstance(info, RepoFile)), None)
    if found is None:
        raise FileNotFoundError(f"{path} is no file of the repository")
    return int(found)


def _address(filesystem: Any, path: str) -> str:
    """Where the content of a file is, whether or not there is one; the driver would list its folder."""
    from huggingface_hub import hf_hub_url

    if _is_in_bucket(path):
        return str(filesystem.url(path))
    place = _resolved(filesystem, path)
    return str(
        hf_hub_url(
            place.repo_id,
            place.path_in_repo,
            repo_type=place.repo_type,
            revision=place.revision,
            endpoint=filesystem.endpoint,
        )
    )


def _resolved(filesystem: Any, path: str) -> Any:
    """The repository, revision and file that a path names; asks once whether the first two may be seen."""
    try:
        return filesystem.resolve_path(path)
    except FileNotFoundError:
        filesystem.invalidate_cache()  # a refusal would be remembered, whatever is changed about it
        raise


def _is_in_bucket(path: str) -> bool:
    """Whether a path is in one of the Hub's buckets, which are no repositories."""
    return path.startswith("buckets/")
