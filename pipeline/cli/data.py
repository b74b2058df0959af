"""Commands about data sets and their shards."""

from __future__ import annotations

from typing import Annotated

import typer
from refinedet.pipeline.cli.arguments import Job, Overrides
from refinedet.pipeline.config.files import load_spec
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec import Augmentation
from refinedet.pipeline.runs import storage

# OpenCV and webdataset are loaded inside the commands: the help text need not wait for them.

app = typer.Typer()
data_app = typer.Typer(help="Look at shards, and check them.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@app.command()
def shard(job: Job, overrides: Overrides = None) -> None:
    """Write a job's data set as shards (data.shards, or the run's directory), without a cluster."""
    from refinedet.pipeline.cluster.progress import ProgressDisplay
    from refinedet.pipeline.data.shards import prepare_shards

    run = Run(load_spec(job, overrides or ()))
    with ProgressDisplay() as display:
        for part in ("train", "val"):
            if not getattr(run.spec.data, part):
                continue
            display.stage(part, unit="images")
            shards = prepare_shards(
                run.spec.data,
                part,
                storage.join(run.shards, part),
                on_progress=lambda done, total: display.update(done, total, unit="images"),
            )
            display.done(f"{shards.num_samples} images in {len(shards)} shards at {shards.url}")


@data_app.command("show")
def data_show(
    shards: Annotated[str, typer.Argument(help="directory or URI of shards, as in runs/quickstart/shards/train")],
    output: Annotated[str, typer.Option(help="the picture to write")] = "samples.png",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    plain: Annotated[bool, typer.Option("--plain", help="the images as they are, without augmentation")] = False,
) -> None:
    """Draw samples on one sheet with their boxes, augmented as training sees them."""
    from refinedet.pipeline.data.index import open_shards
    from refinedet.pipeline.data.inspection import show_samples

    show_samples(open_shards(shards), output, seed=seed, augmentation=None if plain else Augmentation())
    typer.echo(output)


@data_app.command("check")
def data_check(shards: Annotated[str, typer.Argument(help="directory or URI of shards")]) -> None:
    """Verify every digest and every box."""
    from refinedet.pipeline.data.inspection import check_shards

    found = check_shards(shards)
    for fault in found.faults:
        typer.echo(str(fault))
    typer.echo(
        f"{found.num_shards} shards, {found.num_samples} images, {found.num_objects} objects: "
        + (f"{len(found.faults)} faults" if found.faults else "all digests and boxes in order")
    )
    if found.faults:
        raise typer.Exit(1)
