from __future__ import annotations

import pytest
import torch
from refinedet.model.filtering import select_survivors, select_trained_rows
from refinedet.model.structures import Matches


@pytest.mark.parametrize("theta", [1.0, 0.99, 0.98, 0.95, 0.9, 0.8])
def test_survivors_are_those_of_the_loop(theta):
    logits = 6 * torch.randn(2, 50, 2, generator=torch.Generator().manual_seed(0))
    survivors = select_survivors(logits, theta)
    for image in range(2):
        for anchor in range(50):
            negative = logits[image, anchor].double().softmax(0)[0].item()
            assert survivors[image, anchor].item() == (negative <= theta)


def test_low_precision_logits_are_compared_in_fp32():
    logits = torch.tensor([[[4.0, 0.0], [5.0, 0.0]]]).bfloat16()  # 0.982 and 0.993 sure of background
    assert select_survivors(logits, 0.99).tolist() == [[True, False]]


def test_trained_rows():
    labels = torch.tensor([[2, 0, 0, -1], [0, 0, 0, 0]])
    survivors = torch.tensor([[False, True, False, True], [True, True, True, True]])
    rows = select_trained_rows(survivors, Matches(labels, torch.zeros_like(labels)))
    assert rows.tolist() == [[True, True, False, False], [False] * 4]
    rows = select_trained_rows(None, Matches(labels, torch.zeros_like(labels)))
    assert rows.tolist() == [[True, True, True, False], [False] * 4]
