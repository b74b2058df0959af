"""Names of backbones, their strides and timm's trained weights; without timm, which takes seconds to import.

`backbone_names.txt` holds what the pinned timm has. After a change of timm, for ten minutes:
`python -m refinedet.model.backbone_names`.
"""

# timm is typed in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .config import VGG16_REDUCED

# The paper's depths that timm does not name. (layers of the four stages, cardinality, base width)
RESNETS = {"resnext152_32x4d": ((3, 8, 36, 3), 32, 4)}
_OWN = (VGG16_REDUCED, *RESNETS)

FILE = Path(__file__).with_suffix(".txt")
"""first line: the version of timm; then a network a line, the strides of its maps, the tags of its trained weights"""


@dataclass(frozen=True)
class Network:
    """A network of timm: strides of its maps (None: not known yet), and tags of its trained weights."""

    strides: tuple[int, ...] | None
    tags: tuple[str, ...]


def check_backbone(name: str) -> None:
    """Raise ValueError for a name that neither this package nor timm has, and for a network without maps to use."""
    if name in _OWN:
        return
    networks = timm_networks()
    base, dot, tag = name.partition(".")
    if base not in networks:
        near = difflib.get_close_matches(name, [*_OWN, *networks], n=1)
        raise ValueError(
            f"backbone must be {', '.join(_OWN)} or a model that timm has, received {name!r}"
            f"{f'; did you mean {near[0]!r}?' if near else '.'}"
        )
    if dot and tag not in networks[base].tags:
        known = ", ".join(networks[base].tags) or "none"
        raise ValueError(f"backbone {name!r} names weights that timm does not have; of {base} it has {known}.")
    strides = networks[base].strides or _read_strides(base)
    if not {8, 16, 32} <= set(strides):
        raise ValueError(f"backbone {name!r} has maps at strides {list(strides)}; detection needs 8, 16 and 32.")


def check_pretrained(name: str) -> None:
    """Raise ValueError where timm has no trained weights for a backbone of this name."""
    base, dot, tag = name.partition(".")
    tags = timm_networks()[base].tags if base in timm_networks() else ()
    if not tags or (dot and tag not in tags):
        raise ValueError(
            f"timm has no trained weights for backbone {name!r}; give a file or URI of weights, or choose one of "
            "`timm.list_pretrained()`."
        )


@cache
def timm_networks() -> dict[str, Network]:
    """All networks of timm by name: from the file if it is of the installed version, otherwise from timm."""
    first, *lines = FILE.read_text(encoding="utf-8").splitlines()
    if first != f"timm {importlib.metadata.version('timm')}":
        return {name: Network(None, tags) for name, tags in read_tags().items()}
    rows = (line.split(" ") for line in lines)
    return {name: Network(tuple(map(int, strides.split("/"))), tuple(tags)) for name, strides, *tags in rows}


def read_tags() -> dict[str, tuple[str, ...]]:
    """The tags of the trained weights of each network, read from timm."""
    import timm

    found: dict[str, list[str]] = {name: [] for name in (*timm.list_models(), *timm.models.get_deprecated_models())}
    for name in timm.list_pretrained():
        base, _, tag = name.partition(".")
        found[base].append(tag)
    return {name: tuple(tags) for name, tags in sorted(found.items())}


def describe_networks(names: Iterable[str]) -> Iterator[str]:
    """Lines of the file, of the timm that is installed."""
    tags = read_tags()
    for name in names:
        yield " ".join((name, "/".join(map(str, _read_strides(name))), *tags[name]))


def _read_strides(name: str) -> tuple[int, ...]:
    import timm
    import torch

    try:
        with torch.device("meta"):
            body: Any = timm.create_model(name, pretrained=False, features_only=True)
    except (RuntimeError, AttributeError, ValueError) as error:
        raise ValueError(f"backbone {name!r} gives no feature maps (timm's features_only): {error}") from error
    return tuple(body.feature_info.reduction())


if __name__ == "__main__":
    version = importlib.metadata.version("timm")
    FILE.write_text("\n".join((f"timm {version}", *describe_networks(read_tags()))) + "\n", encoding="utf-8")
