from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from refinedet.pipeline.training.world import World, open_world


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """This process, alone; one thread, for the models are tiny."""
    torch.set_num_threads(1)
    with open_world() as world:
        yield world
