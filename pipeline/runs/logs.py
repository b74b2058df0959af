"""Logging of all libraries into files of the run, never over the progress bar."""

from __future__ import annotations

import logging
import os
import posixpath
import tempfile
import warnings

from refinedet.pipeline.runs import storage

_FORMAT = "%(asctime)s %(levelname).1s {who} %(name)s: %(message)s"


class _RunLog(logging.FileHandler):
    """A file on a disk that may be full: records that it does not take are lost."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Print nothing: a traceback for every record would bury the lines that name the fault."""


def log_folder(run_path: str) -> str:
    """A local directory for the logs of a run on this machine: inside the run where that is local."""
    folder = run_path
    if not storage.is_local(run_path):
        name = f"{posixpath.basename(run_path)}-{storage.digest_json(run_path)[:8]}"
        folder = os.path.join(tempfile.gettempdir(), "refinedet-logs", name)
    folder = os.path.join(folder, "logs")
    os.makedirs(folder, exist_ok=True)
    return folder


def log_to_file(path: str, who: str) -> None:
    """Send the logging of this process, and Python's warnings, to a file; `who` stands in every line."""
    handler = _RunLog(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(_FORMAT.format(who=who)))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    # DeepSpeed's import warns on stdout of every machine without a GPU, a launcher's too, which needs none.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def restore_loggers() -> None:
    """Take the handlers away that libraries gave their own loggers, so that their words reach the file alone."""
    for name in list(logging.Logger.manager.loggerDict):
        library = logging.getLogger(name)
        for handler in list(library.handlers):
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                library.removeHandler(handler)
                library.propagate = True
