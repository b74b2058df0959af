"""Export of trained weights as a torch.export program or an ONNX graph, checked against the detector."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Literal

import torch
from refinedet.model import RefineDet
from refinedet.model.export import DetectionGraph, export_onnx, export_program
from refinedet.model.hub import detector_metadata
from refinedet.pipeline.inference.choice import check_image_size
from refinedet.pipeline.inference.predictor import Predictor
from refinedet.pipeline.runs.errors import JobError, UserError
from torch import Tensor

ExportFormat = Literal["torch", "onnx"]
_TOLERANCE = 1e-3
"""of boxes in pixels and of scores: kernels sum in other orders"""


def export_weights(
    weights: str, output: Path, kind: ExportFormat, height: int | None = None, width: int | None = None
) -> str:
    """Export a detector and compare the graph with it on a random batch; return one line for the terminal.

    weights        as `Predictor.load`
    height, width  of the images, pixels; default: the model's input size
    output         a file in a directory that exists
    Raises UserError for a size that the model does not take or a missing package, and JobError where the graph does not
    compute what the detector does.
    """
    model = Predictor.load(weights, device="cpu", precision="fp32").model.to(memory_format=torch.contiguous_format)
    height, width = check_image_size(model.config, height, width)
    example = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / output.name
        write = _write_program if kind == "torch" else _write_onnx
        found = write(model, file, example)
        with torch.no_grad():
            expected = DetectionGraph(model).eval()(example)
            difference = max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))
        if not difference <= _TOLERANCE:
            raise JobError(f"the exported graph differs from the detector by {difference:.2g}; {output} is not written")
        shutil.copyfile(file, output)
    return (
        f"{output}: images [B, 3, {height}, {width}] uint8 RGB -> boxes [B, {len(model.anchors(example))}, 4], "
        f"scores [B, {len(model.anchors(example))}, {model.config.num_classes}]; differs from the detector by "
        f"{difference:.1g} at most"
    )


def _write_program(model: RefineDet, file: Path, example: Tensor) -> tuple[Tensor, ...]:
    """Write a torch.export program with the weights' metadata; return its outputs on the example."""
    program = export_program(model, example.shape[2], example.shape[3])
    torch.export.save(program, file, extra_files=detector_metadata(model))
    return torch.export.load(file).module()(example)


def _write_onnx(model: RefineDet, file: Path, example: Tensor) -> tuple[Tensor, ...]:
    """Write an ONNX graph with the weights' metadata; return its outputs on the example."""
    try:
        import onnx  # the extra `export`
        import onnxruntime
    except ImportError as error:
        raise UserError(f"--format onnx needs the package {error.name}; pip install 'refinedet[export]'.") from None
    export_onnx(model, file, example.shape[2], example.shape[3])
    graph = onnx.load(file)
    onnx.helper.set_model_props(graph, detector_metadata(model))
    onnx.save(graph, file)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return tuple(torch.from_numpy(array) for array in session.run(None, {"images": example.numpy()}))
