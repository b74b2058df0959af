"""The command `refinedet`. Each command reads its arguments, calls one function, and says what came of it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from refinedet.pipeline.config.files import load_spec
from refinedet.pipeline.runs.errors import JobError, UserError, describe_end

if TYPE_CHECKING:
    from refinedet.pipeline.cluster.jobs import JobsClient
    from refinedet.pipeline.evaluation.protocols import Metrics

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
Address = Annotated[
    str | None, typer.Option(help="Ray cluster that this machine is a node of, HOST:PORT; default: run here")
]

Dashboard = Annotated[
    str | None, typer.Option("--address", help="the cluster's dashboard, http://HOST:8265; default: on this machine")
]
Weights = Annotated[str | None, typer.Option(help="other weights, file or URI; default: the run's")]
Shards = Annotated[str | None, typer.Option(help="other shards, folder or URI; default: the run's validation shards")]
Output = Annotated[str | None, typer.Option(help="folder for the results; default: the run's")]
Json = Annotated[Path | None, typer.Option("--json", help="write the numbers, by class and size, and curves here too")]
RunOrJob = Annotated[str, typer.Argument(metavar="NAME", help="a run's name (its last job), or a job's id")]


@app.command()
def launch(
    job: Job,
    overrides: Overrides = None,
    address: Address = None,
    stages: Annotated[str | None, typer.Option(help="comma-separated; default: all of them")] = None,
    check_only: Annotated[bool, typer.Option("--preflight", help="place the workers, check them, and end")] = False,
) -> None:
    """Run a job's stages here, or on the cluster at ADDR; what is done already is not done again."""
    from refinedet.pipeline.cluster.launch import STAGES, launch
    from refinedet.pipeline.cluster.preflight import preflight
    from refinedet.pipeline.cluster.progress import ProgressDisplay

    spec = load_spec(job, overrides or ())
    with ProgressDisplay() as display:
        if check_only:
            preflight(spec, address=address, display=display)
            return
        launch(spec, address=address, stages=stages.split(",") if stages else STAGES, display=display)


@app.command()
def submit(
    job: Job,
    overrides: Overrides = None,
    address: Dashboard = None,
    follow: Annotated[bool, typer.Option("--follow", help="print its logs until it ends")] = False,
) -> None:
    """Submit a job to a Ray cluster and print its id; a run that stopped goes on."""
    from refinedet.pipeline.cluster.jobs import JobsClient

    spec = load_spec(job, overrides or ())
    client = JobsClient(address)
    job_id = client.submit(spec)
    typer.echo(job_id)
    if follow:
        _follow(client, job_id)


@app.command()
def resume(name: RunOrJob, address: Dashboard = None) -> None:
    """Submit a run's last job again; it goes on from its last checkpoint."""
    from refinedet.pipeline.cluster.jobs import JobsClient

    typer.echo(JobsClient(address).resume(name))


@app.command()
def status(name: RunOrJob, address: Dashboard = None) -> None:
    """How a submitted job is doing."""
    from refinedet.pipeline.cluster.jobs import JobsClient

    client = JobsClient(address)
    found = client.find(name)
    typer.echo(f"{found.id}  {found.status.lower()}  run {found.run} at {found.home}")
    lines = [line for line in client.read_logs(found.id).splitlines() if line.strip()]
    for line in lines[-5:]:
        typer.echo(f"  {line}")


@app.command(name="list")
def list_jobs(address: Dashboard = None) -> None:
    """The jobs that were submitted to a cluster."""
    from refinedet.pipeline.cluster.jobs import JobsClient
    from refinedet.pipeline.runs.durations import describe_duration

    for found in JobsClient(address).list():
        took = describe_duration((found.ended or time.time()) - found.started) if found.started else "not started"
        typer.echo(f"{found.id:<40} {found.status.lower():<10} {took}")


@app.command()
def logs(
    name: RunOrJob,
    address: Dashboard = None,
    follow: Annotated[bool, typer.Option("--follow", help="until it ends")] = False,
) -> None:
    """What a submitted job has printed."""
    from refinedet.pipeline.cluster.jobs import JobsClient

    client = JobsClient(address)
    if follow:
        _follow(client, name)
    else:
        typer.echo(client.read_logs(name), nl=False)


def _follow(client: JobsClient, name: str) -> None:
    for chunk in client.follow_logs(name):
        typer.echo(chunk, nl=False)
    found = client.wait(name)
    if found.status != "SUCCEEDED":
        raise JobError(f"job {found.id} {found.status.lower()}: {found.message}")


