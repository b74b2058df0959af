"""Jobs on a cluster: submit, status, logs, stop, resume, over Ray's Jobs API.

The code and the resolved spec travel with the job; secrets never do: they come from the cluster's environment. A run
has one name and one home, so that submitting it again goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import UserError
from pipeline.spec import JobSpec
from pipeline.spec_files import dump_spec

_RUN_KEY = "refinedet.run"
_HOME_KEY = "refinedet.home"
_SPEC_FILE = "job.yaml"
_ENTRYPOINT = f"exec python -m pipeline.cli launch {_SPEC_FILE}"  # exec: the stop signal reaches Python, not a shell
_ACTIVE = ("PENDING", "RUNNING")
_STOP_MARGIN_S = 30
_POLL_S = 1.0


@dataclass(frozen=True)
class SubmittedJob:
    """A job that the cluster knows of. Times are seconds since the epoch, None where there is none yet."""

    id: str
    run: str
    home: str
    status: str
    message: str
    started: float | None
    ended: float | None
    entrypoint: str
    runtime_env: dict[str, Any]

    @property
    def is_active(self) -> bool:
        return self.status in _ACTIVE


class JobsClient:
    """The jobs of the cluster whose dashboard is at `address`."""

    def __init__(self, address: str | None) -> None:
        self.address = _dashboard_address(address)
        with self._said_clearly():
            from ray.job_submission import JobSubmissionClient

            verify: str | bool = os.environ.get("RAY_TLS_CA_CERT") or True
            self._client = JobSubmissionClient(self.address, verify=verify)
            self._check_version()

    def submit(self, spec: JobSpec) -> str:
        """Start a job, or go on with a run that stopped; returns its id.

        Raises UserError where the run is being worked on, or where its paths mean nothing on a cluster.
        """
        check_paths(spec)
        home = f"{spec.runs.rstrip('/')}/{spec.name}"
        jobs = self.list()
        for job in jobs:
            if job.home == home and job.is_active:
                raise UserError(
                    f"The run {spec.name!r} is being worked on by job {job.id}; follow it (refinedet logs {job.id}), "
                    "stop it, or choose another name (name=OTHER)."
                )
        number = 1 + sum(job.run == spec.name for job in jobs)
        with tempfile.TemporaryDirectory(prefix="refinedet-submit-") as folder, self._said_clearly():
            stage_code(Path(folder), spec)
            return self._client.submit_job(
                entrypoint=_ENTRYPOINT,
                submission_id=f"{spec.name}-{number}-{os.urandom(3).hex()}",
                runtime_env={"working_dir": folder, "env_vars": _environment(spec)},
                metadata={_RUN_KEY: spec.name, _HOME_KEY: home},
            )

    def resume(self, name: str) -> str:
        """Submit a run's last job again, as it was; returns the new id."""
        job = self.find(name)
        if job.is_active:
            raise UserError(f"Job {job.id} is {job.status.lower()} already; there is nothing to resume.")
        number = 1 + sum(other.run == job.run for other in self.list())
        with self._said_clearly():
            return self._client.submit_job(
                entrypoint=job.entrypoint,
                submission_id=f"{job.run}-{number}-{os.urandom(3).hex()}",
                runtime_env=job.runtime_env,
                metadata={_RUN_KEY: job.run, _HOME_KEY: job.home},
            )

    def list(self) -> list[SubmittedJob]:
        """The jobs that this project submitted, oldest first."""
        with self._said_clearly():
            details = self._client.list_jobs()
        jobs = [
            SubmittedJob(
                id=detail.submission_id or "",
                run=(detail.metadata or {})[_RUN_KEY],
                home=(detail.metadata or {}).get(_HOME_KEY, ""),
                status=str(getattr(detail.status, "value", detail.status)),
                message=detail.message or "",
                started=detail.start_time / 1000 if detail.start_time else None,
                ended=detail.end_time / 1000 if detail.end_time else None,
                entrypoint=detail.entrypoint,
                runtime_env=dict(detail.runtime_env or {}),
            )
            for detail in details
            if _RUN_KEY in (detail.metadata or {})
        ]
        return sorted(jobs, key=lambda job: job.started or float("inf"))

    def find(self, name: str) -> SubmittedJob:
        """A job by its id, or the last one of a run by the run's name."""
        jobs = self.list()
        found = [job for job in jobs if name in (job.id, job.run)]
        if not found:
            known = ", ".join(sorted({job.run for job in jobs})) or "none"
            raise UserError(f"The cluster at {self.address} knows no job {name!r}; runs there: {known}.")
        return found[-1]

    def logs(self, name: str, *, follow: bool = False) -> Iterator[str]:
        """What a job has printed, in chunks; `follow` goes on until it ends."""
        job = self.find(name)
        if not follow:
            with self._said_clearly():
                yield self._client.get_job_logs(job.id)
            return
        chunks = self._client.tail_job_logs(job.id)
        loop = asyncio.new_event_loop()
        try:
            while True:
                with self._said_clearly():
                    try:
                        yield loop.run_until_complete(anext(chunks))
                    except StopAsyncIteration:
                        return
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    def stop(self, name: str) -> SubmittedJob:
        """Ask a job to save and end; returns once it has, or was killed after its time of grace."""
        job = self.find(name)
        if not job.is_active:
            raise UserError(f"Job {job.id} has ended already ({job.status.lower()}); there is nothing to stop.")
        with self._said_clearly():
            self._client.stop_job(job.id)
        while job.is_active:
            time.sleep(_POLL_S)
            job = self.find(job.id)
        return job

    def wait(self, name: str) -> SubmittedJob:
        """Return once a job has ended."""
        job = self.find(name)
        while job.is_active:
            time.sleep(_POLL_S)
            job = self.find(job.id)
        return job

    def _check_version(self) -> None:
        import ray

        theirs = self._client.get_version()
        ours = ray.__version__
        found = re.search(r"\d+\.\d+\.\d+", str(theirs))
        if found and found.group() != ours:
            raise UserError(
                f"The cluster at {self.address} runs Ray {found.group()}, this machine has {ours}; install ray=="
                f"{found.group()} here, or update the cluster."
            )

    @contextmanager
    def _said_clearly(self) -> Iterator[None]:
        """Ray's errors as one sentence: nobody there, a wrong token, anything else it says."""
        try:
            yield
        except UserError:
            raise
        except (ConnectionError, OSError) as error:
            raise UserError(
                f"No Ray cluster answers at {self.address} ({_one_line(error)}); give the address of its dashboard, "
                "http://HOST:8265."
            ) from error
        except (RuntimeError, ValueError) as error:
            message = _one_line(error)
            if re.search(r"\b40[13]\b|authenticat|token", message, re.IGNORECASE):
                raise UserError(
                    f"The cluster at {self.address} refused the authentication token; set RAY_AUTH_MODE=token and "
                    "RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's."
                ) from error
            raise UserError(f"The cluster at {self.address} answered: {message}") from error


