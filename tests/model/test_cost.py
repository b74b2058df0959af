from __future__ import annotations

import pytest
import torch
from refinedet.model import RefineDet, RefineDetConfig
from refinedet.model.cost import count_cost


def test_cost_of_the_paper_s_smallest_model():
    config = RefineDetConfig(num_classes=20, backbone="vgg16_reduced", input_size=320)
    cost = count_cost(config)
    assert cost.num_anchors == 6375
    assert cost.anchors == (4800, 1200, 300, 75)
    with torch.device("meta"):
        assert cost.total_parameters == sum(parameter.numel() for parameter in RefineDet(config).parameters())
    # By hand: the ARM's four 3x3 convolutions to 18 channels.
    cells = (1600, 400, 100, 25)
    arm = sum(2 * n * 9 * width * 18 for n, width in zip(cells, (512, 512, 1024, 512), strict=True))
    assert abs(cost.gflops["arm"] - arm / 1e9) < 1e-6
    # AlignConv is a product of K * K * 256 inputs and 25 outputs for each anchor.
    assert abs(cost.gflops["adm"] - 2 * 6375 * 9 * 256 * 25 / 1e9) < 1e-6


def test_align_conv_is_counted_as_it_runs_not_as_it_is_exported():
    """AlignConv keeps its features, as a plain convolution does; sampled columns would be nine times those."""
    small = {"num_classes": 3, "input_size": 128, "backbone": "resnet18"}
    align, vanilla = (count_cost(RefineDetConfig(**small, head=head)) for head in ("align", "vanilla"))
    assert align.activation_bytes == vanilla.activation_bytes
    assert align.gflops == pytest.approx(vanilla.gflops)


def test_checkpointing_keeps_less_and_a_detector_without_tcb_has_no_arm():
    small = {"num_classes": 3, "input_size": 64, "backbone": "resnet18", "prediction_block": False}
    plain = count_cost(RefineDetConfig(**small))
    recomputed = count_cost(RefineDetConfig(**small, activation_checkpointing=True))
    assert 0 < recomputed.activation_bytes < plain.activation_bytes
    cost = count_cost(RefineDetConfig(**small, head="vanilla", theta=1.0, cascade=False, tcb=False))
    assert set(cost.parameters) == {"backbone", "adm"}


def test_an_image_of_training_costs_three_times_what_torch_counts_forward():
    from torch.utils.flop_counter import FlopCounterMode

    config = RefineDetConfig(num_classes=3, input_size=128, backbone="resnet18", head="vanilla")
    with torch.device("meta"):
        model = RefineDet(config).train()
    counter = FlopCounterMode(display=False)
    with counter:
        model(torch.empty(2, 3, 128, 128, dtype=torch.uint8, device="meta"), dense=True)
    forward = counter.get_total_flops() / 2e9
    cost = count_cost(config)
    assert cost.total_gflops == pytest.approx(forward, rel=1e-3)
    assert cost.training_gflops() == pytest.approx(3 * forward, rel=1e-3)
    frozen = cost.training_gflops(backbone_trained=False)
    assert frozen == pytest.approx(3 * forward - 2 * cost.gflops["backbone"], rel=1e-3)
    assert cost.training_gflops(recomputed=True) == pytest.approx(3 * forward + cost.gflops["backbone"], rel=1e-3)


def test_a_worker_among_others_counts_what_one_alone_does(monkeypatch: pytest.MonkeyPatch):
    """Counting must not wait for the others: rank 0 counts, while they do something else."""
    config = RefineDetConfig(num_classes=3, input_size=64, backbone="resnet18", norm="frozen")
    alone = count_cost(config)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    assert count_cost(config) == alone
