"""The last word of a process that could not say it: a small child that outlives its parent and marks the run.

SIGKILL, the kernel's memory killer and a crash of the interpreter leave an MLflow run RUNNING for ever. The child
waits, holding nothing but a pipe; if the parent is gone without having said "done", it sets the run's status to KILLED,
unless another process has taken the run over meanwhile.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys

_POLL_S = 1.0


class Guardian:
    """Watches over this process until `dismiss`. Nothing happens where the child cannot be started."""

    def __init__(self, *, uri: str, run_id: str, owner: str) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # what ends the parent's group must not end the child
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
            self._tell(json.dumps({"uri": uri, "run_id": run_id, "owner": owner, "parent": os.getpid()}))
        except OSError:
            self.dismiss()

    def dismiss(self) -> None:
        """The status is set: nothing is left to do."""
        child, self._child = self._child, None
        if child is not None and child.stdin is not None:
            try:
                child.stdin.write(b"done\n")
                child.stdin.close()
            except OSError:
                pass
            child.wait()

    def _tell(self, line: str) -> None:
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
            break  # the pipe closed without a word
    _mark(orders["uri"], orders["run_id"], orders["owner"])


def _mark(uri: str, run_id: str, owner: str) -> None:
    from refinedet.pipeline.tracking.runs import OWNER_TAG, REASON_TAG, MlflowClient

    client = MlflowClient(uri)
    run = client.get_run(run_id)
    if run.info.status == "RUNNING" and run.data.tags.get(OWNER_TAG) == owner:
        client.set_tag(run_id, REASON_TAG, "the process ended without a word")
        client.set_terminated(run_id, status="KILLED")


if __name__ == "__main__":
    _watch()
