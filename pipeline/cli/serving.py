"""The command `serve`."""

from __future__ import annotations

import importlib.util
import os
import socket
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Annotated

import typer
from refinedet.pipeline.cli.arguments import Address, Detector
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.runs.progress import ProgressDisplay
from refinedet.pipeline.runs.stop import stop_signals

app = typer.Typer()


@app.command()
def serve(
    weights: Detector,
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0: from everywhere")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="copies of the detector")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU where there is one")] = None,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, max=64, help="images detected at once, of all requests")] = 8,
    wait: Annotated[float, typer.Option(min=0, max=1000, help="ms that an image waits for others")] = 10,
    address: Address = None,
) -> None:
    """Serve a detector over HTTP, with Ray Serve.

    A page to drop an image on, POST /predict and /invocations, /health, metrics. Ctrl-C ends it.
    Example: refinedet serve runs/quickstart --port 8000
    """
    if precision not in ("auto", "fp32", "bf16", "fp16"):
        raise UserError(f"--precision must be one of auto, fp32, bf16, fp16, received {precision!r}.")
    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda, received {device!r}.")
    for package in ("starlette", "uvicorn", "httptools"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"`refinedet serve` needs the package {package}; pip install 'refinedet[serve]'.")
    check_port(host, port)
    # Bad weights are met before Ray starts, in a process whose half gigabyte of torch is given back.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        on_gpu = pool.submit(_is_on_gpu, weights, device, precision).result()
    from refinedet.pipeline.cluster.detection_server import Server, serve_detector
    from refinedet.pipeline.cluster.detection_service import Settings

    settings = Settings(device=device, precision=precision, batch_size=batch_size, wait_s=wait / 1000)
    server = Server(host, port, replicas, float(on_gpu), address)
    path = storage.absolute(weights) if os.path.exists(weights) else weights  # replicas run in other directories
    with ProgressDisplay() as display, stop_signals(display.note, "  stopping") as stop:
        serve_detector(path, settings, server, stop=stop, report=display.note)


def _is_on_gpu(weights: str, device: str | None, precision: str) -> bool:
    """Load a detector; UserError where that fails."""
    from refinedet.pipeline.inference.predictor import Predictor

    return Predictor.load(weights, device=device, precision=precision).model.mean.is_cuda


def check_port(host: str, port: int) -> None:
    """UserError where the address cannot be listened on."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise UserError(
            f"Nothing can listen on {host}:{port} ({error.strerror or error}); give another --host or --port."
        ) from None
