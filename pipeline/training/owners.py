"""Assignment of tensors to the ranks that write them."""

from __future__ import annotations

import heapq
from collections.abc import Mapping


def assign_owners(sizes: Mapping[str, int], world_size: int) -> dict[str, int]:
    """Share things out to ranks, evenly by size: each, largest first, to the rank that has least."""
    loads = [(0, rank) for rank in range(world_size)]  # a heap
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, owners[name] = loads[0]
        heapq.heapreplace(loads, (load + sizes[name], owners[name]))
    return owners
