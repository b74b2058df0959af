"""Ends of a job that are no defects of this program, each with one sentence for a person."""

import errno
import logging
from typing import NamedTuple

logger = logging.getLogger(__name__)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_FILE_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class UserError(ValueError):
    """A mistake that the user can fix: what, received, remedy. Exit status 2, nothing overwritten."""


class JobError(RuntimeError):
    """A failure that retries did not overcome. Exit status 1; the logs hold the details."""


class StoppedError(RuntimeError):
    """A stop on request, after a save; the same command resumes. Exit status 130."""


class End(NamedTuple):
    """Exit status, and the one sentence that is printed."""

    status: int
    sentence: str


def describe_end(error: BaseException) -> End | None:
    """The end of a command that raised `error`; None for a defect of this program, which shows its traceback."""
    if isinstance(error, UserError):
        return End(2, _one_line(error))
    if isinstance(error, StoppedError):
        return End(130, f"stopped: {_one_line(error)}")
    if isinstance(error, JobError):
        return End(1, _one_line(error))
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        where = f" for {error.filename}" if error.filename else ""
        return End(
            1, f"no space is left{where} ({error.strerror}); free some, then run the same command again to resume."
        )
    if isinstance(error, _FILE_ERRORS) and error.filename:
        logger.info("ended by a file error", exc_info=error)  # into the log of the run, where there is one
        return End(2, f"{error.filename}: {error.strerror}; give another path, or change this one.")
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
