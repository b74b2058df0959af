"""A run of a job spec: one name, one directory, one spec, one process at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import yaml
from refinedet.pipeline.config.identity import lasting_part, spec_difference
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.config.spec_checks import weights_file
from refinedet.pipeline.config.spec_files import dump_spec, parse_spec
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.directory import RunDirectory
from refinedet.pipeline.runs.errors import JobError, UserError
from refinedet.pipeline.runs.lease import Lease


class Run(RunDirectory):
    """The directory of a job's run, with the spec of the job."""

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self.runs = storage.absolute(spec.runs)
        super().__init__(storage.join(self.runs, spec.name))

    @property
    def shards(self) -> str:
        """Directory of the shards: train/ and val/ below it."""
        return storage.absolute(self.spec.data.shards) if self.spec.data.shards else self.file("shards")

    def spec_for_workers(self) -> dict[str, Any]:
        """The spec as JSON values, every path absolute: on a running cluster, workers are in another directory."""
        spec = self.spec.model_dump(mode="json")
        spec["runs"] = self.runs
        for section, names in (("data", ("root", "shards", "cache_dir")), ("training", ("init_weights", "fork_from"))):
            for name in names:
                if spec[section][name] and (name != "init_weights" or weights_file(self.spec)):
                    spec[section][name] = storage.absolute(spec[section][name])
        return spec

    @contextlib.contextmanager
    def open(self, on_lost: Callable[[str], None] | None = None) -> Iterator[Run]:
        """Hold the run for this process.

        on_lost  called from a thread, with a sentence, if another process has taken the run over
        Raises UserError where another process holds the run, where it was started from another spec, or where its
        spec.yaml cannot be read; on leaving, JobError where the run was taken over.
        """
        try:
            storage.make_folder(self.path)
        except Exception as error:  # a library of remote storage raises errors of its own, or is missing
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
            raise UserError(
                f"The run's directory {self.path} cannot be written ({reason}); set runs=DIRECTORY to one that can."
            ) from None
        with Lease(self.path, on_lost) as lease:
            self._check_same_spec()
            storage.write_bytes(self.file("spec.yaml"), dump_spec(self.spec).encode())
            try:
                yield self
            finally:
                if lease.lost:  # whatever else went wrong came of it
                    raise JobError(lease.lost)

    def _check_same_spec(self) -> None:
        path = self.file("spec.yaml")
        if not storage.exists(path):
            return
        try:
            before = yaml.safe_load(storage.read_bytes(path).decode())
        except (yaml.YAMLError, UnicodeDecodeError):
            before = None
        if not isinstance(before, dict):
            raise UserError(
                f"{path} is empty or garbled, so that it is unknown what this run was started from; restore it, choose "
                f"another name (name=OTHER), or remove {self.path} to start it afresh."
            )
        with contextlib.suppress(UserError):  # written by an older release: keys that came since have their defaults
            before = parse_spec(lasting_part(before), source=path).model_dump(mode="json")
        difference = spec_difference(before, self.spec.model_dump(mode="json"))
        if difference:
            raise UserError(
                f"The run {self.spec.name!r} was started from another spec: {'; '.join(difference)}. Choose another "
                f"name (name=OTHER), or remove {self.path} to start it afresh."
            )
