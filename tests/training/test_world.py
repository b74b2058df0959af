"""Messages between two ranks: rank 0's results, its errors, and its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.training.state import broadcast_state
from refinedet.pipeline.training.world import World
from torch import nn

from tests.training.workers import run_together

pytestmark = pytest.mark.dist


def test_all_ranks_get_what_rank_0_gets_and_raise_what_it_raises(tmp_path: Path) -> None:
    first, second = run_together(_ask_rank_0, tmp_path)
    assert first == ["read by 0", "UserError: no such file", "OSError: a disk is full"]
    assert second == ["read by 0", "UserError: no such file", "RuntimeError: rank 0: OSError: a disk is full"]


def _ask_rank_0(world: World) -> list[str]:
    said = [world.from_main(lambda: f"read by {world.rank}")]
    for error in (UserError("no such file"), OSError("a disk is full")):
        try:
            said.append(world.from_main(lambda error=error: _raise(error)))
        except Exception as raised:
            said.append(f"{type(raised).__name__}: {raised}")
    return said


def _raise(error: Exception) -> Any:
    raise error


def test_weights_and_buffers_become_those_of_rank_0(tmp_path: Path) -> None:
    first, second = run_together(_share_weights, tmp_path)
    assert first == second
    assert first["before"] == [0.0, 0.0, 0.0]
    assert first["after"] == [0.0, 0.0, 0.0]


def _share_weights(world: World) -> dict[str, list[float]]:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    values = [network[0].weight, network[0].bias, network[1].running_mean]
    with torch.no_grad():
        for value in values:
            value.fill_(world.rank)
    before = world.broadcast_object([float(value.flatten()[0]) for value in values])
    broadcast_state(network, world)
    return {"before": before, "after": [float(value.flatten()[-1]) for value in values]}