def check_paths(spec: JobSpec) -> None:
    """On a cluster a relative path would mean another folder on every node."""
    paths = {"runs": spec.runs, "data.shards": spec.data.shards, "training.init_weights": spec.training.init_weights}
    if spec.data.format != "shapes":
        paths["data.root"] = spec.data.root
    for key, path in paths.items():
        if path and "://" not in path and not os.path.isabs(path):
            raise UserError(
                f"{key} is the relative path {path!r}, which means nothing on a cluster; give a URI (s3://...) or an "
                "absolute path that every node sees."
            )


def stage_code(folder: Path, spec: JobSpec) -> None:
    """What travels: the packages, the operators as built here, the resolved spec. Nothing else of this checkout."""
    import model.ops.library

    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(Path(__file__).parent.parent, folder / "pipeline", ignore=ignore)
    shutil.copytree(Path(model.ops.library.__file__).parent.parent, folder / "model", ignore=ignore)
    built = model.ops.library.describe().path
    if built is not None and not (folder / "model" / "ops" / built.name).exists():
        shutil.copy(built, folder / "model" / "ops" / built.name)
    (folder / _SPEC_FILE).write_text(dump_spec(spec), encoding="utf-8")


def _environment(spec: JobSpec) -> dict[str, str]:
    return {
        "RAY_JOB_STOP_SIGNAL": "SIGTERM",
        # Ray's own 3 s would kill a job that is saving.
        "RAY_JOB_STOP_WAIT_TIME_S": str(int(spec.cluster.stop_grace_s) + _STOP_MARGIN_S),
        "PYTHONUNBUFFERED": "1",
    }


def _dashboard_address(address: str | None) -> str:
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
    if "://" not in address:
        address = f"http://{address}"
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"The address of a cluster's dashboard reads http://HOST:8265, received {address!r}; ray:// addresses are "
            "for `refinedet launch`."
        )
    return address


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400].rstrip(".") or type(error).__name__
