"""The run that `evaluate` and `multiscale` are given, checked without torch and Ray, which take seconds to load."""

from __future__ import annotations

from collections.abc import Sequence

from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec_checks import check_spec
from refinedet.pipeline.config.spec_files import load_spec
from refinedet.pipeline.data.index import open_shards
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.directory import check_run_directory
from refinedet.pipeline.runs.errors import UserError

# Keys of how the work is done, without effect on its results: these may be set without --output.
_HARMLESS = (
    "cluster.",
    "evaluation.diagnose=",
    "evaluation.images_per_chunk=",
    "evaluation.trace_images=",
    "tracking.",
)


def choose_run(
    directory: str,
    overrides: Sequence[str] = (),
    *,
    multiscale: bool = False,
    weights: str | None = None,
    shards: str | None = None,
    output: str | None = None,
) -> Run:
    """The run of a directory, its spec with overrides.

    directory   here or behind an fsspec URI
    multiscale  whether the spec needs to have `multiscale`
    weights     other weights, file or URI; default: the run's
    shards      other shards; default: the run's validation shards
    output      where the results go; default: the run directory, unless there are other weights, shards or overrides
    Raises UserError where the run, weights or shards do not exist, or where `output` is missing.
    """
    check_run_directory(directory)
    parent, _, name = storage.absolute(directory).rstrip("/").rpartition("/")
    spec = load_spec(storage.join(directory, "spec.yaml"), [f"runs={parent}", f"name={name}", *overrides])
    if multiscale and spec.multiscale is None:
        raise UserError("The run's spec has no `multiscale`; give a recipe, as in multiscale.recipe=coco512.")
    check_spec(spec)
    changes = [override for override in overrides if not override.strip().startswith(_HARMLESS)]
    if (weights or shards or changes) and not output:
        raise UserError(
            "Other weights, shards or settings need --output DIRECTORY, so that the run's own results stay."
        )
    run = Run(spec)
    if weights and not storage.exists(weights):
        raise UserError(f"--weights: {weights!r} does not exist; give a file or URI of weights.")
    if not (weights or storage.exists(run.weights)):
        raise UserError(f"There are no weights at {run.weights}; run the stage train first, or name others.")
    open_shards(storage.absolute(shards) if shards else storage.join(run.shards, "val"))
    return run
