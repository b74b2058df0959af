"""Contents of a submitted job: the packages, the operators as built here, the resolved spec. Never a secret."""

from __future__ import annotations

import platform
import shutil
import time
from pathlib import Path
from typing import Any

import yaml
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.config.spec_files import dump_spec, parse_spec
from refinedet.pipeline.runs.errors import UserError

SPEC_FILE = "job.yaml"
_PYTHON = ".".join(platform.python_version_tuple()[:2])
# exec: the stop signal reaches Python, not a shell.
ENTRYPOINT = f"exec python -m refinedet.pipeline.cluster.entrypoint {_PYTHON} launch {SPEC_FILE}"
STOP_MARGIN_S = 30
RUN_KEY, HOME_KEY, _SPEC_KEY = "refinedet.run", "refinedet.home", "refinedet.spec"


def home_of(spec: JobSpec) -> str:
    """Return the run's directory or URI, by which jobs of one run are recognised."""
    return f"{spec.runs.rstrip('/')}/{spec.name}"


def describe_job(spec: JobSpec) -> dict[str, str]:
    """Return what the cluster keeps beside the job, by which the run is found and resumed from any machine."""
    return {RUN_KEY: spec.name, HOME_KEY: home_of(spec), _SPEC_KEY: dump_spec(spec)}


def described_run(metadata: dict[str, str]) -> tuple[str, str] | None:
    """(name, home) of the run that a job works on; None for a job of somebody else."""
    return (metadata[RUN_KEY], metadata.get(HOME_KEY, "")) if RUN_KEY in metadata else None


def described_spec(metadata: dict[str, str]) -> JobSpec | None:
    """The spec a job was submitted with; None where it is missing, or of a release with other keys."""
    text = metadata.get(_SPEC_KEY)
    try:
        return parse_spec(yaml.safe_load(text), source="the submitted job") if text else None
    except UserError:
        return None


def stage_code(folder: Path, spec: JobSpec) -> None:
    """Fill an empty directory with all that a job needs of this checkout."""
    from refinedet.model.ops import library

    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", library.LIBRARY_NAME)
    shutil.copytree(Path(__file__).parent.parent, folder / "refinedet" / "pipeline", ignore=ignore)
    shutil.copytree(Path(library.__file__).parent.parent, folder / "refinedet" / "model", ignore=ignore)
    built = library.find()
    if built is not None:
        # Beside the package, not in it: nodes whose image has operators of its own, for their GPUs, take those.
        (folder / library.CARRIED).mkdir()
        shutil.copy(built, folder / library.CARRIED / built.name)
    (folder / SPEC_FILE).write_text(dump_spec(spec), encoding="utf-8")


def runtime_environment(spec: JobSpec, folder: Path) -> dict[str, Any]:
    submitted = {"REFINEDET_SUBMITTED_AT": f"{time.time():.3f}"}
    return {"working_dir": str(folder), "env_vars": stop_environment(spec) | submitted}


def stop_environment(spec: JobSpec) -> dict[str, str]:
    """Return Ray's settings for ending a job: a signal on which it saves, and time for that (Ray's default is 3 s)."""
    return {
        "RAY_JOB_STOP_SIGNAL": "SIGTERM",
        "RAY_JOB_STOP_WAIT_TIME_S": str(int(spec.cluster.stop_grace_s) + STOP_MARGIN_S),
        "PYTHONUNBUFFERED": "1",
    }
