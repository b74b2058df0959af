"""Image files of a directory, local or behind a URI."""

from __future__ import annotations

import os
from typing import Any

from refinedet.pipeline.data.images import SUFFIXES
from refinedet.pipeline.runs import storage


def list_images(directory: str) -> dict[str, int]:
    """Bytes of every image file below `directory`, by its path from there, sorted; empty where it does not exist."""
    return {name: size for name, size in list_sizes(directory).items() if name.lower().endswith(SUFFIXES)}


def list_sizes(directory: str) -> dict[str, int]:
    """Bytes of every file below `directory`, by its path from there, sorted."""
    sizes: dict[str, int] = {}
    if storage.is_local(directory):
        top = storage.filesystem(directory)[1]
        for folder, _, names in os.walk(top):
            for name in names:
                path = os.path.join(folder, name)
                if os.path.exists(path):  # no link into nothing
                    sizes[os.path.relpath(path, top)] = os.path.getsize(path)
    else:
        fs, inner = storage.filesystem(directory)
        found: Any = fs.find(inner, detail=True)
        for path, info in found.items():
            sizes[path[len(inner.rstrip("/")) + 1 :]] = int(info["size"])
    return dict(sorted(sizes.items()))
