"""Start from trained weights: a backbone's (torchvision, timm) or an earlier run's.

State dicts in, tensors copied; reading files is left to the caller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .backbones import ReducedVgg16, TimmBackbone
from .detector import RefineDet
from .heads import NUM_ASPECTS

# Layers of a block: efficientnet_pytorch's name -> timm's.
_SQUEEZE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
SEPARABLE_BLOCK = {
    "_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2", **_SQUEEZE
}  # fmt: skip
EXPANDING_BLOCK = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
    "_project_conv": "conv_pwl", "_bn2": "bn3", **_SQUEEZE,
}  # fmt: skip


@dataclass(frozen=True)
class LoadReport:
    """Outcome of a load, tensor by tensor.

    matched   names in the model that were copied as they are
    reshaped  names in the model that were copied in part (another number of classes, fc6 and fc7 of VGG)
    left      names in the file that found no place
    missing   names in the model that keep their initial values
    """

    matched: tuple[str, ...]
    reshaped: tuple[str, ...]
    left: tuple[str, ...]
    missing: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{len(self.matched)} tensors matched, {len(self.reshaped)} reshaped, {len(self.left)} of the file left, "
            f"{len(self.missing)} of the model missing"
        )


@torch.no_grad()
def load_weights(model: RefineDet, state: Mapping[str, Tensor]) -> LoadReport:
    """Copy what fits from `state` into `model`, and say what did and what did not.

    state  of a RefineDet (any number of classes), of a torchvision, timm or efficientnet_pytorch classifier, of the
           reduced VGG-16 or a VGG-16 RefineDet of the PyTorch ports (`vgg16_reducedfc.pth`), or of any part of one
    Raises ValueError for a tensor that holds NaN or infinity.
    """
    for source, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"weights must be finite, received NaN or infinity in {source!r}.")
    own = model.state_dict()
    matched, reshaped, left = set(), set(), []
    for source, value in state.items():
        name = next((name for name in _possible_names(model, source) if name in own), None)
        if name is None or name in matched | reshaped:
            left.append(source)
        elif value.shape == own[name].shape:
            own[name].copy_(value)
            matched.add(name)
        elif _copy_partly_(own[name], value, name):
            reshaped.add(name)
        else:
            left.append(source)
    missing = [name for name in own if name not in matched | reshaped and not name.endswith("num_batches_tracked")]
    return LoadReport(tuple(sorted(matched)), tuple(sorted(reshaped)), tuple(left), tuple(missing))


def _possible_names(model: RefineDet, source: str) -> list[str]:
    """Names that a source's tensor may have here, most likely first."""
    source = source.removeprefix("module.")
    if isinstance(model.backbone, ReducedVgg16):
        return [source, *_vgg_names(model.backbone, source)]
    if source.startswith("_") and hasattr(model.backbone.body, "blocks"):
        return _efficientnet_names(model.backbone, source)
    # timm flattens the first level of some networks: blocks.0 becomes blocks_0.
    return [source, f"backbone.body.{source}", f"backbone.body.{source.replace('.', '_', 1)}"]


def _efficientnet_names(backbone: TimmBackbone, source: str) -> list[str]:
    """Place of the tensors of efficientnet_pytorch and its lite variants, which number blocks across stages."""
    layer, _, kind = source.rpartition(".")
    if layer in ("_conv_stem", "_bn0"):
        return [f"backbone.body.{'conv_stem' if layer == '_conv_stem' else 'bn1'}.{kind}"]
    if not layer.startswith("_blocks."):
        return []  # of the classifier
    blocks = [(stage, block) for stage, blocks in enumerate(backbone.body.blocks) for block in range(len(blocks))]
    number, _, name = layer.removeprefix("_blocks.").partition(".")
    stage, block = blocks[int(number)]
    expands = hasattr(backbone.body.blocks[stage][block], "conv_pwl")
    place = EXPANDING_BLOCK if expands else SEPARABLE_BLOCK
    return [f"backbone.body.blocks.{stage}.{block}.{place[name]}.{kind}"] if name in place else []


def _vgg_names(backbone: ReducedVgg16, source: str) -> list[str]:
    """Place of a VGG-16's tensors, by the names of torchvision or of the PyTorch ports of SSD and RefineDet."""
    layer, _, kind = source.rpartition(".")
    convs = [f"backbone.stages.{name}" for name, part in backbone.stages.named_modules() if isinstance(part, nn.Conv2d)]
    numbers = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    place = dict(zip([f"features.{number}" for number in numbers] + ["classifier.0", "classifier.3"], convs))  # noqa: B905
    for prefix in ("", "vgg."):
        place |= dict(zip([f"{prefix}{number}" for number in [*numbers, 31, 33]], convs))  # noqa: B905
    place |= {"extras.0": convs[15], "extras.1": convs[16]} if len(convs) > 16 else {}
    place |= {"conv4_3_L2Norm": "backbone.norms.0", "conv5_3_L2Norm": "backbone.norms.1"}
    for level in range(4):
        place |= {f"{part}_loc.{level}": f"{name}.box.{level}" for part, name in (("arm", "arm"), ("odm", "adm"))}
        place |= {f"{part}_conf.{level}": f"{name}.cls.{level}" for part, name in (("arm", "arm"), ("odm", "adm"))}
        block = f"tcb.blocks.{level}"
        place |= {f"tcb0.{3 * level}": f"{block}.conv1", f"tcb0.{3 * level + 2}": f"{block}.conv2"}
        place |= {f"tcb2.{3 * level + 1}": f"{block}.conv3", f"tcb1.{level}": f"{block}.enlarge"}
    return [f"{place[layer]}.{kind}"] if layer in place else []


def _copy_partly_(own: Tensor, value: Tensor, name: str) -> bool:
    """Copy into `own` what a tensor of another shape has for it; whether there was anything."""
    if name.startswith("adm.cls"):
        if value.shape[0] % NUM_ASPECTS or value.shape[1:] != own.shape[1:]:
            return False
        mine, theirs = (tensor.unflatten(0, (NUM_ASPECTS, -1)) for tensor in (own, value))
        mine[:, :1].copy_(theirs[:, :1])  # background; the other classes mean something else
        return True
    if name.startswith("backbone.stages.5"):  # fc6, fc7: every 4th row, and for fc6 every 3rd of 7x7 positions
        side = {25088: 7, 4096: 1}.get(value.shape[-1] if value.dim() == 2 else 0)
        if value.dim() == 1 and len(value) == 4 * len(own):
            own.copy_(value[::4])
            return True
        if side:
            kernel = value.view(4096, -1, side, side)[::4, :: 1 if side == 7 else 4, ::3, ::3]
            own.copy_(kernel)
            return True
    return False
