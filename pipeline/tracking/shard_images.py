"""The images of chosen validation samples, read back from a run's shards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.tracking.run_folder import RunFolder


class ShardImages:
    """Loads images of the run's validation shards by image id."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run

    def __call__(self, image_ids: Sequence[int]) -> dict[int, np.ndarray]:
        raise NotImplementedError
