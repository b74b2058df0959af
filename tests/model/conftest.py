"""Small detectors for the model's tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from refinedet.model import RefineDet, RefineDetConfig


@pytest.fixture(scope="session")
def build() -> Callable[..., RefineDet]:
    """A detector small enough for a test, of the given options, always with the same weights."""

    def make(**options: Any) -> RefineDet:
        defaults: dict[str, Any] = {
            "num_classes": 3,
            "input_size": 64,
            "backbone": "resnet10t",
            "tcb_channels": 16,
            "prediction_block": False,
        }
        torch.manual_seed(0)
        return RefineDet(RefineDetConfig(**{**defaults, **options}))

    return make
