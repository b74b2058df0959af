"""Stores of MLflow: the default SQLite file, and a quiet, offline client.

Import this before MLflow: it reads its environment when it is imported.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager

from refinedet.pipeline.config.spec import Tracking
from refinedet.pipeline.runs import settings, storage
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.runs.redaction import redact_text

logger = logging.getLogger(__name__)

DATABASE = "mlflow.db"
ARTIFACTS = "mlflow-artifacts"
_CHECK_TIMEOUT_S = 5.0


def configure_mlflow() -> None:
    """Set what MLflow reads from the environment; what the user has set stays."""
    settings.provide("mlflow")


def quiet_mlflow() -> None:
    """Log only warnings of MLflow and its libraries."""
    for name in ("mlflow", "alembic", "sqlalchemy.engine", "huey"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # the outbox logs once that a server is away


def tracking_uri(tracking: Tracking, runs: str) -> str:
    """The MLflow tracking URI: the spec's, MLFLOW_TRACKING_URI, or a SQLite file in the runs directory, absolute.

    SQLite needs a local disk: where the runs live behind a URI, the file is under `~/.refinedet`.
    """
    given = tracking.uri or settings.read("MLFLOW_TRACKING_URI")
    if given:
        return given
    folder = storage.absolute(runs) if storage.is_local(runs) else os.path.expanduser("~/.refinedet")
    if not storage.is_local(runs):
        logger.warning(
            "Runs are kept at %s and no tracking.uri is given: MLflow's records go to %s on this machine.",
            redact_text(runs),
            folder,
        )
    return f"sqlite:///{os.path.join(folder.removeprefix('file://'), DATABASE)}"


def artifact_location(uri: str, runs: str) -> str | None:
    """Return where a new experiment keeps its artifacts: beside the runs, or where the server chooses (None)."""
    return None if uri.startswith(("http://", "https://")) else storage.join(storage.absolute(runs), ARTIFACTS)


def prepare_store(uri: str) -> None:
    """Make the directory of a SQLite store, and let readers (the MLflow UI) and writers not wait for one another.

    Write-ahead logging is a property of the file, set once. It needs a local disk, as SQLite's locks do.
    """
    if not uri.startswith("sqlite:///"):
        return
    path = uri.removeprefix("sqlite:///").split("?")[0]
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with opening_alone(uri), closing(sqlite3.connect(path, timeout=20)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA schema_version")
    except (OSError, sqlite3.Error) as error:
        raise UserError(
            f"MLflow's store {path} cannot be opened ({error}); "
            "repair or move the file, or set tracking.uri to a server or another file"
        ) from error


@contextmanager
def opening_alone(uri: str) -> Iterator[None]:
    """Hold other jobs off while the block opens a SQLite store.

    MLflow makes the tables of a new one without a lock; a change of the journal's mode fails beside another connection.
    """
    if not uri.startswith("sqlite:///"):
        yield
        return
    with open(uri.removeprefix("sqlite:///").split("?")[0] + ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def check_store(tracking: Tracking, runs: str) -> None:
    """Raise UserError where MLflow's store cannot be used: no server, no driver, no such kind. Takes no MLflow.

    Called before anything of a job starts. A server that answers at all is accepted here.
    """
    uri = tracking_uri(tracking, runs)
    scheme = uri.partition(":")[0] if "://" in uri else ""
    try:
        if scheme in ("http", "https"):
            _check_server(uri)
        elif scheme == "sqlite":
            prepare_store(uri)
        elif scheme not in ("", "file", "databricks", "uc"):
            import sqlalchemy  # not before: the default store needs none of it, and it takes half a second

            engine = sqlalchemy.create_engine(uri)
            with engine.connect():
                pass
            engine.dispose()
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(
            f"MLflow's store {redact_text(uri)} needs the driver {error.name}, which is not installed; install it "
            f"(postgresql: `pip install psycopg2-binary`), or set tracking.uri to a server"
        ) from error
    except Exception as error:  # drivers of databases raise kinds of their own
        raise UserError(unreachable(uri, error)) from error


def _check_server(uri: str) -> None:
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_CHECK_TIMEOUT_S):
            pass
    except urllib.error.HTTPError as error:  # it answers; a proxy before it may keep /health to itself
        if error.code >= 500:
            raise


def unreachable(uri: str, error: BaseException) -> str:
    """One sentence: no store answers at `uri`, and what to do."""
    return (
        f"no MLflow store answers at {redact_text(uri)} ({first_line(error)}); start it, or set "
        "tracking.uri (without one, a SQLite file in the runs directory is used)"
    )


def first_line(error: BaseException | None) -> str:
    text = redact_text(str(error)).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def settle_store(uri: str) -> None:
    """Fold a SQLite store's write-ahead log into its file, so that the file alone can be copied."""
    if uri.startswith("sqlite:///"):
        try:
            connection = sqlite3.connect(uri.removeprefix("sqlite:///").split("?")[0], timeout=5)
            try:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            finally:
                connection.close()
        except sqlite3.Error:
            logger.debug("The store's write-ahead log stays beside it.", exc_info=True)
