"""timm's own weights, of which these tests download none."""

from __future__ import annotations

import pytest
import timm
import torch
from refinedet.model import load_weights
from refinedet.model.pretrained import download_pretrained


def test_what_timm_downloads_fills_the_backbone(build, monkeypatch):
    torch.manual_seed(5)
    classifier = timm.create_model("resnet10t")
    asked = []

    def create(name, pretrained):
        asked.append((name, pretrained))
        return classifier

    monkeypatch.setattr(timm, "create_model", create)
    state = download_pretrained("resnet10t")
    monkeypatch.undo()
    model = build(backbone="resnet10t")
    report = load_weights(model, state)
    assert asked == [("resnet10t", True)]
    assert not [name for name in report.missing if name.startswith("backbone.body")]


@pytest.mark.parametrize("name", ["resnext152_32x4d", "vgg16_reduced", "beit3_giant_patch14_224"])
def test_a_backbone_that_timm_has_not_trained_is_refused(name):
    with pytest.raises(ValueError, match=f"timm has no trained weights for backbone '{name}'; give a file"):
        download_pretrained(name)


def test_without_a_network_one_sentence_says_so(monkeypatch):
    def create(name, pretrained):
        raise FileNotFoundError("no network\nand a long story")

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(ValueError, match=r"cannot be downloaded here \(no network\); give a file"):
        download_pretrained("resnet10t")
