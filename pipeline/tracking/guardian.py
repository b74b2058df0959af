"""Subprocess that marks the MLflow run KILLED if its parent dies without setting a status.

SIGKILL, the kernel's out-of-memory killer and a crash of the interpreter leave an MLflow run RUNNING for ever. The
child waits on a pipe. If the parent ends without dismissing it, the child sets the run's status to KILLED, unless
another process has taken the run over.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys

from refinedet.pipeline.runs import settings
from refinedet.pipeline.tracking.run_tags import OWNER_TAG, REASON_TAG

_POLL_S = 1.0


class Guardian:
    """Watch over this process until `dismiss`; does nothing where the child cannot be started."""

    def __init__(self, *, uri: str, run_id: str, owner: str) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # what ends the parent's group must not end the child
                env=settings.inherited(PYTHONPATH=os.pathsep.join(path for path in sys.path if path)),
            )
            self._send(json.dumps({"uri": uri, "run_id": run_id, "owner": owner, "parent": os.getpid()}))
        except OSError:
            self.dismiss()

    def dismiss(self) -> None:
        """End the child: the run's status is set."""
        child, self._child = self._child, None
        if child is not None and child.stdin is not None:
            with contextlib.suppress(OSError):
                child.stdin.write(b"done\n")
                child.stdin.close()
            child.wait()

    def _send(self, line: str) -> None:
        assert self._child is not None
        assert self._child.stdin is not None
        self._child.stdin.write(line.encode() + b"\n")
        self._child.stdin.flush()


def _watch() -> None:
    orders = json.loads(sys.stdin.buffer.raw.readline())  # type: ignore[union-attr]
    while os.getppid() == orders["parent"]:
        if select.select([sys.stdin], [], [], _POLL_S)[0]:
            if sys.stdin.buffer.raw.readline() == b"done\n":  # type: ignore[union-attr]
                return
            break  # the pipe closed without "done"
    _mark(orders["uri"], orders["run_id"], orders["owner"])


def _mark(uri: str, run_id: str, owner: str) -> None:
    # Only now: the child waits for hours, and should hold little memory.
    from refinedet.pipeline.tracking.stores import configure_mlflow

    configure_mlflow()
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    run = client.get_run(run_id)
    if run.info.status == "RUNNING" and run.data.tags.get(OWNER_TAG) == owner:
        children = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
        running = [child.info.run_id for child in children if child.info.status == "RUNNING"]
        for one in (*running, run_id):
            client.set_tag(one, REASON_TAG, "the process ended without setting a status")
            client.set_terminated(one, status="KILLED")


if __name__ == "__main__":
    _watch()
