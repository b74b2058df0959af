"""Remote shards: retried reads, and a bounded cache on the node's disk that its processes share.

A sample is read from its shard's copy on disk where there is one, else from the store, its own bytes only: nothing
ever waits for a whole shard, not the first batch either. Shards that the schedule comes to next are copied ahead in
the background; the least recently used make room.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import IO, TypeVar

from refinedet.pipeline.data.index import ShardSet
from refinedet.pipeline.data.remote import read_range
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")
_DOWNLOADS = 4  # at a time, by one process
_full: set[str] = set()  # directories whose disk was full, as this process has logged


@dataclass(frozen=True)
class ShardCache:
    """Copies of remote shards in `folder`, together at most `num_bytes`; safe for the processes of a node."""

    shards: ShardSet
    folder: str
    num_bytes: int

    def path(self, shard: int) -> str:
        return os.path.join(self.folder, self.shards.digest[:16], self.shards.names[shard])

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """A range of a shard, from its copy or from the store."""
        try:
            handle = os.open(self.path(shard), os.O_RDONLY)
            try:
                os.utime(handle)  # the least recently used goes first
                return os.pread(handle, size, offset)
            finally:
                os.close(handle)
        except FileNotFoundError:
            pass
        except OSError as error:  # the node's disk, not the store
            self.discard(shard, str(error))
        return read_range(self.shards.shard_url(shard), offset, size)

    def discard(self, shard: int, reason: str) -> None:
        """Remove a copy that is no good; it is read from the store until it is copied again."""
        logger.warning("the copy %s is removed: %s", self.path(shard), reason)
        _discard(self.path(shard))

    def copy(self, shard: int) -> bool:
        """Copy a shard to the disk; False where another process is at it, or where there is no room for it."""
        if self.folder in _full:
            return False
        try:
            return self._copy(shard)
        except OSError as error:
            if error.errno not in storage.NO_ROOM:
                raise
            self._tell_full(error)
            return False

    def _copy(self, shard: int) -> bool:
        path, size = self.path(shard), self.shards.num_bytes[shard]
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.lock", "ab") as lock:  # never removed, so that its holder is the only one
            if not _try_lock(lock):
                return False
            if os.path.exists(path):
                if (found := os.path.getsize(path)) == size:
                    return True
                self.discard(shard, f"it has {found} of {size} bytes")
            if not self._reserve(lock, size):
                return False
            partial = f"{path}.partial"
            try:
                fs, remote = storage.filesystem(self.shards.shard_url(shard))
                storage.retry(lambda: fs.get_file(remote, partial), self.shards.shard_url(shard), level=logging.DEBUG)
                os.replace(partial, path)
            finally:
                _discard(partial)
                lock.truncate(0)
        return True

    def _tell_full(self, error: OSError) -> None:
        """Log a full disk, once a process, and stop copying to it; samples are read from the store."""
        if self.folder not in _full:
            _full.add(self.folder)
            logger.warning(
                "the disk of the cache %s is full (%s): no more shards are copied to it, samples are read from the "
                "store; make room, or lower data.cache_bytes", self.folder, error.strerror
            )  # fmt: skip

    def _reserve(self, lock: IO[bytes], size: int) -> bool:
        """Make room for a copy, evicting those that were not used for longest; a lock's length is what it reserves."""
        with open(os.path.join(self.folder, "lock"), "ab") as all_locks:
            fcntl.flock(all_locks, fcntl.LOCK_EX)
            used, copies = 0, []
            for folder, _, names in os.walk(self.folder):
                for path in (os.path.join(folder, name) for name in names):
                    with contextlib.suppress(FileNotFoundError):
                        stat = os.stat(path)
                        if path.endswith(".partial") or (
                            path.endswith(".lock") and stat.st_size and _free_if_left(path)
                        ):
                            continue
                        if path.endswith(".tar"):
                            copies.append((stat.st_mtime, stat.st_size, path))
                        used += stat.st_size
            for _, num_bytes, path in sorted(copies):
                if used + size <= self.num_bytes:
                    break
                _discard(path)
                used -= num_bytes
            if used + size > self.num_bytes:
                return False
            lock.truncate(size)
            return True


def _try_lock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _free_if_left(path: str) -> bool:
    """Free what a process reserved that died while copying."""
    with open(path, "ab") as lock:
        if not _try_lock(lock):
            return False
        _discard(path.removesuffix(".lock") + ".partial")
        lock.truncate(0)
        return True


def _discard(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def node_cache(shards: ShardSet, folder: str | None, num_bytes: int) -> ShardCache | None:
    """The node's cache for remote shards; local ones are read in place and need none."""
    if not shards.remote:
        return None
    largest = max(shards.num_bytes)
    if num_bytes < largest:
        raise UserError(f"data.cache_bytes is {num_bytes}, less than one shard of {largest} bytes: raise it")
    folder = folder or os.path.join(tempfile.gettempdir(), f"refinedet-shards-{os.getuid()}")
    os.makedirs(folder, exist_ok=True)
    shards.copies = os.path.abspath(folder)
    return ShardCache(shards, shards.copies, num_bytes)


def prefetch(turns: Iterable[T], shard_of: Callable[[T], int], cache: ShardCache, ahead: int) -> Iterator[T]:
    """Pass `turns` on, and have the shards of the next `ahead` of them copied, as far as the cache can hold them."""
    waiting: deque[tuple[T, int]] = deque()
    uses: Counter[int] = Counter()  # of the shards that `waiting` needs
    held = 0  # their bytes
    wanted: SimpleQueue[int | None] = SimpleQueue()
    for _ in range(_DOWNLOADS):  # daemons: a process that ends does not wait for a store that is out of reach
        threading.Thread(target=_copy_wanted, args=(cache, wanted), daemon=True).start()
    try:
        source = iter(turns)
        more = True
        while more or waiting:
            while more and len(waiting) <= ahead:
                turn = next(source, None)
                if turn is None:
                    more = False
                    break
                shard = shard_of(turn)
                if not uses[shard]:
                    held += cache.shards.num_bytes[shard]
                    if held <= cache.num_bytes:
                        wanted.put(shard)
                uses[shard] += 1
                waiting.append((turn, shard))
            if waiting:
                turn, shard = waiting.popleft()
                uses[shard] -= 1
                if not uses[shard]:
                    del uses[shard]
                    held -= cache.shards.num_bytes[shard]
                yield turn
    finally:
        for _ in range(_DOWNLOADS):
            wanted.put(None)


def _copy_wanted(cache: ShardCache, wanted: SimpleQueue[int | None]) -> None:
    """Copy shards as they are wanted; where one cannot be copied, its samples are read from the store."""
    while (shard := wanted.get()) is not None:
        try:
            cache.copy(shard)
        except Exception as error:
            logger.warning("shard %s was not copied ahead: %s", cache.shards.names[shard], error)
