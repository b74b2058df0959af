"""Files of a run, in a directory or behind any fsspec URI: whole or not at all, with digests; and the one retry.

A path is a string: a local path or a URI. A manifest lists what a directory holds and is written last; what has no
manifest does not exist.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import posixpath
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import fsspec
import tenacity
from fsspec.implementations.local import LocalFileSystem
from refinedet.pipeline.runs.errors import JobError, UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")
RETRY_DEADLINE_S = 300.0
"""how long a store may be out of reach before it is an error"""
_LONGEST_PAUSE_S = 5.0
_FINAL = (UserError, FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_waiting: dict[int, str] = {}
"""by thread: the call that `retry` repeats, and the error of its last attempt"""

_patient: ContextVar[bool] = ContextVar("patient", default=False)

_CHUNK = 4 * 2**20


@dataclass(frozen=True)
class FileDigest:
    """Size in bytes and SHA-256 of one file; `name` is relative to its manifest."""

    name: str
    size: int
    sha256: str


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system that serves `path`, and the path within that file system.

    Raises UserError where fsspec has none.
    """
    try:
        return fsspec.core.url_to_fs(path, use_listings_cache=False)  # other processes write there too
    except (ImportError, ValueError) as error:  # a package that is not installed, or an unknown protocol
        raise UserError(f"{path!r} cannot be opened ({error}); give a path, or a URI such as s3://...") from None


def is_local(path: str) -> bool:
    return isinstance(filesystem(path)[0], LocalFileSystem)


def absolute(path: str) -> str:
    """URIs as they are, local paths absolute: workers run in directories of their own."""
    path = path.removeprefix("file://")
    return os.path.abspath(os.path.expanduser(path)) if "://" not in path else path


def join(path: str, *parts: str) -> str:
    return posixpath.join(path, *parts)


@contextmanager
def patience() -> Iterator[None]:
    """Read, write and list files of remote stores with `retry`, in this thread."""
    before = _patient.set(True)
    try:
        yield
    finally:
        _patient.reset(before)


def _reach(call: Callable[[], T], path: str) -> T:
    return retry(call, path) if _patient.get() and not is_local(path) else call()


def exists(path: str) -> bool:
    fs, name = filesystem(path)
    return _reach(lambda: fs.exists(name), path)


def make_folder(path: str) -> None:
    fs, name = filesystem(path)
    fs.makedirs(name, exist_ok=True)


def is_folder(path: str) -> bool:
    fs, name = filesystem(path)
    return fs.isdir(name)


def list_folder(path: str) -> list[str]:
    """Names in a directory, sorted; empty where it does not exist."""
    fs, name = filesystem(path)
    entries = _reach(lambda: fs.ls(name, detail=False) if fs.isdir(name) else [], path)
    return sorted(posixpath.basename(entry.rstrip("/")) for entry in entries)


def remove(path: str) -> None:
    """Remove a file or directory; nothing happens where there is none."""
    fs, name = filesystem(path)
    if fs.exists(name):
        fs.rm(name, recursive=True)


def retry(call: Callable[[], T], what: str, *, deadline_s: float = RETRY_DEADLINE_S, level: int = logging.WARNING) -> T:
    """Call until it succeeds, with pauses of 0.5 s that double up to 5 s, for `deadline_s` seconds at most.

    The one policy for storage. What a repetition cannot change is raised at once: absence, refusal, a full disk, a
    user's mistake. Everything else is repeated, since the libraries of stores share no base class of errors. Raises
    JobError at the deadline.

    what   names the call in the log and in the error: a file, or "the checkpoint of step 8"
    level  of the log's lines
    """

    def log(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        _waiting[threading.get_ident()] = f"{what}: {error!s:.200}"
        logger.log(
            level, "%s: %.200s; again in %.1f s", what, error, state.next_action.sleep if state.next_action else 0
        )

    def end(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        raise JobError(
            f"{what}: no answer from storage for {state.seconds_since_start or 0:.0f} s ({type(error).__name__}: "
            f"{error!s:.200}); check the storage, then run the same command again"
        ) from error

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_may_pass),
        wait=tenacity.wait_exponential(multiplier=0.5, max=_LONGEST_PAUSE_S),
        stop=tenacity.stop_before_delay(deadline_s),
        before_sleep=log,
        retry_error_callback=end,
    )
    before = _patient.set(False)  # one retry at a time
    try:
        return retrying(call)
    finally:
        _patient.reset(before)
        _waiting.pop(threading.get_ident(), None)


