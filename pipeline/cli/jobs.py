"""Commands that run jobs, here or on a cluster."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Annotated

import typer
from refinedet.pipeline.cli.arguments import Address, Dashboard, Job, Overrides, RunOrJob
from refinedet.pipeline.cli.comparisons import print_sweep
from refinedet.pipeline.config.spec_files import load_spec
from refinedet.pipeline.config.sweep_spec import load_sweep
from refinedet.pipeline.runs.durations import describe_duration
from refinedet.pipeline.runs.errors import JobError, UserError

if TYPE_CHECKING:
    from refinedet.pipeline.cluster.jobs_client import JobsClient

# Ray is loaded inside the commands that need it: it takes a second, and the others run where it is not installed.

app = typer.Typer()


@app.command()
def launch(
    job: Job,
    overrides: Overrides = None,
    address: Address = None,
    stages: Annotated[str | None, typer.Option(help="comma-separated; default: all of them")] = None,
    check_only: Annotated[bool, typer.Option("--preflight", help="place the workers, check them, and end")] = False,
) -> None:
    """Run a job's stages, here or on a cluster.

    A stage that is done is not done again, so the same command resumes a job that stopped.
    Example: refinedet launch quickstart training.epochs=3
    """
    from refinedet.pipeline.cluster.launch import launch
    from refinedet.pipeline.runs.progress import ProgressDisplay

    spec = load_spec(job, overrides or ())
    with ProgressDisplay() as display:
        if check_only:
            from refinedet.pipeline.cluster.preflight import preflight

            preflight(spec, address=address, display=display)
            return
        chosen = {"stages": stages.split(",")} if stages is not None else {}
        launch(spec, address=address, display=display, **chosen)


@app.command()
def sweep(
    path: Annotated[str, typer.Argument(metavar="SWEEP.yaml", help="variants of a job: a file or a URI")],
    overrides: Overrides = None,
    address: Address = None,
) -> None:
    """Run variants of a job with several seeds, and compare them.

    The same command resumes what stopped. Example: refinedet sweep jobs/sweeps/table2_drawn.yaml
    """
    from refinedet.pipeline.cluster.sweep import run_sweep
    from refinedet.pipeline.runs.progress import ProgressDisplay

    found = load_sweep(path, overrides or ())
    try:
        with ProgressDisplay() as display:
            run_sweep(found, address=address, display=display)
    finally:
        with contextlib.suppress(UserError):  # nothing was evaluated yet
            print_sweep(found)


@app.command()
def submit(
    job: Job,
    overrides: Overrides = None,
    address: Dashboard = None,
    follow: Annotated[bool, typer.Option("--follow", help="print its logs until it ends")] = False,
) -> None:
    """Submit a job to a Ray cluster and print its id.

    A run that stopped is resumed. Example: refinedet submit JOB.yaml --address http://HEAD:8265 --follow
    """
    from refinedet.pipeline.cluster.jobs_client import JobsClient

    spec = load_spec(job, overrides or ())
    client = JobsClient(address)
    job_id = client.submit(spec)
    typer.echo(job_id)
    if follow:
        _follow(client, job_id)


@app.command()
def resume(name: RunOrJob, address: Dashboard = None) -> None:
    """Submit a run's last job again, to resume it."""
    from refinedet.pipeline.cluster.jobs_client import JobsClient

    typer.echo(JobsClient(address).resume(name))


@app.command()
def status(name: RunOrJob, address: Dashboard = None) -> None:
    """Show the status of a submitted job."""
    from refinedet.pipeline.cluster.jobs_client import JobsClient

    client = JobsClient(address)
    found = client.find(name)
    typer.echo(f"{found.id}  {found.status.lower()}  run {found.run} at {found.home}")
    lines = [line for line in client.read_logs(found.id).splitlines() if line.strip()]
    for line in lines[-5:]:
        typer.echo(f"  {line}")