@app.command()
def stop(name: RunOrJob, address: Dashboard = None) -> None:
    """Ask a submitted job to save and end, and wait until it has."""
    from refinedet.pipeline.cluster.jobs import JobsClient

    found = JobsClient(address).stop(name)
    typer.echo(f"{found.id}  {found.status.lower()}; `refinedet resume {found.run}` goes on")


@app.command()
def plan(
    job: Job,
    overrides: Overrides = None,
    device: Annotated[str | None, typer.Option(help="CPU, A100, H100 or H200")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="instead of cluster.workers")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Resolve and check a job, and estimate batch, memory, time and storage; needs no cluster and no GPU."""
    from refinedet.pipeline.planning.plan import print_plan

    print_plan(load_spec(job, overrides or ()), device=device, nodes=nodes, gpus_per_node=gpus_per_node)


@app.command()
def shard(job: Job, overrides: Overrides = None) -> None:
    """Write a job's data set as shards (data.shards, or the run's folder), without a cluster."""
    from refinedet.pipeline.cluster.progress import ProgressDisplay
    from refinedet.pipeline.config.run import Run
    from refinedet.pipeline.data.shards import prepare_shards
    from refinedet.pipeline.runs import storage

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
    from refinedet.pipeline.inference.predict import predict_images

    for line in predict_images(weights, images, output, threshold):
        typer.echo(line)


@app.command()
def report(run: Annotated[str, typer.Argument(metavar="RUN", help="a run's folder, as in runs/quickstart")]) -> None:
    """Build the report of a run again."""
    from refinedet.pipeline.report.report import build_report
    from refinedet.pipeline.runs import storage

    if not storage.exists(storage.join(run, "spec.yaml")):
        raise UserError(f"{run!r} is no run's folder (it has no spec.yaml); give one, as in runs/quickstart.")
    typer.echo(build_report(storage.absolute(run)))


@app.command()
def evaluate(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="a run's folder")] = None,
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
    weights: Weights = None,
    shards: Shards = None,
    output: Output = None,
    address: Address = None,
    json_file: Json = None,
) -> None:
    """COCO's twelve numbers or VOC's mAP, of a run's weights or of a detections file."""
    _check_writable(json_file)
    if run and not (detections or annotations):
        from refinedet.pipeline.cluster.evaluate import evaluate_run

        settings = {"metric": metric, "ious": iou, "max_detections": max_detections}
        changes = [*(overrides or ()), *(f"evaluation.{name}={value}" for name, value in settings.items() if value)]
        metrics = evaluate_run(
            run, "single", overrides=changes, weights=weights, shards=shards, output=output, address=address
        )
    elif detections and annotations and not run:
        from refinedet.pipeline.evaluation.files import evaluate_files
        from refinedet.pipeline.evaluation.metrics import make_protocol

        protocol = make_protocol(metric or "coco", ious=iou, max_detections=max_detections)
        metrics = evaluate_files(detections, annotations, protocol)
    else:
        raise UserError("evaluate takes either a run's folder, or --detections FILE and --annotations FILE.")
    _print_metrics(metrics, json_file)


@app.command()
def multiscale(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run's folder")],
    overrides: Overrides = None,
    weights: Weights = None,
    shards: Shards = None,
    output: Output = None,
    address: Address = None,
    json_file: Json = None,
) -> None:
    """The numbers of a run's weights, tested at several scales and mirrored; what it costs is said first."""
    _check_writable(json_file)
    from refinedet.pipeline.cluster.evaluate import evaluate_run

    metrics = evaluate_run(
        run, "multiscale", overrides=overrides or (), weights=weights, shards=shards, output=output, address=address
    )
    _print_metrics(metrics, json_file)


def _check_writable(json_file: Path | None) -> None:
    """Before hours of evaluation rather than after."""
    if json_file and (json_file.is_dir() or not json_file.parent.is_dir()):
        fault = "is a folder" if json_file.is_dir() else f"lies in no folder: there is no {json_file.parent}"
        raise UserError(f"--json: {json_file} {fault}; give a file in a folder that is there.")


def _print_metrics(metrics: Metrics | None, json_file: Path | None) -> None:
    if metrics is None:
        return
    for name, value in metrics.values.items():
        typer.echo(f"{name:<6} {value:.6f}")
    if json_file:
        json_file.write_text(json.dumps(metrics.to_json(), indent=1) + "\n", encoding="utf-8")


