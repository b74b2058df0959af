"""Weights to start a training from, matched by name."""

from __future__ import annotations

import logging

from refinedet.model import LoadReport, RefineDet, load_weights
from refinedet.pipeline.inference.weight_files import read_weights
from refinedet.pipeline.runs.errors import UserError

logger = logging.getLogger(__name__)

_SHOWN = 8


def load_initial_weights(detector: RefineDet, uri: str) -> LoadReport:
    """Load a backbone's or an earlier run's weights into `detector`, and log what matched.

    Raises UserError where nothing matches, or where a part of the backbone gets nothing: then it is the wrong file.
    """
    report = load_weights(detector, read_weights(uri))
    if not report.matched and not report.reshaped:
        raise UserError(
            f"training.init_weights: none of the tensors of {uri!r} fits this detector ({detector.config.backbone}); "
            "give weights of the same backbone."
        )
    trained = tuple(f"backbone.{name}" for name in detector.backbone.trained)
    if unset := [name for name in report.missing if name.startswith(trained)]:
        raise UserError(
            f"training.init_weights: {uri!r} has nothing for {len(unset)} tensors of the backbone "
            f"{detector.config.backbone} ({unset[0]}, ...); give weights of the same backbone."
        )
    logger.info("initial weights from %s: %s", uri, report)
    for what, names in (("left of the file", report.left), ("missing, so newly initialised", report.missing)):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            logger.info("%s: %s%s", what, ", ".join(names[:_SHOWN]), more)
    return report
