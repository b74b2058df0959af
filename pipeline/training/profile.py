"""A window of steps under torch's profiler; its trace goes into the run."""

from __future__ import annotations

import logging
import os
import tempfile

from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.training.world import World
from torch.profiler import profile

logger = logging.getLogger(__name__)


def check_profile_steps(steps: tuple[int, int] | None, total_steps: int) -> None:
    """A window that ends after the run: UserError."""
    if steps and steps[1] > total_steps:
        raise UserError(
            f"training.profile_steps {list(steps)} ends after the run's {total_steps} steps; choose one within them"
        )


class StepProfiler:
    """Profiles rank 0 in the steps after `steps[0]` up to `steps[1]`; writes profile/steps-A-B.json.gz."""

    def __init__(self, steps: tuple[int, int] | None, run_dir: str, world: World) -> None:
        self._steps = steps if world.is_main else None
        self._run_dir = run_dir
        self._profile: profile | None = None

    def finish_step(self, step: int) -> None:
        """Between two steps; `step` is the number of steps taken."""
        if self._steps and step == self._steps[0]:
            self._profile = profile()
            self._profile.start()
        elif self._steps and self._profile and step == self._steps[1]:
            self._write(self._steps)

    def close(self) -> None:
        """A run that ends within the window leaves what there is."""
        if self._steps and self._profile:
            self._write(self._steps)

    def _write(self, steps: tuple[int, int]) -> None:
        trace, self._profile = self._profile, None
        assert trace is not None
        trace.stop()
        name = storage.join(self._run_dir, "profile", f"steps-{steps[0]}-{steps[1]}.json.gz")
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "trace.json.gz")
                trace.export_chrome_trace(path)
                storage.write_bytes(name, storage.read_bytes(path))
        except Exception as error:  # training is worth more than its profile
            logger.warning("the profile of steps %d to %d could not be written: %s", *steps, error)
        else:
            logger.info("the profile of steps %d to %d is in %s", *steps, name)
