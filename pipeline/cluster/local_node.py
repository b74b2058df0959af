"""A Ray node for one launch, in a process and a session of its own.

Signals to the process group of the launch, as a terminal, `timeout` and Slurm send them, do not reach Ray: only the
driver handles them, and saves. The node ends when its standard input closes, so that it never outlives the driver.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator

from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import JobError

logger = logging.getLogger(__name__)

_SHOWN = 2000
_DEADLINE_S = 60.0
"""for further attempts: Ray gives its parts 15 s to start, and a busy machine may need longer"""


@contextlib.contextmanager
def local_node() -> Iterator[str]:
    """Start the node; yields HOST:PORT. JobError where it does not start."""
    try:
        node, address = storage.retry(_start, "Ray on this machine", deadline_s=_DEADLINE_S)
    except JobError as error:
        raise JobError(f"{error.__cause__}; end what else keeps the machine busy, or run the command again") from error
    with node:
        try:
            yield address
        finally:
            assert node.stdin is not None
            node.stdin.close()


def _start() -> tuple[subprocess.Popen, str]:
    node = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert node.stdout is not None
    words = node.stdout.readline().split()
    if words[:1] == ["node"]:
        return node, words[1]
    _, output = node.communicate()
    logger.warning("Ray did not start: %s", output[-_SHOWN:])
    lines = output.strip().splitlines() or [f"status {node.returncode}"]
    raise RuntimeError(f"Ray did not start on this machine: {lines[-1]}")


def _serve() -> None:
    import ray  # not in the driver: it connects only after the node has started

    ray.init(
        address="local",
        num_cpus=os.cpu_count(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        configure_logging=False,
    )
    sys.stdout.write(f"node {ray.get_runtime_context().gcs_address}\n")
    sys.stdout.flush()
    sys.stdin.read()
    ray.shutdown()


if __name__ == "__main__":
    _serve()
