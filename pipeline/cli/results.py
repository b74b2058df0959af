"""Commands about trained weights and finished runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from refinedet.model.hub_files import check_detector, read_config
from refinedet.pipeline.cli.arguments import Address, Detector, Json, Output, Overrides, Shards, Weights
from refinedet.pipeline.evaluation.chosen_run import choose_run
from refinedet.pipeline.inference.choice import check_image_size
from refinedet.pipeline.inference.devices import check_device_name
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.directory import check_run_directory
from refinedet.pipeline.runs.errors import JobError, UserError
from refinedet.pipeline.runs.progress import ProgressDisplay

if TYPE_CHECKING:
    from collections.abc import Sequence

    from refinedet.pipeline.evaluation.diagnosis import Diagnosis
    from refinedet.pipeline.evaluation.protocols import Metrics
    from refinedet.pipeline.inference.choice import Choice
    from refinedet.pipeline.inference.predictor import Predictor
    from refinedet.pipeline.inference.sources import Source

# Torch, Ray and matplotlib are loaded inside the commands that need them: each takes seconds.

app = typer.Typer()


@app.command()
def predict(
    weights: Detector,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="images, videos, directories, patterns, URLs, .txt lists; - reads names from standard input; screen",
        ),
    ],
    output: Annotated[Path, typer.Option(help="directory for the files")] = Path("predictions"),
    format: Annotated[
        list[str] | None, typer.Option(help="pictures, frames, jsonl, coco, yolo, crops, window; may be repeated")
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="lowest score in pictures, crops and yolo; the JSON files hold all")
    ] = 0.3,
    category: Annotated[list[str] | None, typer.Option(help="keep only this one; may be repeated")] = None,
    size: Annotated[
        list[int] | None, typer.Option(min=64, help="test at this size, mirrored too, and merge; may be repeated")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1; default: a GPU where there is one")] = None,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="images at once")] = 8,
    nms_iou: Annotated[float | None, typer.Option(min=0, max=1, help="overlap at which boxes of a class merge")] = None,
    max_detections: Annotated[int | None, typer.Option(min=1, help="most objects in an image")] = None,
    class_agnostic: Annotated[
        bool, typer.Option("--class-agnostic", help="suppress overlapping boxes of different classes too")
    ] = False,
    every: Annotated[int, typer.Option(min=1, help="of videos, read one frame in so many")] = 1,
    no_labels: Annotated[bool, typer.Option("--no-labels", help="draw boxes without names and scores")] = False,
    no_scores: Annotated[bool, typer.Option("--no-scores", help="draw names without scores")] = False,
    line_width: Annotated[
        int | None, typer.Option(min=1, metavar="PIXELS", help="of drawn boxes; default: by the picture's size")
    ] = None,
) -> None:
    """Detect objects in images and videos.

    Examples: refinedet predict runs/quickstart photos/ --output found;
    find . -name '*.jpg' | refinedet predict runs/quickstart - --format coco
    """
    formats = format or ["pictures", "jsonl"]
    _check_prediction(formats, precision, device, output)
    if size and (nms_iou is not None or max_detections is not None or class_agnostic):
        raise UserError(
            "--size has a merge method of its own; remove --nms-iou, --max-detections and --class-agnostic."
        )
    from refinedet.pipeline.inference.sources import find_sources

    found = find_sources(sources, leave_out=str(output), every=every)
    if set(formats) == {"frames"} and not any(source.is_video for source in found):
        raise UserError("--format frames draws the frames of videos, and no source is one; use --format pictures.")
    from refinedet.pipeline.config.spec import Multiscale, Pass
    from refinedet.pipeline.inference.choice import BoxStyle, Choice, check_choice

    multiscale = Multiscale(passes=tuple(Pass(size=one) for one in size)) if size else None
    check_choice(weights, category or (), multiscale)
    from refinedet.pipeline.inference.predictor import Predictor  # torch, after what may be wrong

    predictor = Predictor.load(
        weights,
        device=device,
        precision=precision,
        batch_size=batch_size,
        multiscale=multiscale,
    ).selecting(nms_iou=nms_iou, max_detections=max_detections, class_agnostic=class_agnostic)
    drawing = BoxStyle(labels=not no_labels, scores=not no_scores, line_width=line_width)
    _predict(predictor, found, Choice(output, formats, threshold, category or (), drawing))


def _check_prediction(formats: Sequence[str], precision: str, device: str | None, output: Path) -> None:
    """UserError for a format, precision, device or directory that cannot be; before torch is loaded."""
    from refinedet.pipeline.inference.outputs import Outputs

    for value, known, option in (
        *((one, tuple(Outputs.FORMATS), "--format") for one in formats),
        (precision, ("auto", "fp32", "bf16", "fp16"), "--precision"),
    ):
        if value not in known:
            raise UserError(f"{option} must be one of {', '.join(known)}, received {value!r}.")
    check_device_name(device)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output must be a directory, received the file {output}.")
    if "window" in formats:
        from refinedet.pipeline.inference.window import PictureWindow

        PictureWindow().close()
    above = next(one for one in (output.absolute(), *output.absolute().parents) if one.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(f"--output {output} cannot be written, since {above} is no directory that takes files.")


def _predict(predictor: Predictor, sources: Sequence[Source], choice: Choice) -> None:
    """Detect and write, with a bar; JobError at the end where images could not be read."""
    from refinedet.pipeline.inference.predict import Tally, predict_sources

    total = sum(source.count for source in sources)
    with ProgressDisplay() as display:
        display.stage("predict", total, "images")

        def on_progress(tally: Tally) -> None:
            done = tally.images + tally.unreadable
            display.update(done, max(done, total), unit="images", objects=str(tally.objects))  # streams have no count

        tally = predict_sources(
            predictor,
            sources,
            choice,
            on_progress=on_progress,
            on_fault=lambda name, fault: display.warn(f"{name}: {fault}; passed over"),
        )
        place = f", in {choice.output}" if set(choice.formats) != {"window"} else ""
        end = "; the window was closed" if tally.ended else ""
        display.done(f"objects: {tally.objects}, images: {tally.images}{place}{end}")
    if tally.unreadable:
        raise JobError(f"{tally.unreadable} of {tally.unreadable + tally.images} images could not be read.")


@app.command()
def export(
    weights: Detector,
    output: Annotated[Path, typer.Option(help="the file; .pt2 for torch, .onnx for onnx")],
    format: Annotated[Literal["torch", "onnx"], typer.Option(help="torch.export's program, or ONNX")] = "onnx",
    height: Annotated[int | None, typer.Option(min=1, help="of the images, pixels; default: the input size")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="of the images, pixels; default: the input size")] = None,
) -> None:
    """Export a detector as ONNX or as a torch program.

    A graph of standard operators: images in, boxes and scores of every anchor out.
    Example: refinedet export runs/quickstart --output detector.onnx
    """
    if not output.parent.is_dir() or output.is_dir():
        raise UserError(f"--output must be a file in an existing directory, received {output}.")
    if output.suffix != (suffix := {"torch": ".pt2", "onnx": ".onnx"}[format]):
        raise UserError(f"--output must end in {suffix} with --format {format}, received {output}.")
    if metadata := check_detector(weights):
        check_image_size(read_config(metadata), height, width)
    from refinedet.pipeline.inference.exporting import export_weights

    typer.echo(export_weights(weights, output, format, height, width))


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="a run's directory, as in runs/quickstart")],
    output: Annotated[str, typer.Option(help="the page, where several runs are given")] = "comparison.html",
) -> None:
    """Build a run's report again; of several runs, one page."""
    for run in runs:
        check_run_directory(run)
    from refinedet.pipeline.report.report import build_report
    from refinedet.pipeline.report.run_comparison import build_comparison
    from refinedet.pipeline.report.run_data import read_runs

    paths = [storage.absolute(run) for run in runs]
    typer.echo(
        build_report(paths[0]) if len(paths) == 1 else build_comparison(read_runs(paths), storage.absolute(output))
    )


