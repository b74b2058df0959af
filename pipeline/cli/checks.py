"""Commands that check a job or an installation, and start nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from refinedet.pipeline.cli.arguments import Job, Overrides
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.config.spec_checks import check_spec
from refinedet.pipeline.config.spec_files import load_spec
from refinedet.pipeline.planning.calibration import DEFAULT_FILE, save_calibration
from refinedet.pipeline.planning.device_speeds import find_device
from refinedet.pipeline.planning.doctor import check_installation
from refinedet.pipeline.runs.errors import UserError

app = typer.Typer()


@app.command()
def plan(
    job: Job,
    overrides: Overrides = None,
    device: Annotated[str | None, typer.Option(help="CPU, A100, H100 or H200")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="instead of cluster.workers")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1)] = None,
    price_per_gpu_hour: Annotated[float | None, typer.Option(min=0, help="dollars")] = None,
    node_mtbf_hours: Annotated[float, typer.Option(min=0.1, help="between two losses of a node")] = 6300.0,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="measure this machine first, for minutes")] = False,
    calibration: Annotated[
        str | None, typer.Option(metavar="FILE", help=f"measured rates; default: {DEFAULT_FILE}")
    ] = None,
) -> None:
    """Check a job; estimate its memory, time, price and storage.

    Needs no cluster and no GPU. Example: refinedet plan coco_refinedet1024_resnet101 --nodes 2 --device A100
    """
    spec = load_spec(job, overrides or ())
    check_spec(spec)
    if device:
        find_device(device)
    if calibration and not calibrate and not Path(calibration).expanduser().is_file():
        raise UserError(f"--calibration: there is no file {calibration}; write one with --calibrate.")
    if not (device or nodes or gpus_per_node):  # a plan for other machines, which may see other data
        from refinedet.pipeline.data.presence import check_data

        check_data(spec)
    from refinedet.pipeline.planning.plan import Assumptions, print_plan  # torch and timm, for seconds

    if calibrate:
        from refinedet.pipeline.planning.measured_run import calibrate as measure

        typer.echo("Calibrating: a few steps of this job's model on drawn images, on this machine.", err=True)
        save_calibration(calibration or DEFAULT_FILE, measure(spec))
    print_plan(
        spec,
        Assumptions(
            device=device,
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            price_per_gpu_hour=price_per_gpu_hour,
            node_mtbf_hours=node_mtbf_hours,
            calibrations=calibration or DEFAULT_FILE,
            elsewhere=calibration is not None,
        ),
    )


@app.command()
def doctor() -> None:
    """Check the installation: what is missing, and the remedy."""
    findings = check_installation()
    for finding in findings:
        typer.echo(f"{finding.mark} {finding.name:<12} {finding.text}")
    if any(finding.needed for finding in findings):
        raise typer.Exit(1)


@app.command()
def schema(
    format: Annotated[
        Literal["json", "markdown"], typer.Option(help="json: for editors; markdown: docs/job-spec.md")
    ] = ("json"),
) -> None:
    """Print the schema of the job spec, for editors or people."""
    if format == "markdown":
        from refinedet.pipeline.config.reference import describe_spec

        typer.echo(describe_spec(), nl=False)
    else:
        typer.echo(json.dumps(JobSpec.model_json_schema(), indent=1))
