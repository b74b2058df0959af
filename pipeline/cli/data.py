"""Commands about data sets and their shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from refinedet.pipeline.cli.arguments import Job, Overrides
from refinedet.pipeline.config.batches import training_sizes
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec_files import load_spec
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError

# OpenCV and webdataset are loaded inside the commands: the help text need not wait for them.

app = typer.Typer()
data_app = typer.Typer(help="Look at shards, and check them.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@app.command()
def shard(job: Job, overrides: Overrides = None) -> None:
    """Write a job's data set as shards, without a cluster.

    They go to data.shards, or into the run's directory. Example: refinedet shard JOB.yaml data.root=datasets/coco
    """
    from refinedet.pipeline.data.presence import check_data

    run = Run(load_spec(job, overrides or ()))
    check_data(run.spec)
    from refinedet.pipeline.data.shards import prepare_shards  # webdataset takes torch, which takes seconds
    from refinedet.pipeline.runs.progress import ProgressDisplay

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
            display.done(f"{shards.num_samples} images, shards: {len(shards)}, at {shards.url}")


@app.command()
def init(
    directory: Annotated[str, typer.Argument(metavar="DATA", help="directory of images and annotations")],
    output: Annotated[Path | None, typer.Option(help="the job spec to write; default: NAME.yaml here")] = None,
    name: Annotated[str | None, typer.Option(help="of the job; default: the directory's")] = None,
) -> None:
    """Write a job spec for a data set of your own.

    Recognises COCO, LVIS, VOC, YOLO, LabelMe, CVAT, Hugging Face and webdataset. Example: refinedet init photos/
    """
    import os

    from refinedet.pipeline.data.recognition import recognise
    from refinedet.pipeline.planning.initial_job import Hardware, propose_job

    found = recognise(directory)
    import torch  # after what may be wrong with the directory: it takes seconds

    hardware = Hardware(torch.cuda.device_count(), os.cpu_count() or 1)
    job = propose_job(found, hardware, name, str(output) if output else None)
    if Path(job.file).exists():
        raise UserError(f"{job.file} exists: remove it, or choose another file with --output")
    Path(job.file).write_text(job.text)
    typer.echo(f"{job.summary}\n{job.file} is written; next: refinedet launch {job.file}")


@data_app.command("show")
def data_show(
    job: Job,
    overrides: Overrides = None,
    output: Annotated[str, typer.Option(help="the picture to write")] = "samples.png",
    part: Annotated[Literal["train", "val"], typer.Option(help="which shards of the job")] = "train",
    count: Annotated[int, typer.Option(min=1, help="samples on the sheet")] = 20,
    plain: Annotated[bool, typer.Option("--plain", help="without augmentation")] = False,
    classes: Annotated[
        str | None, typer.Option(metavar="DIRECTORY", help="also write a contact sheet of objects per class there")
    ] = None,
) -> None:
    """Draw a job's samples with their boxes, as it trains.

    Example: refinedet data show JOB.yaml --output samples.png
    """
    from refinedet.pipeline.data.index import open_shards

    run = Run(load_spec(job, overrides or ()))
    spec, shards = run.spec, open_shards(storage.join(run.shards, part))
    from refinedet.pipeline.data.sheets import show_classes, show_samples  # with torch, for seconds

    plain = plain or part == "val"
    sizes, batch = training_sizes(spec), spec.training.global_batch
    if plain:
        sizes = (spec.model.input_size,)
    show_samples(shards, output, spec.data, sizes=sizes, global_batch=batch, seed=spec.seed, plain=plain, count=count)
    typer.echo(output)
    for path in show_classes(shards, classes, seed=spec.seed) if classes else ():
        typer.echo(path)


@data_app.command("stats")
def data_stats(
    job: Job,
    overrides: Overrides = None,
    json_path: Annotated[str | None, typer.Option("--json", help="write all of them, by class, here too")] = None,
) -> None:
    """Print classes, box and image sizes of a job's shards.

    Boxes beside the anchors, duplicates, and images that are in train and val.
    """
    from refinedet.pipeline.data.index import find_parts, open_shards

    run = Run(load_spec(job, overrides or ()))
    parts = find_parts(run.shards) or {"train": open_shards(storage.join(run.shards, "train"))}
    from refinedet.pipeline.data.job_statistics import job_statistics  # with torch, for seconds
    from refinedet.pipeline.data.statistics_table import statistics_rows
    from rich.console import Console
    from rich.table import Table

    statistics = job_statistics(parts, run.spec.model)
    table = Table("", *parts, box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name, values in statistics_rows(statistics):
        table.add_row(name, *values)
    console = Console(soft_wrap=True)
    console.print(table)
    for finding in statistics["findings"]:
        console.print(f"! {finding}", markup=False, highlight=False)
    if json_path:
        storage.write_json(json_path, statistics)


@data_app.command("check")
def data_check(shards: Annotated[str, typer.Argument(help="directory or URI of shards")]) -> None:
    """Verify every digest and every box of shards."""
    from refinedet.pipeline.data.index import open_shards

    open_shards(shards)
    from refinedet.pipeline.data.inspection import check_shards  # with torch, for seconds

    found = check_shards(shards)
    for fault in found.faults:
        typer.echo(str(fault))
    typer.echo(
        f"{found.num_shards} shards, {found.num_samples} images, {found.num_objects} objects: "
        + (f"{len(found.faults)} faults" if found.faults else "all digests and boxes in order")
    )
    if found.faults:
        raise typer.Exit(1)