@app.command(name="list")
def list_jobs(address: Dashboard = None) -> None:
    """List the jobs that were submitted to a cluster."""
    from refinedet.pipeline.cluster.jobs_client import JobsClient

    for found in JobsClient(address).list():
        took = describe_duration((found.ended or time.time()) - found.started) if found.started else "not started"
        typer.echo(f"{found.id:<40} {found.status.lower():<10} {took}")


@app.command()
def logs(
    name: RunOrJob,
    address: Dashboard = None,
    follow: Annotated[bool, typer.Option("--follow", help="until it ends")] = False,
) -> None:
    """Print the output of a submitted job."""
    from refinedet.pipeline.cluster.jobs_client import JobsClient

    client = JobsClient(address)
    if follow:
        _follow(client, name)
    else:
        typer.echo(client.read_logs(name), nl=False)


@app.command()
def stop(name: RunOrJob, address: Dashboard = None) -> None:
    """Make a submitted job save and end; wait until it has."""
    from refinedet.pipeline.cluster.jobs_client import JobsClient

    found = JobsClient(address).stop(name)
    typer.echo(f"{found.id}  {found.status.lower()}; `refinedet resume {found.run}` resumes it")


@app.command()
def render(
    target: Annotated[str, typer.Argument(metavar="kuberay", help="what to render for")],
    job: Job,
    overrides: Overrides = None,
    image: Annotated[str, typer.Option(help="container image of infra/Dockerfile")] = "refinedet:latest",
    kind: Annotated[str, typer.Option(help="job: ends with its cluster; cluster: stays")] = "job",
    namespace: Annotated[str | None, typer.Option(help="default: kubectl's")] = None,
    queue: Annotated[str | None, typer.Option(help="Kueue LocalQueue")] = None,
    spot: Annotated[str | None, typer.Option(help="gke, eks, karpenter or aks: workers on its spot nodes")] = None,
    efa_per_node: Annotated[int, typer.Option(min=0, help="AWS fabric adapters of a node: p4d 4, p5 32")] = 0,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="a training pod fills a node")] = 8,
    memory_per_worker_gib: Annotated[int, typer.Option(min=1, help="of each training worker")] = 32,
    volume_claim: Annotated[str | None, typer.Option(help="PersistentVolumeClaim mounted at /shared")] = None,
    service_account: Annotated[str | None, typer.Option(help="of the pods, for access to storage without keys")] = None,
    retries: Annotated[int, typer.Option(min=0, help="new clusters after a failure; each resumes the run")] = 3,
    network_policy: Annotated[bool, typer.Option("--network-policy", help="refuse connections from elsewhere")] = False,
    tls: Annotated[bool, typer.Option("--tls", help="encrypt what Ray processes send each other")] = False,
) -> None:
    """Print a job as Kubernetes manifests for KubeRay.

    Example: refinedet render kuberay JOB.yaml --image REGISTRY/refinedet:1 | kubectl apply -f -
    """
    from refinedet.pipeline.cluster.render import KubeRay, render_kuberay

    if target != "kuberay":
        raise UserError(f"There is nothing to render for {target!r}; there is kuberay.")
    options = KubeRay(
        image=image,
        kind=kind,  # type: ignore[arg-type]  # `render_kuberay` checks it
        namespace=namespace,
        queue=queue,
        spot=spot,  # type: ignore[arg-type]
        efa_per_node=efa_per_node,
        gpus_per_node=gpus_per_node,
        memory_per_worker_gib=memory_per_worker_gib,
        volume_claim=volume_claim,
        service_account=service_account,
        retries=retries,
        network_policy=network_policy,
        tls=tls,
    )
    typer.echo(render_kuberay(load_spec(job, overrides or ()), options), nl=False)


def _follow(client: JobsClient, name: str) -> None:
    for chunk in client.follow_logs(name):
        typer.echo(chunk, nl=False)
    found = client.wait(name)
    if found.status != "SUCCEEDED":
        raise JobError(f"job {found.id} {found.status.lower()}: {found.message}")
