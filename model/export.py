"""The detector as a graph of standard operators: `torch.export` and ONNX.

B images, A anchors per image, C classes with background, H W pixels

The graph takes images and gives a box and class scores for every anchor, the form in which ONNX's NonMaxSuppression
and TensorRT's EfficientNMS take them; `finish_detections` is the rest of section IV-H.
"""

# torch's `onnx.export` is typed in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .boxes import decode_boxes
from .detector import RefineDet
from .filtering import select_survivors
from .inference import finish_detections as finish_detections

OPSET = 19  # the first with DeformConv


class DetectionGraph(nn.Module):
    """Images to boxes and scores, with every shape but the batch fixed.

    images   [B, 3, H, W]      RGB, 0..255, uint8
    returns  boxes [B, A, 4]   xyxy pixels, not clipped; scores [B, A, C - 1], zero for anchors the ARM filtered
    """

    def __init__(self, model: RefineDet) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        p = self.model(images, dense=True)
        batch, config = images.shape[0], self.model.config
        scores = p.adm_class.softmax(dim=-1)[:, 1:].unflatten(0, (batch, -1))
        if p.arm_class is not None and config.filter_negatives == "always" and config.theta < 1.0:
            scores = scores * select_survivors(p.arm_class, config.theta)[..., None]
        return decode_boxes(p.adm_box.view(batch, -1, 4), p.refined), scores


def export_program(model: RefineDet, height: int, width: int) -> torch.export.ExportedProgram:
    """The detector as an `ExportedProgram`, in evaluation mode, for images of one size and any number of them."""
    graph = DetectionGraph(model).eval()
    example = torch.zeros(2, 3, height, width, dtype=torch.uint8, device=model.mean.device)
    model.anchors(example)  # tiled beforehand, so that they enter the graph as a constant
    shapes = {"images": {0: torch.export.Dim("batch")}}
    before, model.adm.portable = model.adm.portable, True
    try:
        with torch.no_grad():
            return torch.export.export(graph, (example,), dynamic_shapes=shapes)
    finally:
        model.adm.portable = before


def export_onnx(model: RefineDet, path: str | Path, height: int, width: int) -> None:
    """Write the detector as ONNX: input `images`, outputs `boxes` and `scores`; needs onnx and onnxscript."""
    program = export_program(model, height, width)
    torch.onnx.export(
        program,
        (),
        str(path),
        input_names=["images"],
        output_names=["boxes", "scores"],
        opset_version=OPSET,
        dynamo=True,
        external_data=False,
        verbose=False,
    )
