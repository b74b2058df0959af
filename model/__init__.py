"""RefineDet++ in PyTorch: `RefineDet(RefineDetConfig())` detects; `detection_loss` trains it."""

from model.config import RefineDetConfig
from model.detector import RefineDet
from model.inference import select_detections
from model.loss import detection_loss
from model.structures import Detections, Losses, Predictions, Targets
from model.weights import LoadReport, load_weights

__all__ = [
    "Detections",
    "LoadReport",
    "Losses",
    "Predictions",
    "RefineDet",
    "RefineDetConfig",
    "Targets",
    "detection_loss",
    "load_weights",
    "select_detections",
]
