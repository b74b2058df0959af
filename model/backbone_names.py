"""Names of backbones, and which of them timm has trained weights for; timm itself takes seconds to import.

`backbone_names.txt` holds timm's names. After a change of timm: `python -m refinedet.model.backbone_names`.
"""

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from .config import VGG16_REDUCED

# The paper's depths that timm does not name. (layers of the four stages, cardinality, base width)
RESNETS = {"resnext152_32x4d": ((3, 8, 36, 3), 32, 4)}

FILE = Path(__file__).with_suffix(".txt")
"""first line: the version of timm; then a network a line, and the tags of its trained weights"""


def check_backbone(name: str) -> None:
    """Raise ValueError for a name that neither this package nor timm knows, with the nearest that is known."""
    own = (VGG16_REDUCED, *RESNETS)
    if name in own or name.partition(".")[0] in timm_networks():
        return
    near = difflib.get_close_matches(name, [*own, *timm_networks()], n=1)
    raise ValueError(
        f"backbone must be {', '.join(own)} or a model that timm has, received {name!r}"
        f"{f'; did you mean {near[0]!r}?' if near else '.'}"
    )


def check_pretrained(name: str) -> None:
    """Raise ValueError where timm has no trained weights for a backbone of this name."""
    network, dot, tag = name.partition(".")
    tags = timm_networks().get(network, ())
    if not tags or (dot and tag not in tags):
        raise ValueError(
            f"timm has no trained weights for backbone {name!r}; give a file or URI of weights, or choose one of "
            "`timm.list_pretrained()`."
        )


@cache
def timm_networks() -> dict[str, list[str]]:
    """The tags of the trained weights of each network: from the file if timm has its version, otherwise from timm."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    if lines[0] != f"timm {importlib.metadata.version('timm')}":
        lines = ["", *describe_timm()]
    return {network: tags for network, *tags in (line.split(" ") for line in lines[1:])}


def describe_timm() -> Iterator[str]:
    """The lines of the file below the first, of the timm that is installed."""
    import timm

    found: dict[str, list[str]] = {name: [] for name in (*timm.list_models(), *timm.models.get_deprecated_models())}
    for name in timm.list_pretrained():
        network, _, tag = name.partition(".")
        found[network].append(tag)
    return (" ".join((network, *tags)) for network, tags in sorted(found.items()))


if __name__ == "__main__":
    version = importlib.metadata.version("timm")
    FILE.write_text("\n".join((f"timm {version}", *describe_timm())) + "\n", encoding="utf-8")
