"""Assignment of tensors to the ranks that write them."""

from __future__ import annotations

from collections.abc import Mapping


def assign_owners(sizes: Mapping[str, int], world_size: int) -> dict[str, int]:
    """Share things out to ranks, evenly by size: each, largest first, to the rank that has least."""
    loads = [0] * world_size
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += sizes[name]
    return owners
