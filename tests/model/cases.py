"""Random and hostile inputs for the model's tests."""

from __future__ import annotations

import torch
from refinedet.model import Targets


def random_targets(generator: torch.Generator, count: int, size: int = 64, num_classes: int = 3) -> Targets:
    corner = torch.rand(count, 2, generator=generator) * size * 0.8
    side = 4 + torch.rand(count, 2, generator=generator) * size * 0.6
    labels = torch.randint(1, num_classes + 1, (count,), generator=generator)
    return Targets(torch.cat([corner, corner + side], dim=1), labels)


def random_images(generator: torch.Generator, batch: int, size: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)


# Boxes that have broken detectors: none, crowds, no area, outside the image, larger than it, the same one twice.
HOSTILE = {
    "none": Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)),
    "five hundred": random_targets(torch.Generator().manual_seed(7), 500),
    "zero area": Targets(torch.tensor([[10.0, 10, 10, 30], [5, 5, 5, 5], [8, 8, 40, 8]]), torch.tensor([1, 2, 3])),
    "outside": Targets(torch.tensor([[-90.0, -90, -60, -60], [200, 200, 240, 260]]), torch.tensor([1, 2])),
    "larger than the image": Targets(torch.tensor([[-500.0, -400, 900, 700]]), torch.tensor([3])),
    "twice": Targets(torch.tensor([[8.0, 8, 40, 40], [8, 8, 40, 40]]), torch.tensor([1, 2])),
    "a thousandth of a pixel": Targets(torch.tensor([[20.0, 20, 20.001, 20.001]]), torch.tensor([2])),
}
