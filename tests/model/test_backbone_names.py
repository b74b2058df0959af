"""The names that travel with the package are those of the timm that is installed."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest
import timm
from refinedet.model import backbone_names
from refinedet.model.backbone_names import (
    FILE,
    check_backbone,
    check_pretrained,
    describe_networks,
    read_tags,
    timm_networks,
)

REMEDY = "run python -m refinedet.model.backbone_names"
SMALL = (
    "resnet10t",
    "regnetx_002",
    "vit_tiny_patch16_224",
    "mobilenetv3_small_050",
    "convnext_atto",
    "xcit_nano_12_p8_224",
)


def accepts(check, name):
    try:
        check(name)
    except ValueError:
        return False
    return True


def test_the_file_is_what_timm_says():
    first, *lines = FILE.read_text(encoding="utf-8").splitlines()
    assert first == f"timm {importlib.metadata.version('timm')}", REMEDY
    assert {name: network.tags for name, network in timm_networks().items()} == read_tags(), REMEDY
    assert set(describe_networks(SMALL)) <= set(lines), REMEDY


def test_a_name_is_accepted_where_timm_accepts_it():
    usable = {name for name, network in timm_networks().items() if {8, 16, 32} <= set(network.strides or ())}
    names = [*timm.list_models(), *timm.list_pretrained(), *timm.models.get_deprecated_models(), "resnet51", ""]
    for name in names:
        assert accepts(check_backbone, name) == (name.partition(".")[0] in usable), name
        assert accepts(check_pretrained, name) == timm.models.is_model_pretrained(name), name
    assert len(usable) > 900


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("resnet500", "did you mean 'resnet50"),
        ("resnet18.nonsense", "of resnet18 it has a1_in1k, "),
        ("vit_base_patch16_224", r"has maps at strides \[16, 16, 16\]; detection needs 8, 16 and 32"),
    ],
)
@pytest.mark.parametrize("listed", [True, False], ids=["from the file", "from timm"])
def test_a_name_that_does_not_do_is_refused(name, sentence, listed, monkeypatch, tmp_path):
    if not listed:
        monkeypatch.setattr(backbone_names, "FILE", tmp_path / "names.txt")
        (tmp_path / "names.txt").write_text("timm 0.0.1\nresnet500 8/16/32\n")
    timm_networks.cache_clear()
    try:
        check_backbone("resnet50")
        with pytest.raises(ValueError, match=sentence):
            check_backbone(name)
    finally:
        timm_networks.cache_clear()


def test_a_name_is_checked_without_torch():
    code = "import sys; from refinedet.model.backbone_names import *; check_backbone('resnet50'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "timm"} & set(done.stdout.split())