@app.command()
def evaluate(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="a run's directory")] = None,
    overrides: Overrides = None,
    detections: Annotated[str | None, typer.Option(help="instead of a run: JSON of detections")] = None,
    annotations: Annotated[str | None, typer.Option(help="instead of a run: COCO instances JSON")] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="coco, voc2007, voc2012, lvis, openimages or crowdhuman; default: as the data set"),
    ] = None,
    iou: Annotated[list[float] | None, typer.Option(help="an overlap to measure at; may be repeated")] = None,
    max_detections: Annotated[
        list[int] | None, typer.Option(help="detections of a category in an image that count; may be repeated")
    ] = None,
    category: Annotated[
        list[str] | None, typer.Option(help="of files: measure only this category; may be repeated")
    ] = None,
    single_class: Annotated[
        bool, typer.Option("--single-class", help="of files: take all categories as one, to measure only the boxes")
    ] = False,
    diagnose: Annotated[
        bool, typer.Option("--diagnose", help="of files: also what the errors are; a run has it in metrics.json")
    ] = False,
    weights: Weights = None,
    shards: Shards = None,
    output: Output = None,
    address: Address = None,
    json_file: Json = None,
) -> None:
    """Evaluate a run's weights, or a file of detections.

    Example: refinedet evaluate --detections found.json --annotations instances_val2017.json
    """
    _check_writable(json_file)
    if run and (category or single_class):
        raise UserError(
            "--category and --single-class measure files; give RUN/detections/single.json as --detections and "
            "RUN/ground_truth.json as --annotations."
        )
    if run and not (detections or annotations):
        settings = {"metric": metric, "ious": iou, "max_detections": max_detections}
        changes = [*(overrides or ()), *(f"evaluation.{name}={value}" for name, value in settings.items() if value)]
        chosen = choose_run(run, changes, weights=weights, shards=shards, output=output)
        from refinedet.pipeline.cluster.evaluate import evaluate_run

        metrics = evaluate_run(chosen, "single", weights=weights, shards=shards, output=output, address=address)
    elif detections and annotations and not run:
        from refinedet.pipeline.evaluation import file_evaluation
        from refinedet.pipeline.evaluation.metrics import evaluate as measure
        from refinedet.pipeline.evaluation.metrics import make_protocol

        protocol = make_protocol(metric or "coco", ious=iou, max_detections=max_detections)
        truth, table = file_evaluation.read_files(detections, annotations)
        if category:
            truth, table = file_evaluation.choose_categories(truth, table, category)
        if single_class:
            truth, table = file_evaluation.merge_categories(truth, table)
        metrics = measure(protocol, truth, table)
        diagnosis = file_evaluation.diagnose_files(truth, table) if diagnose else None
        _print_metrics(metrics, json_file, diagnosis)
        return
    else:
        raise UserError("evaluate takes either a run's directory, or --detections FILE and --annotations FILE.")
    _print_metrics(metrics, json_file)


