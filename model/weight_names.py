"""Names of the same tensors in the files of other projects.

All of them order a predictor's outputs as here: aspects (1, 2, 1/2) outside, inside them the four deltas, or the
classes with background first. Only the names differ, and sometimes a layer around them:

- classifiers of torchvision, timm, efficientnet_pytorch and OpenMMLab, and OpenMMLab's detectors (the backbone);
- the reduced VGG-16 of the PyTorch ports (`vgg16_reducedfc.pth`), and the detectors of RefineDet.PyTorch;
- refinedet.pytorch's VGG and ResNet detectors, for `tcb_norm` true and, with ResNet, `prediction_block` false. Their
  TCBs enlarge by a 3x3 kernel, which has no place here, nor have the TCBs of its first version (`back_pyramid`);
- the authors' Caffe models (ResNet as well as VGG), for `normalization` "caffe". A .caffemodel must be converted to a
  state dict of Caffe's layer names and torch's kinds: `conv1_1.weight`, `P4-up.bias`, `bn_conv1.running_mean` and
  `.running_var` (divided by Caffe's factor, the third blob), `scale_conv1.weight`. Caffe strides in a block's first
  convolution, this ResNet in its second: a start to train from, not the same detector.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from .backbones import ReducedVgg16, TimmBackbone
from .detector import RefineDet

# Layers of a block: efficientnet_pytorch's name -> timm's.
_SQUEEZE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
SEPARABLE_BLOCK = {
    "_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2", **_SQUEEZE
}  # fmt: skip
EXPANDING_BLOCK = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
    "_project_conv": "conv_pwl", "_bn2": "bn3", **_SQUEEZE,
}  # fmt: skip

# Layers of a residual block: Caffe's branch -> (convolution, norm) of timm's and torchvision's, and of `Bottleneck`.
_BRANCHES = {"branch1": ("downsample.0", "downsample.1")} | {
    f"branch2{letter}": (f"conv{number}", f"bn{number}") for number, letter in enumerate("abc", start=1)
}
_PROJECTION = {"downsample.0": "project", "downsample.1": "project_bn"}

VGG_DEPTHS = (2, 2, 3, 3, 3)
VGG_NUMBERS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
"""of torchvision's convolutions; the ports and OpenMMLab's detectors continue with 31 and 33, fc6 and fc7"""
VGG_BLOCK_NUMBERS = (0, 1, 3, 4, 6, 7, 8, 10, 11, 12, 14, 15, 16)
"""of OpenMMLab's classifier, which counts a convolution and its activation as one"""

_STATISTICS, _AFFINE = ("running_mean", "running_var"), ("weight", "bias")


@dataclass
class ForeignNames:
    """Names of tensors in other projects' files, and the names that they have here.

    places  tensor there -> tensor here
    shifts  bias there -> running mean here: the norm behind the convolution, which has no bias here, absorbs it
    """

    places: dict[str, str] = field(default_factory=dict[str, str])
    shifts: dict[str, str] = field(default_factory=dict[str, str])


def find_foreign_names(model: RefineDet) -> ForeignNames:
    """Every name that a file of another project may have for a tensor of `model`."""
    table = _Table(model)
    if isinstance(model.backbone, ReducedVgg16):
        _add_vgg(table, model.backbone)
    else:
        _add_timm(table)
        _add_efficientnet(table, model.backbone)
        _add_caffe_resnet(table, model.backbone)
    levels = range(len(model.adm.box))
    for level in levels:
        _add_tcb(table, level)
        for ours, prefixes in (("arm", ("arm", "bi")), ("adm", ("odm", "multi"))):
            for prefix in prefixes:
                table.add(f"{prefix}_loc.{level}", f"{ours}.box.{level}")
                table.add(f"{prefix}_conf.{level}", f"{ours}.cls.{level}")
    sources = _caffe_maps(model.backbone)[: len(levels)]
    for level, source in enumerate(sources):
        _add_caffe_predictor(table, "arm", level, source)
        _add_caffe_predictor(table, "adm", level, f"P{level + 3}")
    return table.names


