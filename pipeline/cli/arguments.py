"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from refinedet.model.hub_files import check_detector
from refinedet.pipeline.runs.errors import UserError


def _check_detector(context: typer.Context, weights: str) -> str:
    """Refuse weights that are none before torch is loaded, which takes seconds."""
    if not context.resilient_parsing:
        try:
            check_detector(weights)
        except ValueError as error:
            raise UserError(str(error)) from None
    return weights


Job = Annotated[str, typer.Argument(metavar="JOB", help="job spec: a file, a URI, or the name of a job that ships")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="training.epochs=3 and the like")]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster that this machine is a node of, HOST:PORT; default: run here")
]
Dashboard = Annotated[
    str | None, typer.Option("--address", help="the cluster's dashboard, http://HOST:8265; default: on this machine")
]
RunOrJob = Annotated[str, typer.Argument(metavar="NAME", help="a run's name (its last job), or a job's id")]
Weights = Annotated[str | None, typer.Option(help="other weights, file or URI; default: the run's")]
Shards = Annotated[str | None, typer.Option(help="directory or URI; default: the run's validation shards")]
Output = Annotated[str | None, typer.Option(help="directory for the results; default: the run's")]
Json = Annotated[Path | None, typer.Option("--json", help="write the numbers, by class and size, and curves here too")]
Detector = Annotated[
    str,
    typer.Argument(
        metavar="WEIGHTS",
        help="run or model directory, .safetensors file, URI, or the hub's owner/name",
        callback=_check_detector,
    ),
]
