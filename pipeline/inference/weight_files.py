"""Weights from a file or URI, without unpickling what we did not write; and detectors that use all of them."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from refinedet.model import RefineDet, RefineDetConfig, load_weights
from refinedet.model.hub_files import CATEGORIES
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError
from safetensors import SafetensorError
from torch import Tensor

_NESTED_UNDER = ("state_dict", "model", "model_state", "module")


def load_whole_detector(config: RefineDetConfig, uri: str, what: str = "weights") -> RefineDet:
    """A detector in evaluation mode, every tensor of which is from the file.

    what  names the weights in messages
    Raises UserError where the file leaves a tensor of the model unset, or has it in another shape.
    """
    detector = RefineDet(config)
    report = load_weights(detector, read_weights(uri, what))
    unset = [*report.missing, *report.reshaped]
    if unset:
        raise UserError(
            f"{what}: {uri!r} does not fit the model ({config.backbone}, {config.num_classes} classes): {len(unset)} "
            f"of its tensors do not exist in that shape, such as {unset[0]}; give the weights of a whole detector "
            "of the same spec."
        )
    return detector.eval()


def weights_step(uri: str) -> int:
    """The step of training at which a run's safetensors file was written; 0 where the file does not hold one."""
    return int(_read_metadata(uri).get("step", 0))


def read_categories(uri: str) -> tuple[str, ...]:
    """Names of the classes that a weights file carries; empty where it carries none."""
    if not uri.endswith(".safetensors"):
        return ()
    return tuple(json.loads(_read_metadata(uri).get(CATEGORIES, "[]")))


def _read_metadata(uri: str) -> dict[str, str]:
    """Metadata of a safetensors file, of which only the header is read."""
    length = int.from_bytes(storage.read_bytes(uri, 0, 8), "little")
    return json.loads(storage.read_bytes(uri, 8, 8 + length)).get("__metadata__", {})


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