class _Table:
    def __init__(self, model: RefineDet) -> None:
        self.names = ForeignNames()
        self.tensors = list(model.state_dict())
        self.kinds: dict[str, list[str]] = {}
        for name in self.tensors:
            layer, _, kind = name.rpartition(".")
            self.kinds.setdefault(layer, []).append(kind)

    def add(self, theirs: str, ours: str, kinds: tuple[str, ...] = ()) -> None:
        """Add the tensors of a layer; a layer that the model lacks adds nothing.

        kinds  only these, such as weight; default: all
        """
        for kind in self.kinds.get(ours, ()):
            if not kinds or kind in kinds:
                self.names.places.setdefault(f"{theirs}.{kind}", f"{ours}.{kind}")

    def add_norm(self, statistics: str, affine: str, ours: str) -> None:
        """Add a norm that Caffe has as two layers."""
        self.add(statistics, ours, _STATISTICS)
        self.add(affine, ours, _AFFINE)

    def add_shift(self, bias: str, norm: str) -> None:
        if norm in self.kinds:
            self.names.shifts[bias] = f"{norm}.running_mean"


def _add_timm(table: _Table) -> None:
    """timm's and torchvision's classifiers; behind `backbone.` OpenMMLab's, behind `base.` refinedet.pytorch's."""
    own = "backbone.body."
    for name in table.tensors:
        if not name.startswith(own):
            continue
        inner = name.removeprefix(own)
        # timm flattens the first level of some networks: blocks.0 becomes blocks_0.
        first, dot, rest = inner.partition(".")
        stage, _, number = first.rpartition("_")
        whole = f"{stage}.{number}{dot}{rest}" if stage and number.isdigit() else inner
        for prefix in ("", "backbone.", "base."):
            table.names.places.setdefault(f"{prefix}{inner}", name)
            table.names.places.setdefault(f"{prefix}{whole}", name)
    for number in range(1, 4):
        table.add(f"extra.resbody.conv{number}", f"backbone.extra.0.conv{number}")
        table.add(f"extra.resbody.bn{number}", f"backbone.extra.0.bn{number}")
    for theirs, ours in _PROJECTION.items():
        table.add(f"extra.resbody.{theirs}", f"backbone.extra.0.{ours}")


def _add_efficientnet(table: _Table, backbone: TimmBackbone) -> None:
    """efficientnet_pytorch and its lite variants, which number blocks across stages."""
    body: Any = backbone.body
    if not hasattr(body, "blocks"):
        return
    table.add("_conv_stem", "backbone.body.conv_stem")
    table.add("_bn0", "backbone.body.bn1")
    places = [(stage, block) for stage, blocks in enumerate(body.blocks) for block in range(len(blocks))]
    for number, (stage, block) in enumerate(places):
        layers = EXPANDING_BLOCK if hasattr(body.blocks[stage][block], "conv_pwl") else SEPARABLE_BLOCK
        for theirs, ours in layers.items():
            table.add(f"_blocks.{number}.{theirs}", f"backbone.body.blocks.{stage}.{block}.{ours}")


def _add_vgg(table: _Table, backbone: ReducedVgg16) -> None:
    """torchvision's VGG-16, OpenMMLab's, the reduced one of the ports, and Caffe's."""
    modules = cast(Iterable[tuple[str, nn.Module]], backbone.stages.named_modules())
    convs = [f"backbone.stages.{name}" for name, part in modules if isinstance(part, nn.Conv2d)]
    in_classifier = ["classifier.0", "classifier.3"]
    blocks = [f"backbone.features.{number}.conv" for number in VGG_BLOCK_NUMBERS]
    blocks += [f"backbone.{layer}" for layer in in_classifier]
    caffe = [f"conv{stage}_{conv}" for stage, depth in enumerate(VGG_DEPTHS, 1) for conv in range(1, depth + 1)]
    conventions = [[f"features.{number}" for number in VGG_NUMBERS] + in_classifier, blocks]
    conventions.append([*caffe, "fc6", "fc7", "conv6_1", "conv6_2"])
    for prefix in ("", "vgg.", "base.", "backbone.features."):
        conventions.append([f"{prefix}{number}" for number in (*VGG_NUMBERS, 31, 33)])
    for layers in conventions:
        for theirs, ours in zip(layers, convs, strict=False):
            table.add(theirs, ours)
    for theirs, conv in (("extras.0", 15), ("extras.1", 16), ("extras.2", 16), ("extra.0", 15), ("extra.2", 16)):
        table.add(theirs, convs[conv])
    for number, level in enumerate(("conv4_3", "conv5_3")):
        for theirs in (f"{level}_L2Norm", f"L2Norm_{level}", f"{level}_norm"):
            table.add(theirs, f"backbone.norms.{number}")


