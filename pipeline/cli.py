"""The command `refinedet`. Each command reads its arguments, calls one function, and says what came of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import JobError, StoppedError, UserError
from pipeline.spec_files import load_spec

app = typer.Typer(
    help="RefineDet++ as a distributed training pipeline.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Look at shards, and check them.", no_args_is_help=True)
app.add_typer(data_app, name="data")

Job = Annotated[str, typer.Argument(metavar="JOB.yaml", help="job spec; see jobs/")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="training.epochs=3 and the like")]
Address = Annotated[str | None, typer.Option(help="Ray cluster, HOST:PORT or ray://HOST:PORT; default: run here")]


@app.command()
def launch(
    job: Job,
    overrides: Overrides = None,
    address: Address = None,
    stages: Annotated[str | None, typer.Option(help="comma-separated; default: all of them")] = None,
) -> None:
    """Run a job's stages here, or on the cluster at ADDR; what is done already is not done again."""
    from pipeline.cluster.launch import STAGES, launch
    from pipeline.cluster.progress import ProgressDisplay

    spec = load_spec(job, overrides or ())
    with ProgressDisplay() as display:
        launch(spec, address=address, stages=stages.split(",") if stages else STAGES, display=display)


@app.command()
def plan(job: Job, overrides: Overrides = None) -> None:
    """Resolve and check a job, and estimate batch, memory, time and storage; needs no cluster and no GPU."""
    from pipeline.cluster.plan import print_plan

    print_plan(load_spec(job, overrides or ()))


@app.command()
def shard(job: Job, overrides: Overrides = None) -> None:
    """Write a job's data set as shards (data.shards, or the run's folder), without a cluster."""
    from pipeline import storage
    from pipeline.cluster.progress import ProgressDisplay
    from pipeline.cluster.run import Run
    from pipeline.data import prepare_shards

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


@app.command()
def predict(
    weights: Annotated[str, typer.Argument(help="weights.safetensors, beside its run's spec.yaml, or a run's folder")],
    images: Annotated[list[Path], typer.Argument(help="image files")],
    output: Annotated[Path, typer.Option(help="folder for the pictures and detections.json")],
    threshold: Annotated[float, typer.Option(help="lowest score that is drawn")] = 0.3,
) -> None:
    """Detect objects in images: a picture of each with its boxes, and all boxes as JSON."""
    from pipeline.cluster.predict import predict_images

    for line in predict_images(weights, images, output, threshold):
        typer.echo(line)


@app.command()
def report(run: Annotated[str, typer.Argument(metavar="RUN", help="a run's folder, as in runs/quickstart")]) -> None:
    """Build the report of a run again."""
    from pipeline import storage
    from pipeline.tracking.report import build_report

    if not storage.exists(storage.join(run, "spec.yaml")):
        raise UserError(f"{run!r} is no run's folder (it has no spec.yaml); give one, as in runs/quickstart.")
    typer.echo(build_report(storage.absolute(run)))


@app.command()
def evaluate(
    detections: Annotated[str, typer.Option(help="COCO results JSON")],
    annotations: Annotated[str, typer.Option(help="COCO instances JSON")],
    json_file: Annotated[Path | None, typer.Option("--json", help="write the numbers here too")] = None,
) -> None:
    """COCO's twelve numbers of a detections file."""
    from pipeline.evaluation import METRIC_NAMES, evaluate_coco
    from pipeline.evaluation.truth import read_json_file

    metrics = evaluate_coco(annotations, read_json_file(detections, "detections"))
    for name in METRIC_NAMES:
        typer.echo(f"{name:<6} {metrics.values[name]:.6f}")
    if json_file:
        json_file.write_text(json.dumps(metrics.to_json(), indent=1) + "\n", encoding="utf-8")


@app.command()
def doctor() -> None:
    """What is installed and built, what is missing, and what to do about it."""
    from pipeline.cluster.doctor import examine

    findings = examine()
    for finding in findings:
        typer.echo(f"{finding.mark} {finding.name:<12} {finding.text}")
    if any(finding.needed for finding in findings):
        raise typer.Exit(1)


@app.command()
def schema() -> None:
    """JSON schema of the job spec, for editors."""
    from pipeline.spec import JobSpec

    typer.echo(json.dumps(JobSpec.model_json_schema(), indent=1))


@data_app.command("show")
def data_show(
    shards: Annotated[str, typer.Argument(help="folder or URI of shards, as in runs/quickstart/shards/train")],
    output: Annotated[str, typer.Option(help="the picture to write")] = "samples.png",
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Draw augmented samples with their boxes on one sheet."""
    from pipeline.data import open_shards, show_samples

    show_samples(open_shards(shards), output, seed=seed)
    typer.echo(output)


@data_app.command("check")
def data_check(shards: Annotated[str, typer.Argument(help="folder or URI of shards")]) -> None:
    """Verify every digest and every box."""
    from pipeline.data import check_shards

    found = check_shards(shards)
    typer.echo(str(found))
    if not found.ok:
        raise typer.Exit(1)


def main() -> None:
    """Entry point: 0 done; 1 failed; 2 the user's mistake; 130 stopped, and saved."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        _say(error)
        sys.exit(2)
    except StoppedError as error:
        _say(f"stopped: {error}")
        sys.exit(130)
    except JobError as error:
        _say(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _say(error: BaseException | str) -> None:
    typer.echo(f"refinedet: {' '.join(str(error).split())}", err=True)


if __name__ == "__main__":
    main()
