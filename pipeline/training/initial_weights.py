"""Weights to start from: read from a file or URI without unpickling what we did not write, and matched by name."""

from __future__ import annotations

import io
import logging
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from refinedet.model import LoadReport, RefineDet, load_weights
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError
from safetensors import SafetensorError
from torch import Tensor

logger = logging.getLogger(__name__)

_NESTED_UNDER = ("state_dict", "model", "model_state", "module")
_SHOWN = 8


def read_weights(uri: str, what: str = "training.init_weights") -> dict[str, Tensor]:
    """A state dict from safetensors, or from a torch file that holds tensors only.

    what  names the weights in messages
    Raises UserError where there is no such file, or where it holds anything else.
    """
    try:
        content = storage.read_bytes(uri)
    except OSError as error:
        raise UserError(
            f"{what}: {uri!r} cannot be read ({error.strerror or error}); give a file or URI of weights."
        ) from None
    try:
        if uri.endswith(".safetensors"):
            return safetensors.torch.load(content)
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{what}: {uri!r} holds no weights that can be read safely "
            f"({' '.join(str(error).split())[:200]}); give safetensors, or a torch file of tensors alone."
        ) from None
    return _tensors(state, uri, what)


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


def _tensors(state: Any, uri: str, what: str) -> dict[str, Tensor]:
    for name in _NESTED_UNDER:
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
            break
    if not isinstance(state, Mapping):
        raise UserError(f"{what}: {uri!r} holds a {type(state).__name__}, no state dict of tensors.")
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors
