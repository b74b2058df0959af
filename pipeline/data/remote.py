"""Reads from stores that may be out of reach for a while, by the one retry of `runs.storage`."""

from __future__ import annotations

import contextlib
import os
import uuid
from typing import Any

from refinedet.pipeline.runs import storage


def read_range(url: str, offset: int, size: int) -> bytes:
    """Bytes [offset, offset + size) of a file behind a URI, retried."""
    fs, path = storage.filesystem(url)
    content: Any = storage.retry(lambda: fs.cat_file(path, start=offset, end=offset + size), url)
    return content


def read_file(url: str) -> bytes:
    """A whole file; retried where it is remote."""
    return storage.read_bytes(url) if storage.is_local(url) else storage.retry(lambda: storage.read_bytes(url), url)


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
