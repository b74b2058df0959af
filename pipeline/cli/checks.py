"""Commands that check a job or an installation, and start nothing."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer
from refinedet.pipeline.cli.arguments import Job, Overrides
from refinedet.pipeline.config.checks import check_spec
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.config.spec_files import load_spec
from refinedet.pipeline.planning.doctor import examine

app = typer.Typer()


@app.command()
def plan(
    job: Job,
    overrides: Overrides = None,
    device: Annotated[str | None, typer.Option(help="CPU, A100, H100 or H200")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="instead of cluster.workers")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Check a job; estimate its memory, time and storage.

    Needs no cluster and no GPU. Example: refinedet plan coco_refinedet1024_resnet101 --nodes 2 --device A100
    """
    spec = load_spec(job, overrides or ())
    check_spec(spec)
    if not (device or nodes or gpus_per_node):  # a plan for other machines, which may see other data
        from refinedet.pipeline.data.presence import check_data

        check_data(spec)
    from refinedet.pipeline.planning.plan import print_plan  # torch and timm, for seconds

    print_plan(spec, device=device, nodes=nodes, gpus_per_node=gpus_per_node)


@app.command()
def doctor() -> None:
    """Check the installation: what is missing, and the remedy."""
    findings = examine()
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
