"""Starting from weights of elsewhere: what fits is copied, what cannot be trusted is refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from refinedet.model import RefineDet, RefineDetConfig
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.training import initial_weights
from refinedet.pipeline.training.initial_weights import load_initial_weights, read_weights

CONFIG = RefineDetConfig(num_classes=3, input_size=64, backbone="resnet18", tcb_channels=16, prediction_block=False)


@pytest.fixture(scope="module")
def classifier() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return timm.create_model("resnet18").state_dict()


@pytest.mark.parametrize("form", ["safetensors", "torch", "nested", "data-parallel"])
def test_a_classifier_gives_its_backbone(tmp_path: Path, classifier: dict[str, torch.Tensor], form: str) -> None:
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        safetensors.torch.save_file(classifier, path)
    elif form == "torch":
        torch.save(classifier, path)
    elif form == "nested":
        torch.save({"state_dict": classifier, "epoch": 3}, path)
    else:
        torch.save({f"module.{name}": value for name, value in classifier.items()}, path)
    detector = RefineDet(CONFIG)
    report = load_initial_weights(detector, str(path))
    assert "fc.weight" in report.left
    state = detector.state_dict()
    torch.testing.assert_close(
        state[next(n for n in state if n.endswith("layer4.1.conv2.weight"))], classifier["layer4.1.conv2.weight"]
    )


def test_an_earlier_run_of_other_classes_gives_all_but_the_class_outputs(tmp_path: Path) -> None:
    torch.manual_seed(2)
    earlier = RefineDet(RefineDetConfig(**{**vars(CONFIG), "num_classes": 7}))
    safetensors.torch.save_model(earlier, str(tmp_path / "weights.safetensors"))
    report = load_initial_weights(RefineDet(CONFIG), str(tmp_path / "weights.safetensors"))
    assert report.reshaped
    assert all("adm" in name for name in report.reshaped)
    assert not report.missing


def test_an_earlier_run_of_other_classes_gives_the_outputs_of_those_that_both_have(tmp_path: Path) -> None:
    torch.manual_seed(3)
    earlier = RefineDet(RefineDetConfig(**{**vars(CONFIG), "num_classes": 2}), categories=("bus", "dog"))
    detector = RefineDet(CONFIG, categories=("cat", "dog", "cow"))
    report = load_initial_weights(detector, str(earlier.save_pretrained(tmp_path)))
    assert report.classes == ("dog",)
    ours, theirs = detector.adm.cls[1].weight.view(3, 4, -1), earlier.adm.cls[1].weight.view(3, 3, -1)
    assert torch.equal(ours[:, 2], theirs[:, 2])


def test_timms_own_weights(monkeypatch: pytest.MonkeyPatch, classifier: dict[str, torch.Tensor]) -> None:
    monkeypatch.setattr(initial_weights, "download_pretrained", {"resnet18": classifier}.__getitem__)
    detector = RefineDet(CONFIG)
    report = load_initial_weights(detector, "timm")
    assert "fc.weight" in report.left
    assert torch.equal(detector.backbone.body.conv1.weight, classifier["conv1.weight"])
    monkeypatch.undo()
    unknown = RefineDet(RefineDetConfig(num_classes=1, input_size=64, backbone="vgg16_reduced"))
    with pytest.raises(UserError, match=r"training\.init_weights: timm has no trained weights for backbone 'vgg16_red"):
        load_initial_weights(unknown, "timm")


class _Trap:
    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))


def test_a_pickle_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": _Trap()}, tmp_path / "w.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(_Trap()))
    for name in ("w.pth", "raw.pth"):
        with pytest.raises(UserError, match="safely"):
            read_weights(str(tmp_path / name))
    assert not Path("unpickled").exists()


def test_the_wrong_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_weights(str(tmp_path / "nowhere.pth"))
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(UserError, match=r"cut\.safetensors"):
        read_weights(str(tmp_path / "cut.safetensors"))
    torch.save({"unrelated.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="none of the tensors"):
        load_initial_weights(RefineDet(CONFIG), str(tmp_path / "other.pth"))
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "smaller.pth")
    with pytest.raises(UserError, match=r"nothing for \d+ tensors of the backbone resnet18 \(backbone\.body\."):
        load_initial_weights(RefineDet(CONFIG), str(tmp_path / "smaller.pth"))
    torch.save({"conv1.weight": torch.full((64, 3, 7, 7), torch.nan)}, tmp_path / "broken.pth")
    with pytest.raises(UserError, match=r"received NaN or infinity in 'conv1\.weight'"):
        load_initial_weights(RefineDet(CONFIG), str(tmp_path / "broken.pth"))
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list"):
        read_weights(str(tmp_path / "list.pth"))