@app.command()
def render(
    target: Annotated[str, typer.Argument(metavar="kuberay", help="what to render for")],
    job: Job,
    overrides: Overrides = None,
    image: Annotated[str, typer.Option(help="container image of infra/Dockerfile")] = "refinedet:latest",
    kind: Annotated[str, typer.Option(help="job: ends with its cluster; cluster: stays")] = "job",
    namespace: Annotated[str | None, typer.Option(help="default: kubectl's")] = None,
    queue: Annotated[str | None, typer.Option(help="Kueue LocalQueue")] = None,
    spot: Annotated[str | None, typer.Option(help="gke, eks or karpenter: workers on its spot nodes")] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="a training pod fills a node")] = 8,
    memory_per_worker_gib: Annotated[int, typer.Option(min=1, help="of each training worker")] = 32,
    volume_claim: Annotated[str | None, typer.Option(help="PersistentVolumeClaim mounted at /shared")] = None,
    service_account: Annotated[str | None, typer.Option(help="of the pods, for access to storage without keys")] = None,
    retries: Annotated[int, typer.Option(min=0, help="new clusters after a failure; each resumes the run")] = 3,
) -> None:
    """A job spec as Kubernetes manifests, for `kubectl apply -f -`."""
    from refinedet.pipeline.cluster.render import KubeRay, render_kuberay

    if target != "kuberay":
        raise UserError(f"There is nothing to render for {target!r}; there is kuberay.")
    options = KubeRay(
        image=image,
        kind=kind,  # type: ignore[arg-type]  # `render_kuberay` says which there are
        namespace=namespace,
        queue=queue,
        spot=spot,  # type: ignore[arg-type]
        gpus_per_node=gpus_per_node,
        memory_per_worker_gib=memory_per_worker_gib,
        volume_claim=volume_claim,
        service_account=service_account,
        retries=retries,
    )
    typer.echo(render_kuberay(load_spec(job, overrides or ()), options), nl=False)


@app.command()
def drill(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="or `all`, the default; `list`")
    ] = None,
) -> None:
    """Break small real jobs on purpose, and see them recover."""
    from refinedet.pipeline.drills.bench import Check, run_drills
    from refinedet.pipeline.drills.cases import DRILLS
    from refinedet.pipeline.runs.durations import describe_duration

    if names == ["list"]:
        for name, case in DRILLS.items():
            typer.echo(f"{name:<22} {case.__doc__}")
        return
    names = list(DRILLS) if names in (None, [], ["all"]) else names
    for name in names:
        if name not in DRILLS:
            raise UserError(f"There is no drill {name!r}; there are {', '.join(DRILLS)}.")

    def report(name: str, seconds: float, checks: list[Check]) -> None:
        passed = all(check.passed for check in checks)
        typer.echo(f"{'✓' if passed else '✗'} {name}  {describe_duration(seconds)}")
        for check in checks:
            mark = " " if check.passed else "✗"
            typer.echo(f"  {mark} {check.what}: expected {check.expected}; seen {check.seen}")

    if not run_drills(names, report):
        raise JobError("a drill failed; its runs are kept in the temporary folder refinedet-drill-*")


@app.command()
def doctor() -> None:
    """What is installed and built, what is missing, and what to do about it."""
    from refinedet.pipeline.planning.doctor import examine

    findings = examine()
    for finding in findings:
        typer.echo(f"{finding.mark} {finding.name:<12} {finding.text}")
    if any(finding.needed for finding in findings):
        raise typer.Exit(1)


@app.command()
def schema() -> None:
    """JSON schema of the job spec, for editors."""
    from refinedet.pipeline.config.spec import JobSpec

    typer.echo(json.dumps(JobSpec.model_json_schema(), indent=1))


@data_app.command("show")
def data_show(
    shards: Annotated[str, typer.Argument(help="folder or URI of shards, as in runs/quickstart/shards/train")],
    output: Annotated[str, typer.Option(help="the picture to write")] = "samples.png",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    plain: Annotated[bool, typer.Option("--plain", help="the images as they are, without augmentation")] = False,
) -> None:
    """Draw samples on one sheet with their boxes, augmented as training sees them."""
    from refinedet.pipeline.config.spec import Augmentation
    from refinedet.pipeline.data.index import open_shards
    from refinedet.pipeline.data.inspection import show_samples

    show_samples(open_shards(shards), output, seed=seed, augmentation=None if plain else Augmentation())
    typer.echo(output)


@data_app.command("check")
def data_check(shards: Annotated[str, typer.Argument(help="folder or URI of shards")]) -> None:
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


def main() -> None:
    """Entry point: 0 done; 1 failed; 2 the user's mistake; 130 stopped, and saved."""
    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        end = describe_end(error)
        if end is None:
            raise
        typer.echo(f"refinedet: {end.sentence}", err=True)
        sys.exit(end.status)


if __name__ == "__main__":
    main()
