"""A run's home: one name, one folder, one spec, one job at a time; and the manifests of its stages.

runs/<name>/  spec.yaml  stages/<stage>.json  shards/  checkpoints/  weights.safetensors
              detections/  metrics.jsonl  metrics.json  report.html  logs/
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from refinedet.pipeline.config.files import dump_spec, parse_spec
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError

logger = logging.getLogger(__name__)

# What may change between two launches of one run: where and how it runs and how it is looked at, never what is
# learnt. A changed evaluation is done again, nothing else.
_MAY_CHANGE = {
    "runs": None,
    "cluster": None,
    "tracking": None,
    "evaluation": None,
    "multiscale": None,
    "data": {"loader_workers", "cache_dir", "cache_bytes", "max_bad_samples", "root", "shards", "shard_bytes"},
    "training": {
        "micro_batch",
        "keep_last",
        "keep_best",
        "checkpoint_every_epochs",
        "checkpoint_every_steps",
        "validate_every_epochs",
        "validate_on",
        "non_finite",
        "max_skipped_steps",
        "stall_timeout_s",
        "zero_stage",
    },
    "model": {
        "activation_checkpointing",
        "score_threshold",
        "pre_nms_top_k",
        "pre_nms_scope",
        "nms_iou",
        "max_detections",
    },
}


class Run:
    """The folder of a job's run, and what its stages have left there."""

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self.runs = storage.absolute(spec.runs)
        self.path = storage.join(self.runs, spec.name)

    def spec_for_workers(self) -> dict[str, Any]:
        """The spec as JSON values, every path absolute: on a running cluster, workers are in another folder."""
        spec = self.spec.model_dump(mode="json")
        spec["runs"] = self.runs
        for section, names in (("data", ("root", "shards", "cache_dir")), ("training", ("init_weights",))):
            for name in names:
                if spec[section][name]:
                    spec[section][name] = storage.absolute(spec[section][name])
        return spec

    def file(self, *parts: str) -> str:
        return storage.join(self.path, *parts)

    @property
    def shards(self) -> str:
        """Folder of the shards: train/ and val/ below it."""
        return storage.absolute(self.spec.data.shards) if self.spec.data.shards else self.file("shards")

    @property
    def weights(self) -> str:
        return self.file("weights.safetensors")

    def ground_truth(self, part: str) -> str:
        """COCO instances of a part's shards, which evaluation measures by."""
        return self.file("ground_truth.json" if part == "val" else f"ground_truth_{part}.json")

    @contextlib.contextmanager
    def open(self) -> Iterator[Run]:
        """Hold the run for this process; refuse where another holds it, or where it was started from another spec."""
        try:
            storage.make_folder(self.path)
        except Exception as error:  # a library of remote storage raises what it likes, or is not there
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
            raise UserError(
                f"The run's folder {self.path} cannot be written ({reason}); set runs=FOLDER to one that can."
            ) from None
        with self._lock():
            self._check_same_spec()
            storage.write_bytes(self.file("spec.yaml"), dump_spec(self.spec).encode())
            yield self

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Freed by the kernel whatever ends this process; a run behind a URI relies on `Monitor` instead."""
        if not storage.is_local(self.path):
            yield
            return
        with open(self.file(".lock"), "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise UserError(
                    f"The run {self.spec.name!r} is being worked on by process {file.read().strip() or 'unknown'}; "
                    "wait for it, stop it, or choose another name (name=OTHER)."
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def _check_same_spec(self) -> None:
        path = self.file("spec.yaml")
        if not storage.exists(path):
            return
        try:
            before = yaml.safe_load(storage.read_bytes(path))
        except yaml.YAMLError:
            logger.warning("%s cannot be read and is written again", path)
            return
        with contextlib.suppress(UserError):  # written by an older release: keys that came since have their defaults
            before = parse_spec(before, source=path).model_dump(mode="json")
        difference = spec_difference(before, self.spec.model_dump(mode="json"))
        if difference:
            raise UserError(
                f"The run {self.spec.name!r} was started from another spec: {'; '.join(difference)}. Choose another "
                f"name (name=OTHER), or remove {self.path} to start it afresh."
            )

    def stage_is_done(self, stage: str, inputs: Mapping[str, Any]) -> bool:
        """Whether the stage has run on these very inputs, and its outputs are still what it wrote."""
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
        """Declare a stage done. `outputs` are files, relative to the run's folder."""
        files = [storage.digest_file(self.file(name), name) for name in outputs]
        storage.write_manifest(self._manifest(stage), files, stage=stage, inputs=dict(inputs))

    def _manifest(self, stage: str) -> str:
        return self.file("stages", f"{stage}.json")


def lasting_part(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What of a spec, as JSON values, makes the run what it is: all but what may change from launch to launch."""
    lasting: dict[str, Any] = {}
    for key, value in spec.items():
        exempt = _MAY_CHANGE.get(key, set())
        if exempt is None:
            continue
        if isinstance(value, Mapping):
            value = {name: each for name, each in value.items() if name not in exempt}
        lasting[key] = value
    return lasting


def spec_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What distinguishes two specs in a way that makes them different runs: "training.epochs was 3, now 4"."""
    before, now = lasting_part(before), lasting_part(now)
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += [
                f"{key}.{name} was {old.get(name)!r}, now {new.get(name)!r}"
                for name in sorted({*old, *new})
                if old.get(name) != new.get(name)
            ]
        elif old != new:
            found.append(f"{key} was {old!r}, now {new!r}")
    return found
