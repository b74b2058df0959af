"""Names of other projects reach every tensor that they have, each one once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from refinedet.model import RefineDet, RefineDetConfig, load_weights
from torch import Tensor, nn

CLASSES = 3


@pytest.fixture(scope="module")
def small_vgg() -> RefineDet:
    return RefineDet(RefineDetConfig(num_classes=CLASSES, backbone="vgg16_reduced", input_size=64))


@pytest.mark.parametrize("prefix", ["backbone.", "base."])
def test_openmmlab_and_refinedet_pytorch_name_a_resnet_as_torchvision_does(build, prefix: str) -> None:
    state = torchvision.models.resnet18(weights=None).state_dict()
    theirs = {f"{prefix}{name}": value for name, value in state.items() if not name.startswith("fc.")}
    theirs |= {"neck.fpn_convs.0.conv.weight": torch.zeros(4), "bbox_head.fc_cls.weight": torch.zeros(4)}
    model = build(backbone="resnet18")
    report = load_weights(model, theirs)
    assert set(report.left) == {"neck.fpn_convs.0.conv.weight", "bbox_head.fc_cls.weight"}
    assert not [name for name in report.missing if name.startswith("backbone.body")]
    assert torch.equal(model.backbone.body.layer3[1].bn2.running_var, state["layer3.1.bn2.running_var"])
    assert torch.equal(model.backbone.body.layer2[0].downsample[0].weight, state["layer2.0.downsample.0.weight"])


def test_openmmlabs_vgg_counts_an_activation_with_its_convolution(small_vgg: RefineDet) -> None:
    layers, number = {}, 0
    for channels, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers[f"backbone.features.{number}.conv"] = channels
            number += 1
        number += 1  # the pooling
    state = {f"{name}.bias": torch.randn(channels) for name, channels in layers.items()}
    report = load_weights(small_vgg, state)
    assert (len(report.matched), report.left) == (13, ())
    convs = [part for part in small_vgg.backbone.stages.modules() if isinstance(part, nn.Conv2d)]
    for conv, bias in zip(convs, state.values(), strict=False):
        assert torch.equal(conv.bias, bias)


class PortTcb(nn.Module):
    """A TCB as refinedet.pytorch builds it: each convolution keeps its bias before a norm."""

    def __init__(self, lateral: int, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(lateral, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.deconv, self.deconv_bn = nn.ConvTranspose2d(channels, channels, 3, 2, 1, 1), nn.BatchNorm2d(channels)
        self.conv3, self.bn3 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def first(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))


def port_detector(channels: list[int], width: int) -> nn.ModuleDict:
    """The parts of a refinedet.pytorch detector beside its backbone."""

    def heads(widths: list[int], outputs: int) -> nn.ModuleList:
        return nn.ModuleList(nn.Conv2d(size, 3 * outputs, 3, padding=1) for size in widths)

    def norm_conv(size: int) -> list[nn.Module]:
        return [nn.Conv2d(size, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]

    parts: dict[str, nn.Module] = {
        f"pyramid_layer{level + 1}": PortTcb(size, width) for level, size in enumerate(channels[:3])
    }
    again = norm_conv(width)
    parts["pyramid_layer4"] = nn.Sequential(*norm_conv(channels[3]), *again, *again)  # one object, twice
    parts |= {"bi_loc": heads(channels, 4), "bi_conf": heads(channels, 2)}
    parts |= {"multi_loc": heads([width] * 4, 4), "multi_conf": heads([width] * 4, CLASSES + 1)}
    return nn.ModuleDict(parts)


def test_the_parts_of_refinedet_pytorch_compute_the_same_here(build) -> None:
    torch.manual_seed(3)
    model = build(backbone="resnet18", tcb_norm=True)
    port = port_detector(model.backbone.channels, 16)
    block = torchvision.models.resnet.Bottleneck(
        512, 128, 2, nn.Sequential(nn.Conv2d(512, 512, 1, 2, bias=False), nn.BatchNorm2d(512))
    )
    port["extra"] = nn.ModuleDict({"resbody": block})
    for norm in (part for part in port.modules() if isinstance(part, nn.BatchNorm2d)):
        norm.running_mean.normal_()  # pyright: ignore[reportOptionalMemberAccess]
        norm.running_var.uniform_(0.5, 2.0)  # pyright: ignore[reportOptionalMemberAccess]
    report = load_weights(model, port.state_dict())
    assert report.left
    assert all("deconv" in name for name in report.left)
    own = [name for name in report.missing if not name.startswith(("backbone.body.", "backbone.norms."))]
    assert own
    assert all(".enlarge." in name for name in own)
    model.eval()
    port.eval()
    maps = [torch.randn(1, size, 4, 4) for size in model.backbone.channels]
    with torch.no_grad():
        tcb: Any = model.tcb
        torch.testing.assert_close(F.relu(tcb.blocks[1].conv1(maps[1])), port["pyramid_layer2"].first(maps[1]))
        torch.testing.assert_close(tcb.blocks[3](maps[3], None), port["pyramid_layer4"](maps[3]))
        torch.testing.assert_close(model.backbone.extra[0](maps[2]), block(maps[2]))
    assert torch.equal(model.arm.box[2].weight, port["bi_loc"][2].weight)
    assert torch.equal(model.arm.cls[0].weight, port["bi_conf"][0].weight)
    assert torch.equal(model.adm.cls[3].bias, port["multi_conf"][3].bias)


def test_the_vgg_of_refinedet_pytorch(small_vgg: RefineDet) -> None:
    """Its layers come a second time below layer1 to layer4; its TCBs have norms, which this detector has not."""
    state = {}
    for prefix, numbers in (("base", (0, 2, 28, 31, 33)), ("extra", (0, 2))):
        convs = [part for part in small_vgg.backbone.stages.modules() if isinstance(part, nn.Conv2d)]
        order = {0: 0, 2: 1, 28: 12, 31: 13, 33: 14} if prefix == "base" else {0: 15, 2: 16}
        state |= {f"{prefix}.{number}.bias": torch.randn_like(convs[order[number]].bias) for number in numbers}
    state |= {"L2Norm_conv4_3.weight": torch.randn(512), "L2Norm_conv5_3.weight": torch.randn(512)}
    again = {"layer1.0.bias": state["base.0.bias"], "pyramid_layer1.conv1.weight": torch.zeros(256, 512, 3, 3)}
    report = load_weights(small_vgg, state | again)
    assert set(report.left) == set(again)
    assert len(report.matched) == len(state)
    assert torch.equal(small_vgg.backbone.norms[1].weight, state["L2Norm_conv5_3.weight"])
    assert torch.equal(small_vgg.backbone.stages[6][2].bias, state["extra.2.bias"])


def caffe_convs(names: dict[str, tuple[int, int, int]], bias: bool = True) -> dict[str, Tensor]:
    """name -> (inputs, outputs, kernel)."""
    state = {}
    for name, (inputs, outputs, kernel) in names.items():
        state[f"{name}.weight"] = torch.randn(outputs, inputs, kernel, kernel)
        if bias:
            state[f"{name}.bias"] = torch.randn(outputs)
    return state


def caffe_tcbs(channels: list[int], norm: bool) -> dict[str, Tensor]:
    convs = {}
    for level, size in zip((6, 5, 4, 3), reversed(channels), strict=True):
        convs |= {f"TL{level}_1": (size, 256, 3), f"TL{level}_2": (256, 256, 3), f"P{level}": (256, 256, 3)}
        if level < 6:
            convs[f"P{level + 1}-up"] = (256, 256, 2)
    state = caffe_convs(convs, bias=not norm)
    return state | (dict(caffe_norms({f"{name}": 256 for name in convs}, "{}_bn", "{}_scale")) if norm else {})


def caffe_norms(sizes: dict[str, int], norm: str, scale: str) -> Iterator[tuple[str, Tensor]]:
    for name, size in sizes.items():
        yield f"{norm.format(name)}.running_mean", torch.randn(size)
        yield f"{norm.format(name)}.running_var", torch.rand(size)
        yield f"{scale.format(name)}.weight", torch.randn(size)
        yield f"{scale.format(name)}.bias", torch.randn(size)


def caffe_heads(arm: list[str], arm_widths: list[int], adm: list[str], adm_width: int) -> dict[str, Tensor]:
    convs = {}
    for name, width in zip(arm, arm_widths, strict=True):
        convs |= {f"{name}_mbox_loc": (width, 12, 3), f"{name}_mbox_conf": (width, 6, 3)}
    for name in adm:
        convs |= {f"{name}_mbox_loc": (adm_width, 12, 3), f"{name}_mbox_conf": (adm_width, 3 * (CLASSES + 1), 3)}
    return caffe_convs(convs)


def test_the_authors_vgg() -> None:
    model = RefineDet(RefineDetConfig(num_classes=CLASSES, backbone="vgg16_reduced", input_size=64))
    convs, inputs = {}, 3
    for stage, (channels, depth) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), start=1):
        for number in range(1, depth + 1):
            convs[f"conv{stage}_{number}"] = (inputs, channels, 3)
            inputs = channels
    convs |= {"fc6": (512, 1024, 3), "fc7": (1024, 1024, 1), "conv6_1": (1024, 256, 1), "conv6_2": (256, 512, 3)}
    channels = [512, 512, 1024, 512]
    state = caffe_convs(convs) | caffe_tcbs(channels, norm=False)
    state |= {f"conv{level}_3_norm.weight": torch.randn(512) for level in (4, 5)}
    maps = ["conv4_3_norm", "conv5_3_norm", "fc7", "conv6_2"]
    state |= caffe_heads(maps, channels, ["P3", "P4", "P5", "P6"], 256)
    report = load_weights(model, state)
    assert (report.left, report.missing, report.reshaped) == ((), (), ())
    tcb: Any = model.tcb
    assert torch.equal(tcb.blocks[0].enlarge.weight, state["P4-up.weight"])
    assert torch.equal(tcb.blocks[3].conv3.weight, state["P6.weight"])
    assert torch.equal(model.adm.cls[1].weight, state["P4_mbox_conf.weight"])


def caffe_resnet_blocks(depths: tuple[int, ...], long: tuple[int, ...]) -> Iterator[tuple[str, int, int, int]]:
    """name, inputs, width, outputs of each residual block; stages in `long` number their blocks 3a 3b1 3b2."""
    inputs = 64
    for stage, depth in enumerate(depths, start=2):
        width = 64 * 2 ** (stage - 2)
        for block in range(depth):
            name = f"b{block}" if stage in long and block else "abcdef"[block]
            yield f"{stage}{name}", inputs, width, 4 * width
            inputs = 4 * width


def caffe_block(name: str, inputs: int, width: int, outputs: int, projected: bool) -> dict[str, Tensor]:
    branches = {"branch2a": (inputs, width, 1), "branch2b": (width, width, 3), "branch2c": (width, outputs, 1)}
    if projected:
        branches["branch1"] = (inputs, outputs, 1)
    state = caffe_convs({f"res{name}_{branch}": shape for branch, shape in branches.items()}, bias=False)
    sizes = {f"{name}_{branch}": shape[1] for branch, shape in branches.items()}
    return state | dict(caffe_norms(sizes, "bn{}", "scale{}"))


@pytest.mark.parametrize(
    ("backbone", "depths", "long"), [("resnet50", (3, 4, 6, 3), ()), ("resnet101", (3, 4, 23, 3), (3, 4))]
)
def test_the_authors_resnet(
    build: Callable[..., RefineDet], backbone: str, depths: tuple[int, ...], long: tuple[int, ...]
) -> None:
    """Every tensor of the authors' release has a place here; only the norms of this project's maps are new."""
    model = build(backbone=backbone, prediction_block=True, tcb_norm=True, tcb_channels=256, map_norm="none")
    state = caffe_convs({"conv1": (3, 64, 7)}, bias=False) | dict(caffe_norms({"conv1": 64}, "bn_{}", "scale_{}"))
    for name, inputs, width, outputs in caffe_resnet_blocks(depths, long):
        state |= caffe_block(name, inputs, width, outputs, projected=name.endswith("a"))
    state |= caffe_block("6", 2048, 128, 512, projected=True)
    channels = [512, 1024, 2048, 512]
    state |= caffe_tcbs(channels, norm=True)
    maps = [f"res3b{depths[1] - 1}_relu", f"res4b{depths[2] - 1}_relu", "res5c_relu", "res6_relu"]
    for name, width in zip([*maps, "P3", "P4", "P5", "P6"], [*channels, 256, 256, 256, 256], strict=True):
        state |= caffe_block(f"{name}_inter", width, 256, 1024, projected=True)
    behind = [f"res{name}_inter" for name in maps]
    state |= caffe_heads(behind, [1024] * 4, [f"resP{level}_inter" for level in range(3, 7)], 1024)
    report = load_weights(model, state)
    assert (report.left, report.missing, report.reshaped) == ((), (), ())
    body: Any = model.backbone.body
    last = f"4b{depths[2] - 1}" if long else "4f"
    assert torch.equal(body.layer3[-1].conv2.weight, state[f"res{last}_branch2b.weight"])
    assert torch.equal(body.layer1[0].downsample[1].bias, state["scale2a_branch1.bias"])
    assert torch.equal(model.backbone.extra[0].bn3.running_var, state["bn6_branch2c.running_var"])
    arm: Any = model.arm
    assert torch.equal(arm.blocks[2].project_bn.running_mean, state["bnres5c_relu_inter_branch1.running_mean"])
    tcb: Any = model.tcb
    assert torch.equal(tcb.blocks[1].enlarge[1].weight, state["P5-up_scale.weight"])
