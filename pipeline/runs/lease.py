"""The lease on a run: one process works on it at a time, on any machine and cluster, in a directory or behind a URI.

`<run>/lease/<number>.json` names an owner; the highest number holds the run. A file is only ever created where it is
absent, which local disks and object stores both decide for one of several processes. Its owner alone rewrites it, as
a sign of life. So a lease of a dead owner is taken over by creating the next number, and an owner that was merely
paused finds that number and stops.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.durations import describe_duration
from refinedet.pipeline.runs.errors import UserError

logger = logging.getLogger(__name__)

TTL_S = 60.0
"""an owner on another machine that gives no sign of life for this long is dead"""
_BEATS_PER_TTL = 6
_SURELY_DEAD_S = 600.0  # since the last sign of life, by clocks that may differ
_POLL_S = 0.5


@dataclass(frozen=True)
class Owner:
    """Content of a lease file.

    machine  boot and process namespace in which `pid` is a process; empty where they are unknown
    started  start of the process, since a later one may have the same number
    beat     sign of life: grows while the owner lives; -1 once it has released the run
    renewed  seconds since the epoch, of the owner's clock
    """

    token: str
    host: str
    machine: str
    pid: int
    started: str
    beat: int
    renewed: float


class Lease:
    """A run held by this process, as a context manager.

    directory  the run's, or a URI
    on_lost    called once, from a thread, with a sentence, if another process has taken the run over
    ttl_s      how long an owner on another machine may be silent
    Entering raises UserError where another process holds the run; a dead owner is waited for, `ttl_s` at most.
    """

    def __init__(self, directory: str, on_lost: Callable[[str], None] | None = None, *, ttl_s: float = TTL_S) -> None:
        self.lost: str | None = None
        """why the run is no longer this process's"""
        self._run = directory
        self._directory = storage.join(directory, "lease")
        self._on_lost = on_lost
        self._ttl_s = ttl_s
        self._number = 0
        self._owner = Owner(
            uuid.uuid4().hex, platform.node(), _machine(), os.getpid(), _process_start(os.getpid()) or "", 0, 0.0
        )
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_ended, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        self._acquire()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self.lost is None:
            try:
                self._write(beat=-1)
            except Exception as error:  # file systems raise what they like; the next owner waits for the silence
                logger.warning("the lease on %s could not be released: %s", self._run, error)

    # --- acquiring

    def _acquire(self) -> None:
        seen: Owner | None = None
        since = time.monotonic()
        while True:
            number, holder = self._read_highest()
            free = number == 0 or _is_free(holder)
            beats = seen is not None and seen != holder  # the file changed since the last look: its owner lives
            if not free and holder is not None and (beats or _is_alive_here(holder)):
                raise UserError(_refusal(self._run, holder))
            silent = time.monotonic() - since > self._ttl_s
            if free or silent:
                if self._create(number + 1):
                    return
                since = time.monotonic()
            seen = holder
            time.sleep(min(_POLL_S, self._ttl_s / _BEATS_PER_TTL / 2))

    def _create(self, number: int) -> bool:
        """Try to take `number`, and with it the run; return whether this process has it."""
        content = json.dumps(asdict(self._owner) | {"renewed": time.time()}).encode()
        if not storage.create(self._file(number), content):
            return False
        # The store may have ignored the condition, or a third process may have created the number after this one.
        highest, holder = self._read_highest()
        if highest != number or holder is None or holder.token != self._owner.token:
            return False
        self._number = number
        for name in storage.list_folder(self._directory):
            if name < self._name(number):
                storage.remove(storage.join(self._directory, name))
        return True

    # --- holding

    def _renew_until_ended(self) -> None:
        beat = 0
        while not self._ended.wait(self._ttl_s / _BEATS_PER_TTL):
            try:
                number, holder = self._read_highest()
                if number != self._number or holder is None or holder.token != self._owner.token:
                    self._lose(holder)
                    return
                beat += 1
                self._write(beat)
            except Exception as error:  # the store is away: the run stays ours unless another process took it
                logger.warning("the lease on %s could not be renewed: %s", self._run, error)

    def _lose(self, holder: Owner | None) -> None:
        by = f"process {holder.pid} on {holder.host}" if holder else "another process, or its directory was removed"
        self.lost = f"The run {self._run} was taken over by {by}; this process no longer writes to it."
        logger.error(self.lost)
        if self._on_lost:
            self._on_lost(self.lost)

    def _write(self, beat: int) -> None:
        content = asdict(self._owner) | {"beat": beat, "renewed": time.time()}
        storage.write_bytes(self._file(self._number), json.dumps(content).encode())

    # --- files

    def _read_highest(self) -> tuple[int, Owner | None]:
        """The highest number, 0 for none, and its owner; None while the file is being created, or is garbled.

        A sign of life replaces the file whole, so that an owner never reads its own half written.
        """
        numbers = [int(name[:-5]) for name in storage.list_folder(self._directory) if name[:-5].isdigit()]
        if not numbers:
            return 0, None
        number = max(numbers)
        try:
            return number, Owner(**json.loads(storage.read_bytes(self._file(number))))
        except (FileNotFoundError, ValueError, TypeError):
            return number, None

    def _file(self, number: int) -> str:
        return storage.join(self._directory, self._name(number))

    @staticmethod
    def _name(number: int) -> str:
        return f"{number:08d}.json"


def _is_free(holder: Owner | None) -> bool:
    """Released, or of an owner that is certainly dead."""
    if holder is None:
        return False
    died_here = _is_here(holder) and _process_start(holder.pid) != holder.started
    return holder.beat < 0 or died_here or time.time() - holder.renewed > _SURELY_DEAD_S


def _is_alive_here(holder: Owner) -> bool:
    return _is_here(holder) and _process_start(holder.pid) == holder.started


def _is_here(holder: Owner) -> bool:
    return bool(holder.machine) and holder.machine == _machine()


def _refusal(run: str, holder: Owner) -> str:
    silence = describe_duration(max(0.0, time.time() - holder.renewed))
    return (
        f"The run {run} is in use by process {holder.pid} on {holder.host} (last sign of life {silence} ago); "
        "wait for it, stop it, or choose another name (name=OTHER)."
    )


def _machine() -> str:
    """The boot of this machine and the namespace of its process numbers; empty where the system has none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_start(pid: int) -> str | None:
    """Clock ticks from boot to the start of a process; None where there is no such process, or only its remains."""
    try:
        fields: Any = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
