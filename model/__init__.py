"""RefineDet++ in PyTorch: `RefineDet(RefineDetConfig())` detects; `detection_loss` trains it.

The names are imported when they are first asked for: the job spec needs the config alone, a data worker the targets
alone, and neither should wait for timm.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import RefineDetConfig
    from .detector import RefineDet
    from .inference import detect_images, resize_images, select_detections
    from .loss import detection_loss, sum_losses
    from .structures import DetectionBatch, Detections, Losses, LossSums, Predictions, Targets
    from .weights import LoadReport, load_weights

__all__ = [
    "DetectionBatch",
    "Detections",
    "LoadReport",
    "LossSums",
    "Losses",
    "Predictions",
    "RefineDet",
    "RefineDetConfig",
    "Targets",
    "detect_images",
    "detection_loss",
    "load_weights",
    "resize_images",
    "select_detections",
    "sum_losses",
]

_HOMES = {
    "RefineDetConfig": "config",
    "RefineDet": "detector",
    "detect_images": "inference",
    "resize_images": "inference",
    "select_detections": "inference",
    "detection_loss": "loss",
    "sum_losses": "loss",
    "DetectionBatch": "structures",
    "Detections": "structures",
    "LossSums": "structures",
    "Losses": "structures",
    "Predictions": "structures",
    "Targets": "structures",
    "LoadReport": "weights",
    "load_weights": "weights",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
