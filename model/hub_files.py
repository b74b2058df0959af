"""Place and header of a detector's file; without torch, which takes seconds to load."""

# huggingface_hub, fsspec and safetensors are typed in part.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, cast

from safetensors import SafetensorError, safe_open

from .config import RefineDetConfig

FILE, RUN_FILE, PACKAGED_FILE = "model.safetensors", "weights.safetensors", "artifacts/weights.safetensors"
"""name in a directory of `save_pretrained`, in the directory of a training run, and in a model packaged for MLflow"""
_FILES = (FILE, RUN_FILE, PACKAGED_FILE)
CONFIG, CATEGORIES, PREPROCESSING = "config", "categories", "preprocessing"
"""keys of the file's metadata; the values are JSON"""


def check_detector(source: str) -> dict[str, str]:
    """Raise ValueError where `source` can be no detector, as far as a path and a file's header show.

    source   as in `hub.load_detector`; of a URI the protocol is looked at, the hub is not asked
    returns  metadata of a local file; empty for a URI and for the hub
    """
    if "://" in source:
        try:
            import fsspec

            fsspec.get_filesystem_class(source.partition("://")[0])
        except (ImportError, ValueError) as error:
            raise ValueError(f"weights must be readable, received {source!r} ({error}).") from None
    elif path := _find(source):
        try:
            opened: Any = safe_open(path, framework="numpy")
            with opened as file:
                metadata: dict[str, str] = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"weights must be a safetensors file, received {source!r} ({error}).") from None
        check_metadata(metadata, source)
        return metadata
    return {}


def check_metadata(metadata: dict[str, str], source: str) -> None:
    """Raise ValueError where a file's metadata hold no detector's config."""
    if CONFIG not in metadata:
        raise ValueError(
            f"weights must carry the detector's config, received {source!r} without one; build a RefineDet from "
            "its config and call load_weights."
        )


def read_exif(metadata: Mapping[str, str]) -> str:
    """`RefineDet.exif` of a weights file; files of earlier releases have none."""
    return json.loads(metadata.get(PREPROCESSING, "{}")).get("exif", "stored")


def read_config(metadata: dict[str, str]) -> RefineDetConfig:
    """The detector's config that a file's metadata hold."""
    fields: dict[str, Any] = {
        name: tuple(cast(list[Any], value)) if isinstance(value, list) else value
        for name, value in json.loads(metadata[CONFIG]).items()
    }
    return RefineDetConfig(**fields)


def _find(source: str) -> Path | None:
    """Path of the file, None for the hub's owner/name; ValueError where it can be neither."""
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in _FILES if (path / name).is_file()]
        if not found:
            raise ValueError(f"a detector's directory must hold {FILE} or {RUN_FILE}, received {source!r} without.")
        return found[0]
    if path.is_file():
        return path
    if source.count("/") != 1 or source.endswith(".safetensors"):
        raise ValueError(f"weights must be a file, a directory, a URI or the hub's owner/name, received {source!r}.")
    if path.parent.is_dir():  # the hub would be asked for a run whose name is mistyped
        raise ValueError(f"weights must exist, received {source!r}, which is not in the directory {path.parent}.")
    return None


def read_detector(source: str, hub_options: dict[str, Any]) -> bytes:
    """Content of the file; ValueError where there is none."""
    if "://" in source:
        return _read_uri(source)
    if path := _find(source):
        return path.read_bytes()
    import huggingface_hub  # only for the hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        downloaded = cast(str, huggingface_hub.hf_hub_download(source, FILE, **hub_options))
        return Path(downloaded).read_bytes()
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
    names = [""] if source.endswith(".safetensors") else [f"/{name}" for name in _FILES]
    for name in names:
        try:
            opened = cast(AbstractContextManager[IO[bytes]], fsspec.open(f"{source.rstrip('/')}{name}", "rb"))
            with opened as file:
                return file.read()
        except FileNotFoundError:
            continue
        except (OSError, ImportError, ValueError) as error:
            raise ValueError(f"weights must be readable, received {source!r} ({error}).") from None
    raise ValueError(f"weights must exist, received {source!r}, which has none of {', '.join(_FILES)}.")


def read_metadata(content: bytes) -> dict[str, str]:
    """The metadata of a safetensors file: its header is JSON, after eight bytes that hold its length."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]).get("__metadata__", {})
