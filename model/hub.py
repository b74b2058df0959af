"""A detector in one file: weights, config, categories and preprocessing; on disk, behind a URI or on the hub."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .config import RefineDetConfig

if TYPE_CHECKING:
    from .detector import RefineDet

FILE, RUN_FILE = "model.safetensors", "weights.safetensors"
"""name in a directory of `save_pretrained`, and in the directory of a training run"""
CONFIG, CATEGORIES, PREPROCESSING = "config", "categories", "preprocessing"
"""keys of the file's metadata; the values are JSON"""


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
    mean, std = (part.flatten().tolist() for part in (detector.mean, detector.std))
    order = "BGR" if detector.config.normalization == "caffe" else "RGB"
    size = detector.config.input_size
    preprocessing = {"resize": [size, size], "order": order, "mean_rgb": mean, "std_rgb": std, "range": 255}
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
    content = _read(str(source), hub_options)
    try:
        state, metadata = load(content), _read_metadata(content)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"weights must be a safetensors file, received {str(source)!r} ({error}).") from None
    if CONFIG not in metadata:
        raise ValueError(
            f"weights must carry the detector's config, received {str(source)!r} without one; build a RefineDet from "
            "its config and call load_weights."
        )
    fields: dict[str, Any] = json.loads(metadata[CONFIG])
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    detector = cls(RefineDetConfig(**fields), categories=json.loads(metadata.get(CATEGORIES, "[]")))
    if broken := [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise ValueError(f"weights must be finite, received NaN or infinity in {broken[0]!r} of {str(source)!r}.")
    try:
        detector.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"weights must fit the detector of their config, received {str(source)!r}: {error}") from None
    return detector.eval()


def _own_tensors(detector: RefineDet) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in detector.state_dict().items()}


def _read(source: str, hub_options: dict[str, Any]) -> bytes:
    path = Path(source)
    if "://" in source:
        return _read_uri(source)
    if path.is_dir():
        found = [path / name for name in (FILE, RUN_FILE) if (path / name).is_file()]
        if not found:
            raise ValueError(f"a detector's directory must hold {FILE} or {RUN_FILE}, received {source!r} without.")
        return found[0].read_bytes()
    if path.is_file():
        return path.read_bytes()
    if source.count("/") != 1 or source.endswith(".safetensors"):
        raise ValueError(f"weights must be a file, a directory, a URI or the hub's owner/name, received {source!r}.")
    from huggingface_hub import hf_hub_download  # only for the hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, FILE, **hub_options)).read_bytes()
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"weights must exist, received {source!r}, which is no path here and no repository that the hub gives "
            f"({str(error).splitlines()[0]})."
        ) from None


def _read_uri(source: str) -> bytes:
    try:
        import fsspec
    except ImportError:
        raise ValueError(f"reading {source!r} needs fsspec; install it with `pip install fsspec`.") from None
    names = [""] if source.endswith(".safetensors") else [f"/{FILE}", f"/{RUN_FILE}"]
    for name in names:
        try:
            with fsspec.open(f"{source.rstrip('/')}{name}", "rb") as file:
                return file.read()  # pyright: ignore[reportAttributeAccessIssue]
        except FileNotFoundError:
            continue
        except (OSError, ImportError, ValueError) as error:
            raise ValueError(f"weights must be readable, received {source!r} ({error}).") from None
    raise ValueError(f"weights must exist, received {source!r}, which has neither {FILE} nor {RUN_FILE}.")


def _read_metadata(content: bytes) -> dict[str, str]:
    """The metadata of a safetensors file: its header is JSON, after eight bytes that hold its length."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]).get("__metadata__", {})
