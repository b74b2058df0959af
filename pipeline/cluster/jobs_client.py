"""Jobs on a cluster: submit, status, logs, stop, resume, over Ray's Jobs API.

The code and the resolved spec travel with the job; secrets never do: they come from the cluster's environment. A run
has one name and one directory, so that submitting it again resumes it.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from refinedet.pipeline.cluster.capacity import check_capacity
from refinedet.pipeline.cluster.dashboard import clear_errors, cluster_nodes, connect, dashboard_address
from refinedet.pipeline.cluster.submission import (
    ENTRYPOINT,
    describe_job,
    described_run,
    described_spec,
    home_of,
    runtime_environment,
    stage_code,
)
from refinedet.pipeline.config.identity import spec_difference
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.config.spec_checks import check_spec
from refinedet.pipeline.runs.errors import UserError

_ACTIVE = ("PENDING", "RUNNING")
_POLL_S = 1.0
_LOST_S = 60.0  # a connection that is lost for longer than this is not coming back


@dataclass(frozen=True)
class SubmittedJob:
    """A job on the cluster. Times are seconds since the epoch, None where there is none yet."""

    id: str
    run: str
    home: str
    status: str
    message: str
    started: float | None
    ended: float | None
    spec: JobSpec | None

    @property
    def is_active(self) -> bool:
        return self.status in _ACTIVE


class JobsClient:
    """The jobs of the cluster whose dashboard is at `address`."""

    def __init__(self, address: str | None) -> None:
        self.address = dashboard_address(address)
        self._client = connect(self.address)

    def submit(self, spec: JobSpec) -> str:
        """Start a job, or resume a run that stopped; returns its id.

        Raises UserError where the run is in use, where its name stands for another spec, where the cluster
        cannot hold it, or where its paths mean nothing on a cluster.
        """
        check_spec(spec, "cluster")
        home = home_of(spec)
        jobs = self.list()
        for job in jobs:
            if job.home == home and job.is_active:
                raise UserError(
                    f"The run {spec.name!r} is in use by job {job.id}; follow it (refinedet logs {job.id}), "
                    "stop it, or choose another name (name=OTHER)."
                )
        before = next((job.spec for job in reversed(jobs) if job.home == home and job.spec), None)
        if before and (difference := spec_difference(before.model_dump(mode="json"), spec.model_dump(mode="json"))):
            raise UserError(
                f"The run {spec.name!r} was submitted with another spec: {'; '.join(difference)}. Choose another name "
                "(name=OTHER), or resume the one before (refinedet resume)."
            )
        with clear_errors(self.address):
            nodes = cluster_nodes(self.address)
        check_capacity(spec.cluster, nodes)
        number = 1 + sum(job.run == spec.name for job in jobs)
        with tempfile.TemporaryDirectory(prefix="refinedet-submit-") as folder:
            try:
                stage_code(Path(folder), spec)
            except OSError as error:
                raise UserError(
                    f"The job's code cannot be laid out in {tempfile.gettempdir()} ({error.strerror or error}); make "
                    "room there, or set TMPDIR."
                ) from error
            with clear_errors(self.address):
                return self._client.submit_job(
                    entrypoint=ENTRYPOINT,
                    submission_id=f"{spec.name}-{number}-{os.urandom(3).hex()}",
                    runtime_env=runtime_environment(spec, Path(folder)),
                    metadata=describe_job(spec),
                )

    def resume(self, name: str) -> str:
        """Submit a run's last job again, with its spec and the code of this checkout; returns the new id."""
        job = self.find(name)
        if job.is_active:
            raise UserError(f"Job {job.id} is {job.status.lower()} already; there is nothing to resume.")
        if job.spec is None:
            raise UserError(f"The spec of job {job.id} is not known here; submit its file again: that resumes it too.")
        return self.submit(job.spec)

    def list(self) -> list[SubmittedJob]:
        """The jobs that this project submitted, oldest first."""
        with clear_errors(self.address):
            details = self._client.list_jobs()
        jobs = []
        for detail in details:
            metadata = detail.metadata or {}
            run = described_run(metadata)
            if run is None:
                continue
            job = SubmittedJob(
                id=detail.submission_id or "",
                run=run[0],
                home=run[1],
                status=str(getattr(detail.status, "value", detail.status)),
                message=(detail.message or "").partition(", last available logs")[0],  # they are in the log
                started=detail.start_time / 1000 if detail.start_time else None,
                ended=detail.end_time / 1000 if detail.end_time else None,
                spec=described_spec(metadata),
            )
            jobs.append(job)
        return sorted(jobs, key=lambda job: job.started or float("inf"))

    def find(self, name: str) -> SubmittedJob:
        """A job by its id, or the last one of a run by the run's name."""
        jobs = self.list()
        found = [job for job in jobs if name in (job.id, job.run)]
        if not found:
            known = ", ".join(sorted({job.run for job in jobs})) or "none"
            raise UserError(f"The cluster at {self.address} has no job {name!r}; its runs: {known}.")
        return found[-1]

    def read_logs(self, name: str) -> str:
        """The output of a job so far."""
        job = self.find(name)
        with clear_errors(self.address):
            return self._client.get_job_logs(job.id)

    def follow_logs(self, name: str) -> Iterator[str]:
        """Yield the output of a job in chunks until it ends.

        Where Ray's stream breaks, as behind a proxy or on a sleeping laptop, the rest is polled.
        """
        job = self.find(name)
        printed = 0
        for chunk in self._stream(job.id):
            printed += len(chunk)
            yield chunk
        last_answer = time.monotonic()
        while True:
            try:
                job = self.find(job.id)
                text = self.read_logs(job.id)
                last_answer = time.monotonic()
            except UserError:
                if time.monotonic() - last_answer > _LOST_S:
                    raise
                time.sleep(_POLL_S)
                continue
            if len(text) > printed:
                yield text[printed:]
                printed = len(text)
            if not job.is_active:
                return
            time.sleep(_POLL_S)

    def _stream(self, job_id: str) -> Iterator[str]:
        """Ray's stream of a job's logs; ends with it, or where it breaks."""
        import aiohttp

        chunks = self._client.tail_job_logs(job_id)
        loop = asyncio.new_event_loop()
        try:
            while True:
                try:
                    yield loop.run_until_complete(anext(chunks))
                except (StopAsyncIteration, RuntimeError, OSError, aiohttp.ClientError):
                    return
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    def stop(self, name: str) -> SubmittedJob:
        """Make a job save and end; returns once it has, or was killed after its time of grace."""
        job = self.find(name)
        if not job.is_active:
            raise UserError(f"Job {job.id} has ended already ({job.status.lower()}); there is nothing to stop.")
        with clear_errors(self.address):
            self._client.stop_job(job.id)
        return self.wait(job.id)

    def wait(self, name: str) -> SubmittedJob:
        """Return once a job has ended."""
        job = self.find(name)
        while job.is_active:
            time.sleep(_POLL_S)
            job = self.find(job.id)
        return job
