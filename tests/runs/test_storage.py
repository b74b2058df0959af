"""The one retry: what passes is repeated until its deadline, what is final is not."""

from __future__ import annotations

import errno
import time

import pytest
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