def describe_waiting() -> str:
    """The call that some thread of this process repeats because storage does not answer, with its error; else ""."""
    return next(iter(list(_waiting.values())), "")


def _may_pass(error: BaseException) -> bool:
    full = isinstance(error, OSError) and error.errno in NO_ROOM
    return isinstance(error, Exception) and not isinstance(error, _FINAL) and not full


def read_bytes(path: str, start: int | None = None, stop: int | None = None) -> bytes:
    """A file, or its bytes [start, stop)."""
    fs, name = filesystem(path)
    content: Any = _reach(lambda: fs.cat_file(name, start, stop), path)  # fsspec types it as text or bytes
    return bytes(content)


def write_bytes(path: str, content: bytes) -> None:
    """Write a file that others see whole or not at all, and that a crash of the machine does not undo."""
    fs, name = filesystem(path)
    if isinstance(fs, LocalFileSystem):
        _write_local(name, [content])
        return

    def write() -> None:
        with fs.open(name, "wb") as file:  # an object store shows an object only once its upload is complete
            file.write(content)  # type: ignore[arg-type]

    _reach(write, path)


def write_parts(path: str, parts: Iterable[bytes]) -> None:
    """Like `write_bytes`, for content that is made part by part; for a store, on the local disk first."""
    fs, name = filesystem(path)
    if isinstance(fs, LocalFileSystem):
        _write_local(name, parts)
        return
    with tempfile.NamedTemporaryFile() as file:
        file.writelines(parts)
        file.flush()
        _reach(lambda: fs.put_file(file.name, name), path)


def _write_local(name: str, parts: Iterable[bytes]) -> None:
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    partial = f"{name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        with open(partial, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, name)
    except BaseException:
        if os.path.exists(partial):
            os.unlink(partial)
        raise


def create(path: str, content: bytes) -> bool:
    """Write a file only where none exists, atomically; whether it was written. Of several processes, one succeeds."""
    fs, name = filesystem(path)
    try:
        if isinstance(fs, LocalFileSystem):
            os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
            with open(name, "xb") as file:
                file.write(content)
        else:
            fs.pipe_file(name, content, mode="create")
    except FileExistsError:
        return False
    return True


def read_json(path: str) -> Any:
    return json.loads(read_bytes(path))


def write_json(path: str, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def digest_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def digest_json(value: Any) -> str:
    """Digest of a JSON value, whatever the order of its keys."""
    return digest_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def digest_file(path: str, name: str | None = None) -> FileDigest:
    fs, inner = filesystem(path)

    def digest() -> FileDigest:
        sha = hashlib.sha256()
        size = 0
        with fs.open(inner, "rb") as file:
            while chunk := file.read(_CHUNK):
                sha.update(chunk)  # type: ignore[arg-type]
                size += len(chunk)
        return FileDigest(name or posixpath.basename(inner), size, sha.hexdigest())

    return _reach(digest, path)


def write_manifest(path: str, files: Iterable[FileDigest], **facts: Any) -> None:
    """Declare that `files` are complete. Always the last write."""
    write_json(path, {**facts, "files": [asdict(file) for file in files]})


def verify_manifest(path: str, manifest: Mapping[str, Any]) -> list[str]:
    """Faults of the files that a manifest in directory `path` names; an empty list means that all are as written."""
    faults = []
    for entry in manifest["files"]:
        file = join(path, entry["name"])
        if not exists(file):
            faults.append(f"{entry['name']} is missing")
            continue
        seen = digest_file(file, entry["name"])
        if seen.size != entry["size"]:
            faults.append(f"{entry['name']} has {seen.size} bytes, the manifest has {entry['size']}")
        elif seen.sha256 != entry["sha256"]:
            faults.append(f"{entry['name']} does not match its digest")
    return faults
