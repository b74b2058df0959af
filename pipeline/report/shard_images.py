"""The images of chosen validation samples, read back from a run's shards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class ShardImages:
    """Loads images by their id.

    url        directory or URI of the shards
    image_ids  of all samples, in the order of the shards, as `ground_truth.json` lists them
    """

    def __init__(self, url: str, image_ids: Sequence[int]) -> None:
        self._url = url
        self._positions = {image_id: position for position, image_id in enumerate(image_ids)}

    def __call__(self, image_ids: Sequence[int]) -> dict[int, np.ndarray]:
        """uint8 [H, W, 3] RGB of each id; those that cannot be decoded are excluded."""
        from refinedet.pipeline.data.index import open_shards
        from refinedet.pipeline.data.reading import EvaluationSamples

        positions = [self._positions[image_id] for image_id in image_ids if image_id in self._positions]
        samples = EvaluationSamples(open_shards(self._url), positions, max_bad_samples=len(positions))
        return {sample.image_id: sample.image for sample in samples if sample.fault is None}
