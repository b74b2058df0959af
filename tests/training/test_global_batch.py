"""Equation 1 over the whole global batch: the same loss, gradient and weights at any number of workers."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from refinedet.model import RefineDet, sum_losses
from refinedet.pipeline.config.batches import divide_batch
from refinedet.pipeline.config.spec import Training
from refinedet.pipeline.data.samples import Cursor
from refinedet.pipeline.training.engine import Engine
from refinedet.pipeline.training.world import World
from torch import nn

from tests.training.fakes import SMALL_REFINEDET, SquareStream, TinyDetector, TinyStream, tiny_loss
from tests.training.workers import run_together

pytestmark = pytest.mark.dist
SPEC = Training(global_batch=8, precision="fp32", weight_decay=0, gradient_clip=10)
STEPS = 20


def take_steps(world: World, norm: str, folder: str) -> list[float]:
    """Losses of the global batch in the first step; gradient, and weights and buffers at the end, go to a file."""
    config = replace(SMALL_REFINEDET, norm=norm, map_norm="batch")
    torch.manual_seed(0)
    plan = divide_batch(SPEC.global_batch, None, world.size)
    engine = Engine(RefineDet(config), functools.partial(sum_losses, config=config), SPEC, plan, world)
    batches = iter(SquareStream(Cursor(), plan, world.rank))
    shares, gradient = torch.zeros(10), torch.zeros(0)
    for step in range(STEPS):
        batch = next(batches)
        total, losses = engine.forward(batch.images, batch.targets)
        engine.backward(total)
        assert engine.step(1e-4)
        engine.buffers.average(world)
        if step == 0:
            shares = world.sum(losses)
            gradient = torch.cat([momentum.flatten() for _, momentum in engine.momentum()])  # from zero, without decay
    state = {name: tensor.detach().clone() for name, tensor in engine.detector.state_dict().items()}
    if world.is_main:
        torch.save((gradient, state), Path(folder) / f"{norm}-{world.size}.pt")
    engine.close()
    return shares.tolist()


@pytest.mark.parametrize(("norm", "tolerance"), [("frozen", 1e-6), ("sync", 1e-5)])
def test_one_to_four_workers_take_the_same_steps(tmp_path: Path, norm: str, tolerance: float) -> None:
    losses = {size: run_together(take_steps, tmp_path, norm, str(tmp_path), size=size)[0] for size in (1, 2, 3, 4)}
    left = {size: torch.load(tmp_path / f"{norm}-{size}.pt") for size in losses}
    for size in (2, 3, 4):
        assert losses[size] == pytest.approx(losses[1], rel=tolerance)
        gradient, expected = left[size][0].double(), left[1][0].double()
        assert (gradient - expected).norm() <= tolerance * expected.norm()
        for name, tensor in left[1][1].items():
            torch.testing.assert_close(left[size][1][name], tensor, atol=1e-4, rtol=0)


def take_one_step(world: World, folder: str, micro_batch: int | None) -> list[float]:
    """The loss's parts in one step of a detector without batch norm; its gradient goes to a file."""
    plan = divide_batch(SPEC.global_batch, micro_batch, world.size)
    detector = TinyDetector()
    detector.body[1] = nn.Identity()
    engine = Engine(detector, tiny_loss, SPEC, plan, world)
    batches = iter(TinyStream(Cursor(), plan, world.rank))
    parts = [next(batches) for _ in range(plan.accumulation)]
    if len(parts) > 1:
        engine.count_positives([(part.images, part.targets) for part in parts])
    values = []
    for part in parts:
        total, losses = engine.forward(part.images, part.targets)
        engine.backward(total)
        values.append(losses)
    engine.step(1e-4)
    gradient = torch.cat([momentum.flatten() for _, momentum in engine.momentum()])
    if world.is_main:
        torch.save(gradient, Path(folder) / f"{world.size}-{micro_batch}.pt")
    engine.close()
    return world.sum(torch.stack(values).mean(0)).tolist()


def test_micro_batches_share_the_positives_of_the_global_batch(tmp_path: Path) -> None:
    """Micro-batches of 2, 3 and 3 images: each divided by its own count, they would weigh differently."""
    whole = run_together(take_one_step, tmp_path, str(tmp_path), None, size=1)[0]
    expected = torch.load(tmp_path / "1-None.pt")
    for size, micro_batch in ((1, 3), (2, 2)):
        assert run_together(take_one_step, tmp_path, str(tmp_path), micro_batch, size=size)[0] == pytest.approx(whole)
        gradient = torch.load(tmp_path / f"{size}-{micro_batch}.pt")
        assert (gradient - expected).norm() <= 1e-5 * expected.norm()  # fp32, added up in another order
