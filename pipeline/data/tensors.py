"""Images as tensors. Apart from `images`: commands that only look at data need not wait for torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate


def image_tensor(image: np.ndarray) -> Tensor:
    """A uint8 image [H, W, 3] as [3, H, W], without a copy where the array is contiguous and writable."""
    return torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)


def stack_images(images: Sequence[np.ndarray]) -> Tensor:
    """uint8 images [H, W, 3] of one size to one uint8 tensor [B, 3, H, W], channels-last in memory."""
    # In a worker of a loader this writes to shared memory at once, where the batch would be copied to otherwise.
    return default_collate([torch.from_numpy(image) for image in images]).permute(0, 3, 1, 2)
