"""The ways a job ends that are not defects of this program, each with one sentence for a person."""

import errno
from typing import NamedTuple

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class UserError(ValueError):
    """A mistake that the user can mend: what, received, remedy. Exit status 2, nothing written over."""


class JobError(RuntimeError):
    """The job failed, and trying again did not help. Exit status 1; the logs tell more."""


class StoppedError(RuntimeError):
    """The job was asked to stop, has saved, and goes on with the same command. Exit status 130."""


class End(NamedTuple):
    """Exit status, and the one sentence that is printed."""

    status: int
    sentence: str


def describe_end(error: BaseException) -> End | None:
    """How a command ends that raised `error`; None for a defect of this program, which shows its traceback."""
    if isinstance(error, UserError):
        return End(2, _one_line(error))
    if isinstance(error, StoppedError):
        return End(130, f"stopped: {_one_line(error)}")
    if isinstance(error, JobError):
        return End(1, _one_line(error))
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        where = f" for {error.filename}" if error.filename else ""
        return End(1, f"no space is left{where} ({error.strerror}); free some, then the same command goes on.")
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
