"""A run's directory, local or behind a URI: its files, and the manifests of its stages.

runs/<name>/  spec.yaml  lease/  stages/<stage>.json  shards/  checkpoints/  weights.safetensors
              detections/  validations/  metrics.jsonl  metrics.json  timeline.jsonl  report.html  logs/
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError

logger = logging.getLogger(__name__)

JOB_STATISTICS = "data.json"
"""file of a run: what its data sets hold"""


def check_run_directory(directory: str) -> None:
    """UserError where a directory is no run's."""
    if not storage.exists(storage.join(directory, "spec.yaml")):
        raise UserError(f"{directory!r} is no run's directory (it has no spec.yaml); give one, as in runs/quickstart.")


class RunDirectory:
    """Names of the files of a run, and what its stages have committed."""

    def __init__(self, path: str) -> None:
        self.path = storage.absolute(path).rstrip("/")

    def file(self, *parts: str) -> str:
        return storage.join(self.path, *parts)

    @property
    def weights(self) -> str:
        return self.file("weights.safetensors")

    def ground_truth(self, part: str) -> str:
        """COCO instances of a part's shards, which evaluation measures by."""
        return self.file("ground_truth.json" if part == "val" else f"ground_truth_{part}.json")

    def stage_is_done(self, stage: str, inputs: Mapping[str, Any]) -> bool:
        """Return whether the stage has run on these inputs and its outputs are unchanged."""
        path = self._manifest(stage)
        if not storage.exists(path):
            return False
        try:
            manifest = storage.read_json(path)
        except ValueError:
            logger.warning("%s is not whole, so the stage %s runs again", path, stage)
            return False
        if manifest.get("inputs") != dict(inputs):
            logger.info("the inputs of the stage %s have changed, so it runs again", stage)
            return False
        faults = storage.verify_manifest(self.path, manifest)
        for fault in faults:
            logger.warning("stage %s runs again: %s", stage, fault)
        return not faults

    def commit_stage(self, stage: str, inputs: Mapping[str, Any], outputs: list[str]) -> None:
        """Declare a stage done. `outputs` are files, relative to the run directory."""
        files = [storage.digest_file(self.file(name), name) for name in outputs]
        storage.write_manifest(self._manifest(stage), files, stage=stage, inputs=dict(inputs))

    def _manifest(self, stage: str) -> str:
        return self.file("stages", f"{stage}.json")
