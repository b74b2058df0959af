"""Reads from stores that may be out of reach for a while: every one is tried again until a deadline."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")
RETRY_S = 300.0
"""how long a store may be out of reach before it is an error"""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_FINAL = (FileNotFoundError, PermissionError, UserError)


def retry(read: Callable[[], T], what: str, *, timeout_s: float = RETRY_S, level: int = logging.WARNING) -> T:
    """Call `read` until it succeeds. Stores fail in many ways; absence, refusal and a full local disk are final."""
    began, pause = time.monotonic(), 0.5
    while True:
        try:
            return read()
        except _FINAL:
            raise
        except Exception as error:  # botocore, aiohttp, gcsfs and the like share no base class
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                raise
            waited = time.monotonic() - began
            reason = f"{type(error).__name__}: {error}"
            if waited + pause > timeout_s:
                raise UserError(
                    f"{what} could not be read for {waited:.0f} s ({reason:.200}): check the store"
                ) from error
            logger.log(level, "%s cannot be read (%.200s), waiting; next try in %.1f s", what, reason, pause)
            time.sleep(pause)
            pause = min(2 * pause, 5.0)


def read_range(url: str, offset: int, size: int) -> bytes:
    """Bytes [offset, offset + size) of a file behind a URI, retried."""
    fs, path = storage.filesystem(url)
    content: Any = retry(lambda: fs.cat_file(path, start=offset, end=offset + size), url)
    return content


def read_file(url: str) -> bytes:
    """A whole file; retried where it is remote."""
    return storage.read_bytes(url) if storage.is_local(url) else retry(lambda: storage.read_bytes(url), url)


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