def _add_tcb(table: _Table, level: int) -> None:
    """RefineDet.PyTorch's lists tcb0, tcb1, tcb2; refinedet.pytorch's pyramid layers; Caffe's TL and P."""
    block = f"tcb.blocks.{level}"
    table.add(f"tcb0.{3 * level}", f"{block}.conv1")
    table.add(f"tcb0.{3 * level + 2}", f"{block}.conv2")
    table.add(f"tcb2.{3 * level + 1}", f"{block}.conv3")
    table.add(f"tcb1.{level}", f"{block}.enlarge")
    for number in (1, 2, 3):
        ours, pyramid = f"{block}.conv{number}", f"pyramid_layer{level + 1}"
        place = 3 * (number - 1)  # in the coarsest, a list of convolutions, norms and activations
        for conv, norm in ((f"conv{number}", f"bn{number}"), (str(place), str(place + 1))):
            table.add(f"{pyramid}.{conv}", f"{ours}.0")
            table.add_shift(f"{pyramid}.{conv}.bias", f"{ours}.1")
            table.add(f"{pyramid}.{norm}", f"{ours}.1")
    caffe = {f"TL{level + 3}_{number}": f"conv{number}" for number in (1, 2)}
    caffe |= {f"P{level + 3}": "conv3", f"P{level + 4}-up": "enlarge"}
    for theirs, ours in caffe.items():
        table.add(theirs, f"{block}.{ours}")
        table.add(theirs, f"{block}.{ours}.0")
        table.add_norm(f"{theirs}_bn", f"{theirs}_scale", f"{block}.{ours}.1")


def _caffe_maps(backbone: TimmBackbone | ReducedVgg16) -> list[str]:
    """Caffe's names of the maps that the ARM reads, fine to coarse."""
    if isinstance(backbone, ReducedVgg16):
        return ["conv4_3_norm", "conv5_3_norm", "fc7", "conv6_2"]
    depths = _resnet_depths(backbone)
    return [f"res3b{depths[1] - 1}_relu", f"res4b{depths[2] - 1}_relu", "res5c_relu", "res6_relu"] if depths else []


def _resnet_depths(backbone: TimmBackbone) -> list[int]:
    """Blocks of each of a ResNet's four stages; none where the backbone is no ResNet."""
    stages = [getattr(backbone.body, f"layer{stage}", None) for stage in range(1, 5)]
    return [len(stage) for stage in stages if isinstance(stage, nn.Sequential)] if all(stages) else []


def _add_caffe_resnet(table: _Table, backbone: TimmBackbone) -> None:
    """ResNet's blocks: 3a 3b 3c in short stages, 3a 3b1 3b2 in long ones."""
    table.add_norm("bn_conv1", "scale_conv1", "backbone.body.bn1")
    for stage, depth in enumerate(_resnet_depths(backbone), start=1):
        for block in range(depth):
            for name in (f"{stage + 1}{chr(ord('a') + block)}", f"{stage + 1}b{block}"):
                _add_caffe_block(table, name, f"backbone.body.layer{stage}.{block}")
    if len(backbone.extra):
        _add_caffe_block(table, "6", "backbone.extra.0", own=True)


def _add_caffe_block(table: _Table, name: str, ours: str, own: bool = False) -> None:
    """One residual block.

    own  it is a `Bottleneck` of this project
    """
    for branch, (conv, norm) in _BRANCHES.items():
        place, norm_place = (_PROJECTION.get(part, part) for part in (conv, norm)) if own else (conv, norm)
        table.add(f"res{name}_{branch}", f"{ours}.{place}")
        table.add_norm(f"bn{name}_{branch}", f"scale{name}_{branch}", f"{ours}.{norm_place}")


def _add_caffe_predictor(table: _Table, head: str, level: int, source: str) -> None:
    """A predictor on a map, or on the bottleneck behind it."""
    for theirs in (source, f"res{source}_inter"):
        table.add(f"{theirs}_mbox_loc", f"{head}.box.{level}")
        table.add(f"{theirs}_mbox_conf", f"{head}.cls.{level}")
    _add_caffe_block(table, f"{source}_inter", f"{head}.blocks.{level}", own=True)
