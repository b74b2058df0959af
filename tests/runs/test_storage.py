"""The one retry: what passes is repeated until its deadline, what is final is not."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import JobError, UserError


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("x"),
        PermissionError("x"),
        FileExistsError("x"),
        UserError("x"),
        OSError(errno.ENOSPC, "full"),
        OSError(errno.EDQUOT, "full"),
    ],
    ids=repr,
)
def test_what_a_repetition_cannot_change_is_raised_at_once(error: Exception) -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        storage.retry(fail, "a read")
    assert len(calls) == 1


def test_what_passes_is_repeated(caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def fail_once() -> str:
        calls.append(1)
        if len(calls) < 2:
            raise ConnectionResetError("gone")
        return "read"

    assert storage.retry(fail_once, "s3://bucket/key") == "read"
    assert "s3://bucket/key: gone; again in 0.5 s" in caplog.text


def test_the_deadline_ends_it_with_one_sentence() -> None:
    def fail() -> None:
        raise TimeoutError("away")

    began = time.monotonic()
    with pytest.raises(JobError, match=r"a read: no answer from storage for \d s \(TimeoutError: away\); check"):
        storage.retry(fail, "a read", deadline_s=0.8)
    assert time.monotonic() - began < 60


class Flaky(MemoryFileSystem):
    """A store whose every second call fails."""

    protocol = "flaky"
    calls = 0

    def _answer(self) -> None:
        Flaky.calls += 1
        if Flaky.calls % 2:
            raise ConnectionResetError("gone")

    def exists(self, path: str, **options: Any) -> bool:
        self._answer()
        return super().exists(path, **options)

    def isdir(self, path: str) -> bool:
        self._answer()
        return super().isdir(path)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        self._answer()
        return super().cat_file(path, start, end, **options)

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        self._answer()
        return super().open(path, mode, **options)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> str:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(Flaky, "calls", 0)
    return "flaky://bucket"


CALLS: list[Callable[[str], Any]] = [
    lambda path: storage.exists(path),
    lambda path: storage.list_folder(path.rpartition("/")[0]),
    lambda path: storage.read_bytes(path),
    lambda path: storage.write_bytes(path, b"again"),
    lambda path: storage.write_parts(path, [b"ag", b"ain"]),
    lambda path: storage.digest_file(path),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__code__.co_names[1])
def test_patience_repeats_the_calls_of_a_remote_store(flaky: str, call: Callable[[str], Any]) -> None:
    path = f"{flaky}/file"
    with pytest.raises(ConnectionResetError):
        call(path)
    Flaky.calls = 1
    storage.write_bytes(path, b"content")
    Flaky.calls = 0
    with storage.patience():
        call(path)
    assert Flaky.calls >= 2


def test_patience_ends_with_its_block_and_belongs_to_its_thread(flaky: str) -> None:
    seen: list[BaseException] = []

    def elsewhere() -> None:
        try:
            storage.exists(f"{flaky}/file")
        except ConnectionResetError as error:
            seen.append(error)

    with storage.patience():
        other = threading.Thread(target=elsewhere)
        other.start()
        other.join()
    assert len(seen) == 1
    Flaky.calls = 0
    with pytest.raises(ConnectionResetError):
        storage.exists(f"{flaky}/file")


def test_a_retry_within_patience_is_one_retry(flaky: str) -> None:
    attempts = []

    def fail() -> None:
        attempts.append(1)
        Flaky.calls = 0
        storage.exists(f"{flaky}/file")

    with storage.patience(), pytest.raises(JobError, match="a read: no answer"):
        storage.retry(fail, "a read", deadline_s=0.0)
    assert len(attempts) == 1
