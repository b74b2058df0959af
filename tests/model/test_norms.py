from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from refinedet.model.norms import BatchNorm, SyncBatchNorm, synchronize_norms
from timm.layers import BatchNormAct2d
from torch import nn


def test_one_value_a_channel_is_normalised_by_the_running_statistics():
    norm = BatchNorm(4)
    x = torch.randn(1, 4, 1, 1)
    assert torch.allclose(norm(x), x, atol=1e-4)
    assert norm.running_mean.abs().sum() == 0
    assert norm(torch.randn(2, 4, 1, 1)).shape == (2, 4, 1, 1)


def test_frozen_norms_keep_their_statistics(build):
    model = build(norm="frozen")
    norm = model.backbone.body.bn1
    before = norm.running_mean.clone()
    model.train()
    model(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), dense=True)
    assert torch.equal(norm.running_mean, before)
    assert not norm.weight.requires_grad
    assert model.tcb.blocks[0].conv1[1].training  # new blocks have no imported statistics to keep


@pytest.mark.parametrize("backbone", ["resnet18", "regnetx_002"])  # the second has norms with an activation
def test_every_norm_is_synchronised(build, backbone):
    model = build(norm="sync", backbone=backbone)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(m, SyncBatchNorm) for m in norms)
    model(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8), dense=True)  # alone: plain batch statistics
    assert build(norm="batch", backbone=backbone).state_dict().keys() == model.state_dict().keys()


def _network() -> nn.Module:
    torch.manual_seed(0)
    with_activation = BatchNormAct2d(4, act_layer=nn.SiLU)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 1), with_activation, nn.Conv2d(4, 2, 1)
    )


def _run_rank(rank: int, folder: str, images: torch.Tensor, ranks: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    network = _network()
    synchronize_norms(network)
    part = images if ranks == 1 else images[:1] if rank == 0 else images[1:]  # unequal shares
    network(part).square().sum().backward()
    for parameter in network.parameters():
        dist.all_reduce(parameter.grad)
    if rank == 0:
        statistics = _statistics(network)
        torch.save([parameter.grad for parameter in network.parameters()] + statistics, f"{folder}/result.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads now and then abort a process that ends by itself


def _statistics(network: nn.Module) -> list[torch.Tensor]:
    return [statistic for place in (1, 4) for statistic in (network[place].running_mean, network[place].running_var)]


@pytest.mark.dist
@pytest.mark.timeout(900)  # fresh processes that import torch, on a machine that may be busy
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_normalise_as_one_batch(tmp_path: Path, ranks: int):
    images = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    mp.spawn(_run_rank, args=(str(tmp_path), images, ranks), nprocs=ranks)
    network = _network()
    network(images).square().sum().backward()
    expected = [parameter.grad for parameter in network.parameters()]
    expected += _statistics(network)
    for ours, theirs in zip(torch.load(tmp_path / "result.pt", weights_only=True), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)
