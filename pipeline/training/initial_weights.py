"""Weights to start a training from, of a file or of timm, matched by name."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from refinedet.model import LoadReport, RefineDet, load_weights
from refinedet.model.pretrained import download_pretrained
from refinedet.pipeline.config.spec_checks import TIMM_WEIGHTS
from refinedet.pipeline.inference.weight_files import read_categories, read_weights
from refinedet.pipeline.runs.errors import UserError
from torch import Tensor

logger = logging.getLogger(__name__)

_SHOWN = 8


def load_initial_weights(detector: RefineDet, uri: str) -> LoadReport:
    """Load a backbone's, an earlier run's or another project's weights into `detector`, and log what matched.

    uri  of a file; or "timm", for timm's own weights of the backbone
    Raises UserError where there are no such weights, where they are not finite, where nothing matches, or where a part
    of the backbone gets nothing: then it is the wrong file.
    """
    state, categories = _read(detector, uri)
    try:
        report = load_weights(detector, state, categories)
    except ValueError as error:
        raise UserError(f"training.init_weights: {uri!r} cannot be used: {error}") from None
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
    lists = {
        "classes matched by name": report.classes,
        "left of the file": report.left,
        "missing, so newly initialised": report.missing,
    }
    for what, names in lists.items():
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            logger.info("%s: %s%s", what, ", ".join(names[:_SHOWN]), more)
    return report


def _read(detector: RefineDet, uri: str) -> tuple[dict[str, Tensor], Sequence[str]]:
    """State dict, and the names of its classes where they are known."""
    if uri != TIMM_WEIGHTS:
        return read_weights(uri), read_categories(uri)
    try:
        return download_pretrained(detector.config.backbone), ()
    except ValueError as error:
        raise UserError(f"training.init_weights: {error}") from None