@app.command()
def multiscale(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run's directory")],
    overrides: Overrides = None,
    weights: Weights = None,
    shards: Shards = None,
    output: Output = None,
    address: Address = None,
    json_file: Json = None,
) -> None:
    """Evaluate a run's weights at several scales, mirrored too."""
    _check_writable(json_file)
    chosen = choose_run(run, overrides or (), multiscale=True, weights=weights, shards=shards, output=output)
    from refinedet.pipeline.cluster.evaluate import evaluate_run

    metrics = evaluate_run(chosen, "multiscale", weights=weights, shards=shards, output=output, address=address)
    _print_metrics(metrics, json_file)


def _check_writable(json_file: Path | None) -> None:
    """Before hours of evaluation rather than after."""
    if json_file and (json_file.is_dir() or not json_file.parent.is_dir()):
        fault = "is a directory" if json_file.is_dir() else f"lies in no directory: there is no {json_file.parent}"
        raise UserError(f"--json: {json_file} {fault}; give a file in an existing directory.")


def _print_metrics(metrics: Metrics | None, json_file: Path | None, diagnosis: Diagnosis | None = None) -> None:
    """A number a line, - where there is no object to measure by; below it the diagnosis."""
    if metrics is None:
        return
    for name, value in metrics.values.items():
        typer.echo(f"{name:<6} {'-' if value < 0 else f'{value:.6f}'}")
    content = metrics.to_json()
    if diagnosis is not None:
        from refinedet.pipeline.evaluation.diagnosis_text import describe_diagnosis

        typer.echo(f"\n{describe_diagnosis(diagnosis)}")
        content["diagnosis"] = diagnosis.to_json()
    if json_file:
        json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
