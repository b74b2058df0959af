"""A lock on a directory of shards: one writer at a time, also from several machines."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from refinedet.pipeline.data.remote import reach, read_file
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import JobError

logger = logging.getLogger(__name__)

LOCK = "writer.lock"
EXPIRY_S = 60.0
"""a lock that was not renewed for this long is another's to take: its owner is gone"""
_POLL_S = 0.5


class WriterLock:
    """A lock that is held and renewed in the background."""

    def __init__(self, path: str, owner: str) -> None:
        self.path = path
        self.owner = owner
        self._ended = threading.Event()
        self._renewal = threading.Thread(target=self._renew, name=f"renewal of {path}", daemon=True)
        self._renewal.start()

    def check(self) -> None:
        """Raise JobError where the lock has been taken by another writer."""
        if (_read(self.path) or {}).get("owner") != self.owner:
            raise JobError(f"{self.path} was lost to another writer; run the same command again to resume")

    def release(self) -> None:
        self._ended.set()
        self._renewal.join()
        if (_read(self.path) or {}).get("owner") == self.owner:
            reach(lambda: storage.remove(self.path), self.path)

    def _renew(self) -> None:
        while not self._ended.wait(EXPIRY_S / 4):
            with suppress(Exception):  # a store out of reach; the lock expires where it stays so
                if (_read(self.path) or {}).get("owner") == self.owner:
                    storage.write_bytes(self.path, _state(self.owner))


@contextmanager
def writer_lock(directory: str) -> Iterator[WriterLock]:
    """Wait until no other writer holds `directory`, and hold it. Waiting is logged, with the owner's name."""
    path = storage.join(directory, LOCK)
    owner = f"{socket.gethostname()}/{os.getpid()}/{uuid.uuid4().hex[:8]}"
    storage.make_folder(directory)
    told = None
    while not reach(lambda: _create(path, _state(owner)), path):
        held = _read(path)
        if held is None:
            continue  # released meanwhile
        if held.get("owner") == owner:
            break  # the store created it, and its answer was lost
        if _is_over(held):
            logger.warning("%s of %s has expired and is taken over", path, held.get("owner"))
            reach(lambda: storage.remove(path), path)
            continue
        if told != held["owner"]:
            told = held["owner"]
            logger.warning("%s is being written by %s; waiting", directory, told)
        time.sleep(_POLL_S)
    lock = WriterLock(path, owner)
    try:
        lock.check()
        yield lock
    finally:
        lock.release()


def _state(owner: str) -> bytes:
    return json.dumps({"owner": owner, "expires": time.time() + EXPIRY_S}).encode()


def _read(path: str) -> dict[str, Any] | None:
    try:
        return json.loads(read_file(path))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}  # nothing of ours: over


def _is_over(held: dict[str, Any]) -> bool:
    """Return whether a lock has expired, or its owner was a process of this machine that is gone."""
    host, _, rest = str(held.get("owner")).partition("/")
    process = rest.partition("/")[0]
    if host == socket.gethostname() and process.isdigit():
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
    return time.time() > float(held.get("expires", 0))


def _create(path: str, content: bytes) -> bool:
    """Create a file that does not exist; False where it does. Atomic on local disks, S3 and stores that offer it."""
    fs, name = storage.filesystem(path)
    if storage.is_local(path):
        partial = f"{name}.{uuid.uuid4().hex[:8]}.partial"
        with open(partial, "wb") as file:
            file.write(content)
        try:
            os.link(partial, name)  # a lock is never seen half written
        except (FileExistsError, FileNotFoundError):  # not found: the writer that holds the lock removed partial files
            return False
        finally:
            with suppress(FileNotFoundError):
                os.unlink(partial)
        return True
    fs.invalidate_cache()
    if fs.exists(name):
        return False
    try:
        fs.pipe_file(name, content, mode="create")
    except FileExistsError:
        return False
    except (TypeError, NotImplementedError, ValueError):
        logger.warning("the store of %s has no conditional writes: two writers that start at once may both write", path)
        fs.pipe_file(name, content)
    return True
