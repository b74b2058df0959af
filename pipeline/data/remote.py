"""Reads and writes of stores that may be out of reach for a while, by the one retry of `runs.storage`.

Local files are read and written once: what a disk refuses it refuses again.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from refinedet.pipeline.runs import storage

T = TypeVar("T")


def read_range(url: str, offset: int, size: int) -> bytes:
    """Bytes [offset, offset + size) of a file behind a URI, retried."""
    fs, path = storage.filesystem(url)
    content: Any = storage.retry(lambda: fs.cat_file(path, start=offset, end=offset + size), url)
    return content


def read_file(url: str) -> bytes:
    """A whole file."""
    return reach(lambda: storage.read_bytes(url), url)


def read_json(url: str) -> Any:
    return json.loads(read_file(url))


def exists(url: str) -> bool:
    return reach(lambda: storage.exists(url), url)


def write_file(url: str, content: bytes) -> None:
    """Write a file that others see whole or not at all."""
    reach(lambda: storage.write_bytes(url, content), url)


def write_json(url: str, value: Any) -> None:
    reach(lambda: storage.write_json(url, value), url)


def reach(call: Callable[[], T], url: str) -> T:
    """The result of a call that reads or writes `url`, repeated until the store answers."""
    return call() if storage.is_local(url) else storage.retry(call, url)


def read_file_cached(url: str, copy: str, sha256: str) -> bytes:
    """A whole remote file of a known digest, through `copy` on the node's disk, which other processes may use too.

    A disk that cannot be written does not matter: the file is read from the store then.
    """
    with contextlib.suppress(OSError):
        content = storage.read_bytes(copy)
        if storage.digest_bytes(content) == sha256:
            return content
    content = read_file(url)
    partial = f"{copy}.{uuid.uuid4().hex[:8]}.partial"
    try:
        os.makedirs(os.path.dirname(copy), exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
        os.replace(partial, copy)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(partial)
    return content
