"""A detector in one file: weights, config, categories and preprocessing; on disk, behind a URI or on the hub."""

# torch's `tolist` is typed in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .hub_files import (
    CATEGORIES,
    CONFIG,
    FILE,
    PREPROCESSING,
    check_metadata,
    read_config,
    read_detector,
    read_exif,
    read_metadata,
)

if TYPE_CHECKING:
    from .detector import RefineDet


def save_detector(detector: RefineDet, directory: str | Path) -> Path:
    """Write `directory`/model.safetensors, and config.json beside it for the hub; returns the weights' path."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = json.dumps(dataclasses.asdict(detector.config))
    (directory / "config.json").write_text(config + "\n")
    path = directory / FILE
    path.write_bytes(save(_own_tensors(detector), detector_metadata(detector)))
    return path


def detector_metadata(detector: RefineDet) -> dict[str, str]:
    """Metadata of a weights file: config, categories and preprocessing, as JSON texts."""
    mean, std = (cast(list[float], part.flatten().tolist()) for part in (detector.mean, detector.std))
    order = "BGR" if detector.config.normalization == "caffe" else "RGB"
    size = detector.config.input_size
    preprocessing = {"resize": [size, size], "order": order, "mean_rgb": mean, "std_rgb": std, "range": 255}
    preprocessing["exif"] = detector.exif
    return {
        CONFIG: json.dumps(dataclasses.asdict(detector.config)),
        CATEGORIES: json.dumps(list(detector.categories)),
        PREPROCESSING: json.dumps(preprocessing),
    }


def load_detector(cls: type[RefineDet], source: str | Path, **hub_options: Any) -> RefineDet:
    """Build the detector of a file, of a directory that holds one, of a URI, or of a repository on the hub.

    source       a path, a URI that fsspec reads, or the hub's "owner/name"
    hub_options  of `huggingface_hub.hf_hub_download`, such as revision
    Raises ValueError where there is no such file, or where it does not hold a whole detector.
    """
    content = read_detector(str(source), hub_options)
    try:
        state, metadata = load(content), read_metadata(content)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"weights must be a safetensors file, received {str(source)!r} ({error}).") from None
    check_metadata(metadata, str(source))
    categories = json.loads(metadata.get(CATEGORIES, "[]"))
    detector = cls(read_config(metadata), categories=categories, exif=read_exif(metadata))
    if broken := [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise ValueError(f"weights must be finite, received NaN or infinity in {broken[0]!r} of {str(source)!r}.")
    try:
        detector.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"weights must fit the detector of their config, received {str(source)!r}: {error}") from None
    return detector.eval()


def _own_tensors(detector: RefineDet) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in detector.state_dict().items()}
