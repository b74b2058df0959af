"""The names that travel with the package are those of the timm that is installed."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest
import timm
from refinedet.model import backbone_names
from refinedet.model.backbone_names import FILE, check_backbone, check_pretrained, describe_timm, timm_networks


def accepts(check, name):
    try:
        check(name)
    except ValueError:
        return False
    return True


def test_the_file_is_what_timm_says():
    first, *lines = FILE.read_text(encoding="utf-8").splitlines()
    remedy = "run python -m refinedet.model.backbone_names"
    assert first == f"timm {importlib.metadata.version('timm')}", remedy
    assert lines == list(describe_timm()), remedy


def test_a_name_is_accepted_where_timm_accepts_it():
    deprecated = timm.models.get_deprecated_models()
    names = [
        *timm.list_models(),
        *timm.list_pretrained(),
        *deprecated,
        "resnet51",
        "resnet50.nonsense",
        "resnet50.",
        "",
    ]
    for name in names:
        assert accepts(check_backbone, name) == timm.is_model(name), name
        assert accepts(check_pretrained, name) == timm.models.is_model_pretrained(name), name


def test_another_timm_is_asked_itself(monkeypatch, tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("timm 0.0.1\nold_network\n")
    monkeypatch.setattr(backbone_names, "FILE", file)
    timm_networks.cache_clear()
    try:
        check_backbone("resnet50")
        with pytest.raises(ValueError, match="did you mean 'resnet50'"):
            check_backbone("resnet500")
        with pytest.raises(ValueError, match="old_network"):
            check_backbone("old_network")
    finally:
        timm_networks.cache_clear()


def test_a_name_is_checked_without_torch():
    code = "import sys; from refinedet.model.backbone_names import *; check_pretrained('resnet50'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "timm"} & set(done.stdout.split())
