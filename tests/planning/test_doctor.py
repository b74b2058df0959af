"""The doctor: what it finds here, and what it calls missing."""

from __future__ import annotations

import pytest
import torch
from refinedet.model.ops import library
from refinedet.pipeline.planning.doctor import check_installation


def test_this_installation_misses_nothing() -> None:
    conditions = {condition.name: condition for condition in check_installation()}
    assert {"machine", "torch", "ray", "operators", "CPU bf16"} <= conditions.keys()
    assert not [
        condition.name for condition in conditions.values() if condition.needed and condition.name != "operators"
    ]


def test_operators_without_cuda_are_missing_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if library.describe_library().cuda:
        pytest.skip("the operators are built for CUDA here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU")
    operators = next(condition for condition in check_installation() if condition.name == "operators")
    assert operators.needed
    assert "built for the CPU only" in operators.text
